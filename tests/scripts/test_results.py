"""Result lines say what the runs did, and the benchmark page accepts them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from agents.preferences import PreferencesConfig
from agents.presets import preset
from scripts import benchmarks_page, config_json, results
from scripts.train import settings

VERSIONS = {"python": "3.11.7", "jax": "0.10.2", "commit": "1a2b3c4d", "cpu": "A processor"}


def make_run(
    folder: Path,
    env: str,
    steps: int,
    means: dict[int, float],
    finished: bool = True,
    **changes: Any,
) -> Path:
    config = dataclasses.replace(preset("pets", env), **changes)
    saved = {
        "agent": "pets", "env": env, "config": config_json.to_json(config), "steps": steps,
        "seeds": list(means), "num_envs": 1, "log_every": steps // 50, "save_every": 1000,
        "eval_episodes": 20, "on_bad": "raise", "versions": VERSIONS,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(saved))
    if finished:
        seeds = {str(seed): {"return_mean": mean} for seed, mean in means.items()}
        evaluation = {"step": steps, "env": env, "seeds": seeds}
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


def test_a_run_of_several_seeds_gives_the_median_of_their_means(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", "Pendulum-v1", 2000, {0: -170.0, 1: -190.0, 2: -120.0})
    out = tmp_path / "results" / "pets.jsonl"
    assert results.main(["collect", str(run), "--out", str(out)]) == 0
    (row,) = benchmarks_page.load(out.parent)
    assert row["value"] == -170.0
    assert row["values"] == [-170.0, -190.0, -120.0]
    assert (row["seeds"], row["steps"], row["target"]) == (3, 2000, ">= -180")
    assert row["command"] == "mbrl train pets --env Pendulum-v1 --steps 2000 --num-seeds 3"
    assert (row["commit"], row["hardware"]) == ("1a2b3c4d", "A processor")
    assert row["versions"] == {"python": "3.11.7", "jax": "0.10.2"}
    assert "| -170 (-190 to -120) | met so far, 3 of 5 seeds |" in benchmarks_page.render([row])


def test_where_every_seed_must_reach_the_target_the_worst_is_judged(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", "CartPole-v1", 3000, {0: 500.0, 1: 500.0, 2: 470.0})
    median, worst = results.collect([run])
    assert (median["value"], median.get("target")) == (500.0, None)
    assert (worst["value"], worst["target"]) == (470.0, ">= 475")
    assert worst["metric"] != median["metric"]


def test_runs_on_other_observations_or_on_records_are_other_results(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, "Pendulum-v1", 2000, {0: -150.0}) for name in "abc"]
    others = {"b": {"env_options": {"pixels": 64, "action_repeat": 2}}, "c": {"data": "x.npz"}}
    for name, change in others.items():
        file = tmp_path / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    rows = results.collect(folders)
    assert [row["setting"] for row in rows] == ["", "pixels 64 action-repeat 2", "data x.npz"]
    # The target is one for the preset.
    assert ["target" in row for row in rows] == [True, False, False]
    assert "--pixels 64 --action-repeat 2" in rows[1]["command"]
    assert "--data x.npz" in rows[2]["command"]


def test_commands_hold_the_changes_and_parse_back(tmp_path: Path) -> None:
    env = "CartPole-v1"
    default = preset("pets", env)
    changes: dict[str, Any] = {
        "hidden": (64, 32), "learn_bounds": False, "penalty": 0.5,
        "planner": dataclasses.replace(default.planner, horizon=9, method="cem"),
    }  # fmt: skip
    run = make_run(tmp_path / "a", env, 100, {3: 1.0}, **changes)
    (row,) = results.collect([run])
    words = row["command"].split()
    assert words[:3] == ["mbrl", "train", "pets"]
    train, agent, _ = settings("pets", words[3:])
    assert (train.env, train.steps, train.seed, train.num_seeds) == (env, 100, 3, 1)
    assert agent == dataclasses.replace(default, **changes)
    assert "noise" not in row["command"]  # the preset has it already
    assert "planner.horizon 9" in row["setting"]


def test_commands_tell_how_the_reward_was_learned_and_where_a_run_was_judged(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path / "a", "CartPole-v1", 3_000, {3: 1.0})
    config = json.loads((run / "config.json").read_text())
    asked = PreferencesConfig(labels=20, teacher="skip")
    config |= {"preferences": config_json.to_json(asked), "eval_env": "device/CartPole"}
    (run / "config.json").write_text(json.dumps(config))
    rows = results.collect([run])
    words = rows[0]["command"].split()
    train, _, preferences = settings("pets", words[3:])
    assert preferences == asked
    assert (train.env, train.eval_env) == ("CartPole-v1", "device/CartPole")
    assert "segment" not in rows[0]["command"]  # as usual
    # Other rewards and other judges have targets of their own.
    assert len(rows) == 1
    assert "target" not in rows[0]


def test_runs_that_differ_in_the_seed_are_one_result(tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path / "0", "Reacher-v5", 5000, {0: -5.0}),
        make_run(tmp_path / "1", "Reacher-v5", 5000, {1: -7.0}),
        make_run(tmp_path / "2", "Reacher-v5", 5000, {2: 0.0}, finished=False),
        make_run(tmp_path / "3", "Reacher-v5", 5000, {0: -4.0}, batch_size=32),
    ]
    two, other = results.collect(folders)
    assert (two["value"], two["seeds"]) == (-6.0, 2)
    assert two["note"] == "2 of 3 runs are finished."
    assert two["command"].count("mbrl train") == 2
    assert (other["value"], other["setting"]) == (-4.0, "batch-size 32")


def test_lines_are_replaced_and_others_stay(tmp_path: Path) -> None:
    out = tmp_path / "pets.jsonl"
    a = make_run(tmp_path / "a", "Pendulum-v1", 1000, {0: -300.0})
    b = make_run(tmp_path / "b", "Pendulum-v1", 2000, {0: -150.0})
    c = make_run(tmp_path / "c", "Pendulum-v1", 1000, {0: -200.0})
    for run in (a, b, c):
        results.main(["collect", str(run), "--out", str(out)])
    assert [row["value"] for row in benchmarks_page.load(tmp_path)] == [-200.0, -150.0]


def test_unfinished_and_mixed_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config.json"):
        results.collect([tmp_path])
    run = make_run(tmp_path / "a", "Pendulum-v1", 1000, {0: 1.0}, finished=False)
    with pytest.raises(ValueError, match="evaluation.json"):
        results.collect([run])
    early = make_run(tmp_path / "b", "Pendulum-v1", 1000, {0: 1.0})
    (early / "evaluation.json").write_text('{"step": 500, "seeds": {"0": {"return_mean": 1.0}}}')
    with pytest.raises(ValueError, match="after 500 steps"):
        results.collect([early])


def measured(**changes: Any) -> dict[str, Any]:
    case = {"obs": 4, "act": 1, "population": 500, "horizon": 15, "median_seconds": 1.5,
            "gflops": 123.0, "share_of_gemm": 0.65, "traces": 1}  # fmt: skip
    return {
        "benchmark": "planning", "quick": False, "command": "mbrl bench planning --repeats 20",
        "date": "2026-11-30", "commit": "1a2b3c4d", "versions": {"jax": "0.10.2"},
        "hardware": {"cpu": "A processor", "cores": 2, "all_cores": 2, "accelerator": None},
        "gemm": {"before_gflops": 190.0, "after_gflops": 188.0}, "load_before": [0.1, 0.2, 0.3],
        "planning": {
            "a_float32": case | {"dtype": "float32"},
            "a_bfloat16": case | {"dtype": "bfloat16", "speedup_over_float32": 1.8},
        },
        "preset": {"evaluations": 24_000, "median_seconds": 0.02,
                   "fewer_evaluations_than_pets": 41.7},
        "batch": [{"batch": 1, "ratio": 1.01}, {"batch": 8, "ratio": 0.8}],
        "epoch": {"transitions": 10_000, "members": 5, "hidden": [200, 200],
                  "median_cpu_seconds": 0.4, "median_seconds": 0.2, "share_of_guard": 0.004},
        "seeds": {name: {"seeds": 5, "ratio": 3.5} for name in ("tiny", "default")},
        **changes,
    }  # fmt: skip


def test_speed_is_judged_by_its_targets(tmp_path: Path) -> None:
    source, out = tmp_path / "planning.json", tmp_path / "lines" / "planning.jsonl"
    source.write_text(json.dumps(measured()))
    assert results.main(["bench", str(source), "--out", str(out)]) == 0
    rows = benchmarks_page.load(out.parent)
    verdicts = {
        (row["metric"], row["setting"]): benchmarks_page.met(row["value"], row["target"])
        for row in rows
    }
    small = "500 plans, horizon 15, "
    assert len(verdicts) == len(rows) == 18
    assert verdicts["share of the f32 GEMM rate", small + "float32"] is False
    assert verdicts["times faster than f32", small + "bfloat16"] is True
    assert verdicts["seconds", "24,000 model evaluations"] is True
    assert verdicts["time relative to B calls", "B = 1"] is None
    assert verdicts["time relative to B calls", "B = 8"] is True
    assert verdicts["CPU seconds", "5 x 200-200"] is True
    guard = "share of an epoch that the check of gradients takes"
    assert verdicts[guard, "5 x 200-200"] is True
    assert verdicts["time relative to one seed", "tiny settings"] is False
    assert verdicts["time relative to one seed", "default settings"] is None
    assert {row["hardware"] for row in rows} == {"A processor, 2 cores"}


def test_figures_of_one_core_stand_beside_those_of_the_machine() -> None:
    one_core = measured()["hardware"] | {"cores": 1}
    rows = results.speed(measured(hardware=one_core))
    assert all(row["setting"].endswith(", 1 of 2 cores") for row in rows)
    assert {row["hardware"] for row in rows} == {"A processor, 1 core"}


def test_a_quick_measurement_is_refused() -> None:
    with pytest.raises(ValueError, match="--quick"):
        results.speed(measured(quick=True))
