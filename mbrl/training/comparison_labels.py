"""The labels of a comparison store: a file of lines that processes append to at the same time."""

from __future__ import annotations

import collections
import contextlib
import errno
import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mbrl.training.json_lines import BadFileError, check_rank, is_number, parse, read_lines

MAX_LINE = 4096
"""Bytes of a label, with its newline."""
_TORN = b" (torn)"  # closes a line that was cut short: else it might become a label later
ID = re.compile(r"[0-9]{8}")
_LABEL = {"query", "rank", "margin", "by", "time"}
_UNDO = {"query", "undo", "by", "time"}


class Label(NamedTuple):
    """The answer to one query.

    Attributes:
      query: its id.
      rank: K ranks, 0 = best, equal numbers = a tie; None = the question was skipped.
      margin: by how much the best is better, in units that the teacher chooses; 0 = not said.
      by: who has answered.
      time: seconds since 1970.
    """

    query: str
    rank: tuple[int, ...] | None
    margin: float
    by: str
    time: float


class Labels(NamedTuple):
    """What `labels.jsonl` holds.

    Attributes:
      labels: one per query that has one, in the order in which they were written.
      bad: lines that were not used, counted by reason.
    """

    labels: list[Label]
    bad: dict[str, int]


def append(
    path: Path,
    entry: dict[str, Any],
    options: int,
    queries: Callable[[], list[str]],
    labelled: bool | None = None,
) -> None:
    """Write one line in one piece; it is on the disk when this returns.

    Args:
      path: of `labels.jsonl`.
      entry: JSON value of the line.
      options: K, ranks per label.
      queries: lists those that there are.
      labelled: whether the query must have a label, or must have none; None = either.

    Raises:
      ValueError: when it must have one and has none, or the other way round, or the line is
        none that could be read.
    """
    query, _ = check_entry(entry, options)
    line = json.dumps(entry, allow_nan=False).encode() + b"\n"
    if len(line) > MAX_LINE:
        raise ValueError(f"by: got {len(entry['by'])} characters, expected a short name")
    new = not path.exists()
    with locked(path, os.O_RDWR | os.O_CREAT | os.O_APPEND) as descriptor:
        size = os.fstat(descriptor).st_size
        if labelled is not None:
            found, _ = _read(path, size, options, queries, "skip")
            if (query in found) != labelled:
                fact = "has no label to take back" if labelled else "has a label already"
                raise ValueError(f"query: {query} in {path} {fact}")
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = _TORN + b"\n" + line
        if (written := os.write(descriptor, line)) != len(line):
            os.ftruncate(descriptor, size)
            raise OSError(errno.ENOSPC, f"wrote {written} of {len(line)} bytes", str(path))
        os.fsync(descriptor)
    if new:
        sync(path.parent)


def read(path: Path, options: int, queries: Callable[[], list[str]], on_bad: str) -> Labels:
    """Read the labels that count, and count the lines that cannot be used.

    Args:
      path: of `labels.jsonl`; there are no labels without it.
      options: K, ranks per label.
      queries: lists those that there are.
      on_bad: 'raise' or 'skip'.

    Raises:
      BadFileError: naming file and line, unless such lines are skipped.
    """
    try:
        # With the lock nobody is writing; what lies before this size never changes again.
        with locked(path, os.O_RDONLY, fcntl.LOCK_SH) as descriptor:
            size = os.fstat(descriptor).st_size
    except FileNotFoundError:
        return Labels([], {})
    found, bad = _read(path, size, options, queries, on_bad)
    return Labels(list(found.values()), bad)


def _read(
    path: Path, size: int, options: int, queries: Callable[[], list[str]], on_bad: str
) -> tuple[dict[str, Label], dict[str, int]]:
    """Read the labels in the first `size` bytes: the newest of each query, and what is bad."""
    bad = collections.Counter[str]()
    known = set(queries())  # not before the size: those of these lines are there by now
    stacks: dict[str, list[Label]] = {}
    for number, line in read_lines(path, MAX_LINE, size):
        try:
            query, label = parse_line(line, options)
            if query not in known:
                raise BadFileError("query", f"query: there is no {query} in this store")
            stack = stacks.pop(query, [])
            stacks[query] = stack  # now the last one
            if label is not None:
                stack.append(label)
            elif stack:
                stack.pop()
            else:
                raise BadFileError("undo", f"undo: {query} has no label to take back")
        except BadFileError as error:
            if on_bad == "raise" and error.reason != "torn":
                raise BadFileError(
                    error.reason, f"{path}, line {number}: {error}; mend or delete the line, "
                    "or open the store with on_bad='skip'"
                ) from None  # fmt: skip
            bad[error.reason] += 1
    return {query: stack[-1] for query, stack in stacks.items() if stack}, dict(bad)


@contextlib.contextmanager
def locked(
    path: Path, flags: int = os.O_RDWR | os.O_CREAT, kind: int = fcntl.LOCK_EX
) -> Iterator[int]:
    """Open a file and hold its lock; the system releases that of a process that is gone."""
    descriptor = os.open(path, flags, 0o644)
    try:
        fcntl.flock(descriptor, kind)
        yield descriptor
    finally:
        os.close(descriptor)


def sync(folder: Path) -> None:
    """Put the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def parse_line(line: bytes, options: int) -> tuple[str, Label | None]:
    """Read one line of `labels.jsonl`.

    Returns:
      The id of the query, and its label; None = the last one is taken back.

    Raises:
      BadFileError: saying what is wrong.
    """
    if line.endswith(_TORN + b"\n") or not line.endswith(b"\n"):
        raise BadFileError("torn", "cut short, its writer was killed before it was acknowledged")
    return check_entry(parse(line, MAX_LINE), options)


def check_entry(entry: Any, options: int) -> tuple[str, Label | None]:
    """Check the JSON value of a line; see `parse_line`."""
    if not isinstance(entry, dict):
        raise BadFileError("fields", f"got {entry!r:.60}, expected an object")
    wanted = _UNDO if "undo" in entry else _LABEL
    missing, unknown = sorted(wanted - entry.keys()), sorted(entry.keys() - wanted)
    if missing or unknown:
        raise BadFileError("fields", f"fields {missing} are missing and {unknown!s:.80} unknown")
    query, by, when = entry["query"], entry["by"], entry["time"]
    if not isinstance(query, str) or not ID.fullmatch(query):
        raise BadFileError("query", f"query: got {query!r:.60}, expected 8 digits in quotes")
    if not isinstance(by, str):
        raise BadFileError("by", f"by: got {by!r:.60}, expected a name in quotes")
    if not is_number(when):
        raise BadFileError("time", f"time: got {when!r:.60}, expected seconds since 1970")
    if "undo" in entry:
        if entry["undo"] is not True:
            raise BadFileError("undo", f"undo: got {entry['undo']!r:.60}, expected true")
        return query, None
    rank, margin = entry["rank"], entry["margin"]
    if not is_number(margin) or margin < 0:
        raise BadFileError("margin", f"margin: got {margin!r:.60}, expected 0 or a finite number")
    if rank is not None:
        check_rank(rank, options)
        rank = tuple(rank)
    return query, Label(query, rank, float(margin), by, float(when))
