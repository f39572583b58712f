"""Direct preference optimization: a policy fitted to comparisons, without a reward model.

Reference: Rafailov et al. 2023 (arXiv:2305.18290).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from agents.rlhf.stage import Stage, TuningConfig, descend, tuning
from mbrl.losses.direct_preference import DirectKind, direct_preference_loss, sequence_log_prob
from mbrl.models.token import token_log_probs
from mbrl.networks.transformer import Transformer
from mbrl.settings import check_within
from mbrl.text_batches import TextBatch
from mbrl.types import Array, Key, Metrics, Params


@dataclasses.dataclass(frozen=True)
class DirectConfig:
    """Settings of direct preference optimization."""

    kind: DirectKind = "sigmoid"
    """Loss of a pair, see `mbrl.losses.direct_preference`."""
    beta: float = 0.1
    """Weight of the divergence from the reference, per nat."""
    smoothing: float = 0.0
    """Probability that a label is reversed."""
    tuning: TuningConfig = TuningConfig()
    """What is trained, and how fast."""

    def __post_init__(self) -> None:
        check_within(self, "beta", 0, ends="(]")


class DirectState(NamedTuple):
    """Everything that is learned."""

    weights: Params
    opt_state: Any


class DirectGiven(NamedTuple):
    """What the stage starts from, which is its reference too."""

    base: Params


class DirectBatch(NamedTuple):
    """Pairs, and how likely the reference finds them [B, 2]: it never changes, so that it is
    evaluated once.
    """

    text: TextBatch
    reference: Array


def make_direct(model: Transformer, config: DirectConfig = DirectConfig()) -> Stage:
    """Build the stage; its batches are `DirectBatch`, its result the policy's parameters."""
    tuned = tuning(config.tuning)

    def init(key: Key, given: DirectGiven) -> DirectState:
        weights = tuned.init(key, given.base)
        return DirectState(weights, tuned.optimizer.init(weights))

    def loss(weights: Params, base: Params, batch: DirectBatch) -> tuple[Array, Metrics]:
        text = chosen_first(batch.text)
        log_prob = answer_log_probs(model, tuned.merge(base, weights), text)
        weight = pair_weight(text)
        return direct_preference_loss(
            log_prob, batch.reference, config.kind, config.beta, config.smoothing,
            text.response.sum(-1), weight=weight,
        )  # fmt: skip

    def step(
        state: DirectState, given: DirectGiven, batch: DirectBatch, key: Key
    ) -> tuple[DirectState, Metrics]:
        del key
        (value, found), grads = jax.value_and_grad(loss, has_aux=True)(
            state.weights, given.base, batch
        )
        weights, opt_state, metrics = descend(
            tuned.optimizer, grads, state.opt_state, state.weights
        )
        return DirectState(weights, opt_state), metrics | found | {"loss": value}

    def result(state: DirectState, given: DirectGiven) -> Params:
        return tuned.merge(given.base, state.weights)

    return Stage(init, step, result)
