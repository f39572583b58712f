"""Synthetic annotators who put K answers in order, with the faults of `TeacherConfig`."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from mbrl.preferences.teachers import TeacherConfig
from mbrl.types import Array, Key


def rank_answers(
    config: TeacherConfig, key: Key, score: Array, scale: Array | float = 1.0
) -> tuple[Array, Array]:
    """Ask an annotator to put answers in order.

    The best is chosen among all, the next among the rest, and so on, each with the probability
    that Plackett and Luce give it; so of any two answers, one is put first as Bradley and Terry
    have it. A mistake exchanges two neighbours. Neighbours whose scores differ by less than
    `equal` are tied. For two answers the distribution is that of `teachers.teach`.

    Args:
      config: the annotator; `myopia` is of no account.
      key: consumed.
      score: [M, K] what the annotator values in each answer.
      scale: scalar, the unit of `skip` and `equal`; 1 = that of the scores.

    Returns:
      `(rank, keep)`: int32 [M, K], 0 = the best, without gaps, -1 where there is no answer; and
      bool [M], an answer was given.

    Raises:
      ValueError: when there are less than two answers to order.

    Reference: Plackett 1975; Luce 1959.
    """
    if score.ndim != 2 or score.shape[1] < 2:
        raise ValueError(f"score: got shape {score.shape}, expected [M, K] of K >= 2 answers")
    M, K = score.shape
    noise_key, mistake_key, place_key = jax.random.split(key, 3)
    rational = math.isinf(config.beta)
    noise = 0.0 if rational else jax.random.gumbel(noise_key, (M, K))
    order = jnp.argsort(-((score if rational else config.beta * score) + noise), axis=1)
    mistaken = jax.random.bernoulli(mistake_key, config.mistake, (M,))
    place = jax.random.randint(place_key, (M,), 0, K - 1)
    at, place = jnp.arange(K), jnp.where(mistaken, place, K)[:, None]
    swapped = at + (at == place) - (at == place + 1)
    order = jnp.take_along_axis(order, swapped, 1)
    gap = jnp.abs(jnp.diff(jnp.take_along_axis(score, order, 1), axis=1))
    tied = (gap < config.equal * jnp.abs(scale)) | (rational & (gap == 0.0))
    places = jnp.pad(jnp.cumsum(~tied, axis=1), ((0, 0), (1, 0)))
    rank = jnp.zeros((M, K), jnp.int32).at[jnp.arange(M)[:, None], order].set(places)
    threshold = config.skip * jnp.asarray(scale)
    keep = ~((threshold > 0.0) & (score.max(1) <= threshold))
    return jnp.where(keep[:, None], rank, -1), keep
