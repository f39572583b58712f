"""Configurations of agents as JSON values, and back."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any


def to_json(value: Any) -> Any:
    """Turn a configuration into JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [to_json(v) for v in value]
    return value


def from_json(kind: Any, value: Any) -> Any:
    """Invert `to_json` for a dataclass of plain fields, tuples and nested dataclasses.

    Raises:
      ValueError: when the fields are not those of `kind`.
    """
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kinds = [k for k in typing.get_args(kind) if k is not type(None)]
        return None if value is None else from_json(kinds[0], value)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        names = {f.name for f in dataclasses.fields(kind)}
        if set(value) != names:
            odd = sorted(set(value) ^ names)
            raise ValueError(
                f"{kind.__name__}: fields {odd} are missing or unknown, as in runs of another "
                "version; the commit that made a run is in its config.json"
            )
        return kind(**{name: from_json(hints[name], value[name]) for name in names})
    if isinstance(value, list):
        return tuple(value)
    return value
