"""`mbrl report`: learning curves and a table from the metrics of one or several runs.

With `--dream`, what the latent model of one run predicts without looking (`scripts.dream`); with
`--model`, what an ensemble does, and how far that can be believed (`scripts.model_report`); with
`--preferences` or `--rlhf`, what a learned reward has led to (`scripts.overoptimization`,
`scripts.pursuit`).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file: imports start at the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import tyro

from mbrl.training.evaluation import statistics
from mbrl.training.run_directory import read_config
from scripts import overoptimization, pursuit
from scripts.cli import parse, run
from scripts.curves import Curve, Run, curve, load
from scripts.figures import COLOURS, STYLE, finish

TRAIN, EVAL = "episode_return", "eval/return_mean"
DOTTED = 2
"""Runs in a figure beyond which single episodes are not shown: they would hide the curves."""

PANEL_WORDS = ("holdout", "loss", "error")


@dataclass(frozen=True)
class ReportConfig:
    """Draw learning curves (median over seeds, band of the middle half) and print a table.

    With --dream: play episodes with the trained agent, let its latent model predict them
    open loop, draw that beside the truth, and print its errors as one line of JSON.
    With --model: play episodes with the trained agent, and draw what its ensemble predicts of them:
    calibration, returns of several steps, and open-loop rollouts.
    With --preferences: draw the learned reward of runs beside the true one.
    With --rlhf: the same for runs of mbrl rlhf, over the distance from the reference.
    """

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Run folders; each is one curve over all seeds found below it."""
    out: str = ""  # PNG to write; in the first run, named after what it shows, when empty
    labels: tuple[str, ...] = ()  # names of the runs; folder names when empty
    title: str = ""  # above the figure; the environment when the runs tell it
    window: int = 10  # training episodes in the moving average, at most a tenth of them
    json: bool = False  # print the table as one JSON object
    preferences: bool = False  # learned and true reward, and how far they part
    rlhf: bool = False  # the same for language models
    dream: bool = False  # open-loop predictions of one run: PNG, or GIF of images
    model: bool = False  # calibration, returns and rollouts of an ensemble, for one run
    episodes: int = 10  # dream, model: episodes to play; the errors are means over them
    context: int = 0  # dream: records the model sees; 0 = 5, or half of shorter episodes
    length: int = 50  # dream, model: records of an episode, the context included
    seed: int = 0  # dream, model: of the start states


def main(argv: list[str]) -> int:
    """Write the figure, print the table."""
    config = parse(ReportConfig, argv, "mbrl report")
    if not config.runs:
        raise ValueError(
            "RUN: got none, expected one or more run folders: mbrl report runs/pendulum"
        )
    if config.labels and len(config.labels) != len(config.runs):
        raise ValueError(
            f"--labels: got {len(config.labels)} for {len(config.runs)} runs, expected one for each"
        )
    if config.window < 1:
        raise ValueError(f"--window: got {config.window}, expected at least 1")
    if config.dream + config.model + config.preferences + config.rlhf > 1:
        raise ValueError("--dream, --model, --preferences, --rlhf: expected one figure at a time")
    if config.dream or config.model:
        return _episodes(config)
    if config.preferences:
        return _preferences(config)
    if config.rlhf:
        return _rlhf(config)
    runs = _load(config)
    out = _figure_file(config, "curve.png")
    draw(runs, out, config.title or _environment(config.runs), config.window)
    rows = [summarize(one) for one in runs]
    if config.json:
        print(json.dumps({"figure": str(out), "runs": rows}))
    else:
        _print(rows, out)
    return 0


def _figure_file(config: ReportConfig, name: str) -> Path:
    out = Path(config.out or Path(config.runs[0]) / name)
    if out.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--out: got {out}, expected a name that ends in .png, .pdf or .svg")
    return out


def _load(config: ReportConfig) -> list[Run]:
    labels = config.labels or [Path(path).resolve().name for path in config.runs]
    return [load(Path(path), label) for path, label in zip(config.runs, labels, strict=True)]


def _preferences(config: ReportConfig) -> int:
    out = _figure_file(config, "preferences.png")
    overoptimization.draw(_load(config), out, config.title or _environment(config.runs))
    print(f"figure: {out}")
    return 0


def _rlhf(config: ReportConfig) -> int:
    out = _figure_file(config, "rlhf.png")
    labels = config.labels or [Path(path).resolve().name for path in config.runs]
    pairs = zip(config.runs, labels, strict=True)
    runs = [one for path, label in pairs for one in pursuit.load(Path(path), label)]
    fit = pursuit.draw(runs, out, config.title)
    print(json.dumps({"figure": str(out), "fit": fit, "runs": pursuit.summary(runs)}, indent=2))
    return 0


def _episodes(config: ReportConfig) -> int:
    from scripts import dream, model_report  # build agents and environments, curves do without

    flag, job = ("--dream", dream) if config.dream else ("--model", model_report)
    if len(config.runs) != 1:
        raise ValueError(f"RUN: got {len(config.runs)}, expected one run with {flag}")
    window = dream.Window(config.episodes, config.context, config.length, config.seed)
    print(json.dumps(job.show(Path(config.runs[0]), config.out, window, config.title)))
    return 0


def summarize(one: Run) -> dict[str, Any]:
    """Return the last results of a run over its seeds: mean, std, IQM, min, max.

    A seed counts with its last evaluation; without one with its last ten episodes.
    """
    source = EVAL if EVAL in one.series else TRAIN
    seeds = one.series.get(source, {})
    last = 1 if source == EVAL else 10
    finals = np.array([values[-last:].mean() for _, values in seeds.values()])
    steps = max(
        (steps[-1] for line in one.series.values() for steps, _ in line.values()), default=0
    )
    row: dict[str, Any] = {"run": one.label, "steps": int(steps), "seeds": len(seeds)}
    row["source"] = "evaluation" if source == EVAL else "last 10 episodes"
    if len(finals) == 0:
        return row | {"source": "no finished episode"}
    extremes = {"min": float(finals.min()), "max": float(finals.max())}
    return row | statistics(finals)._asdict() | extremes


def panels(runs: Sequence[Run], most: int = 3) -> list[str]:
    """Choose the metrics for the small panels: held-out errors first, then losses.

    What never changes, as the error of ends in a task without any, has nothing to show.
    """
    names = {
        name
        for one in runs
        for name, seeds in one.series.items()
        if not name.startswith("eval/") and any(np.ptp(values) > 0 for _, values in seeds.values())
    }
    chosen: list[str] = []
    for word in PANEL_WORDS:
        chosen += sorted(name for name in names if word in name.lower() and name not in chosen)
    return chosen[:most]


def draw(runs: Sequence[Run], out: Path, title: str = "", window: int = 10) -> None:
    """Write the figure: returns at the left, model errors at the right where there are any.

    Args:
      runs: one curve each.
      out: file to write; its ending gives the format.
      title: headline.
      window: training episodes in the moving average.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    small = panels(runs)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(10.5 if small else 7.5, 4.6), layout="constrained")
        columns = (2.4, 1.0) if small else (1.0,)
        grid = figure.add_gridspec(max(len(small), 1), len(columns), width_ratios=columns)
        main_axes = figure.add_subplot(grid[:, 0])
        for colour, one in zip(_colours(len(runs)), runs, strict=True):
            _draw_returns(main_axes, one, colour, window, dots=len(runs) <= DOTTED)
        main_axes.set(xlabel="environment steps", ylabel="return")
        finish(main_axes)
        if main_axes.get_legend_handles_labels()[1]:
            main_axes.legend(loc="best")
        if title:
            main_axes.set_title(title, loc="left", fontweight="bold")
        for row, name in enumerate(small):
            axes = figure.add_subplot(grid[row, 1])
            _draw_panel(axes, runs, name, last=row == len(small) - 1)
            axes.set_xlim(main_axes.get_xlim())
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=160)
        plt.close(figure)


def _colours(number: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(number)]


def _draw_returns(axes: Any, one: Run, colour: str, window: int, dots: bool) -> None:
    training, evaluation = one.series.get(TRAIN), one.series.get(EVAL)
    count = len(evaluation or training or {})
    label = one.label if count == 1 else f"{one.label} ({count} seeds)"
    if training:
        for steps, values in training.values() if dots else ():
            axes.plot(steps, values, ".", ms=5, color=colour, alpha=0.25, mew=0)
        shortest = min(len(values) for _, values in training.values())
        line = curve(list(training.values()), max(1, min(window, shortest // 10)))
        if evaluation:
            style = {"lw": 1.1, "alpha": 0.6, "color": colour, "label": f"{one.label}, training"}
            axes.plot(line.steps, line.median, "-", **style)
        else:
            axes.fill_between(line.steps, line.low, line.high, color=colour, alpha=0.18, lw=0)
            style = {"lw": 2.0, "ms": 4.5, "color": colour, "label": label}
            axes.plot(line.steps, line.median, "-", marker=_marker(line), **style)
    if evaluation:
        line = curve(list(evaluation.values()))
        axes.fill_between(line.steps, line.low, line.high, color=colour, alpha=0.18, lw=0)
        style = {"lw": 2.0, "ms": 4.5, "color": colour, "label": f"{label}, evaluation"}
        axes.plot(line.steps, line.median, "-", marker=_marker(line), **style)


def _marker(line: Curve) -> str:
    return "o" if len(line.steps) <= 30 else ""


def _draw_panel(axes: Any, runs: Sequence[Run], name: str, last: bool) -> None:
    lowest, highest = math.inf, -math.inf
    for colour, one in zip(_colours(len(runs)), runs, strict=True):
        if name not in one.series:
            continue
        line = curve(list(one.series[name].values()))
        axes.fill_between(line.steps, line.low, line.high, color=colour, alpha=0.18, lw=0)
        marker = "o" if len(line.steps) == 1 else ""
        axes.plot(line.steps, line.median, "-", marker=marker, lw=1.4, color=colour)
        lowest, highest = min(lowest, line.low.min()), max(highest, line.high.max())
    if 0 < 10 * lowest < highest:
        axes.set_yscale("log")
    axes.set_title(name, loc="left", fontsize=9)
    axes.tick_params(which="both", labelsize=8)
    axes.tick_params(labelbottom=last)
    finish(axes, ticks=4)


def _environment(runs: Sequence[str]) -> str:
    found = set()
    for path in runs:
        config = read_config(Path(path)) if Path(path).is_dir() else None
        found.add("" if config is None else str(config.get("env", "")))
    return found.pop() if len(found) == 1 else ""


def _print(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="final return over seeds", title_justify="left")
    for name in ("run", "steps", "seeds", "mean", "std", "IQM", "min", "max", "from"):
        table.add_column(name, justify="left" if name in ("run", "from") else "right")
    for row in rows:
        numbers = [row.get(name) for name in ("mean", "std", "iqm", "min", "max")]
        shown = ["-" if number is None else f"{number:,.1f}" for number in numbers]
        table.add_row(row["run"], f"{row['steps']:,}", str(row["seeds"]), *shown, row["source"])
    console = Console(highlight=False)
    console.print(table)
    console.print(f"figure: {out}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(run(main))
