"""`mbrl plan`, and the value of random playouts."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from mbrl.planning import playout_value
from mbrl.types import MDP
from scripts.cli import main

SMALL = ["--episodes", "2", "--planner.method", "shooting", "--planner.horizon", "3"]
SMALL += ["--planner.population", "4", "--planner.elites", "2"]


def test_a_playout_is_the_return_of_random_actions():
    mdp = envs.make("device/CartPole")
    assert isinstance(mdp, MDP)
    state = mdp.init(None, jax.random.key(0), batch=3)
    fallen = mdp.init(None, jax.random.key(0), jnp.array([[0.0, 0.0, 0.3, 0.0]]))
    value = playout_value(mdp, horizon=5, playouts=2, discount=0.5)
    # Nothing ends within five steps of the start: the sum of a geometric series.
    np.testing.assert_allclose(value(None, state), [1.9375] * 3, rtol=1e-6)
    assert float(value(None, fallen)[0]) < 1.9375
    long = playout_value(mdp, horizon=60, playouts=20)(None, state)
    assert 10.0 < float(long.min()) and float(long.max()) < 40.0  # random play: about 22 steps
    np.testing.assert_array_equal(long, playout_value(mdp, 60, 20)(None, state))
    with pytest.raises(ValueError, match="playouts: got 0, expected at least 1"):
        playout_value(mdp, 5, 0)


def test_planning_in_a_simulator_beats_chance(tmp_path: Path, capsys):
    argv = ["plan", "device/CartPole", "--env", "CartPole-v1", "--playouts", "2"]
    argv += ["--playout-horizon", "15", "--json", "--episodes", "2", "--planner.method", "search"]
    argv += ["--planner.population", "8", "--planner.horizon", "6"]
    argv += ["--out", str(tmp_path / "results.jsonl")]
    assert main(argv) == 0
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert row["setting"] == "search in device/CartPole, 8 model evaluations per action"
    assert row["value"] > 60.0
    found = json.loads(capsys.readouterr().out)
    assert found["env"] == "CartPole-v1"
    assert len(found["returns"]) == 2
    assert found["return_mean"] > 60.0  # without a plan: about 22


def test_what_a_run_has_learned_says_what_the_end_of_a_plan_is_worth(tmp_path: Path, capsys):
    run = ["--env", "device/CartPole", "--steps", "40", "--members", "2", "--elites", "2",
           "--hidden", "8", "--batch-size", "8", "--max-epochs", "1", "--random-steps", "20",
           "--train-every", "20", "--capacity", "100", "--value-rounds", "1",
           "--planner.horizon", "3", "--planner.population", "8", "--planner.iterations", "2",
           "--planner.elites", "2", "--planner.particles", "2", "--planner.discount", "0.9",
           "--eval-episodes", "0"]  # fmt: skip
    assert main(["train", "pets", *run, "--out", str(tmp_path / "run")]) == 0
    assert main(["plan", "device/CartPole", "--value", str(tmp_path / "run"), *SMALL]) == 0
    out = capsys.readouterr().out
    assert "shooting in device/CartPole, acting in device/CartPole: mean" in out
    assert "min" in out and "(2 episodes)" in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["CartPole-v1"], "CartPole-v1: expected a simulator that runs on the device"),
        (["device/CartPole", "--episodes", "0"], "--episodes: expected at least 1, got 0"),
        (["device/CartPole", "--playouts", "1", "--value", "runs/x"], "--playouts: got --value"),
        (["device/CartPole", "--value", "runs/none"], "expected the folder of a run"),
        (["device/CartPole", "--env", "Pendulum-v1", *SMALL], "observation space"),
    ],
)
def test_what_cannot_be_planned_is_refused(argv, words, capsys):
    assert main(["plan", *argv]) == 2
    assert words in capsys.readouterr().err
