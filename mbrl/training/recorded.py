"""Recorded experience in one .npz file, which offline training learns from.

The arrays are named like the fields of `Record`: `obs`, `action`, `reward`, `is_first`,
`is_last` and `is_terminal`, each [E, T, ...] for E streams of T records in the order of time;
the entries of a Dict space are `obs/NAME`. Episodes follow one another in a stream, and each
but the last ends with a record of its own, as everywhere in this library.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mbrl import replay, spaces
from mbrl.types import Box, Discrete, EnvSpec, MultiDiscrete, Record, Space

FLAGS = ("is_first", "is_last", "is_terminal")


class Column(NamedTuple):
    """One array of the file: the space of its entries, None for reward and flags."""

    name: str
    dtype: np.dtype
    space: Box | Discrete | MultiDiscrete | None


def write_records(path: Path, record: Record) -> None:
    """Write records [E, T, ...] without their extras."""
    fields = {name: value for name, value in record._asdict().items() if name != "extras"}
    arrays: dict[str, Any] = dict(item for name in fields for item in _named(name, fields[name]))
    with path.open("wb") as file:  # a name would be given the suffix .npz
        np.savez_compressed(file, allow_pickle=False, **arrays)


def read_records(path: Path, spec: EnvSpec) -> Record:
    """Read the records of a task.

    Args:
      path: .npz file, see the module.
      spec: spaces that the records must fit.

    Returns:
      Leaves [E, T, ...], without extras.

    Raises:
      ValueError: naming the file and what is wrong: no such file or another format, an
        array that is missing, unknown, or of another shape or kind than `spec` says,
        numbers that are not finite or outside of the action space, flags that do not fit
        together, or more data than memory.
    """
    columns = _columns(spec)
    arrays: dict[str, Any] = _load(path, columns)
    lead = arrays["reward"].shape
    if len(lead) != 2 or lead[1] < 2:
        raise ValueError(
            f"{path}: reward: got shape {lead}, expected [E, T] for E streams of T >= 2 records"
        )
    checked: dict[str, Any] = {c.name: _check(path, c, arrays[c.name], lead) for c in columns}
    _check_flags(path, *(checked[name] for name in FLAGS))
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


def _load(path: Path, columns: list[Column]) -> dict[str, np.ndarray]:
    """Read the arrays, after their sum has been compared with the memory."""
    names = {column.name for column in columns}
    try:
        with zipfile.ZipFile(path) as file:
            size = sum(entry.file_size for entry in file.infolist())
            held = {entry.filename.removesuffix(".npy") for entry in file.infolist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path}: expected recorded data in a .npz file ({error}); write one with: "
            "mbrl collect RUN --out data.npz"
        ) from error
    if held != names:
        raise ValueError(
            f"{path}: arrays {sorted(names - held)} are missing and {sorted(held - names)} are "
            f"unknown; this task needs {sorted(names)}"
        )
    replay.check_memory(size, str(path))
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: damaged, or not made of plain arrays ({error})") from error


def _check(path: Path, column: Column, array: np.ndarray, lead: tuple[int, ...]) -> np.ndarray:
    name, dtype, space = column
    shape = (*lead, *_shape(space))
    if array.shape != shape:
        raise ValueError(f"{path}: {name}: got shape {array.shape}, expected {shape}")
    # Kinds by rank: a flag may become a number, a fraction does not become an integer.
    ranks = {"b": 0, "u": 1, "i": 1, "f": 2}
    if ranks.get(array.dtype.kind, 3) > ranks[dtype.kind] or (
        dtype == np.uint8 and array.dtype != np.uint8
    ):
        raise ValueError(f"{path}: {name}: got {array.dtype}, expected {dtype}")
    bad, expected = ~np.isfinite(array), "a finite number"
    if isinstance(space, Discrete | MultiDiscrete):
        num = np.asarray(space.num if isinstance(space, Discrete) else space.nums)
        bad, expected = (array < 0) | (array >= num), f"one of 0 .. {num} - 1"
    elif isinstance(space, Box) and column.name.startswith("action"):
        slack = 1e-4 * np.maximum(1.0, np.abs(space.high - space.low))
        bad |= (array < space.low - slack) | (array > space.high + slack)
        expected = "a number within the bounds of the action space"
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(f"{path}: {name}{list(where)} is {array[where]}, expected {expected}")
    return array.astype(dtype)


def _shape(space: Box | Discrete | MultiDiscrete | None) -> tuple[int, ...]:
    match space:
        case Box():
            return space.shape
        case MultiDiscrete():
            return (len(space.nums),)
    return ()


def _check_flags(path: Path, first: np.ndarray, last: np.ndarray, terminal: np.ndarray) -> None:
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
            raise ValueError(f"{path}: stream {env}, record {row}: {what}; {fix}")


def _named(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [item for name in value for item in _named(f"{prefix}/{name}", value[name])]
    return [(prefix, value)]


def _nest(space: Space, prefix: str, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(space, Box | Discrete | MultiDiscrete):
        return arrays[prefix]
    return {name: _nest(space[name], f"{prefix}/{name}", arrays) for name in space}
