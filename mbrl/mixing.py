"""Minibatches from two sources: recorded transitions beside imagined ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mbrl.types import Array, Key, reset_rows


class Pool(NamedTuple):
    """Rows of a data set that may be drawn.

    Attributes:
      data: leaves [M, ...].
      rows: int32 [M], the numbers of these rows first.
      count: int32 [], how many they are.
    """

    data: Any
    rows: Array
    count: Array

    def draw(self, key: Key, num: int) -> Any:
        """Draw `num` rows uniformly, with replacement; any row where none may be drawn."""
        chosen = jax.random.randint(key, (num,), 0, jnp.maximum(self.count, 1))
        return jax.tree.map(lambda x: x[self.rows[chosen]], self.data)


def pool(data: Any, mask: Array) -> Pool:
    """Collect the rows of `data` [M, ...] that `mask` [M] marks."""
    rows = jnp.nonzero(mask, size=mask.shape[0], fill_value=0)[0]
    return Pool(data, rows, mask.sum())


def mixed(
    real: Pool, imagined: Pool, key: Key, num: int, ratio: Array | float
) -> tuple[Any, Array]:
    """Draw a minibatch of which an exact share is real.

    Args:
      real: recorded rows.
      imagined: rows of the same structure, from a model.
      key: consumed.
      num: rows to draw B.
      ratio: share of real rows, rounded to whole rows. May be traced.

    Returns:
      Leaves [B, ...], the real rows first, and float32 [B], 0 where a source is empty.
    """
    real_key, imagined_key = jax.random.split(key)
    is_real = jnp.arange(num) < jnp.round(ratio * num)
    data = reset_rows(is_real, real.draw(real_key, num), imagined.draw(imagined_key, num))
    known = jnp.where(is_real, real.count > 0, imagined.count > 0)
    return data, known.astype(jnp.float32)
