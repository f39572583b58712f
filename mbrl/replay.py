"""Replay: a ring of `Record`s `[E, C, ...]`, on device (pure functions) and on host (numpy).

Row `t` of the ring holds one record of every environment: the environments write in lock
step. Both rings compute their indices with the same function, so that the same key gives
the same batch from either.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from mbrl import ring_index
from mbrl.memory import check_memory as check_memory
from mbrl.memory import device_memory as device_memory
from mbrl.memory import disk_space as disk_space
from mbrl.memory import host_memory as host_memory
from mbrl.types import Array, Batch, Key, Record, SampleSpec, Transition


def minibatches(
    train_ratio: float, batch_size: int, length: int, capacity: int, start: int, priority: str = ""
) -> SampleSpec:
    """Ask for minibatches of sequences at a given number of updates per environment step.

    Args:
      train_ratio: updates per environment step, a whole number or one over a whole number.
      batch_size: sequences per update.
      length: records per sequence.
      capacity: records to keep.
      start: environment steps of random actions before the first update.
      priority: see `SampleSpec`.

    Raises:
      ValueError: for another `train_ratio`, or a `start` that is shorter than a sequence.
    """
    ratio = float(train_ratio)
    every, updates = (1, round(ratio)) if ratio > 1.0 else (round(1.0 / max(ratio, 1e-9)), 1)
    if not 1e-6 < ratio < 1e6 or abs(updates / every - ratio) > 1e-6 * ratio:
        raise ValueError(
            f"train_ratio: got {train_ratio}, expected updates per environment step, a whole "
            "number or one over a whole number; use for example 0.5 or 2"
        )
    if start < length:
        raise ValueError(
            f"start: got {start} environment steps before the first update, expected at least "
            f"the length of a sequence, {length}; raise --random-steps or lower --length"
        )
    return SampleSpec("sequences", capacity, start, every, updates, batch_size, length, priority)


class Ring(NamedTuple):
    """Records of `E` environments in a ring of `C` rows.

    Attributes:
      record: leaves [E, C, ...].
      head: int32 [], the row that is written next.
      size: int32 [], rows that hold data.
    """

    record: Record
    head: Array
    size: Array


def init(example: Record, num_envs: int, capacity: int) -> Ring:
    """Allocate an empty ring on the device.

    Args:
      example: one record without batch axes; arrays or `jax.ShapeDtypeStruct`s.
      num_envs: E, environments that write in lock step.
      capacity: records to keep over all environments; C = capacity // num_envs.

    Returns:
      A ring of zeros with leaves [E, C, ...].

    Raises:
      ValueError: when fewer than two rows remain per environment.
    """
    rows = ring_index.num_rows(num_envs, capacity)
    record = jax.tree.map(
        lambda leaf: jnp.zeros((num_envs, rows, *leaf.shape), leaf.dtype), ring_index.specs(example)
    )
    return Ring(record, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def add(ring: Ring, record: Record) -> Ring:
    """Write one record of every environment over the oldest row.

    Args:
      ring: leaves [E, C, ...]; donate it under jit, the write is then in place.
      record: leaves [E, ...].

    Returns:
      The ring with `head` moved on by one row.

    Raises:
      ValueError: naming the leaf when structure, shape or dtype differ from the ring.
    """
    record = jax.tree.map(jnp.asarray, record)
    ring_index.check_record(ring.record, record)
    stored = jax.tree.map(
        lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new, ring.head, 1),
        ring.record,
        record,
    )
    rows = ring.record.reward.shape[1]
    return Ring(stored, (ring.head + 1) % rows, jnp.minimum(ring.size + 1, rows))


def sample(ring: Ring, key: Key, spec: SampleSpec) -> Batch:
    """Read the batch that `spec` asks for.

    'sequences': [K, B, T], drawn with replacement, uniformly or by priority, among all windows
    of T consecutive records of every environment; a window never joins the newest record with
    the oldest, but it may cross the end of an episode (the flags tell). While fewer than
    T rows are written, windows start at the oldest one and `valid` marks the data.
    'latest': [E, T], the last T records in the order of time. 'all': the ring as it is.

    Args:
      ring: leaves [E, C, ...].
      key: consumed by 'sequences' only.
      spec: static under jit.

    Returns:
      The batch; see `Batch` for the meaning of `valid` of each kind.

    Raises:
      ValueError: when `spec.kind` is unknown, `spec.length` exceeds the rows, or the extras
        have no entry `spec.priority`.
    """
    num_envs, rows = ring.record.reward.shape
    if spec.kind == "all":
        valid, newest = ring_index.whole(ring.record, ring.head, ring.size, jnp)
        return Batch(ring.record, valid, newest=newest)
    priority = ring_index.priority(ring.record, spec)
    env, row, valid, odds = ring_index.address(
        key, ring.head, ring.size, spec, num_envs, rows, priority
    )
    record = jax.tree.map(lambda leaf: leaf[env, row], ring.record)
    index = ring_index.first_of(env, row) if spec.kind == "sequences" else None
    return Batch(record, valid, index, odds)


def transitions(batch: Batch) -> tuple[Transition, Array]:
    """Pair every record with its successor.

    Args:
      batch: of kind 'all' ([E, C, ...]), or 'sequences' of length two ([K, B, 2, ...]).
        A batch of kind 'latest' has no such reading: its `valid` marks records.

    Returns:
      `(transition, valid)`: leaves [E * C, ...] and [E * C] for 'all', [K, B, ...] and
      [K, B] for sequences. Where `valid` is False the pair belongs to two episodes.

    Raises:
      ValueError: when sequences are not of length two.
    """
    record = batch.record
    if batch.index is None:
        now = jax.tree.map(_merge_axes, record)
        after = jax.tree.map(lambda leaf: _merge_axes(jnp.roll(leaf, -1, axis=1)), record)
        return _pair(now, after), batch.valid.reshape(-1)
    axis = batch.index.ndim - 1
    length = batch.valid.shape[axis]
    if length != 2:
        raise ValueError(
            f"batch: transitions need sequences of length 2, got length {length}; "
            "set length=2 in the agent's SampleSpec"
        )
    now, after = (
        jax.tree.map(lambda leaf, t=t: leaf[(slice(None),) * axis + (t,)], record) for t in (0, 1)
    )
    valid = batch.valid[..., 0] & batch.valid[..., 1] & ~now.is_last & ~after.is_first
    return _pair(now, after), valid


def shuffled(key: Key, rows: int, epochs: int, parts: int) -> Array:
    """Cut the numbers of `rows`, in a new order each epoch, into parts of equal size.

    Args:
      key: consumed.
      rows: to cut; a remainder of less than one row per part is left out of an epoch, another
        one each time.
      epochs: passes over the rows.
      parts: per epoch.

    Returns:
      int32 [epochs * parts, rows // parts].

    Raises:
      ValueError: when there are fewer rows than parts.
    """
    if rows < parts:
        raise ValueError(
            f"parts: got {parts} minibatches of {rows} rows, expected at most one per row; lower "
            "--minibatches or raise --rollout"
        )
    orders = jax.vmap(lambda key: jax.random.permutation(key, rows))(jax.random.split(key, epochs))
    return orders[:, : rows // parts * parts].reshape(epochs * parts, -1)


def importance(odds: Array | None, beta: Array | float) -> Array | float:
    """Weigh sequences so that likely ones do not count for more.

    Args:
      odds: [B] of a `Batch`, or None.
      beta: 0 = no correction, 1 = full.

    Returns:
      [B] `odds ** -beta` over the greatest of them; 1 where all are alike.

    Reference: Prioritized Experience Replay, Schaul et al. 2016 (arXiv:1511.05952).
    """
    if odds is None:
        return 1.0
    weight = odds ** (-beta)
    return weight / weight.max()


def holdout_mask(shape: tuple[int, int], ratio: float) -> Array:
    """Mark the ring rows that are held out from training.

    The split is a fixed hash of (environment, row): a record stays on its side for as
    long as it lives, whatever the key, the step or the fill of the ring.

    Args:
      shape: (E, C).
      ratio: expected share of held-out records, in [0, 1).

    Returns:
      [E, C] bool, True = holdout.

    Raises:
      ValueError: when `ratio` is outside [0, 1).
    """
    if isinstance(ratio, int | float) and not 0.0 <= ratio < 1.0:
        raise ValueError(f"ratio: expected a share in [0, 1), got {ratio}; use for example 0.1")
    x = jnp.arange(shape[0] * shape[1], dtype=jnp.uint32).reshape(shape) + jnp.uint32(0x9E3779B9)
    # The 32-bit finalizer of MurmurHash3: every input bit reaches every output bit.
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    x = x ^ (x >> 16)
    return (x >> 8).astype(jnp.float32) * 2.0**-24 < ratio


def write_back(ring: Ring, index: Array | None, values: Any) -> Ring:
    """Replace extras of sampled sequences, for example by refreshed latents.

    Where sequences of one batch overlap, the last one in the batch wins, on every device.

    Args:
      ring: leaves [E, C, ...].
      index: [..., 2] `Batch.index`; use it before the rows are overwritten by `add`.
      values: a sub-dict of the record's extras, leaves [..., T, ...]; None = nothing.

    Returns:
      The ring with these extras replaced.

    Raises:
      ValueError: when a name is not among the extras, or a shape or dtype does not fit.
    """
    if values is None:
        return ring
    address: Array = ring_index.check_address(index)

    def write(old: Array, new: Array) -> Array:
        rows = old.shape[1]
        env, row = ring_index.rows_of(address, new.shape[address.ndim - 1], rows, jnp)
        order = jnp.arange(env.size)
        last = jnp.full(old.shape[:2], -1).at[env, row].max(order)
        # Scatters of duplicate indices have no defined order on GPU: losers are dropped.
        row = jnp.where(last[env, row] == order, row, rows)
        new = new.reshape(-1, *old.shape[2:]).astype(old.dtype)
        return old.at[env, row].set(new, mode="drop")

    extras = ring_index.replace(ring.record.extras, values, address.shape[:-1], write, "extras")
    return ring._replace(record=ring.record._replace(extras=extras))


def nbytes(example: Record, num_envs: int, capacity: int) -> int:
    """Return the bytes that `init` or `HostRing` will allocate."""
    rows = ring_index.num_rows(num_envs, capacity)
    sizes = (
        int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(ring_index.specs(example))
    )
    return num_envs * rows * sum(sizes)


class HostRing:
    """The ring in host memory or in memory-mapped files, sampled exactly as `Ring` is.

    Batches are copies: they stay what they were while the ring is written on.
    """

    def __init__(
        self, example: Record, num_envs: int, capacity: int, directory: Path | None = None
    ) -> None:
        """Allocate an empty ring.

        Args:
          example: one record without batch axes; arrays or `jax.ShapeDtypeStruct`s.
          num_envs: E, environments that write in lock step.
          capacity: records to keep over all environments; C = capacity // num_envs.
          directory: folder for one memory-mapped .npy file per leaf (overwritten when
            there); None = ordinary memory. The files are working storage, not a save:
            what outlives the process goes through `state` and `restore`.

        Raises:
          ValueError: when fewer than two rows remain per environment.
          OSError: when the disk has no room for the files.
        """
        rows = ring_index.num_rows(num_envs, capacity)
        self._hold(ring_index.allocate(example, (num_envs, rows), directory))

    @classmethod
    def over(cls, record: Record) -> HostRing:
        """Make an empty ring whose storage is `record`: numpy arrays [E, C, ...], written on."""
        ring = cls.__new__(cls)
        ring._hold(record)
        return ring

    def _hold(self, record: Record) -> None:
        self._record, self._shape = record, (record.reward.shape[0], record.reward.shape[1])
        self._head = self._size = 0

    @property
    def size(self) -> int:
        """Rows that hold data."""
        return self._size

    def add(self, record: Record) -> None:
        """Write one record of every environment, leaves [E, ...]; see `add`."""
        record = jax.tree.map(np.asarray, record)
        ring_index.check_record(self._record, record)
        for old, new in zip(jax.tree.leaves(self._record), jax.tree.leaves(record), strict=True):
            old[:, self._head] = new
        self._head = (self._head + 1) % self._shape[1]
        self._size = min(self._size + 1, self._shape[1])

    def sample(self, key: Key, spec: SampleSpec) -> Batch:
        """Read the batch that `spec` asks for, as numpy arrays; see `sample`."""
        if spec.kind == "all":
            valid, newest = ring_index.whole(self._record, self._head, self._size, np)
            return Batch(jax.tree.map(np.array, self._record), valid, newest=newest)
        head, size = np.int32(self._head), np.int32(self._size)
        priority = ring_index.priority(self._record, spec)
        found = ring_index.address(key, head, size, spec, *self._shape, priority)
        env, row, valid = (np.array(x) for x in found[:3])
        record = jax.tree.map(lambda leaf: np.asarray(leaf[env, row]), self._record)
        index = ring_index.first_of(env, row) if spec.kind == "sequences" else None
        odds = None if found[3] is None else cast(Array, np.array(found[3]))
        return Batch(record, cast(Array, valid), index, odds)

    def write_back(self, index: Any, values: Any) -> None:
        """Replace extras of sampled sequences in place; see `write_back`."""
        if values is None:
            return
        index = np.asarray(ring_index.check_address(index))

        def write(old: np.ndarray, new: Any) -> np.ndarray:
            env, row = ring_index.rows_of(index, new.shape[index.ndim - 1], old.shape[1], np)
            address = (env * old.shape[1] + row)[::-1]
            # The first hit from the end is the last write: as on the device, it wins.
            keep = env.size - 1 - np.unique(address, return_index=True)[1]
            values = np.asarray(new).reshape(-1, *old.shape[2:])[keep]
            old[env[keep], row[keep]] = values.astype(old.dtype)
            return old

        ring_index.replace(self._record.extras, values, index.shape[:-1], write, "extras")

    def state(self) -> Ring:
        """Return the content for a save: views, to be written before the next `add`."""
        head, size = np.array(self._head, np.int32), np.array(self._size, np.int32)
        return Ring(self._record, cast(Array, head), cast(Array, size))

    def restore(self, ring: Ring) -> None:
        """Take over the content of `ring`, of a `HostRing.state` or of a device ring.

        Raises:
          ValueError: naming the leaf when structure, shape or dtype differ.
        """
        record = jax.tree.map(np.asarray, ring.record)
        ring_index.check_same(self._record, record, "ring.record", lambda old: old.shape)
        for old, new in zip(jax.tree.leaves(self._record), jax.tree.leaves(record), strict=True):
            old[...] = new
        self._head, self._size = int(ring.head), int(ring.size)


def _merge_axes(leaf: Array) -> Array:
    return leaf.reshape(-1, *leaf.shape[2:])


def _pair(now: Record, after: Record) -> Transition:
    return Transition(now.obs, now.action, after.reward, after.obs, after.is_terminal)
