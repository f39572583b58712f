"""Segments of trajectories, cut from the records that an agent learns from."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mbrl.types import Array, Batch, Key, Record, SampleSpec, Transition


def steps_per_call(sampling: SampleSpec, batch: Batch) -> int:
    """Count the environment steps between two batches, from what was asked for and what came.

    Where one step of all environments holds several calls' worth of them there is one call with
    so many more minibatches.
    """
    if sampling.kind == "sequences":
        return max(1, sampling.every) * (batch.valid.shape[0] // sampling.updates)
    return max(sampling.every, batch.valid.shape[0])


def streams(batch: Batch, ring: bool = False) -> tuple[Record, Array]:
    """Lay out a batch as streams in the order of time, and mark what starts a transition.

    Args:
      batch: of any kind.
      ring: whether its kind is 'all': the last row is then followed by the first.

    Returns:
      Record without extras, leaves [R, T, ...], and bool [R, T], false where a successor is
        missing or belongs to another episode.
    """
    record, valid = batch.record._replace(extras=()), batch.valid
    if ring:
        return record, valid
    lead = valid.ndim - 1
    record, valid = jax.tree.map(lambda x: x.reshape(-1, *x.shape[lead:]), (record, valid))
    starts = valid[:, :-1] & valid[:, 1:] & ~record.is_last[:, :-1] & ~record.is_first[:, 1:]
    return record, jnp.pad(starts, ((0, 0), (0, 1)))


def successors(record: Record) -> Transition:
    """Pair every record [R, T, ...] with the next of its stream, the last one with the first."""
    after = jax.tree.map(lambda x: jnp.roll(x, -1, 1), record)
    return Transition(record.obs, record.action, after.reward, after.obs, after.is_terminal)


def whole(starts: Array, length: int) -> Array:
    """Mark where `length` transitions follow one another in one episode.

    Args:
      starts: bool [R, T], where a transition starts.
      length: of a segment.

    Returns:
      bool [R, T]; a segment may reach the very last transition of an episode.
    """
    counted = jnp.cumsum(jnp.concatenate([starts, starts[:, : length - 1]], 1), 1)
    before = jnp.pad(counted, ((0, 0), (1, 0)))[:, :-length]
    return counted[:, length - 1 :] - before == length


def draw(
    record: Record, starts: Array, key: Key, num: int, length: int
) -> tuple[Transition, Array]:
    """Draw segments uniformly among all that lie within an episode.

    Args:
      record: leaves [R, T, ...].
      starts: bool [R, T], see `streams`.
      key: consumed.
      num: segments M, with replacement.
      length: transitions L of each.

    Returns:
      Transition, leaves [M, L, ...], with the reward as it is in the records; and bool [],
      whether there is any such segment. Without one, what is returned means nothing.
    """
    time = starts.shape[1]
    order = jnp.cumsum(whole(starts, length).reshape(-1))
    chosen = jax.random.randint(key, (num,), 0, jnp.maximum(order[-1], 1))
    first = jnp.searchsorted(order, chosen, side="right")
    row, column = first // time, (first % time)[:, None] + jnp.arange(length + 1)
    cut = jax.tree.map(lambda x: x[row[:, None], column % time], record)
    now, after = (jax.tree.map(lambda x, s=s: x[:, s], cut) for s in (slice(-1), slice(1, None)))
    return Transition(now.obs, now.action, after.reward, after.obs, after.is_terminal), order[
        -1
    ] > 0
