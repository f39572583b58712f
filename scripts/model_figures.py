"""The picture of `scripts.model_report`: reliability, returns, and open-loop rollouts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mbrl.calibration import INTERVALS, LEVELS, Calibration
from scripts.dream_figures import Scene, draw_error, draw_line, episodes, lines
from scripts.figures import COLOURS, INK, STYLE, finish

COLUMNS, WIDTH, HEIGHT = 3, 10.5, 2.3


class Returns(NamedTuple):
    """Returns [M] over the same steps."""

    predicted: np.ndarray
    realized: np.ndarray


def told(returns: Returns) -> dict[str, float | int | None]:
    """Summarize returns as JSON values, None where they tell nothing.

    Returns:
      Number, means, their difference in deviations of the realized return, and correlation.
    """
    predicted, realized = returns
    if not len(realized):
        return {"number": 0, "predicted": None, "realized": None, "gap": None, "correlation": None}
    means = [float(x.mean()) for x in returns]
    spread = float(realized.std())
    moves = min(spread, float(predicted.std())) > 1e-6
    return {
        "number": len(realized),
        "predicted": round(means[0], 4), "realized": round(means[1], 4),
        "gap": round((means[0] - means[1]) / spread, 4) if spread > 1e-6 else None,
        "correlation": round(float(np.corrcoef(predicted, realized)[0, 1]), 4) if moves else None,
    }  # fmt: skip


def draw(
    scene: Scene, found: Calibration, varies: np.ndarray, returns: Mapping[int, Returns], file: Path
) -> None:
    """Draw reliability, predicted over realized returns, and the rollouts of one episode.

    Args:
      scene: rollouts beside the truth.
      found: calibration of single steps.
      varies: bool [D], targets that vary at all; the others are left out.
      returns: by their number of steps.
      file: to write; its ending gives the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    (row,) = episodes(scene, 1)
    panels = lines(scene, row)
    down = math.ceil((2 + len(returns) + len(panels)) / COLUMNS)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(WIDTH, HEIGHT * down + 0.9), layout="constrained")
        axes = iter(figure.subplots(down, COLUMNS).flat)
        _draw_reliability(next(axes), found, varies)
        for steps, pair in returns.items():
            _draw_returns(next(axes), pair, steps)
        shown = [next(axes)]
        draw_error(shown[0], scene)
        for line in panels:
            shown.append(next(axes))
            draw_line(shown[-1], line, scene.context)
        legends = [panel.get_legend_handles_labels() for panel in (shown[-1], shown[0])]
        handles, labels = (list(itertools.chain(*found)) for found in zip(*legends, strict=True))
        for spare in axes:
            spare.set_axis_off()
        text = f"{scene.title}: {len(scene.valid)} fresh episodes; open loop in episode {row + 1}"
        figure.suptitle(text, x=0.01, ha="left", fontsize=11)
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=160)
        plt.close(figure)


def _draw_reliability(axes: Any, found: Calibration, varies: np.ndarray) -> None:
    curves = np.asarray(found.reliability)[:, varies]
    axes.plot((0, 1), (0, 1), ":", color=INK, lw=1.2)
    axes.plot(LEVELS, curves, "-", color=COLOURS[0], lw=0.8, alpha=0.4)
    axes.plot(LEVELS, curves.mean(1), "-", color=COLOURS[0], lw=2.0)
    cover = np.asarray(found.coverage)[:, varies].mean(1)
    shares = ", ".join(f"{100 * x:.0f}" for x in cover)
    wanted = ", ".join(f"{100 * x:.0f}" for x in INTERVALS)
    axes.set_title(f"intervals of {wanted} % hold {shares} %", loc="left", fontsize=9)
    axes.set_xlabel("predicted quantile", fontsize=8)
    axes.set_ylabel("share below it", fontsize=8)
    finish(axes, ticks=5)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.tick_params(labelsize=8)


def _draw_returns(axes: Any, returns: Returns, steps: int) -> None:
    told_of = told(returns)
    title = f"return, {steps} step{'s' if steps > 1 else ''}"
    if told_of["correlation"] is not None:
        title += f": r = {told_of['correlation']:.2f}, gap {told_of['gap']:+.2f} sd"
    if told_of["number"]:
        ends = [float(f(x)) for f, x in ((np.min, np.stack(returns)), (np.max, np.stack(returns)))]
        axes.plot(ends, ends, ":", color=INK, lw=1.2)
        axes.plot(returns.realized, returns.predicted, ".", ms=3, color=COLOURS[1], alpha=0.6)
    else:
        text = "no episode is that long"
        axes.text(0.5, 0.5, text, ha="center", transform=axes.transAxes)
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_xlabel("realized", fontsize=8)
    axes.set_ylabel("predicted", fontsize=8)
    finish(axes, ticks=4)
    axes.tick_params(labelsize=8)
