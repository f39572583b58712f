"""Supervised fine-tuning: the model of answers that people, or a program, have written."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from agents.rlhf.stage import Stage, TuningConfig, descend, tuning
from mbrl.losses.policy_gradient import average
from mbrl.models.token import token_log_probs
from mbrl.networks.transformer import Transformer
from mbrl.text_batches import SupervisedBatch
from mbrl.types import Array, Key, Metrics, Params


@dataclasses.dataclass(frozen=True)
class SupervisedConfig:
    """Settings of supervised fine-tuning."""

    tuning: TuningConfig = TuningConfig()
    """What is trained, and how fast."""


class SupervisedState(NamedTuple):
    """Everything that is learned."""

    weights: Params
    opt_state: Any


class SupervisedGiven(NamedTuple):
    """What a stage starts from: parameters of the model."""

    base: Params


def make_supervised(model: Transformer, config: SupervisedConfig = SupervisedConfig()) -> Stage:
    """Build the stage; its batches are `SupervisedBatch`, its result the model's parameters."""
    tuned = tuning(config.tuning)

    def init(key: Key, given: SupervisedGiven) -> SupervisedState:
        weights = tuned.init(key, given.base)
        return SupervisedState(weights, tuned.optimizer.init(weights))

    def loss(weights: Params, base: Params, batch: SupervisedBatch) -> Array:
        return supervised_loss(model, tuned.merge(base, weights), batch)

    def step(
        state: SupervisedState, given: SupervisedGiven, batch: SupervisedBatch, key: Key
    ) -> tuple[SupervisedState, Metrics]:
        del key
        value, grads = jax.value_and_grad(loss)(state.weights, given.base, batch)
        weights, opt_state, metrics = descend(
            tuned.optimizer, grads, state.opt_state, state.weights
        )
        return SupervisedState(weights, opt_state), metrics | {"loss": value}

    def result(state: SupervisedState, given: SupervisedGiven) -> Params:
        return tuned.merge(given.base, state.weights)

    return Stage(init, step, result)


def supervised_loss(model: Transformer, params: Params, batch: SupervisedBatch) -> Array:
    """Compute the mean negative log-probability, in nats, of the tokens to be predicted.

    A mean over the tokens of the batch: long answers weigh as much as their tokens do.
    """
    tokens, mask, target = (jnp.asarray(x) for x in batch)
    log_prob = token_log_probs(model, params, tokens, mask, tokens.shape[1] - 1)
    return -average(log_prob, target[:, 1:].astype(jnp.float32))
