"""Recorded experience in one .npz file, which offline training learns from.

The arrays are named like the fields of `Record`: `obs`, `action`, `reward`, `is_first`,
`is_last` and `is_terminal`, each [E, T, ...] for E streams of T records in the order of time;
the entries of a Dict space are `obs/NAME`. Episodes follow one another in a stream, and each
but the last ends with a record of its own, as everywhere in this library.
"""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mbrl import replay, spaces
from mbrl.types import Box, Discrete, EnvSpec, MultiDiscrete, Record, Space

DAMAGED = (
    OSError, ValueError, KeyError, EOFError, MemoryError, RuntimeError, SyntaxError, struct.error,
    tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What numpy and zipfile raise for files that are not whole; RuntimeError covers encrypted ones and
unknown compressions."""
FLAGS = ("is_first", "is_last", "is_terminal")


class Column(NamedTuple):
    """One array of the file: the space of its entries, None for reward and flags."""

    name: str
    dtype: np.dtype
    space: Box | Discrete | MultiDiscrete | None


def write_records(path: Path, record: Record) -> None:
    """Write records [E, T, ...] without their extras."""
    with path.open("wb") as file:  # a name would be given the suffix .npz
        np.savez_compressed(file, allow_pickle=False, **named_arrays(record))


def named_arrays(record: Record) -> dict[str, Any]:
    """List the arrays of records by their names in a file, without extras."""
    fields = {name: value for name, value in record._asdict().items() if name != "extras"}
    return dict(item for name in fields for item in _named(name, fields[name]))


def read_records(path: Path, spec: EnvSpec) -> Record:
    """Read the records of a task.

    Args:
      path: .npz file, see the module.
      spec: spaces that the records must fit.

    Returns:
      Leaves [E, T, ...], without extras.

    Raises:
      ValueError: as `check_records`, and for no such file, another format, or more data than
        memory.
    """
    names = {column.name for column in _columns(spec)}
    return check_records(str(path), _load(path, names), spec)


def check_records(source: str, arrays: dict[str, Any], spec: EnvSpec) -> Record:
    """Make records of arrays that may be wrong.

    Args:
      source: name of the data, for messages.
      arrays: as `named_arrays` lists them, [E, T, ...].
      spec: spaces that they must fit.

    Returns:
      Leaves [E, T, ...], without extras.

    Raises:
      ValueError: naming the source and what is wrong: an array that is missing, unknown, or of
        another shape or kind than `spec` says, numbers that are not finite or outside of the
        action space, flags that do not fit together, or no transition at all.
    """
    columns = _columns(spec)
    _check_names(source, {column.name for column in columns}, set(arrays))
    lead = arrays["reward"].shape
    if len(lead) != 2 or lead[0] < 1 or lead[1] < 2:
        raise ValueError(
            f"{source}: reward: got shape {lead}, expected [E, T] for E >= 1 streams of T >= 2 "
            "records"
        )
    checked: dict[str, Any] = {c.name: _check(source, c, arrays[c.name], lead) for c in columns}
    _check_flags(source, *(checked[name] for name in FLAGS))
    return Record(
        _nest(spec.observation, "obs", checked), _nest(spec.action, "action", checked),
        checked["reward"], *(checked[name] for name in FLAGS), extras=(),
    )  # fmt: skip


def in_order(ring: replay.Ring) -> Record:
    """Return what a ring holds, in the order of time: leaves [E, size, ...]."""
    rows = ring.record.reward.shape[1]
    order = (int(ring.head) - int(ring.size) + np.arange(int(ring.size))) % rows
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:, order], ring.record)


def _columns(spec: EnvSpec) -> list[Column]:
    found = [
        Column(f"{field}/{name}" if name else field, np.dtype(_dtype(leaf)), leaf)
        for field, space in (("obs", spec.observation), ("action", spec.action))
        for name, leaf in spaces.leaves(space)
    ]
    flags = [Column(name, np.dtype(bool), None) for name in FLAGS]
    return [*found, Column("reward", np.dtype(np.float32), None), *flags]


def _dtype(space: Box | Discrete | MultiDiscrete) -> Any:
    return space.dtype if isinstance(space, Box) else np.int32


def _check_names(source: str, names: set[str], held: set[str]) -> None:
    if held != names:
        raise ValueError(
            f"{source}: arrays {sorted(names - held)} are missing and {sorted(held - names)} are "
            f"unknown; this task needs {sorted(names)}"
        )


def _load(path: Path, names: set[str]) -> dict[str, np.ndarray]:
    """Read the arrays, after their sum has been compared with the memory."""
    try:
        with zipfile.ZipFile(path) as file:
            size = sum(entry.file_size for entry in file.infolist())
            held = {entry.filename.removesuffix(".npy") for entry in file.infolist()}
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path}: expected recorded data in a .npz file ({error}); write one with: "
            "mbrl collect RUN --out data.npz"
        ) from error
    _check_names(str(path), names, held)
    replay.check_memory(size, str(path))
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except DAMAGED as error:
        raise ValueError(f"{path}: damaged, or not made of plain arrays ({error})") from error


def _check(source: str, column: Column, array: np.ndarray, lead: tuple[int, ...]) -> np.ndarray:
    name, dtype, space = column
    shape = (*lead, *_shape(space))
    if array.shape != shape:
        raise ValueError(f"{source}: {name}: got shape {array.shape}, expected {shape}")
    # Kinds by rank: a flag may become a number, a fraction does not become an integer.
    ranks = {"b": 0, "u": 1, "i": 1, "f": 2}
    if ranks.get(array.dtype.kind, 3) > ranks[dtype.kind] or (
        dtype == np.uint8 and array.dtype != np.uint8
    ):
        raise ValueError(f"{source}: {name}: got {array.dtype}, expected {dtype}")
    bad, expected = ~(np.abs(array) <= np.finfo(np.float32).max), "a finite float32"
    if isinstance(space, Discrete | MultiDiscrete):
        num = np.asarray(space.num if isinstance(space, Discrete) else space.nums)
        bad, expected = (array < 0) | (array >= num), f"one of 0 .. {num} - 1"
    elif isinstance(space, Box) and column.name.startswith("action"):
        slack = 1e-4 * np.maximum(1.0, np.abs(space.high - space.low))
        bad |= (array < space.low - slack) | (array > space.high + slack)
        expected = "a number within the bounds of the action space"
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(f"{source}: {name}{list(where)} is {array[where]}, expected {expected}")
    return array.astype(dtype)


def _shape(space: Box | Discrete | MultiDiscrete | None) -> tuple[int, ...]:
    match space:
        case Box():
            return space.shape
        case MultiDiscrete():
            return (len(space.nums),)
    return ()


def _check_flags(source: str, first: np.ndarray, last: np.ndarray, terminal: np.ndarray) -> None:
    faults = (
        (terminal & ~last, "is_terminal without is_last", "set is_last there too"),
        (
            np.pad(first[:, 1:] & ~last[:, :-1], ((0, 0), (1, 0))),
            "is_first after a record that is not is_last",
            "add the final observation of the episode before",
        ),
        (
            np.pad(last[:, :-1] & ~first[:, 1:], ((0, 0), (1, 0))),
            "no is_first after a record that is is_last",
            "begin every episode with the record of its reset",
        ),
    )
    for bad, what, fix in faults:
        if bad.any():
            env, row = (int(i) for i in np.argwhere(bad)[0])
            raise ValueError(f"{source}: stream {env}, record {row}: {what}; {fix}")
    if not (~last[:, :-1] & ~first[:, 1:]).any():
        raise ValueError(
            f"{source}: got no transition, expected episodes of at least two records; record more"
        )


def _named(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [item for name in value for item in _named(f"{prefix}/{name}", value[name])]
    return [(prefix, value)]


def _nest(space: Space, prefix: str, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(space, Box | Discrete | MultiDiscrete):
        return arrays[prefix]
    return {name: _nest(space[name], f"{prefix}/{name}", arrays) for name in space}
