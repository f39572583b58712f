"""`mbrl train` and `mbrl evaluate`, called in this process on a few steps of a real task."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import gymnasium as gym
import jax
import numpy as np
import pytest

from agents import AGENTS
from agents.pets import PETSConfig
from mbrl.training import checkpoint
from mbrl.training.learner import DriverConfig, start_learners
from mbrl.training.metrics import read
from scripts import config_json, runs, train
from scripts.cli import main

pytestmark = pytest.mark.usefixtures("same_versions")

TINY = [
    "--members", "2", "--elites", "2", "--hidden", "8", "--batch-size", "8", "--max-epochs", "1",
    "--random-steps", "20", "--train-every", "20", "--capacity", "100",
    "--planner.horizon", "3", "--planner.population", "8", "--planner.iterations", "2",
    "--planner.particles", "2", "--planner.elites", "2",
]  # fmt: skip
RUN = ["--env", "CartPole-v1", "--steps", "60", "--seed", "3", "--log-every", "20",
       "--save-every", "20", "--eval-episodes", "3", *TINY]  # fmt: skip


def call(*argv: str) -> int:
    """Return the exit code, also when the command line itself was wrong."""
    try:
        return main(list(argv))
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "cartpole"
    assert call("train", "pets", *RUN, "--out", str(out)) == 0
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def evaluation(out: Path) -> dict[str, Any]:
    return json.loads((out / "evaluation.json").read_text())


def evaluate(capsys: Any, *argv: str) -> dict[str, Any]:
    """Return the one object on stdout; anything else there fails."""
    capsys.readouterr()
    assert call("evaluate", *argv, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_writes_its_settings_metrics_saves_and_evaluation(finished):
    config = json.loads((finished / "config.json").read_text())
    assert (config["agent"], config["env"], config["seeds"]) == ("pets", "CartPole-v1", [3])
    assert (config["steps"], config["num_envs"], config["save_every"]) == (60, 1, 20)
    assert config["config"]["members"] == 2
    assert config["config"]["planner"]["population"] == 8
    assert config["config"]["planner"]["noise_beta"] == 0.5  # the preset of CartPole-v1
    assert config["versions"] == {"python": "3"}
    lines = read(finished)
    losses = [line["step"] for line in lines if "model/loss" in line]
    assert losses == [20, 40, 60]
    assert all("episode_return" in line for line in lines if "episode_length" in line)
    returns = evaluation(finished)["seeds"]["3"]["returns"]
    assert len(returns) == 3
    assert all(r == int(r) and 1 <= r <= 500 for r in returns)
    saves = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert saves == ["step_000000040", "step_000000060"]
    assert not (finished / "run.lock").exists()


def test_a_finished_run_is_left_as_it_is(copy, capsys):
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file() and "events" not in p.name}
    assert call("train", "pets", *RUN, "--out", str(copy)) == 0
    text = capsys.readouterr().err
    assert "step 60 of 60" in text
    assert "is finished" in text
    after = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file() and "events" not in p.name}
    assert before == after


def test_an_evaluation_that_was_lost_is_made_again(copy):
    old = evaluation(copy)
    (copy / "evaluation.json").unlink()
    assert call("train", "pets", *RUN, "--out", str(copy)) == 0
    assert evaluation(copy)["seeds"] == old["seeds"]


def test_more_steps_go_on_from_the_end(copy, finished, tmp_path, capsys):
    longer = [*RUN[:3], "90", *RUN[4:]]
    assert call("train", "pets", *longer, "--out", str(copy)) == 2
    assert "steps: 60 -> 90" in capsys.readouterr().err
    assert call("train", "pets", *longer, "--out", str(copy), "--override-config") == 0
    other = tmp_path / "whole"
    assert call("train", "pets", *longer, "--out", str(other)) == 0
    assert final_digest(copy) == final_digest(other)
    assert evaluation(copy)["seeds"] == evaluation(other)["seeds"]
    assert [line["step"] for line in read(copy) if "model/loss" in line] == [20, 40, 60, 80]


def final_digest(out: Path) -> str:
    restored = runs.restore(runs.load(out), out)
    assert restored is not None
    return checkpoint.digest(restored.tree)


def test_replay_on_a_disk_changes_nothing_else(finished, tmp_path, capsys):
    out = tmp_path / "run"
    assert call("train", "pets", *RUN, "--replay", "disk", "--out", str(out)) == 0
    text = capsys.readouterr().err
    # 100 rows of 4 observations, a reward (float32), an action (int32) and 3 flags; 2 counters.
    ring = 100 * (4 * 6 + 3) + 2 * 4
    assert f"memory: replay {ring / 1024:.1f} KiB in files of {out}/replay, " in text
    assert not (out / "replay").exists()
    assert final_digest(out) == final_digest(finished)
    assert evaluation(out)["seeds"] == evaluation(finished)["seeds"]
    restored = runs.restore(runs.load(out), out)
    assert restored is not None
    assert isinstance(restored.tree["learner"].ring.record.obs, np.ndarray)  # never on a device
    other = evaluate(capsys, str(out), "--episodes", "1", "--env", "device/CartPole")
    assert other["env"] == "device/CartPole"
    for run in (out, finished):
        assert call("collect", str(run), "--out", str(tmp_path / f"{run.name}.npz")) == 0
    with np.load(tmp_path / "run.npz") as a, np.load(tmp_path / "cartpole.npz") as b:
        assert all(np.array_equal(a[name], b[name]) for name in b.files)


@pytest.mark.parametrize("place", ["host", "disk"])
def test_a_run_goes_on_with_its_replay_elsewhere_when_asked(place, copy, tmp_path, capsys):
    longer = [*RUN[:3], "90", *RUN[4:], "--replay", place]
    assert call("train", "pets", *longer, "--out", str(copy)) == 2
    assert f"replay: device -> {place}" in capsys.readouterr().err
    assert call("train", "pets", *longer, "--out", str(copy), "--override-config") == 0
    other = tmp_path / "whole"
    assert call("train", "pets", *longer[:-2], "--out", str(other)) == 0
    assert final_digest(copy) == final_digest(other)
    assert evaluation(copy)["seeds"] == evaluation(other)["seeds"]


def test_evaluate_prints_one_json_object(finished, capsys):
    result = evaluate(capsys, str(finished), "--episodes", "4", "--seed", "7")
    assert result["episodes"] == len(result["returns"]) == 4
    assert (result["env"], result["step"], result["agent"]) == ("CartPole-v1", 60, "pets")
    assert result["return_mean"] == pytest.approx(np.mean(result["returns"]))
    assert result["return_std"] == pytest.approx(np.std(result["returns"]))
    assert min(result["returns"]) <= result["return_iqm"] <= max(result["returns"])
    assert result["seeds"]["3"]["returns"] == result["returns"]


def test_evaluate_restores_everything_that_acts(finished, capsys):
    # Weights, normalization and elites: else these would not be the returns at the end.
    seed = str(3 + runs.EVALUATION_SEED)
    result = evaluate(capsys, str(finished), "--episodes", "3", "--seed", seed)
    assert result["returns"] == evaluation(finished)["seeds"]["3"]["returns"]
    other = evaluate(capsys, str(finished), "--episodes", "3", "--seed", "1")
    assert other["returns"] != result["returns"]


def test_evaluate_as_text(finished, capsys):
    assert call("evaluate", str(finished), "--episodes", "1") == 0
    text = capsys.readouterr().out
    assert "pets on CartPole-v1 after 60 steps" in text
    assert "seed 3: mean" in text


def test_the_end_of_a_run_is_judged_in_the_environment_that_was_asked_for(copy, capsys):
    (copy / "evaluation.json").unlink()
    run = [*RUN, "--out", str(copy), "--eval-env", "device/CartPole"]
    assert call("train", "pets", *run) == 2
    assert "eval_env" in capsys.readouterr().err
    assert call("train", "pets", *run, "--override-config") == 0
    result = evaluation(copy)
    assert result["env"] == "device/CartPole"
    again = evaluate(
        capsys, str(copy), "--episodes", "3", "--env", "device/CartPole", "--seed",
        str(3 + runs.EVALUATION_SEED),
    )  # fmt: skip
    assert result["seeds"]["3"]["returns"] == again["returns"]
    # What was judged elsewhere is not what another environment asks for.
    assert call("train", "pets", *RUN, "--out", str(copy), "--override-config") == 0
    assert evaluation(copy)["env"] == "CartPole-v1"


def test_evaluate_on_another_environment(finished, capsys):
    result = evaluate(capsys, str(finished), "--episodes", "1", "--env", "device/CartPole")
    assert result["env"] == "device/CartPole"
    assert call("evaluate", str(finished), "--env", "Pendulum-v1", "--json") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "--env Pendulum-v1: its observation space" in captured.err
    assert "same spaces" in captured.err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lerning-rate", "1"], ["unknown flag --lerning-rate", "mean --learning-rate", "--env"]),
        (["--planner.horizn", "1"], ["mean --planner.horizon", "--members"]),
        (["--members", "two"], ["--members"]),
        (["--planner.horizon", "0"], ["planner.horizon must be at least 1, got 0"]),
        (["--planner.elites", "900"], ["planner.elites must not exceed", "got 900"]),
        (["--env", "device/Pendulum", "--on-bad", "drop"], ["on_bad", "device/Pendulum", "'drop'"]),
        (
            ["--env", "device/Pendulum", "--replay", "host"],
            ["--replay: got 'host'", "--env device/Pendulum", "expected 'device'", "leave"],
        ),
        (
            ["--data", "x.npz", "--replay", "disk"],
            ["--replay: got 'disk'", "--data", "expected 'device'", "leave"],
        ),
    ],
)
def test_a_command_line_that_is_wrong_exits_with_2(argv, words, capsys, tmp_path):
    assert call("train", "pets", "--out", str(tmp_path / "x"), *argv) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert all(word in text for word in words), text
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--env", "Pendulm-v1"], ["unknown environment 'Pendulm-v1'", "'Pendulum-v1'"]),
        (["--env", "device/Pendulom"], ["device/Pendulum"]),
        (["--eval-env", "device/Pendulom"], ["device/Pendulum"]),
        (["--eval-env", "CartPole-v1"], ["CartPole-v1: its observation space", "same spaces"]),
        (["--num-seeds", "0"], ["--num-seeds: expected at least 1, got 0"]),
        (["--num-envs", "0"], ["num_envs", "got 0"]),
        (["--steps", "0"], ["steps must be at least 1, got 0"]),
        (["--elites", "9"], ["elites must not exceed members, got 9"]),
        (["--planner.risk", "foo"], ["--planner.risk", "foo", "cvar"]),
        # F15: sizes are checked before anything is allocated.
        (["--capacity", str(10**14)], ["replay needs", "TiB", "--capacity"]),
    ],
)
@pytest.mark.fault
def test_settings_that_cannot_work_are_refused_before_the_run_begins(argv, words, capsys, tmp_path):
    assert call("train", "pets", "--out", str(tmp_path / "x"), *argv) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    assert all(word in text for word in words), text
    assert not (tmp_path / "x").exists()


def test_an_unknown_agent_is_refused_with_the_known_ones(capsys):
    assert call("train", "pest", "--env", "CartPole-v1") == 2
    assert f"got 'pest', agents: {', '.join(AGENTS)}" in capsys.readouterr().err
    assert call("train") == 2


def test_evaluate_without_a_run(tmp_path, capsys):
    assert call("evaluate", str(tmp_path)) == 2
    assert "found no config.json" in capsys.readouterr().err


def test_evaluate_before_the_first_save(copy, capsys):
    shutil.rmtree(copy / "checkpoints")
    assert call("evaluate", str(copy)) == 2
    assert "there is no save to evaluate" in capsys.readouterr().err


def test_settings_come_back_from_json():
    config = dataclasses.replace(
        train.settings("pets", RUN)[1], hidden=(4, 5), dtype="bfloat16", penalty=0.5
    )
    text = json.dumps(config_json.to_json(config))
    assert config_json.from_json(type(config), json.loads(text)) == config
    with pytest.raises(ValueError, match=r"\['members'\] are missing or unknown"):
        config_json.from_json(
            type(config), {k: v for k, v in json.loads(text).items() if k != "members"}
        )


def test_targets_beyond_their_bins_are_announced_once(tmp_path, capsys):
    run = ["--env", "device/CartPole", "--steps", "60", "--num-envs", "2", "--log-every", "20",
           "--simulations", "2", "--unroll", "1", "--td-steps", "2", "--batch-size", "2",
           "--random-steps", "20", "--capacity", "100", "--eval-episodes", "0",
           "--model.latent", "4", "--model.hidden", "4", "--model.max-value", "0.5"]  # fmt: skip
    assert call("train", "muzero", *run, "--out", str(tmp_path / "run")) == 0
    told = capsys.readouterr().err
    assert told.count("of the targets of reward or value lie beyond") == 1
    assert "raise --model.max-reward, or --model.max-value" in told


def test_a_video_that_cannot_be_made_is_refused_before_the_episodes(finished, capsys, monkeypatch):
    def missing(env: Any) -> Any:
        raise gym.error.DependencyNotInstalled("pygame is not installed")

    monkeypatch.setattr(runs, "evaluate", None)  # whoever plays an episode calls it
    monkeypatch.setattr("gymnasium.envs.classic_control.CartPoleEnv.render", missing)
    assert call("evaluate", str(finished), "--video", "film.gif") == 2
    assert 'pip install "modelrl[video]"' in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert call("evaluate", str(finished), "--video", "film.mp4") == 2
    assert "film.mp4 needs imageio" in capsys.readouterr().err


@pytest.mark.fault
def test_the_memory_of_replay_and_agent_is_known_before_it_is_taken(monkeypatch):  # F15
    config = PETSConfig(members=2, elites=2, hidden=(8,), capacity=100)
    driver = DriverConfig(10, seeds=(0, 1, 2))
    job = runs.build("pets", config, "device/Pendulum", driver)
    # Rows of 3 observations, an action and a reward in float32 and 3 flags, two counters.
    learner = start_learners(job.factory, job.spec, driver, {})
    replay = 3 * (100 * (4 * 5 + 3) + 2 * 4)
    agent = sum(leaf.nbytes for leaf in jax.tree.leaves(learner.agent))
    expected = (
        f"memory: replay {replay / 1024:.1f} KiB, agent with optimizer {agent / 1024:.1f} KiB"
    )
    assert runs.describe_memory(job, Path("x")) == expected
    monkeypatch.setattr("mbrl.memory.host_memory", lambda: replay + agent - 1)
    monkeypatch.setattr("mbrl.memory.device_memory", lambda: None)
    with pytest.raises(ValueError, match=r"replay and agent together needs .* KiB, but only"):
        runs.describe_memory(job, Path("x"))


@pytest.mark.fault
@pytest.mark.parametrize(("place", "on_gpu"), [("host", False), ("host", True), ("disk", False)])
def test_the_memory_of_replay_elsewhere_is_that_of_its_place(place, on_gpu, monkeypatch, tmp_path):
    # F15
    config = PETSConfig(members=2, elites=2, hidden=(8,), capacity=2000)
    driver = DriverConfig(10, seeds=(0, 1, 2))
    job = runs.build("pets", config, "Pendulum-v1", driver, replay=place)
    ring = 3 * (2000 * (4 * 5 + 3) + 2 * 4)
    # All of it, which rows start a transition, and which is the newest.
    batch = 3 * (2000 * (4 * 5 + 4) + 4)
    learner = start_learners(job.factory, job.spec, driver, {})
    agent = sum(leaf.nbytes for leaf in jax.tree.leaves(learner.agent))
    on_host = {"host": 2, "disk": 1}[place] * ring + batch + (0 if on_gpu else agent + batch)
    free = {"host": on_host, "device": agent + batch if on_gpu else None, "disk": ring}
    for name in ("host_memory", "device_memory"):
        monkeypatch.setattr(f"mbrl.memory.{name}", lambda n=name[:-7]: free[n])
        monkeypatch.setattr(f"mbrl.replay.{name}", lambda n=name[:-7]: free[n])
    monkeypatch.setattr("mbrl.replay.disk_space", lambda folder: free["disk"])
    where = "in host memory" if place == "host" else f"in files of {tmp_path}/replay"
    text = runs.describe_memory(job, tmp_path)
    assert text.startswith(f"memory: replay {ring / 1024:.1f} KiB {where}, as much ")
    assert text.endswith(
        f"batch {batch / 1024:.1f} KiB, agent with optimizer {agent / 1024:.1f} KiB"
    )
    refused = {
        "host": "a save of it, batch and agent together needs .* of memory are available",
        "device": "^agent and batch together needs .* of memory are available",
        "disk": f"^replay needs .* of the disk of {tmp_path} are available",
    }
    for name in ("host", *(("disk",) if place == "disk" else ("device",) if on_gpu else ())):
        enough, free[name] = free[name], free[name] - 1
        with pytest.raises(ValueError, match=refused[name]):
            runs.describe_memory(job, tmp_path)
        free[name] = enough
    if place == "disk":  # what a killed run has left is written over
        (tmp_path / "replay").mkdir()
        (tmp_path / "replay" / "leaf_000.npy").write_bytes(b"123")
        free["disk"] = ring - 3
        runs.describe_memory(job, tmp_path)
