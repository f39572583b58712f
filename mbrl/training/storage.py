"""Where `run_host` keeps replay: on the device, in host memory, or in files on a disk.

All of them hold the rings of all seeds, leaves [S, E, C, ...], outside of the compiled
programs that act and learn, and yield the same batch for the same key. Hence the programs
are the same too, and so is the learner, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np

from mbrl import replay, ring_index
from mbrl.training.learner import fetch, over_seeds
from mbrl.types import Array, Batch, Key, Record, SampleSpec

Where = Literal["device", "host"] | Path
"""On the device, in ordinary memory of the host, or memory-mapped from files of a folder."""


class Storage(Protocol):
    """The rings of all seeds, leaves [S, ...]."""

    def add(self, record: Record) -> None:
        """Write one record of every environment, leaves [S, E, ...]."""
        ...

    def sample(self, keys: Key) -> Batch:
        """Read a batch per seed, leaves [S, ...], for keys [S]."""
        ...

    def write_back(self, index: Any, values: Any) -> None:
        """Replace extras of a batch, before the next call of any of these functions."""
        ...

    def state(self) -> replay.Ring:
        """Return all content for a save, leaves [S, ...]: valid until the next `add`."""
        ...


def make_storage(
    where: Where, example: Record, shape: tuple[int, int, int], spec: SampleSpec, content: Any
) -> Storage:
    """Allocate the rings.

    Args:
      where: see `Where`.
      example: one record without batch axes; arrays or `jax.ShapeDtypeStruct`s.
      shape: seeds S, environments E, and records to keep per seed.
      spec: what `sample` is asked for.
      content: `Storage.state()` of any of them to go on with, None = empty.

    Raises:
      ValueError: for another place, or when `content` does not fit the rest.
      OSError: when the disk has no room for the files.
    """
    num_seeds, num_envs, capacity = shape
    if not isinstance(where, Path) and where not in ("device", "host"):
        raise ValueError(
            f"where: got {where!r}, expected 'device', 'host' or the Path of a folder for files; "
            "write Path(...) around the name of a folder"
        )
    if where != "device":
        folder = where if isinstance(where, Path) else None
        return HostStorage(example, shape, spec, folder, content)
    if content is None:
        start = over_seeds(lambda _: replay.init(example, num_envs, capacity), num_seeds)
        content = jax.jit(start)(jnp.arange(num_seeds))
    return DeviceStorage(jax.tree.map(_on_device, content), num_seeds, spec)


class DeviceStorage:
    """Rings on the device, written in place."""

    def __init__(self, ring: replay.Ring, num_seeds: int, spec: SampleSpec) -> None:
        """Take over `ring`, leaves [S, ...]: its memory is reused."""
        self._ring = ring
        self._whole = spec.kind == "all"

        def read(ring: replay.Ring, key: Key) -> Any:
            batch = replay.sample(ring, key, spec)
            return batch._replace(record=None) if self._whole else batch

        def compiled(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
            return jax.jit(over_seeds(fn, num_seeds), **options)

        self._add = compiled(replay.add, donate_argnums=0)
        self._read = compiled(read)
        self._write_back = compiled(replay.write_back, donate_argnums=0)

    def add(self, record: Record) -> None:
        """Write one record of every environment; see `Storage`."""
        self._ring = self._add(self._ring, record)

    def sample(self, keys: Key) -> Batch:
        """Read a batch per seed; see `Storage`."""
        found = self._read(self._ring, keys)
        # A program that returned the ring itself would copy it.
        return found._replace(record=self._ring.record) if self._whole else found

    def write_back(self, index: Any, values: Any) -> None:
        """Replace extras of a batch; see `Storage`."""
        if values is not None:
            self._ring = self._write_back(self._ring, index, values)

    def state(self) -> replay.Ring:
        """Return the rings themselves; see `Storage`."""
        return self._ring


class HostStorage:
    """Rings in host memory or in files; only batches are sent to the device."""

    def __init__(
        self, example: Record, shape: tuple[int, int, int], spec: SampleSpec,
        directory: Path | None, content: Any,
    ) -> None:  # fmt: skip
        """Allocate; arguments as in `make_storage`."""
        num_seeds, num_envs, capacity = shape
        rows = ring_index.num_rows(num_envs, capacity)
        self._spec = spec
        self._record = ring_index.allocate(example, (num_seeds, num_envs, rows), directory)
        self._rings = [replay.HostRing.over(_pick(self._record, s)) for s in range(num_seeds)]
        self._feedback: Any = None
        if content is not None:
            content = fetch(content)
            for s, ring in enumerate(self._rings):
                ring.restore(_pick(content, s))

    def add(self, record: Record) -> None:
        """Write one record of every environment; see `Storage`."""
        self._settle()
        record = fetch(record)
        for s, ring in enumerate(self._rings):
            ring.add(_pick(record, s))

    def sample(self, keys: Key) -> Batch:
        """Read a batch per seed, as numpy arrays; see `Storage`."""
        self._settle()
        found = [ring.sample(keys[s], self._spec) for s, ring in enumerate(self._rings)]
        if len(found) == 1:  # not stacked, which would copy: kind 'all' is a whole ring
            return jax.tree.map(lambda x: x[None], found[0])
        return jax.tree.map(lambda *x: np.stack(x), *found)

    def write_back(self, index: Any, values: Any) -> None:
        """Replace extras of a batch; see `Storage`."""
        # Done when the rings are next used: nobody waits here for the update.
        self._feedback = None if values is None else (index, values)

    def state(self) -> replay.Ring:
        """Return views of the rings; see `Storage`."""
        self._settle()
        states = [ring.state() for ring in self._rings]
        head, size = (np.stack(x) for x in ([s.head for s in states], [s.size for s in states]))
        return replay.Ring(self._record, cast(Array, head), cast(Array, size))

    def _settle(self) -> None:
        if self._feedback is not None:
            index, values = fetch(self._feedback)
            for s, ring in enumerate(self._rings):
                ring.write_back(_pick(index, s), _pick(values, s))
            self._feedback = None


def _pick(tree: Any, seed: int) -> Any:
    return jax.tree.map(lambda x: x[seed], tree)


def _on_device(leaf: Any) -> Any:
    # A copy: rings are written in place, and numpy arrays may belong to others.
    return leaf if isinstance(leaf, jax.Array) else jnp.array(leaf)
