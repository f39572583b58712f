"""People as the teacher of a run: its queries go to a store, their answers come back from it."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agents.preferences import PreferencesState
from mbrl.preferences import comparisons
from mbrl.training.comparison_files import BadFileError
from mbrl.training.comparison_store import COMPARISONS, ComparisonStore, Schema
from mbrl.training.learner import Learner, Report
from mbrl.types import EnvSpec, Transition
from scripts import runs

PAUSE = 0.5
"""Seconds between two looks for answers."""


class People:
    """Asks people what an agent with the teacher 'people' wants to know."""

    def __init__(
        self,
        run: Path,
        spec: EnvSpec,
        length: int,
        steps: int,
        wait: bool,
        should_stop: Callable[[], bool],
    ) -> None:
        """Open the store of a run, or make it.

        Args:
          run: folder of the run.
          spec: of its task.
          length: transitions per segment.
          steps: of the run, after which nothing is asked.
          wait: for the answers to all that has been asked, before training goes on.
          should_stop: asked while waiting.

        Raises:
          ValueError: when there is a store with other spaces or segments.
        """
        schema = Schema(spec.observation, spec.action, options=2, length=length)
        self.store = ComparisonStore.create_or_open(run / COMPARISONS, schema)
        self._run, self._steps, self._wait, self._should_stop = run, steps, wait, should_stop
        self._known: list[tuple[str, Any]] = []

    def answer(self, report: Report) -> Learner | None:
        """Write the queries of a report, and return its learner with all answers there are.

        Returns:
          The learner to go on with; None where nothing has changed, or at the end.
        """
        if report.step >= self._steps:
            return None
        state: PreferencesState = report.learner.agent
        asked = int(state.pending.size[0])
        pending = jax.tree.map(lambda x: np.asarray(x[0]), state.pending.segments)
        for index in range(asked):
            self.store.add_query(_query(pending, index))
        if self._wait:
            self._wait_for_answers()
        labels = [label for label in self.store.labels() if label.rank is not None]
        answers = [(label.query, label.rank) for label in labels]
        if not asked and answers == self._known:
            return None
        self._known = answers
        fresh = state._replace(
            pending=state.pending._replace(size=jnp.zeros_like(state.pending.size)),
            comparisons=self._comparisons(state.comparisons),
        )
        return report.learner._replace(agent=fresh)

    def _wait_for_answers(self) -> None:
        waiting = len(self._open())
        if waiting and not self._should_stop():
            command = f"mbrl label {shlex.quote(str(self._run))}"
            print(f"waiting for {waiting} answers: {command}", file=sys.stderr, flush=True)
        while self._open() and not self._should_stop():
            time.sleep(PAUSE)

    def _open(self) -> list[str]:
        """List the queries that can still be answered: the page does not show damaged ones."""
        return [query for query in self.store.pending() if self._is_whole(query)]

    def _is_whole(self, query: str) -> bool:
        try:
            self.store.read_query(query)
        except BadFileError:
            return False
        return True

    def _comparisons(self, old: comparisons.Comparisons) -> comparisons.Comparisons:
        """Fill the buffer anew, [1, Q, ...]: what was taken back is gone from it."""
        segments, rank, margin, *_ = self.store.load()
        example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[2:], x.dtype), old.segments)
        empty = comparisons.empty(example, old.rank.shape[1])
        keep = jnp.ones(len(rank), bool)
        filled, _ = comparisons.add(empty, segments, jnp.asarray(rank), keep, jnp.asarray(margin))
        return jax.tree.map(lambda x: x[None], filled)


def exchange(
    reports: Generator[Report, Learner | None, None], people: People | None
) -> Iterator[Report]:
    """Iterate over the reports of a driver; people answer each of them, if there are any.

    What is saved of a report has the answers in it already, so that nothing is asked twice.
    """
    try:
        report = next(reports)
        while True:
            answered = None if people is None else people.answer(report)
            yield report if answered is None else _with_learner(report, answered)
            report = reports.send(answered)
    except StopIteration:
        return


def _with_learner(report: Report, learner: Learner) -> Report:
    def snapshot() -> Any:
        return runs.with_learner(report.snapshot(), learner)

    return report._replace(learner=learner, snapshot=snapshot)


def _query(pending: Transition, index: int) -> Transition:
    """Take one query out of many; the true reward is not for people to see."""
    cut = jax.tree.map(lambda x: x[index], pending)
    shape = jax.tree.leaves(cut.action)[0].shape[:2]
    nothing: Any = np.zeros(shape, np.float32)
    never: Any = np.zeros(shape, bool)
    return cut._replace(reward=nothing, is_terminal=never)
