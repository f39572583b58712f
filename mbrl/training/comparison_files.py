"""Files of a comparison store: its schema, and the arrays of a query.

Nothing that a file claims about itself makes a reader allocate more than the schema allows,
and nothing is unpickled.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mbrl import spaces
from mbrl.training.json_lines import BadFileError
from mbrl.training.run_directory import write_json
from mbrl.types import Box, Discrete, MultiDiscrete, Space, Transition

MAX_OPTIONS = 64
MAX_FRAMES = 256 * 2**20
"""Bytes of the frames of one query."""
MAX_CAPTION = 2000
"""Characters of one caption."""

_VERSION = 1
_KIND = "segments"
_MAX_SCHEMA = 64 * 2**20
_MAX_HEADER = 8192


class Schema(NamedTuple):
    """What the queries of a store compare.

    Attributes:
      observation: space of one observation.
      action: space of one action.
      options: K segments to compare in each query.
      length: L steps of each segment.
    """

    observation: Space
    action: Space
    options: int
    length: int


class ArraySpec(NamedTuple):
    """One array of a query: what its file may hold.

    Attributes:
      name: in the file.
      dtype: of the file; any length of text for text.
      shape: None = any length.
      limit: bytes that it may have.
      nums: integers lie below these; None = they are no choices.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int | None, ...]
    limit: int
    nums: np.ndarray | None = None


def check_schema(schema: Schema) -> None:
    """Refuse a schema that no store can have.

    Raises:
      ValueError: naming what does not fit.
    """
    _, _, options, length = schema
    if type(options) is not int or not 2 <= options <= MAX_OPTIONS:
        raise ValueError(f"options: got {options!r:.60}, expected 2 .. {MAX_OPTIONS} to compare")
    if type(length) is not int or length < 1:
        raise ValueError(f"length: got {length!r:.60}, expected at least 1 step")
    names = [array.name for array in array_specs(schema)]
    bad = [name for name in names if names.count(name) > 1 or not name.isprintable()]
    if bad:
        raise ValueError(f"spaces: names {bad} are not printable or not unique; rename the entries")


def write_schema(path: Path, schema: Schema) -> None:
    """Write `schema.json` in one step."""
    write_json(path, describe(schema))


def read_schema(path: Path) -> Schema:
    """Read `schema.json`.

    Raises:
      ValueError: naming the file, when it is missing, damaged or of another version.
    """
    try:
        if (size := path.stat().st_size) > _MAX_SCHEMA:
            raise ValueError(f"{size} bytes, expected at most {_MAX_SCHEMA}")
        found = json.loads(path.read_bytes())
        if (found["version"], found["kind"]) != (_VERSION, _KIND):
            raise ValueError(
                f"version {found['version']!r:.60} of kind {found['kind']!r:.60}, this program "
                f"reads version {_VERSION} of {_KIND!r}"
            )
        parts = found["spaces"]
        schema = Schema(
            _space(parts["observation"]), _space(parts["action"]),
            found["options"], found["length"],
        )  # fmt: skip
        if differences(describe(schema), found):
            raise ValueError("not what this program writes")
        check_schema(schema)
    except FileNotFoundError:
        raise ValueError(f"{path.parent}: there is no comparison store (no {path.name})") from None
    except (OSError, ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise ValueError(
            f"{path}: expected the schema of a comparison store: {error!s:.200}; restore the file "
            "or start in a new folder"
        ) from error
    return schema


def describe(schema: Schema) -> dict[str, Any]:
    """Return a schema as JSON values."""
    parts = {name: spaces.describe(getattr(schema, name)) for name in ("observation", "action")}
    sizes = {"options": schema.options, "length": schema.length}
    return {"version": _VERSION, "kind": _KIND, **sizes, "spaces": parts}


def differences(saved: Any, now: Any, name: str = "") -> list[str]:
    """List what differs between two nested dicts of JSON values, as `name: saved -> now`."""
    if isinstance(saved, dict) and isinstance(now, dict):
        keys = [*saved, *(key for key in now if key not in saved)]
        pairs = [(key, saved.get(key, "(absent)"), now.get(key, "(absent)")) for key in keys]
        return [
            line for key, a, b in pairs
            for line in differences(a, b, f"{name}.{key}" if name else str(key))
        ]  # fmt: skip
    same = saved == now and isinstance(saved, bool) == isinstance(now, bool)
    return [] if same else [f"{name}: {saved!r:.80} -> {now!r:.80}"]


def _space(found: Any) -> Space:
    """Invert `spaces.describe`."""
    match found:
        case {"box": list(shape), "low": list(low), "high": list(high), "dtype": str(name)}:
            dtype = np.dtype(name)
            if dtype.kind not in "fiub":
                raise ValueError(f"dtype {name!r:.60}, expected numbers")
            low, high = (np.array([float(x) for x in b]).reshape(shape) for b in (low, high))
            return Box(tuple(shape), low, high, dtype)
        case {"discrete": int(num)} if num > 0:
            return Discrete(num)
        case {"multi_discrete": [*nums]} if all(type(x) is int and x > 0 for x in nums):
            return MultiDiscrete(tuple(nums))
        case dict() if found and all(isinstance(part, dict) for part in found.values()):
            return {name: _space(part) for name, part in found.items()}
    raise ValueError(f"{found!r:.80} describes no space")


def array_specs(schema: Schema) -> list[ArraySpec]:
    """List the arrays that every query of a store has."""
    lead = (schema.options, schema.length)
    found = [
        _spec("reward", np.dtype(np.float32), lead),
        _spec("is_terminal", np.dtype(bool), lead),
    ]
    obs = schema.observation
    for field, space in (("obs", obs), ("action", schema.action), ("next_obs", obs)):
        for name, leaf in spaces.leaves(space):
            path = f"{field}/{name}" if name else field
            match leaf:
                case Box():
                    found.append(_spec(path, leaf.dtype, (*lead, *leaf.shape)))
                case Discrete():
                    found.append(_spec(path, np.dtype(np.int32), lead, leaf.num))
                case MultiDiscrete():
                    shape = (*lead, len(leaf.nums))
                    found.append(_spec(path, np.dtype(np.int32), shape, leaf.nums))
    return found


def shown_specs(schema: Schema) -> list[ArraySpec]:
    """List the arrays that a query may have for people to look at."""
    K = schema.options
    return [
        ArraySpec("frames", np.dtype(np.uint8), (K, None, None, None, 3), MAX_FRAMES),
        ArraySpec("captions", np.dtype(np.str_), (K,), K * 4 * MAX_CAPTION),
    ]


def _spec(name: str, dtype: np.dtype, shape: tuple[int, ...], nums: Any = None) -> ArraySpec:
    limit = math.prod(shape) * dtype.itemsize
    return ArraySpec(name, dtype, shape, limit, None if nums is None else np.asarray(nums))


def named(segments: Transition) -> dict[str, Any]:
    """Name the leaves of segments like their arrays."""
    return {
        key: leaf
        for field, value in segments._asdict().items()
        for key, leaf in _named(field, value)
    }


def _named(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [item for name in value for item in _named(f"{prefix}/{name}", value[name])]
    return [(prefix, value)]


def transition(schema: Schema, arrays: Mapping[str, Any]) -> Transition:
    """Put arrays together, the inverse of `named`."""
    return Transition(
        _nest(schema.observation, "obs", arrays), _nest(schema.action, "action", arrays),
        arrays["reward"], _nest(schema.observation, "next_obs", arrays), arrays["is_terminal"],
    )  # fmt: skip


def _nest(space: Space, prefix: str, arrays: Mapping[str, Any]) -> Any:
    if isinstance(space, Mapping):
        return {name: _nest(space[name], f"{prefix}/{name}", arrays) for name in space}
    return arrays[prefix]


def fitted(spec: ArraySpec, value: Any) -> np.ndarray:
    """Turn a value into an array as its file holds it.

    Raises:
      ValueError: naming the array, when shape, kind or a number does not fit.
    """
    given = np.asarray(value)
    text = given.dtype.kind == spec.dtype.kind == "U"
    if not text and not np.can_cast(given.dtype, spec.dtype, "same_kind"):
        raise BadFileError("array", f"{spec.name}: got {given.dtype}, expected {spec.dtype}")
    with np.errstate(over="ignore"):  # infinite, which is found below
        array = np.ascontiguousarray(given if text else given.astype(spec.dtype))
    if array.dtype.kind in "iu" and not np.array_equal(array, given):
        raise BadFileError("array", f"{spec.name}: numbers that do not fit {spec.dtype}")
    _check_layout(spec, array.shape, array.dtype)
    _check_values(spec, array)
    return array


def read_arrays(path: Path, schema: Schema, shown: bool) -> dict[str, np.ndarray]:
    """Read the file of a query.

    Args:
      path: of the file.
      schema: of the store.
      shown: read what people look at too.

    Raises:
      BadFileError: naming the file, and the array where it is one.
    """
    needed, extra = array_specs(schema), shown_specs(schema)
    specs = {f"{spec.name}.npy": spec for spec in (*needed, *extra)}
    try:
        size, limit = path.stat().st_size, sum(s.limit + 2 * _MAX_HEADER for s in specs.values())
        if size > limit:
            raise BadFileError("file", f"{size} bytes, expected at most {limit}")
        with zipfile.ZipFile(path) as file:
            entries = {entry.filename: entry for entry in file.infolist()}
            missing = [s.name for s in needed if f"{s.name}.npy" not in entries]
            unknown = sorted(f"{name!r:.80}" for name in entries.keys() - specs.keys())
            if missing or unknown or len(entries) != len(file.infolist()):
                raise BadFileError(
                    "array", f"arrays {missing} are missing and {unknown} unknown, or one is double"
                )
            for name, entry in entries.items():
                if entry.file_size > specs[name].limit + _MAX_HEADER:
                    raise BadFileError(
                        "array", f"{specs[name].name}: unpacks to {entry.file_size} bytes, "
                        f"expected at most {specs[name].limit}",
                    )  # fmt: skip
            wanted = [*needed, *(s for s in extra if shown and f"{s.name}.npy" in entries)]
            return {spec.name: _read_array(file, spec) for spec in wanted}
    except BadFileError as error:
        raise BadFileError(error.reason, f"{path}: {error}") from None
    except FileNotFoundError:
        raise BadFileError("query", f"{path}: there is no such query") from None
    except Exception as error:  # zlib, struct, zipfile, numpy: each has its own for nonsense
        raise BadFileError("file", f"{path}: damaged, not whole arrays ({error!s:.200})") from error


def _read_array(file: zipfile.ZipFile, spec: ArraySpec) -> np.ndarray:
    """Read one array, whose layout is compared before there is memory for it."""
    with file.open(f"{spec.name}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise BadFileError("array", f"{spec.name}: npy version {version}, expected (1, 0)")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream, _MAX_HEADER)
        _check_layout(spec, shape, dtype)
        size = math.prod(shape) * dtype.itemsize
        data = stream.read(size + 1)  # one more: at the end the checksum is compared
    if len(data) != size or fortran:
        raise BadFileError(
            "array", f"{spec.name}: {len(data)} bytes, expected {size} in the order of C"
        )
    array = np.frombuffer(data, dtype).reshape(shape)
    _check_values(spec, array)
    return array


def _check_layout(spec: ArraySpec, shape: tuple[int, ...], dtype: np.dtype) -> None:
    text = spec.dtype.kind == dtype.kind == "U"
    if dtype != spec.dtype and not text:
        raise BadFileError("array", f"{spec.name}: got {dtype}, expected {spec.dtype}")
    fits = len(shape) == len(spec.shape) and all(
        (want is None and have > 0) or want == have
        for want, have in zip(spec.shape, shape, strict=True)
    )
    if not fits:
        wanted = str(spec.shape).replace("None", "any")
        raise BadFileError("array", f"{spec.name}: got shape {shape}, expected {wanted}")
    size = math.prod(shape) * dtype.itemsize
    if size > spec.limit:
        raise BadFileError("array", f"{spec.name}: {size} bytes, expected at most {spec.limit}")


def _check_values(spec: ArraySpec, array: np.ndarray) -> None:
    if array.dtype.kind == "U":
        for text in array:  # an error for what is no Unicode
            str(text).encode()
        return
    bad, expected = np.zeros(array.shape, bool), "a finite number"
    if spec.nums is not None:
        bad, expected = (array < 0) | (array >= spec.nums), f"one of 0 .. {spec.nums} - 1"
    elif array.dtype.kind == "f":
        bad = ~np.isfinite(array)
    elif array.dtype.kind == "b":
        bad, expected = array.view(np.uint8) > 1, "true or false"
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise BadFileError(
            "array", f"{spec.name}{list(where)} is {array[where]}, expected {expected}"
        )
