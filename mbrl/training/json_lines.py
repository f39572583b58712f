"""Files of JSON lines from anywhere: bounded reading, and what can be wrong with a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_LARGEST = float(np.finfo(np.float32).max)


class BadFileError(ValueError):
    """Something in a file that cannot be used.

    Attributes:
      reason: one or two words, by which such things are counted.
    """

    def __init__(self, reason: str, text: str) -> None:
        """Keep the reason beside the message."""
        super().__init__(text)
        self.reason = reason


def read_lines(path: Path, limit: int, size: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield number and bytes of the lines of a file, never more than little over `limit`.

    A longer line is cut, but stays too long for `parse`; a whole line ends with a newline also
    when it was cut.

    Args:
      path: of the file.
      limit: bytes of a line, with its newline.
      size: bytes of the file that are read; None = all.
    """
    left = path.stat().st_size if size is None else size
    if not left:
        return
    with path.open("rb") as file:
        number = 0
        while left > 0:
            line = file.readline(min(limit + 1, left))
            left -= len(line)
            end = line
            while end and not end.endswith(b"\n") and left > 0:
                end = file.readline(min(limit + 1, left))
                left -= len(end)
            if not line:  # somebody has cut the file
                return
            number += 1
            whole = line[:-1] + b"?\n" if end is not line and end.endswith(b"\n") else line
            yield number, whole


def parse(line: bytes, limit: int) -> Any:
    """Read the JSON value of a line.

    Raises:
      BadFileError: saying what is wrong.
    """
    if len(line) > limit:
        raise BadFileError("long", f"longer than {limit} bytes")
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=_once)
    except BadFileError:
        raise
    except UnicodeDecodeError as error:
        raise BadFileError("encoding", f"expected UTF-8 ({error})") from None
    except (ValueError, RecursionError) as error:
        raise BadFileError("json", f"expected JSON ({error})") from None


def check_rank(rank: Any, options: int) -> None:
    """Refuse what is no ranking.

    Raises:
      BadFileError: unless `rank` is a list of as many ranks as there are options.
    """
    good = (
        isinstance(rank, list)
        and len(rank) == options
        and all(type(x) is int and 0 <= x < options for x in rank)
        and 0 in rank
    )
    if not good:
        raise BadFileError(
            "rank", f"rank: got {rank!r:.60}, expected {options} integers of 0 .. {options - 1}, "
            "0 for the best",
        )  # fmt: skip


def is_number(x: Any) -> bool:
    """Say whether float32 holds it: neither NaN nor infinite, nor true or false."""
    return type(x) in (int, float) and abs(x) <= _LARGEST


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise BadFileError("fields", "a field appears twice")
    return found
