"""Causal attention with grouped heads, rotary positions and a cache of keys and values."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mbrl.types import Array


class KeyValues(NamedTuple):
    """Keys and values [B, K, S, hd] of one layer; keys are already rotated."""

    keys: Array
    values: Array


def positions_of(mask: Array) -> Array:
    """Count the real tokens before each one, [B, T] -> int32 [B, T]; 0 in padding on the left."""
    return jnp.maximum(jnp.cumsum(mask, -1, dtype=jnp.int32) - 1, 0)


def causal(mask: Array) -> Array:
    """Return who sees whom among the tokens of a mask [B, T]: bool [B, T (asks), T (is seen)]."""
    return jnp.tril(jnp.ones((mask.shape[-1],) * 2, bool)) & mask[:, None]


def rotation(positions: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """Return cosine and sine [B, 1, T, hd / 2] of the angles of rotary positions.

    Reference: RoFormer, Su et al. 2021 (arXiv:2104.09864).
    """
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[:, None, :, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Array, turn: tuple[Array, Array]) -> Array:
    """Rotate [B, H, T, hd]: number i of the first half of a head goes with i of the second."""
    cos, sin = turn
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def attend(queries: Array, past: KeyValues, visible: Array) -> Array:
    """Average the values that each query may see, weighted by a softmax over its keys.

    Args:
      queries: [B, H, T, hd].
      past: keys and values [B, K, S, hd]; H is a multiple of K, and neighbours share.
      visible: bool [B, T, S]. A query that sees nothing gets a mean of all values.

    Returns:
      [B, H, T, hd] float32.

    Reference: Vaswani et al. 2017 (arXiv:1706.03762); Ainslie et al. 2023 (arXiv:2305.13245)
    for the groups.
    """
    batch, heads, time, size = queries.shape
    groups, slots = past.keys.shape[1:3]
    # All queries that share a head of keys are the rows of one matrix.
    rows = queries.reshape(batch, groups, -1, size)
    scores = _product("bkd,bksd->bks", rows, past.keys) * size**-0.5
    scores = scores.reshape(batch, heads, time, slots)
    # Finite: a row of -inf would make its gradient NaN, also where nobody reads it.
    scores = jnp.where(visible[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, -1).astype(past.values.dtype)
    weights = weights.reshape(batch, groups, -1, slots)
    return _product("bks,bksd->bkd", weights, past.values).reshape(queries.shape)


def _product(form: str, rows: Array, matrices: Array) -> Array:
    """Multiply each of the rows [B, K, R, ...] by the matrix of its B and K, by `form`."""
    product = partial(jnp.einsum, form, preferred_element_type=jnp.float32)
    if rows.shape[2] == 1:
        # XLA:CPU takes twice as long for matrices of one row as for vectors.
        return product(rows[:, :, 0], matrices)[:, :, None]
    return jax.vmap(product, (2, None), 2)(rows, matrices)
