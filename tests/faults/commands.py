"""The command that the fault tests run, and how they compare what it leaves behind."""

from __future__ import annotations

import shutil
from pathlib import Path

from mbrl.training import checkpoint
from scripts import runs
from scripts.cli import main

STEPS = 60
FLAGS = [
    "--env", "tests.faults.tasks:Cart", "--steps", str(STEPS), "--log-every", "10",
    "--learning-rate", "0.001",
    "--save-every", "10", "--eval-episodes", "0", "--no-tensorboard",
    "--members", "2", "--elites", "2", "--hidden", "8", "--batch-size", "8", "--max-epochs", "2",
    "--random-steps", "20", "--train-every", "10", "--capacity", "40",
    "--planner.horizon", "3", "--planner.population", "8", "--planner.iterations", "1",
    "--planner.particles", "2", "--planner.elites", "2",
]  # fmt: skip


def train(out: Path, *more: str) -> int:
    """Run the command in this process and return its exit code."""
    try:
        return main(["train", "pets", "--out", str(out), *FLAGS, *more])
    except SystemExit as stop:
        return int(stop.code or 0)


def digest(out: Path, step: int = STEPS) -> str:
    """Return the sha256 of the whole state in the newest save, which must be of `step`."""
    restored = runs.restore(runs.load(out), out)
    assert restored is not None
    assert restored.step == step
    return checkpoint.digest(restored.tree)


def saves(out: Path) -> list[str]:
    """List the saves of a run, oldest first."""
    return sorted(path.name for path in (out / runs.CHECKPOINTS).glob("step_*"))


def copied(source: Path, target: Path) -> Path:
    """Copy a run."""
    return Path(shutil.copytree(source, target))
