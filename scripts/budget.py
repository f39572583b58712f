"""Return against model evaluations: plan through trained models with planners of all sizes.

python scripts/budget.py RUN... --out docs/results/budget.jsonl --figure docs/budget.png
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file: imports start at the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import tyro

from mbrl.planning import PETS_CEM, PlannerConfig
from mbrl.training import run_directory
from scripts import results, runs
from scripts.cli import parse, run


@dataclasses.dataclass(frozen=True)
class BudgetConfig:
    """Play greedy episodes of trained runs with planners of several sizes; no training."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Folders of runs, one per task."""
    out: str
    """JSON-lines file; lines of other results in it stay."""
    figure: str = ""
    """PNG to draw."""
    episodes: int = 10
    """Greedy episodes per trained seed and planner."""
    seed: int = 0
    """Seed of the start states, the same for all planners."""
    populations: tuple[int, ...] = (12, 24, 48, 96)
    """Plans per iteration of the run's own planner."""
    cem_populations: tuple[int, ...] = (20, 50, 100, 400)
    """Plans per iteration of PETS-CEM; the last one is the paper's."""
    simulations: tuple[int, ...] = ()
    """Simulations of tree search, for runs that have learned a value."""


def main(argv: list[str]) -> int:
    """Run the job."""
    config = parse(BudgetConfig, argv, "budget.py")
    rows = []
    for folder in config.runs:
        for row in measure(Path(folder), config):
            rows.append(row | {"command": f"python scripts/budget.py {shlex.join(argv)}"})
            results.write(Path(config.out), rows)
            print(f"{row['task']}, {row['setting']}: {row['value']:.1f}", flush=True)
    if config.figure:
        draw(rows, Path(config.figure))
    return 0


def planners(own: PlannerConfig, config: BudgetConfig) -> list[PlannerConfig]:
    """List the planners to compare: sizes of the run's own, then sizes of PETS-CEM."""
    return [
        *(dataclasses.replace(own, population=p, elites=min(own.elites, p // 2))
          for p in config.populations),
        *(dataclasses.replace(PETS_CEM, population=p, elites=max(2, p // 10))
          for p in config.cem_populations),
        *(dataclasses.replace(own, method="search", population=p) for p in config.simulations),
    ]  # fmt: skip


def measure(folder: Path, config: BudgetConfig) -> Any:
    """Yield a result line per planner."""
    job = runs.load(folder)
    restored = runs.restore(job, folder)
    if restored is None:
        raise ValueError(f"{folder}: there is no save to plan with; train it first")
    state = runs.learner_of(restored.tree).agent
    versions = run_directory.versions()
    origin = results.origin(versions) | {"commit": versions.get("commit", "unknown")}
    for plan in planners(job.config.planner, config):
        replanned = job._replace(config=dataclasses.replace(job.config, planner=plan))
        returns = runs.evaluate(replanned, state, config.episodes, config.seed)
        yield {
            "benchmark": "Planning budget", "task": job.env_id, "agent": job.agent_name,
            "setting": f"{plan.method}, {plan.evaluations():,} model evaluations per action",
            "metric": "return", "value": float(returns.mean()),
            "values": [float(mean) for mean in returns.mean(1)],
            "steps": restored.step, "seeds": len(returns), **origin,
            "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw one panel per task, one line per planner."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(5 * len(tasks), 3.6), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(tasks)))
    for panel, task in zip(panels, tasks, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            if row["task"] == task:
                method, rest = row["setting"].split(", ", 1)
                evaluations = int(rest.split()[0].replace(",", ""))
                lines.setdefault(method, []).append((evaluations, row["value"]))
        for method, points in lines.items():
            panel.plot(*zip(*sorted(points), strict=True), marker="o", label=method)
        panel.set(xscale="log", title=task, xlabel="model evaluations per action", ylabel="return")
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(run(main))
