"""People answer while a run goes on: what they say is what it learns from."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mbrl.training.comparison_store import COMPARISONS, ComparisonStore
from mbrl.training.metrics import read
from scripts import runs
from scripts.cli import main

pytestmark = pytest.mark.usefixtures("same_versions")

TASK = ["--env", "device/Pendulum", "--num-envs", "4", "--eval-episodes", "0", "--log-every", "64",
        "--rollout", "64", "--epochs", "1", "--minibatches", "1", "--hidden", "8"]  # fmt: skip
ASK = ["--preferences.labels", "9", "--preferences.sessions", "3", "--preferences.ask-every", "64",
       "--preferences.segment", "4", "--preferences.members", "2", "--preferences.hidden", "8",
       "--preferences.updates", "5", "--preferences.teacher", "people"]  # fmt: skip


class Person(threading.Thread):
    """Prefers the segment that stays more upright, and answers until told to stop."""

    def __init__(self, out: Path, most: int = 1000) -> None:
        super().__init__(daemon=True)
        self.folder, self.most, self.done = out / COMPARISONS, most, threading.Event()
        self.given: dict[str, list[int]] = {}

    def run(self) -> None:
        while not self.done.is_set():
            time.sleep(0.05)
            if not (self.folder / "schema.json").exists():
                continue
            store = ComparisonStore.open(self.folder)
            for query in store.pending()[: self.most - len(self.given)]:
                upright: Any = store.read_query(query).segments.obs[..., 0].sum(-1)
                rank = [0, 1] if upright[0] >= upright[1] else [1, 0]
                store.add_label(query, rank, by="test")
                self.given[query] = rank


def train(out: Path, *more: str) -> int:
    return main(["train", "ppo", *TASK, *ASK, "--out", str(out), *more])


def learner(out: Path) -> Any:
    restored = runs.restore(runs.load(out), out)
    assert restored is not None
    return runs.learner_of(restored.tree)


def test_a_run_waits_for_its_answers_and_learns_from_them(tmp_path, capsys):
    out = tmp_path / "run"
    person = Person(out)
    person.start()
    assert train(out, "--steps", "320") == 0
    person.done.set()
    person.join()
    assert len(person.given) == 9
    assert f"answers: mbrl label {out}" in capsys.readouterr().err
    buffer = learner(out).agent.comparisons
    assert int(buffer.size[0]) == 9
    wanted = [person.given[query] for query in sorted(person.given)]
    np.testing.assert_array_equal(buffer.rank[0], wanted)
    upright = np.asarray(buffer.segments.obs[0, ..., 0]).sum(-1)
    assert (np.argmax(upright, 1) == np.argmin(wanted, 1)).all()
    labels = [line["preferences/labels"] for line in read(out) if "preferences/labels" in line]
    assert labels[0] == 0  # nobody had been asked
    assert labels[-1] == 9
    # People are not shown what they are to judge.
    store = ComparisonStore.open(out / COMPARISONS)
    assert all(not store.read_query(q).segments.reward.any() for q in store.queries())


def test_a_run_that_does_not_wait_goes_on_without_answers_and_takes_them_later(tmp_path):
    out = tmp_path / "run"
    assert train(out, "--steps", "192", "--no-wait-for-labels") == 0
    store = ComparisonStore.open(out / COMPARISONS)
    asked = len(store.pending())
    assert 3 <= asked <= 9
    assert int(learner(out).agent.comparisons.size[0]) == 0
    for query in store.pending():
        store.add_label(query, [0, 1], by="test")
    store.undo(store.queries()[0])
    assert train(out, "--steps", "320", "--no-wait-for-labels", "--override-config") == 0
    agent = learner(out).agent
    assert int(agent.comparisons.size[0]) == asked - 1
    np.testing.assert_array_equal(agent.comparisons.rank[0, : asked - 1], [[0, 1]] * (asked - 1))


def test_nothing_is_asked_twice_after_a_stop(tmp_path):
    out = tmp_path / "run"
    often = ["--save-every", "64", "--no-wait-for-labels"]
    assert train(out, "--steps", "128", *often) == 0
    # As if it had been killed right after the save in which the first questions were asked.
    saves = sorted((out / "checkpoints").glob("step_*"))
    assert [save.name for save in saves] == ["step_000000064", "step_000000128"]
    shutil.rmtree(saves[-1])
    assert train(out, "--steps", "256", *often, "--override-config") == 0
    store = ComparisonStore.open(out / COMPARISONS)
    asked = [store.read_query(query).segments.obs.tobytes() for query in store.queries()]
    assert len(asked) == len(set(asked)) >= 3


def test_what_is_answered_changes_the_reward(tmp_path):
    states = []
    for flipped in (False, True):
        out = tmp_path / f"run-{flipped}"
        assert train(out, "--steps", "128", "--no-wait-for-labels") == 0
        store = ComparisonStore.open(out / COMPARISONS)
        assert store.pending()
        for query in store.pending():
            store.add_label(query, [1, 0] if flipped else [0, 1])
        assert train(out, "--steps", "256", "--no-wait-for-labels", "--override-config") == 0
        states.append(learner(out).agent.reward.weights)
    first, second = (np.concatenate([x.ravel() for x in _leaves(s)]) for s in states)
    assert (first != second).any()


def _leaves(tree: Any) -> list[np.ndarray]:
    return [tree] if not isinstance(tree, dict) else [x for v in tree.values() for x in _leaves(v)]


def test_several_seeds_cannot_share_the_people(tmp_path, capsys):
    assert train(tmp_path / "run", "--steps", "64", "--num-seeds", "2") == 2
    assert "--num-seeds: got 2" in capsys.readouterr().err


def test_settings_of_preferences_are_part_of_a_run(tmp_path, capsys):
    out = tmp_path / "run"
    assert train(out, "--steps", "64", "--no-wait-for-labels") == 0
    saved = json.loads((out / "config.json").read_text())["preferences"]
    assert (saved["labels"], saved["teacher"], saved["segment"]) == (9, "people", 4)
    assert train(out, "--steps", "64", "--preferences.error", "0.2") == 2
    assert "preferences.error: 0.1 -> 0.2" in capsys.readouterr().err


def test_episodes_and_evaluations_have_the_reward_of_the_environment(tmp_path):
    out = tmp_path / "run"
    # Whole numbers per step, and episodes of 200 of them: nothing that heads predict is like that.
    task = ["--env", "device/CartPoleFixed", "--steps", "832", "--eval-episodes", "2"]
    assert train(out, *task, "--preferences.teacher", "oracle", "--log-every", "64") == 0
    lines = list(read(out))
    learned = [line["preferences/reward"] for line in lines if "preferences/reward" in line]
    assert any(value % 1.0 for value in learned)
    played = [line["episode_return"] for line in lines if "episode_return" in line]
    judged = json.loads((out / "evaluation.json").read_text())["seeds"]["0"]["returns"]
    assert len(played) >= 4
    assert len(judged) == 2
    assert all(value % 1.0 == 0.0 and 0 < value <= 200 for value in [*played, *judged])
