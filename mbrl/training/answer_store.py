"""Questions of text for people, and the rankings that they give.

The questions are a file of JSON lines, each with a `prompt` and K `answers`. Beside it lies a
folder with what was said: a copy of the questions, `labels.jsonl` in the form of
`comparison_labels` (query `00000012` is row 12), and `rankings.jsonl`, which is made of both and
read like any other data set of rankings.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mbrl.text_rows import TextRow
from mbrl.training import comparison_labels
from mbrl.training.comparison_labels import Labels
from mbrl.training.text_data import read_text, write_text


class Question(NamedTuple):
    """One prompt with answers that are to be ranked.

    Attributes:
      id: of the question.
      prompt: what is answered.
      answers: K of them.
    """

    id: str
    prompt: str
    answers: tuple[str, ...]


class AnswerStore:
    """Questions in a file and what was said of them; several processes may use it.

    Attributes:
      path: folder of the labels.
      options: K answers of each question.
    """

    def __init__(self, questions: Path) -> None:
        """Open the questions of a file, and make the folder of their labels if there is none.

        Raises:
          ValueError: naming file and line of what is no question, or has another number of
            answers than the first, or when the labels are those of other questions.
        """
        self._rows = read_text(questions, "questions").rows
        self.options = len(self._rows[0].answers)
        for row in self._rows:
            if len(row.answers) != self.options:
                raise ValueError(
                    f"{row.where}: got {len(row.answers)} answers, expected {self.options} as in "
                    "the first row; write a file for each number"
                )
        self.path = questions.with_suffix(".labels")
        copy = self.path / "questions.jsonl"
        if not copy.exists():
            write_text(copy, "questions", self._rows)
        elif [_content(x) for x in read_text(copy, "questions").rows] != [
            _content(x) for x in self._rows
        ]:
            raise ValueError(
                f"{self.path}: its labels are those of other questions than {questions} has now; "
                "give the new questions a file of another name"
            )

    def queries(self) -> list[str]:
        """List the ids of all questions."""
        return [f"{i:08d}" for i in range(len(self._rows))]

    def read_query(self, query: str) -> Question:
        """Return a question."""
        row = self._rows[int(query)]
        return Question(query, row.prompt, row.answers)

    def add_label(
        self, query: str, rank: Sequence[int] | None, by: str = "", replace: bool = True
    ) -> None:
        """Write a label; it is on the disk when this returns.

        Args:
          query: id of what is answered.
          rank: K ranks, 0 = best, equal = tied; None = skipped.
          by: who answers.
          replace: whether it may take the place of a label that the question has.

        Raises:
          ValueError: naming what does not fit, or when there is a label.
        """
        rank = None if rank is None else list(rank)
        entry = {"query": query, "rank": rank, "margin": 0.0, "by": by, "time": time.time()}
        self._append(entry, None if replace else False)

    def undo(self, query: str, by: str = "") -> None:
        """Take the last label of a question back.

        Raises:
          ValueError: when there is none.
        """
        self._append({"query": query, "undo": True, "by": by, "time": time.time()}, True)

    def read_labels(self) -> Labels:
        """Read the labels that count; lines that cannot be used are counted."""
        return comparison_labels.read(self._file, self.options, self.queries, "skip")

    def write_rankings(self) -> int:
        """Write `rankings.jsonl`, with the questions that have an answer.

        Returns:
          Their number; nothing is written for 0.
        """
        ranks = {x.query: x.rank for x in self.read_labels().labels if x.rank is not None}
        rows = [self._rows[int(i)]._replace(rank=ranks[i]) for i in self.queries() if i in ranks]
        if rows:
            write_text(self.path / "rankings.jsonl", "rankings", rows)
        return len(rows)

    @property
    def _file(self) -> Path:
        return self.path / "labels.jsonl"

    def _append(self, entry: dict[str, object], labelled: bool | None) -> None:
        comparison_labels.append(self._file, entry, self.options, self.queries, labelled)


def _content(row: TextRow) -> TextRow:
    return row._replace(where="")
