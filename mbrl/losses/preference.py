"""Losses of rewards that are learned from comparisons: pairs, rankings with ties, segments.

A ranking of K answers is `scores` [K] and `rank` int [K]: 0 is the best, equal ranks are a
tie, -1 marks an answer that is absent (padding). What an absent answer scores never matters,
not even where it is NaN. Only differences of scores matter, except to `centering_loss`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mbrl.types import Array


def bradley_terry_nll(
    better: Array,
    worse: Array,
    margin: Array | float = 0.0,
    smoothing: Array | float = 0.0,
    uniform: Array | float = 0.0,
) -> Array:
    """Compute `-log P(better > worse)`, elementwise.

    With `d = better - worse - margin`, an annotator prefers the better one with probability
    `(1 - uniform) sigmoid(d) + uniform / 2`.

    Args:
      better: [...] score of the preferred one.
      worse: [...] score of the other one.
      margin: [...] by how much the better one must lead.
      smoothing: [...] probability that the label is reversed, in [0, 1/2]: the loss is
        the mean over both labels. 1/2 is a tie.
      uniform: [...] probability that the annotator answers at random, in [0, 1). It bounds
        the loss of a single answer by `-log(uniform / 2)`.

    Returns:
      [...] nats; value and gradient are finite for every finite score.

    Raises:
      ValueError: for a `smoothing` or `uniform` out of range, where they are not traced.

    Reference: Bradley and Terry 1952; Christiano et al. 2017 (arXiv:1706.03741) for
    `uniform`, 0.1 there; Touvron et al. 2023 (arXiv:2307.09288) for `margin`.
    """
    if isinstance(smoothing, int | float) and not 0.0 <= smoothing <= 0.5:
        raise ValueError(
            f"smoothing: got {smoothing}, expected a probability in [0, 1/2]; beyond 1/2 the "
            "labels say the opposite: swap better and worse"
        )
    if isinstance(uniform, int | float) and not 0.0 <= uniform < 1.0:
        raise ValueError(
            f"uniform: got {uniform}, expected a probability in [0, 1); use for example 0.1"
        )
    difference = better - worse - margin
    kept, random = jnp.log1p(-jnp.asarray(uniform)), jnp.log(0.5 * jnp.asarray(uniform))

    def nll(x: Array) -> Array:
        return -jnp.logaddexp(kept + jax.nn.log_sigmoid(x), random)

    if isinstance(smoothing, int | float) and smoothing == 0:
        return nll(difference)
    return (1.0 - smoothing) * nll(difference) + smoothing * nll(-difference)


class Pairs(NamedTuple):
    """The C = K (K - 1) / 2 pairs of a ranking.

    Attributes:
      better: [..., C] score of the one that is ranked before the other.
      worse: [..., C] score of the other one.
      tied: bool [..., C], both have the same rank; they are in the order of the answers.
      present: bool [..., C], both were ranked; elsewhere the scores read 0.
    """

    better: Array
    worse: Array
    tied: Array
    present: Array


def ranked_pairs(scores: Array, rank: Array) -> Pairs:
    """List all pairs of answers, the one that is ranked better first.

    Args:
      scores: [..., K].
      rank: int [..., K], see the module.

    Returns:
      `Pairs` of [..., C].

    Raises:
      ValueError: when the shapes differ.
    """
    if scores.shape != rank.shape:
        raise ValueError(
            f"rank: got shape {rank.shape}, expected that of scores, {scores.shape}; pad "
            "shorter rankings with rank -1"
        )
    # Not multiplied by 0: a NaN would survive, in the value or in the gradient.
    scores = jnp.where(rank >= 0, scores, 0.0)
    i, j = np.triu_indices(scores.shape[-1], 1)
    in_order = rank[..., i] <= rank[..., j]
    better = jnp.where(in_order, scores[..., i], scores[..., j])
    worse = jnp.where(in_order, scores[..., j], scores[..., i])
    present = (rank[..., i] >= 0) & (rank[..., j] >= 0)
    return Pairs(better, worse, rank[..., i] == rank[..., j], present)


def pair_nll(
    scores: Array,
    rank: Array,
    margin: Array | float = 0.0,
    smoothing: Array | float = 0.0,
    uniform: Array | float = 0.0,
) -> Array:
    """Compute the mean of `bradley_terry_nll` over all pairs of one ranking.

    A mean: with the mean over rankings, each of them weighs the same whatever its K.

    Args:
      scores: [K].
      rank: int [K], see the module. A tie is the mean over both orders, without margin.
      margin: scalar, see `bradley_terry_nll`; likewise the others.
      smoothing: scalar.
      uniform: scalar.

    Returns:
      Scalar, 0 when fewer than two answers are present.

    Raises:
      ValueError: when the shapes differ, or for an option out of range.

    Reference: Ouyang et al. 2022 (arXiv:2203.02155), equation 1.
    """
    pairs = ranked_pairs(scores, rank)
    nll = bradley_terry_nll(
        pairs.better, pairs.worse, jnp.where(pairs.tied, 0.0, margin), smoothing, uniform
    )
    swapped = bradley_terry_nll(pairs.worse, pairs.better, 0.0, smoothing, uniform)
    nll = jnp.where(pairs.tied, 0.5 * (nll + swapped), nll)
    return jnp.sum(jnp.where(pairs.present, nll, 0.0)) / jnp.maximum(pairs.present.sum(), 1)


def plackett_luce_nll(scores: Array, rank: Array) -> Array:
    """Compute `-log P(ranking)`: the best is chosen among all, the next among the rest, ...

    Ties are treated as by Breslow: each of the tied answers is chosen while all of them are
    still to be had. So a tie of two costs the sum of both orders, twice what `pair_nll` asks
    for it, and a longer tie costs more than the mean over its orders; in every case the
    tied scores are drawn together.

    Args:
      scores: [K].
      rank: int [K], see the module; ranks may have gaps.

    Returns:
      Scalar in nats, a sum over the answers; 0 when fewer than two are present.

    Raises:
      ValueError: when the shapes differ.

    Reference: Plackett 1975; Luce 1959; Breslow 1974 for the ties.
    """
    if scores.shape != rank.shape:
        raise ValueError(
            f"rank: got shape {rank.shape}, expected that of scores, {scores.shape}; pad "
            "shorter rankings with rank -1"
        )
    present = rank >= 0
    scores = jnp.where(present, scores, 0.0)
    remain = present & (rank >= rank[:, None])
    # Finite, or the slope of a row where nothing remains would be 0 / 0.
    floor = jnp.finfo(scores.dtype).min
    total = jax.nn.logsumexp(jnp.where(remain, scores, floor), axis=1)
    return jnp.sum(jnp.where(present, total - scores, 0.0))


def centering_loss(scores: Array, rank: Array | None = None) -> Array:
    """Compute `E[(2 mean score)^2]`, which keeps the scores of every ranking around 0.

    For K = 2 this is `E[(chosen + rejected)^2]`, as TRL has it; a mean rather than a sum, so
    that longer rankings are not held tighter. Add it with a weight of about 0.01.

    Args:
      scores: [..., K].
      rank: int [..., K], see the module; None = all are present.

    Returns:
      Scalar, a mean over the rankings that have an answer; 0 when none has.

    Reference: Eisenstein et al. 2023 (arXiv:2312.09244).
    """
    present = jnp.ones(scores.shape, bool) if rank is None else rank >= 0
    count = present.sum(-1)
    mean = jnp.sum(jnp.where(present, scores, 0.0), -1) / jnp.maximum(count, 1)
    return jnp.sum(jnp.square(2.0 * mean)) / jnp.maximum(jnp.sum(count > 0), 1)


def segment_scores(
    reward: Array, discount: Array | float = 1.0, mask: Array | None = None
) -> Array:
    """Compute `sum_t discount^t reward_t`, the score of a segment.

    Args:
      reward: [..., L] of each step.
      discount: scalar; the first step counts fully. 1 = the sum.
      mask: bool [..., L], steps that count; None = all. The others may hold anything.

    Returns:
      [...] in units of reward.
    """
    if mask is not None:
        reward = jnp.where(mask, reward, 0.0)
    return jnp.sum(reward * discount ** jnp.arange(reward.shape[-1]), -1)
