"""Faults that a training command meets in its own process: F2, F3, F5, F8 to F12, F15, F19."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mbrl.training import checkpoint, run_directory, save_files
from mbrl.training.metrics import read
from scripts import alarms, runs
from scripts import train as job
from tests.faults import tasks
from tests.faults.commands import copied, digest, saves, train

pytestmark = [pytest.mark.fault, pytest.mark.usefixtures("same_versions")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("faults") / "whole"
    assert train(out) == 0
    assert saves(out) == ["step_000000050", "step_000000060"]
    return out


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, int], None]:
    def request(kind: str, step: int) -> None:
        asked = {"kind": kind, "step": step, "once": str(tmp_path / f"{kind}-{step}")}
        monkeypatch.setenv(tasks.REQUEST, json.dumps(asked))

    return request


def state_of(out: Path) -> Any:
    restored = runs.restore(runs.load(out), out)
    assert restored is not None
    return restored.tree["learner"]


def finite(tree: Any) -> bool:
    leaves = [x for x in jax.tree.leaves(tree) if jax.numpy.issubdtype(x.dtype, np.floating)]
    return bool(leaves) and all(np.isfinite(x).all() for x in leaves)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_f2_a_signal_saves_and_the_same_command_goes_on(name, whole, fault, tmp_path, capsys):
    fault(name, 32)  # in the middle of a cycle, and of an interval
    out = tmp_path / "run"
    assert train(out) == 75
    text = capsys.readouterr().err
    (stopped,) = saves(out)[-1:]
    assert f"stopped at step {int(stopped[5:])}, saved (exit code 75); resume with: " in text
    assert "mbrl train pets --out" in text
    assert stopped not in ("step_000000030", "step_000000040")
    assert train(out) == 0
    assert f"resuming {out} at step {int(stopped[5:])} of 60" in capsys.readouterr().err
    assert digest(out) == digest(whole)
    steps = [line["step"] for line in read(out) if "model/loss" in line]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("place", ["host", "disk"])
def test_f2_a_run_with_its_replay_elsewhere_goes_on(place, whole, fault, tmp_path):
    fault("SIGTERM", 32)
    out = tmp_path / "run"
    assert train(out, "--replay", place) == 75
    assert not (out / runs.REPLAY).exists()
    if place == "disk":  # as a kill would leave it
        (out / runs.REPLAY).mkdir()
        (out / runs.REPLAY / "leaf_000.npy").write_bytes(b"not ours any more")
    assert train(out, "--replay", place) == 0
    assert not (out / runs.REPLAY).exists()
    assert digest(out) == digest(whole)


def test_f2_a_stop_that_cannot_save_says_so(fault, tmp_path, capsys, monkeypatch):
    def full(*args: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    fault("SIGTERM", 32)
    assert train(tmp_path / "run") == 75
    text = capsys.readouterr().err
    assert re.search(r"warning: step \d+ is not saved \(No space", text)
    assert re.search(r"stopped at step \d+, NOT saved after step 0 \(exit code 75\); resume", text)


def test_f19_an_evaluation_that_fails_leaves_the_run_whole(tmp_path, capsys, monkeypatch, whole):
    def broken(*args: Any) -> None:
        raise RuntimeError("no display")

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(runs, "evaluate", broken)
        assert train(out, "--eval-episodes", "1") == 0
    assert "warning: evaluation failed (RuntimeError: no display)" in capsys.readouterr().err
    assert digest(out) == digest(whole)
    assert train(out, "--eval-episodes", "1") == 0  # now it is made up for
    assert len(json.loads((out / job.EVALUATION).read_text())["seeds"]["0"]["returns"]) == 1


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


DAMAGE = {"flipped": flip, "truncated": truncate, "deleted": Path.unlink}


@pytest.mark.parametrize("name", DAMAGE)
def test_f3_a_damaged_save_is_named_and_the_one_before_is_used(name, whole, tmp_path, capsys):
    out = copied(whole, tmp_path / "run")
    newest = out / runs.CHECKPOINTS / "step_000000060"
    files = [path for path in newest.rglob("*") if path.is_file() and path.name != "manifest.json"]
    DAMAGE[name](max(files, key=lambda path: path.stat().st_size))
    with pytest.warns(checkpoint.CheckpointWarning, match=r"damaged save .*step_000000060.*before"):
        assert train(out) == 0
    assert "at step 50 of 60" in capsys.readouterr().err
    assert digest(out) == digest(whole)


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (["--learning-rate", "0.5"], "config.learning_rate: 0.001 -> 0.5"),
        (["--planner.horizon", "4"], "config.planner.horizon: 3 -> 4"),
        (["--seed", "1"], "seeds: [0] -> [1]"),
        (["--env", "CartPole-v1"], "env: tests.faults.tasks:Cart -> CartPole-v1"),
        (["--on-bad", "drop"], "on_bad: raise -> drop"),
    ],
)
def test_f5_other_settings_are_refused_by_name(flags, field, whole, tmp_path, capsys):
    out = copied(whole, tmp_path / "run")
    for more in ([], ["--override-config"]):
        assert train(out, *flags, *more) == 2
        assert field in capsys.readouterr().err
    assert (out / "config.json").read_bytes() == (whole / "config.json").read_bytes()


def test_f5_harmless_settings_may_change_when_asked(whole, tmp_path, capsys):
    out = copied(whole, tmp_path / "run")
    assert train(out, "--steps", "70") == 2
    assert "steps: 60 -> 70" in capsys.readouterr().err
    assert train(out, "--steps", "70", "--override-config") == 0
    assert saves(out)[-1] == "step_000000070"


def test_f5_other_versions_are_refused(whole, tmp_path, capsys, monkeypatch):
    out = copied(whole, tmp_path / "run")
    monkeypatch.setattr(run_directory, "versions", lambda: {"python": "4"})
    assert train(out) == 2
    assert "versions.python: 3 -> 4" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "key"), [("reward", "reward"), ("observation", "speed")])
def test_f8_a_bad_number_is_named_and_ends_the_run(kind, key, fault, tmp_path, capsys):
    fault(kind, 12)
    out = tmp_path / "run"
    assert train(out) == 2
    text = capsys.readouterr().err
    # 12 calls of step, and one record of the reset after the tenth.
    assert "Cart, environment 0, step 13" in text
    assert key in text
    assert "nan" in text.lower()
    assert saves(out) == ["step_000000010"]
    assert finite(state_of(out))


@pytest.mark.parametrize("kind", ["reward", "observation"])
def test_f8_a_bad_number_is_dropped_on_request(kind, fault, tmp_path):
    fault(kind, 12)
    out = tmp_path / "run"
    assert train(out, "--on-bad", "drop") == 0
    learner = state_of(out)
    assert finite(learner.agent)
    assert finite(learner.ring)
    assert int(learner.ring.size[0]) == 40


def test_f9_a_run_that_only_skips_updates_is_stopped(tmp_path, capsys, monkeypatch):
    # The first step of such a size throws the weights so far that every later loss overflows.
    monkeypatch.setattr(alarms, "MAX_SKIPPED", 30)
    out = tmp_path / "run"
    assert train(out, "--learning-rate", "1e30") == 2
    text = capsys.readouterr().err
    assert "updates had gradients that are not finite and were skipped" in text
    assert "lower the learning rate" in text
    found = json.loads((out / "diagnostics.json").read_text())
    assert found["step"] == 20
    assert float(found["model/skipped_in_a_row"][0]) >= 30
    assert not (out / "run.lock").exists()


def test_f10_an_observation_of_another_shape(fault, tmp_path, capsys):
    fault("shape", 7)
    assert train(tmp_path / "run", "--on-bad", "drop") == 2
    text = capsys.readouterr().err
    assert "Cart, environment 0, step 7" in text
    assert "speed" in text
    assert "(1,)" in text
    assert "(3,)" in text


def test_f11_a_second_run_in_the_same_directory(whole, tmp_path, capsys):
    out = copied(whole, tmp_path / "run")
    with run_directory.Lock(out):
        assert train(out) == 2
        assert "process" in capsys.readouterr().err
    assert train(out) == 0


def craft(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest of a save, checksum included, as an attacker could."""
    body = save_files.unseal((folder / "manifest.json").read_bytes().decode())
    change(body)
    (folder / "manifest.json").write_text(save_files.seal(body))


def outside(body: dict[str, Any]) -> None:
    body["files"]["../../../x"] = {"size": 1, "sha256": "0" * 64}


def enormous(body: dict[str, Any]) -> None:
    name = next(iter(body["files"]))
    body["files"][name]["size"] = 2**60


def wide(body: dict[str, Any]) -> None:
    body["leaves"][0]["shape"] = [2**40]


@pytest.mark.parametrize("change", [outside, enormous, wide])
def test_f12_a_crafted_manifest(change, whole, tmp_path, capsys):
    out = copied(whole, tmp_path / "run")
    (out / "x").write_text("a file that the manifest points at")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save_files, "read_arrays", lambda *args: pytest.fail("it was read"))
        for folder in (out / runs.CHECKPOINTS).iterdir():
            craft(folder, change)
        code = expect_refusal(out)
    assert code == 2
    assert "step_0000000" in capsys.readouterr().err
    assert (out / "x").read_text() == "a file that the manifest points at"


def expect_refusal(out: Path) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", checkpoint.CheckpointWarning)
        return train(out)
