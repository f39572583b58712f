"""Checks of configurations where they are made."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

from mbrl.types import Array


def check_whole(config: Any, *names: str, least: int = 1, prefix: str = "") -> None:
    """Refuse fields that are not whole numbers of at least `least`.

    Args:
      config: a dataclass with a default for every field.
      *names: fields.
      least: smallest value that makes sense.
      prefix: before the name in the message, such as `planner.`.

    Raises:
      ValueError: naming the field, its value, what was expected and the default.
    """
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, numbers.Integral) or value < least:
            raise ValueError(
                f"{prefix}{name} must be at least {least}, got {value}; pass a whole number, "
                f"such as {getattr(type(config), name)}"
            )


def check_within(
    config: Any,
    name: str,
    low: float = -math.inf,
    high: float = math.inf,
    ends: str = "[]",
    prefix: str = "",
) -> None:
    """Refuse a field outside of an interval; a traced value is let through.

    Args:
      config: a dataclass with a default for every field.
      name: field.
      low: lower end.
      high: upper end.
      ends: `[` or `(` and `]` or `)`, whether each end belongs to the interval.
      prefix: before the name in the message.

    Raises:
      ValueError: naming the field, its value, the interval and the default.
    """
    value = getattr(config, name)
    if isinstance(value, Array):
        return
    above = low <= value if ends[0] == "[" else low < value
    below = value <= high if ends[1] == "]" else value < high
    if not (above and below and math.isfinite(value)):
        right = ends[1] if math.isfinite(high) else ")"
        raise ValueError(
            f"{prefix}{name} must be in {ends[0]}{low:g}, {high:g}{right}, got {value}; the "
            f"default is {getattr(type(config), name)}"
        )


def check_choice(config: Any, name: str, choices: Sequence[str]) -> None:
    """Refuse a field that is none of `choices`.

    Args:
      config: a dataclass with a default for every field.
      name: field.
      choices: what it may be.

    Raises:
      ValueError: naming the field, its value and the choices.
    """
    value = getattr(config, name)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
