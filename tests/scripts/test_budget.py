"""Return against model evaluations, on a tiny run."""

from __future__ import annotations

import json

import pytest

from scripts import benchmarks_page, budget
from scripts.cli import main

FLAGS = [
    "--env", "device/Pendulum", "--steps", "60", "--random-steps", "40", "--eval-episodes", "0",
    "--members", "2", "--elites", "2", "--hidden", "8", "--max-epochs", "1", "--capacity", "100",
    "--planner.horizon", "3", "--planner.iterations", "1", "--planner.particles", "2",
    "--no-tensorboard",
]  # fmt: skip


def test_planners_of_all_sizes_meet_the_same_model_and_start_states(tmp_path, capsys):
    assert main(["train", "pets", *FLAGS, "--out", str(tmp_path / "run")]) == 0
    out, figure = tmp_path / "results" / "budget.jsonl", tmp_path / "budget.png"
    argv = [str(tmp_path / "run"), "--out", str(out), "--figure", str(figure), "--episodes", "2",
            "--populations", "4", "6", "--cem-populations", "5"]  # fmt: skip
    assert budget.main(argv) == 0
    rows = benchmarks_page.load(out.parent)
    assert [row["setting"] for row in rows] == [
        "icem, 24 model evaluations per action",
        "icem, 36 model evaluations per action",
        "cem, 12,500 model evaluations per action",
    ]
    assert all(-3000 < row["value"] < 0 for row in rows)
    assert rows[0]["command"].startswith("python scripts/budget.py ")
    assert figure.read_bytes().startswith(b"\x89PNG")
    before = out.read_text()
    assert budget.main(argv) == 0
    assert [json.loads(line)["value"] for line in before.splitlines()] == [
        json.loads(line)["value"] for line in out.read_text().splitlines()
    ]


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="found no config.json"):
        budget.main([str(tmp_path), "--out", str(tmp_path / "x.jsonl")])
