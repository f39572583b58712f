"""Comparisons of short segments in a folder, asked by one process and answered by another.

  schema.json        what is compared, written once
  queries/ID.npz     one query: the arrays of a `Transition` with leaves [K, L, ...], named like
                     its fields (`obs/NAME` for the entries of a Dict space), and what people look
                     at: `frames` uint8 [K, T, H, W, 3], `captions` text [K]
  labels.jsonl       one JSON object per line, appended only; the newest of a query counts:
                     {"query": "00000012", "rank": [0, 1], "margin": 0.0, "by": "me", "time": 0.5}
                     rank 0 = best, equal = tied, null = skipped;
                     {"query": ..., "undo": true, "by": ..., "time": ...} takes the last one back

Any number of processes of one machine may use a store at the same time. A query appears under its
name when it is whole and on the disk, a label is acknowledged when it is. A process that is killed
in the middle of a line leaves it torn: such a line is counted, and never used.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import secrets
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from mbrl.memory import host_memory, readable
from mbrl.training import comparison_files as files
from mbrl.training.comparison_files import BadFileError
from mbrl.training.comparison_files import Schema as Schema
from mbrl.training.comparison_labels import ID, Labels, append, locked, read, sync
from mbrl.training.comparison_labels import Label as Label
from mbrl.types import Transition

COMPARISONS = "comparisons"
"""Folder of a run's store, below that of the run."""
SCHEMA = "schema.json"
QUERIES = "queries"
LABELS = "labels.jsonl"
LOCK = "store.lock"


class Query(NamedTuple):
    """One question.

    Attributes:
      id: its name.
      segments: leaves [K, L, ...].
      frames: uint8 [K, T, H, W, 3] to show, or None.
      captions: K texts to show, or none.
    """

    id: str
    segments: Transition
    frames: np.ndarray | None
    captions: tuple[str, ...]


class Comparisons(NamedTuple):
    """Answered queries, to learn from.

    Attributes:
      segments: leaves [Q, K, L, ...].
      rank: int32 [Q, K], 0 = best, equal = tied.
      margin: float32 [Q].
      queries: Q ids.
      bad: lines and files that were not used, counted by reason.
    """

    segments: Transition
    rank: np.ndarray
    margin: np.ndarray
    queries: list[str]
    bad: dict[str, int]


@dataclasses.dataclass(frozen=True)
class ComparisonStore:
    """A folder of queries and labels; see the module, and make one with `create_or_open`."""

    path: Path
    """Folder."""
    schema: Schema
    """What is compared."""
    on_bad: Literal["raise", "skip"] = "raise"
    """What to do with lines and files that cannot be used: refuse, or count and go on. Torn lines
    are counted in either case: they were never acknowledged."""

    @classmethod
    def create_or_open(
        cls, path: Path, schema: Schema, on_bad: Literal["raise", "skip"] = "raise"
    ) -> ComparisonStore:
        """Make a store, or open the one that is there.

        Raises:
          ValueError: when that has another schema, listing what differs, or for a schema that
            no store can have.
        """
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path}: got a file, expected a folder; choose another path")
        files.check_schema(schema)
        (path / QUERIES).mkdir(parents=True, exist_ok=True)
        with locked(path / LOCK):
            if not (path / SCHEMA).exists():
                sync(path)
                files.write_schema(path / SCHEMA, schema)
                sync(path)
        store = cls.open(path, on_bad)
        odd = files.differences(files.describe(store.schema), files.describe(schema))
        if odd:
            lines = "\n".join(f"  {line}" for line in odd)
            raise ValueError(
                f"{path}: the store was made for other comparisons:\n{lines}\n"
                "use the saved settings, or another folder"
            )
        return store

    @classmethod
    def open(cls, path: Path, on_bad: Literal["raise", "skip"] = "raise") -> ComparisonStore:
        """Open the store in a folder.

        Raises:
          ValueError: when there is none, or its schema is damaged.
        """
        if on_bad not in ("raise", "skip"):
            raise ValueError(f"on_bad: got {on_bad!r}, expected 'raise' or 'skip'")
        path = Path(path)
        schema = files.read_schema(path / SCHEMA)
        if not (path / QUERIES).is_dir():
            raise ValueError(f"{path}: damaged, there is no folder {QUERIES}; restore it")
        return cls(path, schema, on_bad)

    def queries(self) -> list[str]:
        """List the ids of all queries, oldest first."""
        names = os.listdir(self.path / QUERIES)
        stems = (name.removesuffix(".npz") for name in names if name.endswith(".npz"))
        return sorted(stem for stem in stems if ID.fullmatch(stem))

    def add_query(
        self, segments: Transition, frames: Any = None, captions: Sequence[str] = ()
    ) -> str:
        """Write a query.

        Args:
          segments: leaves [K, L, ...].
          frames: uint8 [K, T, H, W, 3] to show; None = the page draws the observations.
          captions: K texts to show, or none.

        Returns:
          Its id; the query is whole and on the disk.

        Raises:
          ValueError: naming the array that does not fit the schema.
        """
        arrays = self._fitted(segments, frames, captions)
        folder = self.path / QUERIES
        temporary = folder / f".{secrets.token_hex(8)}"
        try:
            with temporary.open("xb") as file:
                np.savez_compressed(file, allow_pickle=False, **arrays)
                file.flush()
                os.fsync(file.fileno())
            with locked(self.path / LOCK):
                query = f"{int(max(self.queries(), default='-1')) + 1:08d}"
                if not ID.fullmatch(query):
                    raise ValueError(f"{folder}: expected fewer queries; begin another store")
                os.rename(temporary, folder / f"{query}.npz")
        finally:
            temporary.unlink(missing_ok=True)
        sync(folder)
        return query

    def _fitted(self, segments: Transition, frames: Any, captions: Sequence[str]) -> dict[str, Any]:
        given: dict[str, Any] = files.named(segments)
        specs = files.array_specs(self.schema)
        missing = [spec.name for spec in specs if spec.name not in given]
        unknown = sorted(given.keys() - {spec.name for spec in specs})
        if missing or unknown:
            raise ValueError(
                f"segments: arrays {missing} are missing and {unknown} unknown; they must be "
                "those of the spaces of the store"
            )
        shown = zip(files.shown_specs(self.schema), (frames, list(captions) or None), strict=True)
        pairs = [(spec, given[spec.name]) for spec in specs]
        pairs += [(spec, value) for spec, value in shown if value is not None]
        return {spec.name: files.fitted(spec, value) for spec, value in pairs}

    def read_query(self, query: str) -> Query:
        """Read one query, with what people look at.

        Raises:
          ValueError: naming its file, when there is none or it is damaged.
        """
        arrays = files.read_arrays(self._file(query), self.schema, shown=True)
        captions = tuple(str(text) for text in arrays.get("captions", ()))
        segments = files.transition(self.schema, arrays)
        return Query(query, segments, arrays.get("frames"), captions)

    def add_label(
        self,
        query: str,
        rank: Sequence[int] | None,
        margin: float = 0.0,
        by: str = "",
        replace: bool = True,
    ) -> None:
        """Write a label; it is on the disk when this returns.

        Args:
          query: id of what is answered.
          rank: K ranks, 0 = best, equal = tied; None = skipped.
          margin: by how much the best is better; 0 = not said.
          by: who answers.
          replace: whether it may take the place of a label that the query has.

        Raises:
          ValueError: naming the argument that does not fit, or when there is a label.
        """
        if rank is not None:
            listed = rank.tolist() if hasattr(rank, "tolist") else list(rank)  # type: ignore
            rank = [int(x) if isinstance(x, np.integer) else x for x in listed]
        if isinstance(margin, np.integer | np.floating):
            margin = margin.item()
        entry = {"query": query, "rank": rank, "margin": margin, "by": by, "time": time.time()}
        self._append(entry, None if replace else False)

    def undo(self, query: str, by: str = "") -> None:
        """Take the last label of a query back; the one before it, if any, counts again.

        Raises:
          ValueError: when there is no label.
        """
        entry = {"query": query, "undo": True, "by": by, "time": time.time()}
        self._append(entry, True)

    def _append(self, entry: dict[str, Any], labelled: bool | None) -> None:
        if not self._file(entry["query"]).exists():
            raise ValueError(f"query: there is no {entry['query']} in {self.path / QUERIES}")
        append(self.path / LABELS, entry, self.schema.options, self.queries, labelled)

    def read_labels(self) -> Labels:
        """Read the labels that count, one per query, and count the lines that cannot be used.

        Raises:
          ValueError: naming file and line, unless such lines are skipped.
        """
        return read(self.path / LABELS, self.schema.options, self.queries, self.on_bad)

    def labels(self) -> list[Label]:
        """Return the labels that count, with a warning when there are lines that cannot be used.

        Those of skipped queries have no rank; see `read_labels`.
        """
        found, bad = self.read_labels()
        if bad:
            warnings.warn(f"{self.path / LABELS}: lines not used: {bad}", stacklevel=2)
        return found

    def pending(self) -> list[str]:
        """List the queries that are neither labelled nor skipped, oldest first."""
        answered = {label.query for label in self.labels()}
        return [query for query in self.queries() if query not in answered]

    def load(self, ids: Sequence[str] | None = None) -> Comparisons:
        """Read labelled queries to learn from.

        Args:
          ids: of these queries, in this order; None = all that have a label and were not
            skipped, oldest first.

        Raises:
          ValueError: for an id that comes twice or has no label, for more than memory, or,
            unless such things are skipped, for a line or file that cannot be used.
        """
        labels, bad = self.read_labels()
        found = {label.query: label for label in labels if label.rank is not None}
        wanted = sorted(found) if ids is None else list(ids)
        times = collections.Counter(wanted)
        odd = [query for query in times if query not in found or times[query] > 1]
        if odd:
            raise ValueError(f"ids: {odd[:10]} of {self.path} have no label, or come twice")
        specs = files.array_specs(self.schema)
        size, free = len(wanted) * sum(spec.limit for spec in specs), host_memory()
        if size > free:
            raise ValueError(
                f"{self.path}: {len(wanted)} queries need {readable(size)}, but only "
                f"{readable(free)} of memory are available; load fewer ids"
            )
        arrays = {s.name: np.zeros((len(wanted), *map(int, s.shape)), s.dtype) for s in specs}  # type: ignore
        counts, kept = collections.Counter(bad), []
        for query in wanted:
            try:
                columns = files.read_arrays(self._file(query), self.schema, shown=False)
            except BadFileError as error:
                if self.on_bad == "raise":
                    raise
                counts[error.reason] += 1
                continue
            for name, array in columns.items():
                arrays[name][len(kept)] = array
            kept.append(query)
        ranks = [found[query].rank for query in kept]
        return Comparisons(
            files.transition(self.schema, {name: x[: len(kept)] for name, x in arrays.items()}),
            np.array(ranks, np.int32).reshape(len(kept), self.schema.options),
            np.array([found[query].margin for query in kept], np.float32),
            kept,
            dict(counts),
        )

    def _file(self, query: str) -> Path:
        if not isinstance(query, str) or not ID.fullmatch(query):
            raise ValueError(f"query: got {query!r:.60}, expected 8 digits")
        return self.path / QUERIES / f"{query}.npz"
