"""`mbrl collect`, and training on what it wrote without an environment."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mbrl.training import checkpoint
from scripts import model_env, runs
from tests.scripts.test_train import TINY, call

pytestmark = pytest.mark.usefixtures("same_versions")

ENV = ["--env", "device/Pendulum"]
RUN = [*ENV, "--steps", "60", "--num-seeds", "2", "--eval-episodes", "0", *TINY]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    assert call("train", "pets", *RUN, "--out", str(folder / "run")) == 0
    assert call("collect", str(folder / "run"), "--out", str(folder / "new" / "data.npz")) == 0
    return folder / "new" / "data.npz"


def offline(data: Path, out: Path, steps: int, *more: str) -> int:
    argv = [*ENV, "--data", str(data), "--steps", str(steps), "--log-every", "1", *TINY]
    return call("train", "pets", *argv, "--out", str(out), *more)


def digest(out: Path) -> str:
    restored: Any = runs.restore(runs.load(out), out)
    return checkpoint.digest(restored.tree)


def test_the_file_holds_the_records_of_every_seed(data):
    with np.load(data) as file:
        arrays = dict(file)
    assert arrays["reward"].shape == (2, 60)
    assert arrays["obs"].shape == (2, 60, 3)
    np.testing.assert_array_equal(arrays["is_first"][:, 0], True)
    assert not np.array_equal(arrays["obs"][0], arrays["obs"][1])
    np.testing.assert_allclose(np.square(arrays["obs"][..., :2]).sum(-1), 1.0, rtol=1e-5)


def test_fresh_steps_are_those_of_the_agent_as_it_was_saved(data, tmp_path, capsys):
    run, out = str(data.parent.parent / "run"), tmp_path / "fresh.npz"
    argv = ["collect", run, "--out", str(out), "--steps", "410", "--num-envs", "2"]
    assert call(*argv, "--mode", "random") == 0
    assert "820 records, 4 ended episodes" in capsys.readouterr().out
    with np.load(out) as file:
        assert file["reward"].shape == (4, 205)
        assert 1.0 < file["action"].std() < 1.3  # uniform in [-2, 2]
        np.testing.assert_array_equal(file["is_last"].sum(1), 1)


def test_a_model_predicts_what_an_agent_earns_and_others_train_inside_of_it(
    data, capsys, monkeypatch
):
    run = str(data.parent.parent / "run")
    assert call("evaluate", run, "--in-model", run, "--episodes", "3", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert -2500 < found["return_mean"] < 0
    assert set(found["predicted"]["seeds"]) == {"0", "1"}
    for seed in found["predicted"]["seeds"].values():
        assert len(seed["members"]) == 2
        assert np.isclose(seed["return_mean"], np.mean(seed["members"]))
        assert seed["members_std"] > 0.0

    seen: dict[str, Any] = {}

    class Stay:
        """An agent of another package, that has learned not to move."""

        def __init__(self, policy: str, env: Any, **settings: Any) -> None:
            seen.update(env=env, seed=settings["seed"])

        def learn(self, steps: int) -> Any:
            obs, _ = seen["env"].reset(seed=0)
            seen.update(steps=steps, first=obs)
            return self

        def predict(self, obs: Any, deterministic: bool) -> Any:
            return np.zeros(1, np.float32), None

    other = types.SimpleNamespace(SAC=Stay)
    monkeypatch.setitem(sys.modules, "stable_baselines3", other)
    written = model_env.study(model_env.ModelEnvConfig(run, "", "sac", 7, 2, 5))
    assert (seen["steps"], seen["seed"]) == (7, 5)
    with np.load(data) as file:
        starts = file["obs"][0][file["is_first"][0]]
    assert np.isclose(seen["first"], starts).all(-1).any()
    inside, outside, blind = written["returns"].values()
    assert len(inside["returns"]) == 2
    assert outside["mean"] != inside["mean"]
    assert all(x["mean"] < 0 for x in (outside, blind))


def test_a_run_on_records_resumes_and_is_evaluated_without_them(data, tmp_path, capsys):
    copy = Path(shutil.copy(data, tmp_path / "data.npz"))
    assert offline(copy, tmp_path / "whole", 3, "--eval-episodes", "2") == 0
    found = json.loads((tmp_path / "whole" / "evaluation.json").read_text())
    assert found["step"] == 3
    assert all(-2500 < r < 0 for r in found["seeds"]["0"]["returns"])

    assert offline(copy, tmp_path / "parts", 2, "--eval-episodes", "0") == 0
    assert offline(copy, tmp_path / "parts", 3, "--eval-episodes", "2", "--override-config") == 0
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")

    copy.unlink()
    capsys.readouterr()
    assert call("evaluate", str(tmp_path / "whole"), "--episodes", "1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["step"] == 3


@pytest.mark.fault
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "pets", *ENV, "--data", "nothing.npz"], ["nothing.npz", "mbrl collect"]),
        (["train", "pets", "--env", "device/CartPole", "--data", "DATA"], ["obs", "(2, 60, 4)"]),
        (["collect", "nothing", "--out", "x.npz"], ["nothing", "config.json"]),
        (["collect", "nothing", "--out", "x.csv"], ["--out", "x.csv", ".npz"]),
        (["collect", "nothing"], ["--out", "--to-minari"]),
        (["collect", "nothing", "--out", "x.npz", "--steps", "-1"], ["--steps", "-1"]),
    ],
)
def test_what_cannot_work_is_said_in_one_line(argv, words, data, tmp_path, capsys):
    argv = [str(data) if word == "DATA" else word for word in argv]
    tail = ["--out", str(tmp_path / "x")] if argv[0] == "train" else []
    assert call(*argv, *tail) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    assert all(word in text for word in words), text
    assert not (tmp_path / "x").exists()
