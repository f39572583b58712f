"""Comparisons: a buffer of ranked segments with a fixed capacity, on the device."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mbrl.replay import holdout_mask
from mbrl.types import Array, Transition


class Comparisons(NamedTuple):
    """Q rows, each a query of K segments of L steps and its answer.

    Attributes:
      segments: leaves [Q, K, L, ...]; `reward` and `is_terminal` are None: what is learned
        from preferences never sees the true reward.
      rank: int32 [Q, K], 0 = best, equal = tie, -1 = absent.
      margin: float32 [Q], by how much the better one should lead; 0 where nobody said.
      size: int32 [], rows that hold data.
    """

    segments: Transition
    rank: Array
    margin: Array
    size: Array


def empty(example: Transition, capacity: int) -> Comparisons:
    """Allocate a buffer that holds nothing.

    Args:
      example: one query without batch axis, leaves [K, L, ...]; arrays or
        `jax.ShapeDtypeStruct`s. Its reward and termination are not kept.
      capacity: Q, queries.

    Returns:
      `Comparisons` of zeros, every rank -1.

    Raises:
      ValueError: when `capacity` is less than 1.
    """
    if capacity < 1:
        raise ValueError(f"capacity: got {capacity}, expected at least 1 query")

    def zeros(leaf: Any) -> Array:
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        return jnp.zeros((capacity, *leaf.shape), dtype)

    segments = jax.tree.map(zeros, _inputs(example))
    rank = jnp.full((capacity, jax.tree.leaves(example.action)[0].shape[0]), -1, jnp.int32)
    return Comparisons(segments, rank, jnp.zeros(capacity), jnp.zeros((), jnp.int32))


def add(
    comparisons: Comparisons,
    segments: Transition,
    rank: Array,
    keep: Array,
    margin: Array | None = None,
) -> tuple[Comparisons, Array]:
    """Append answered queries in their order, as many as there is room for.

    Rows beyond the capacity are not added, and nothing is ever overwritten: labels are dear.
    Compare the second output with `keep.sum()` to see whether some were left out.

    Args:
      comparisons: Q rows; donate it under jit, the write is then in place.
      segments: leaves [M, K, L, ...]; reward and termination are ignored.
      rank: int [M, K].
      keep: bool [M], False = no answer was given, the row is skipped.
      margin: [M]; None = 0.

    Returns:
      `(comparisons, added)`, where added is int32 [], the rows that were written.

    Raises:
      ValueError: naming the leaf when structure, shape or dtype differ from the buffer.
    """
    segments = _inputs(segments)
    margin = jnp.zeros(keep.shape) if margin is None else margin
    _check(comparisons, segments, rank, keep, margin)
    capacity = comparisons.rank.shape[0]
    row = comparisons.size + jnp.cumsum(keep, dtype=jnp.int32) - 1
    row = jnp.where(keep, row, capacity)

    def write(old: Array, new: Array) -> Array:
        return old.at[row].set(new.astype(old.dtype), mode="drop")

    size = jnp.minimum(comparisons.size + keep.sum(dtype=jnp.int32), capacity)
    written = Comparisons(
        jax.tree.map(write, comparisons.segments, segments),
        write(comparisons.rank, rank),
        write(comparisons.margin, margin),
        size,
    )
    return written, size - comparisons.size


def filled(comparisons: Comparisons) -> Array:
    """Return bool [Q], the rows that hold data."""
    return jnp.arange(comparisons.rank.shape[-2]) < comparisons.size[..., None]


def split_mask(capacity: int, ratio: float) -> Array:
    """Mark the rows that are held out from training.

    A fixed hash of the row: a query stays on its side as the buffer fills, and all of its
    segments with it.

    Args:
      capacity: Q.
      ratio: expected share of held-out rows, in [0, 1).

    Returns:
      [Q] bool, True = holdout.

    Raises:
      ValueError: when `ratio` is outside [0, 1).
    """
    return holdout_mask((1, capacity), ratio)[0]


def _inputs(segments: Transition) -> Transition:
    """Drop what a reward model may not see."""
    return segments._replace(reward=None, is_terminal=None)


def _check(
    comparisons: Comparisons, segments: Transition, rank: Array, keep: Array, margin: Array
) -> None:
    stored, got = jax.tree.structure(comparisons.segments), jax.tree.structure(segments)
    if stored != got:
        raise ValueError(f"segments: got {got}, expected {stored}, as the buffer's example had")
    (num,) = keep.shape
    leaves = jax.tree_util.tree_leaves_with_path(comparisons.segments)
    for (path, old), new in zip(leaves, jax.tree.leaves(segments), strict=True):
        shape = (num, *old.shape[1:])
        if new.shape != shape or new.dtype != old.dtype:
            raise ValueError(
                f"segments{jax.tree_util.keystr(path)}: got {new.dtype} {new.shape}, expected "
                f"{old.dtype} {shape}; convert it, or make the buffer from another example"
            )
    shape = (num, comparisons.rank.shape[1])
    if rank.shape != shape or not jnp.issubdtype(rank.dtype, jnp.integer):
        raise ValueError(
            f"rank: got {rank.dtype} {rank.shape}, expected integers {shape}; pad shorter "
            "rankings with -1"
        )
    if margin.shape != (num,):
        raise ValueError(f"margin: got shape {margin.shape}, expected {(num,)}, one per query")
