"""What the best of n draws is worth, for every n, from one pool of draws."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mbrl.types import Array


def best_of_n(score: Array, value: Array, n: Sequence[int] | np.ndarray) -> Array:
    """Estimate the mean value of the draw that scores best of n.

    The mean over all subsets of n draws of the pool: unbiased, and of less variance than any
    number of subsets. Of draws that score the same, each is equally likely to be taken.

    Args:
      score: [N] of the pool, by which the best is chosen; such as a learned reward.
      value: [N], what is asked for of the chosen one: the score itself, or the true reward.
      n: [M] draws to choose from, whole numbers in 1..N. Where n nears N the estimate is that
        of a single subset.

    Returns:
      [M] in units of value.

    Raises:
      ValueError: for pools of different shape, or an n out of range.

    Reference: Nakano et al. 2021 (arXiv:2112.09332), appendix on best-of-n.
    """
    size = np.asarray(n)
    if score.ndim != 1 or score.shape != value.shape:
        raise ValueError(
            f"score, value: got shapes {score.shape} and {value.shape}, expected two of [N]; map "
            "over other axes with jax.vmap"
        )
    if size.ndim != 1 or np.any((size < 1) | (size > score.shape[0])):
        raise ValueError(
            f"n: got {n}, expected [M] whole numbers from 1 to {score.shape[0]}, the size of the "
            "pool; enlarge it"
        )
    order = jnp.argsort(score)
    score, value = score[order], value[order]
    # Draws that tie are exchangeable: each stands for the mean of them.
    starts = jnp.concatenate([jnp.zeros(1, bool), score[1:] != score[:-1]])
    group = jnp.cumsum(starts)
    total = jax.ops.segment_sum(value, group, score.shape[0])
    count = jax.ops.segment_sum(jnp.ones_like(value), group, score.shape[0])
    value = (total / jnp.maximum(count, 1.0))[group]
    # Not a matrix product, which accelerators round.
    return jnp.sum(_chances(score.shape[0], jnp.asarray(size)) * value, 1)


def _chances(pool: int, n: Array) -> Array:
    """Return how likely each rank of the pool, the lowest first, is the best of n: [M, N].

    It is binom(i - 1, n - 1) / binom(N, n) for rank i. Downwards from the top each is
    1 - (n - 1) / i times the one above, so that nothing large is ever subtracted.
    """
    rank = jnp.arange(1, pool, dtype=jnp.float32)
    left = jnp.maximum(rank - (n[:, None] - 1), 0.0)
    steps = jnp.log(left) - jnp.log(rank)  # -inf below rank n
    below = jnp.cumsum(steps[:, ::-1], 1)[:, ::-1]
    chance = jnp.exp(jnp.concatenate([below, jnp.zeros((n.shape[0], 1))], 1))
    return chance / chance.sum(1, keepdims=True)


def best_of_n_kl(n: Array | float) -> Array:
    """Return how far the best of n diverges from a single draw, `log n - (n - 1) / n` nats.

    Args:
      n: [...] draws to choose from, at least 1.

    Returns:
      [...] nats; exact where no two draws score the same, a bound otherwise.

    Reference: Stiennon et al. 2020 (arXiv:2009.01325); Beirami et al. 2024 (arXiv:2401.01879)
    for the bound.
    """
    n = jnp.asarray(n, jnp.float32)
    return jnp.log(n) - (n - 1.0) / n
