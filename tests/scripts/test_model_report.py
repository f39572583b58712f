"""`mbrl report --model`: what is told of models that were never trained, and of a perfect one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import envs
from agents.pets import PETSConfig
from agents.preferences import PreferencesConfig
from mbrl.planning import PlannerConfig
from mbrl.types import MDP
from scripts import learned_models, model_figures, model_report, report
from scripts.cli import run as run_job
from scripts.model_report import Modelled, Returns
from tests.scripts.test_dream import save

TINY = {
    "members": 2, "elites": 2, "hidden": (4,), "capacity": 200,
    "planner": PlannerConfig(horizon=3, population=8, iterations=1, elites=2, particles=2),
}  # fmt: skip
MINIMAL = ("--model", "--episodes", "3", "--length", "9")


@pytest.fixture(scope="module")
def pendulum(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("pendulum"), "device/Pendulum", "pets", **TINY)


def printed(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> dict[str, Any]:
    capsys.readouterr()
    assert report.main([str(arg) for arg in argv]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_the_true_dynamics_foretell_every_return(pendulum, monkeypatch, capsys):
    twin = envs.make("device/Pendulum")
    assert isinstance(twin, MDP)
    built = model_report.MODELLED["pets"]

    def perfect(spec: Any, config: Any) -> Any:
        return built.world(spec, config)._replace(mdp=twin, params=lambda state: None)

    monkeypatch.setitem(model_report.MODELLED, "pets", Modelled(perfect, built.horizon))
    line = printed(capsys, pendulum, *MINIMAL)
    assert line["figure"] == str(pendulum / "model.png")
    assert (line["agent"], line["step"], line["episodes"], line["length"]) == ("pets", 100, 3, 9)
    # Eight transitions hold returns of one, three (the horizon) and five steps, none of fifteen.
    assert list(line["returns"]) == ["1", "3", "5"]
    numbers = [one["number"] for one in line["returns"].values()]
    assert numbers[0] == 200 > numbers[1] > numbers[2] == 100
    for one in line["returns"].values():
        assert one["predicted"] == pytest.approx(one["realized"], abs=2e-3)
        assert abs(one["gap"]) < 1e-2
        assert one["correlation"] > 0.999
    # The ensemble itself has random weights: it must not look like the perfect one.
    assert line["calibration_error"] > 0.05
    with Image.open(pendulum / "model.png") as image:
        assert (image.format, image.width) == ("PNG", 1680)
        assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 100


@pytest.mark.slow
def test_models_of_both_agents_are_read(pendulum, tmp_path, capsys):
    own = {k: v for k, v in TINY.items() if k != "planner"}
    folder = save(tmp_path, "device/CartPole", "mbpo", **own)
    out = tmp_path / "new" / "a.png"
    line = printed(capsys, folder, *MINIMAL, "--out", out)
    assert line["figure"] == str(out)
    assert out.exists()
    assert list(line["returns"]) == ["1", "5"]
    wrong = printed(capsys, pendulum, *MINIMAL)["returns"]["5"]
    assert abs(wrong["predicted"] - wrong["realized"]) > 0.1


def test_returns_that_tell_nothing():
    none, one = np.zeros(0), np.ones(4)
    assert model_figures.told(Returns(none, none))["number"] == 0
    told = model_figures.told(Returns(one, one))
    assert (told["predicted"], told["gap"], told["correlation"]) == (1.0, None, None)


def test_what_is_no_run_with_an_ensemble_is_refused(tmp_path, capsys):
    folder = save(tmp_path, "device/Pendulum", "ppo", rollout=64, minibatches=1)
    assert run_job(report.main, [str(folder), "--model"]) == 2
    error = capsys.readouterr().err
    assert "a run of ppo, which has no ensemble; it is for runs of pets, mbpo" in error
    assert error.count("\n") == 1


def test_a_model_of_a_reward_from_preferences_is_no_model_of_the_task(tmp_path, monkeypatch):
    job = SimpleNamespace(
        agent_name="pets", config=PETSConfig(), preferences=PreferencesConfig(labels=5)
    )
    monkeypatch.setattr(learned_models.runs, "load", lambda directory: job)
    with pytest.raises(ValueError, match="pets learns its reward from preferences"):
        learned_models.learned_model(tmp_path, "ts1")


def test_one_figure_at_a_time(pendulum, capsys):
    assert run_job(report.main, [str(pendulum), "--model", "--dream"]) == 2
    assert "--dream, --model, --preferences, --rlhf: expected one" in capsys.readouterr().err
    assert run_job(report.main, [str(pendulum), str(pendulum), "--model"]) == 2
    assert "got 2, expected one run with --model" in capsys.readouterr().err
    assert run_job(report.main, [str(pendulum), "--model", "--out", "a.gif"]) == 2
    assert "--out: got a.gif" in capsys.readouterr().err
