"""Direct preference optimization: a policy fitted to comparisons, without a reward model.

Reference: Rafailov et al. 2023 (arXiv:2305.18290).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from agents.rlhf.stage import Stage, TuningConfig, descend, tuning
from mbrl.losses.direct_preference import (
    DirectKind,
    direct_preference_loss,
    kto_baseline,
    kto_error,
    sequence_log_prob,
)
from mbrl.losses.policy_gradient import average
from mbrl.models.token import token_log_probs
from mbrl.networks.transformer import Transformer
from mbrl.settings import check_within
from mbrl.text_batches import TextBatch
from mbrl.text_rows import TokenRow
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
    """Pairs, the chosen answer first, or single answers; and their log-probabilities [B, K] under
    the reference, which never changes, so that it is evaluated once.
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
        log_prob = answer_log_probs(model, tuned.merge(base, weights), batch.text)
        return direct_loss(config, log_prob, batch)

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


def answer_log_probs(model: Transformer, params: Params, text: TextBatch) -> Array:
    """Compute the log-probability of every answer, [B, K]: a sum over its tokens, with its end."""
    rows = (
        text.tokens.reshape(-1, text.tokens.shape[-1]),
        text.mask.reshape(-1, text.mask.shape[-1]),
    )
    length = text.response.shape[-1]
    log_prob = token_log_probs(model, params, *rows, length).reshape(text.response.shape)
    return sequence_log_prob(log_prob, jnp.asarray(text.response))


def direct_loss(config: DirectConfig, log_prob: Array, batch: DirectBatch) -> tuple[Array, Metrics]:
    """Compute the loss of pairs [B, 2], or of single answers [B, 1] that were judged ('kto')."""
    text = batch.text
    weight = jnp.asarray(text.row >= 0, jnp.float32)
    if log_prob.shape[1] == 2:
        return direct_preference_loss(
            log_prob, batch.reference, config.kind, config.beta, config.smoothing,
            text.response.sum(-1), weight=weight,
        )  # fmt: skip
    log_ratio, good = (log_prob - batch.reference)[:, 0], text.rank[:, 0] == 0
    baseline = kto_baseline(log_ratio, weight)
    loss = average(kto_error(log_ratio, good, baseline, config.beta), weight)
    metrics = {
        "reward/good": config.beta * average(log_ratio, weight * good),
        "reward/bad": config.beta * average(log_ratio, weight * ~good),
        "kl": baseline,
    }
    return loss, metrics


def pairs_of(rows: Sequence[TokenRow]) -> list[TokenRow]:
    """List all pairs of answers that are not tied, the better one first."""
    return [
        TokenRow(row.prompt, (row.answers[i], row.answers[j]), (0, 1), row.margin)
        for row in rows
        for i, j in itertools.permutations(range(len(row.answers)), 2)
        if row.rank[i] < row.rank[j]
    ]
