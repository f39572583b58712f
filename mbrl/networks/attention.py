"""Causal attention with grouped heads, rotary positions and a cache of keys and values."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mbrl.types import Array


class KeyValues(NamedTuple):
    """Keys and values [B, S, K, hd] of one layer; keys are already rotated."""

    keys: Array
    values: Array


def positions_of(mask: Array) -> Array:
    """Count the real tokens before each one, [B, T] -> int32 [B, T]; 0 in padding on the left."""
    return jnp.maximum(jnp.cumsum(mask, -1, dtype=jnp.int32) - 1, 0)


def causal(mask: Array) -> Array:
    """Return who sees whom among the tokens of a mask [B, T]: bool [B, T (asks), T (is seen)]."""
    return jnp.tril(jnp.ones((mask.shape[-1],) * 2, bool)) & mask[:, None]


def rotation(positions: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """Return cosine and sine [B, T, 1, hd / 2] of the angles of rotary positions.

    Reference: RoFormer, Su et al. 2021 (arXiv:2104.09864).
    """
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Array, turn: tuple[Array, Array]) -> Array:
    """Rotate [B, T, H, hd]: number i of the first half of a head goes with i of the second."""
    cos, sin = turn
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def attend(queries: Array, past: KeyValues, visible: Array) -> Array:
    """Average the values that each query may see, weighted by a softmax over its keys.

    Args:
      queries: [B, T, H, hd].
      past: keys and values [B, S, K, hd]; H is a multiple of K, and neighbours share.
      visible: bool [B, T, S]. A query that sees nothing gets a mean of all values.

    Returns:
      [B, T, H, hd] float32.

    Reference: Vaswani et al. 2017 (arXiv:1706.03762); Ainslie et al. 2023 (arXiv:2305.13245)
    for the groups.
    """
    batch, time, heads, size = queries.shape
    groups = past.keys.shape[2]
    q = queries.reshape(batch, time, groups, heads // groups, size)
    scores = jnp.einsum(
        "btkgd,bskd->bkgts", q, past.keys, preferred_element_type=jnp.float32
    )  # fmt: skip
    # Finite: a row of -inf would make its gradient NaN, also where nobody reads it.
    least = jnp.finfo(jnp.float32).min
    scores = jnp.where(visible[:, None, None], scores * size**-0.5, least)
    weights = jax.nn.softmax(scores, -1).astype(past.values.dtype)
    mean = jnp.einsum(
        "bkgts,bskd->btkgd", weights, past.values, preferred_element_type=jnp.float32
    )  # fmt: skip
    return mean.reshape(batch, time, heads, size)
