"""What the device ring and the host ring of `mbrl.replay` share: addresses and checks.

`xp` is `numpy` or `jax.numpy`: one formula serves both, so that they cannot drift apart.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mbrl.types import Array, Key, Record, SampleSpec


def num_rows(num_envs: int, capacity: int) -> int:
    """Return C, the rows of a ring, or refuse a capacity that leaves fewer than two."""
    if num_envs < 1:
        raise ValueError(f"num_envs: expected at least 1, got {num_envs}")
    rows = capacity // num_envs
    if rows < 2:
        raise ValueError(
            f"capacity: {capacity} records over {num_envs} environments leave {rows} row(s) each, "
            f"expected at least 2; raise --capacity to {2 * num_envs} or more"
        )
    return rows


def specs(example: Record) -> Record:
    """Return shapes and dtypes of one record, without 64-bit types unless jax has them on."""

    def spec(leaf: Any) -> jax.ShapeDtypeStruct:
        dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
        return jax.ShapeDtypeStruct(np.shape(leaf), jax.dtypes.canonicalize_dtype(dtype))

    return jax.tree.map(spec, example)


def allocate(example: Record, lead: tuple[int, ...], directory: Path | None) -> Record:
    """Return a record of zeros [*lead, ...], in memory or mapped from files of `directory`."""
    leaves, tree = jax.tree.flatten(specs(example))
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
    found = [
        np.zeros((*lead, *leaf.shape), leaf.dtype)
        if directory is None
        else _mapped(directory / f"leaf_{number:03d}.npy", (*lead, *leaf.shape), leaf.dtype)
        for number, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, found)


def _mapped(file: Path, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return zeros that are mapped from a new .npy file, whose space on the disk is taken."""
    file.unlink(missing_ok=True)  # whoever has mapped an older one keeps what it holds
    # .npy has no name for the small floats of ml_dtypes: keep their bytes and view them.
    array = np.lib.format.open_memmap(file, "w+", np.dtype(f"V{np.dtype(dtype).itemsize}"), shape)
    # Without it the file has holes, and a disk that is full kills whoever writes into one.
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    return np.asarray(array).view(dtype)


def check_record(stored: Record, record: Record) -> None:
    """Refuse a record [E, ...] that is not what the ring [E, C, ...] stores."""
    check_same(stored, record, "record", lambda old: (old.shape[0], *old.shape[2:]))


def check_same(stored: Any, new: Any, name: str, shape_of: Callable[[Any], Any]) -> None:
    """Refuse `new` unless its leaves have the dtypes of `stored` and the shapes `shape_of`."""
    if jax.tree.structure(stored) != jax.tree.structure(new):
        raise ValueError(
            f"{name}: expected the structure {jax.tree.structure(stored)}, got "
            f"{jax.tree.structure(new)}; the ring stores what its example had"
        )
    leaves = jax.tree_util.tree_leaves_with_path(stored)
    for (path, old), leaf in zip(leaves, jax.tree.leaves(new), strict=True):
        if leaf.shape != shape_of(old) or leaf.dtype != old.dtype:
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)}: expected {old.dtype} {shape_of(old)}, got "
                f"{leaf.dtype} {leaf.shape}; convert it before it enters the ring"
            )


@partial(jax.jit, static_argnames=("spec", "num_envs", "rows"))
def address(
    key: Key,
    head: Array,
    size: Array,
    spec: SampleSpec,
    num_envs: int,
    rows: int,
    priority: Array | None = None,
) -> tuple[Array, Array, Array, Array | None]:
    """Return (environment, row, valid) of a sample, broadcast to [K, B, T] or [E, T], and its
    odds [K, B] where a `priority` [E, C] is given.
    """
    if not 1 <= spec.length <= rows:
        raise ValueError(
            f"length: expected 1 to {rows} (rows of the ring), got {spec.length}; raise --capacity"
        )
    time, odds = jnp.arange(spec.length), None
    if spec.kind == "latest":
        env = jnp.arange(num_envs)[:, None]
        age = size - spec.length + time
    elif spec.kind == "sequences":
        shape = (spec.updates, spec.batch_size, 1)
        env_key, start_key = jax.random.split(key)
        windows = jnp.maximum(size - spec.length + 1, 1)
        if priority is None:
            env = jax.random.randint(env_key, shape, 0, num_envs)
            start = jax.random.randint(start_key, shape, 0, windows)
        else:
            oldest_first = jnp.roll(priority, size - head, 1)
            env, start, odds = _draw(env_key, oldest_first, windows, shape)
            odds = odds[..., 0]
        age = start + time
    else:
        raise ValueError(f"kind: expected 'sequences', 'latest' or 'all', got {spec.kind!r}")
    env, row, age = jnp.broadcast_arrays(env, (head - size + age) % rows, age)
    return env, row, (age >= 0) & (age < size), odds


def _draw(
    key: Key, priority: Array, windows: Array, shape: tuple[int, ...]
) -> tuple[Array, Array, Array]:
    """Draw (row, column, odds) of a matrix in proportion to it, from its first columns."""
    allowed = jnp.arange(priority.shape[1]) < windows
    known = jnp.isfinite(priority) & (priority > 0.0) & allowed
    # Where nothing has a priority, all are alike.
    chance = jnp.where(known.any(), jnp.where(known, priority, 0.0), 1.0 * allowed).reshape(-1)
    cumulative = jnp.cumsum(chance)
    point = jax.random.uniform(key, shape) * cumulative[-1]
    index = jnp.searchsorted(cumulative, point, side="right")
    # Rounding may carry the point to the very end, beyond all that can be drawn.
    index = jnp.minimum(index, jnp.searchsorted(cumulative, cumulative[-1]))
    odds = chance[index] * (windows * priority.shape[0]) / cumulative[-1]
    return index // priority.shape[1], index % priority.shape[1], odds


def priority(record: Record, spec: SampleSpec) -> Any:
    """Return what `spec` draws sequences by, [E, C], or None."""
    if not spec.priority:
        return None
    extras = record.extras
    if not isinstance(extras, Mapping) or spec.priority not in extras:
        known = sorted(extras) if isinstance(extras, Mapping) else []
        raise ValueError(
            f"priority: the extras have no entry {spec.priority!r}, only {known}; let `act` return "
            "it among the extras"
        )
    return extras[spec.priority]


def first_of(env: Any, row: Any) -> Any:
    """Return the address int32 [..., 2] of the first record of each sequence."""
    xp = np if isinstance(env, np.ndarray) else jnp
    return xp.stack([env[..., 0], row[..., 0]], axis=-1)


def whole(record: Record, head: Any, size: Any, xp: Any) -> tuple[Any, Any]:
    """Return [E, C], whether a row and the next are one step of an episode; and the newest row."""
    rows = record.is_first.shape[1]
    age = (xp.arange(rows) - head + size) % rows
    valid = (age < size - 1) & ~record.is_last & ~xp.roll(record.is_first, -1, axis=1)
    return valid, xp.asarray((head - 1) % rows, xp.int32)


def rows_of(index: Any, length: int, rows: int, xp: Any) -> tuple[Any, Any]:
    """Return flat (environment, row) of all records of the sequences that start at `index`."""
    env, row = xp.broadcast_arrays(index[..., :1], index[..., 1:] + xp.arange(length))
    return env.reshape(-1), row.reshape(-1) % rows


def check_address(index: Any) -> Any:
    """Return `index`, or refuse a batch that has none."""
    if index is None:
        raise ValueError(
            "index: got None, expected int32 [..., 2]; only batches of kind 'sequences' have an "
            "address to write back to, so `update` must return no feedback for other kinds"
        )
    return index


def replace(extras: Any, values: Any, lead: tuple[int, ...], write: Any, name: str) -> Any:
    """Write `values` over the matching entries of the nested dict `extras`."""
    if values is None:
        return extras
    if isinstance(values, Mapping):
        known = sorted(extras) if isinstance(extras, Mapping) else []
        for key in values:
            if key not in known:
                raise ValueError(
                    f"values: {name} has no entry {key!r} to write back to, only {known}; "
                    "let `act` return it among the extras"
                )
        new = {k: replace(extras[k], v, lead, write, f"{name}.{k}") for k, v in values.items()}
        return {**extras, **new}

    def checked(old: Any, new: Any) -> Any:
        fits = new.ndim == old.ndim - 1 + len(lead) and new.shape[: len(lead)] == lead
        if not fits or new.shape[len(lead) + 1 :] != old.shape[2:]:
            raise ValueError(
                f"values: {name} expected the shape {(*lead, 'T', *old.shape[2:])}, got {new.shape}"
            )
        if not any(
            jnp.issubdtype(old.dtype, kind) and jnp.issubdtype(new.dtype, kind)
            for kind in (jnp.floating, jnp.integer, old.dtype)
        ):
            raise ValueError(f"values: {name} is stored as {old.dtype}, got {new.dtype}")
        return write(old, new)

    return jax.tree.map(checked, extras, values)
