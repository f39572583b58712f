"""`mbrl report RUN... --preferences`: learned and true reward, and how far they part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.curves import Run, curve
from scripts.figures import COLOURS, STYLE, finish

KL = "policy/kl_from_start"
LEARNED = "preferences/reward"
FAR = {LEARNED: "learned reward per step", "preferences/true_reward": "true reward per step"}
"""What is drawn over the distance from the first policy."""

TIME = {
    "preferences/gap": "learned minus true reward, in deviations of labelled steps",
    "preferences/correlation": "correlation of learned and true reward",
    "preferences/agreement": "agreement with fresh answers",
    "preferences/accuracy": "accuracy on known answers",
}
"""What is drawn over steps."""


def draw(runs: Sequence[Run], out: Path, title: str = "") -> None:
    """Draw what learned rewards have led to: medians over seeds, one colour per run.

    What is pursued beyond where it is right shows as a learned reward that rises, over the square
    root of the divergence from the first policy (over steps for agents that do not report one),
    while the true one falls, and as a gap between the two.

    Args:
      runs: of agents that learned their reward.
      out: file to write; its ending gives the format.
      title: headline.

    Raises:
      ValueError: when no reward was learned in a run.

    Reference: Scaling Laws for Reward Model Overoptimization (arXiv 2210.10760).
    """
    for one in runs:
        if LEARNED not in one.series:
            raise ValueError(
                f"RUN: {one.label} has no metric {LEARNED!r}, expected runs that learned their "
                "reward (mbrl train AGENT --preferences.labels N)"
            )
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    far = all(KL in one.series for one in runs)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 3, figsize=(12.0, 5.6), layout="constrained", sharex="col")
        left, right = axes[:, 0], axes[:, 1:].T.reshape(-1)
        for number, one in enumerate(runs):
            style = {"color": COLOURS[number % len(COLOURS)], "label": one.label}
            for part, name in zip(left, FAR, strict=True):
                _draw_far(part, one, name, style) if far else _draw(part, one, name, style)
            for part, name in zip(right, TIME, strict=True):
                _draw(part, one, name, style)
        for part, name in zip((*left, *right), (FAR | TIME).values(), strict=True):
            part.set_title(name, loc="left", fontsize=9)
            finish(part, ticks=5)
        steps = "environment steps"
        left[-1].set_xlabel("distance from the first policy, √KL" if far else steps)
        for part in axes[-1, 1:]:
            part.set_xlabel(steps)
        if len(runs) > 1:
            left[0].legend(loc="best", fontsize=8)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=160)
        plt.close(figure)


def _draw(axes: Any, one: Run, name: str, style: dict[str, Any]) -> None:
    if name not in one.series:
        return
    line = curve(list(one.series[name].values()))
    axes.fill_between(line.steps, line.low, line.high, color=style["color"], alpha=0.18, lw=0)
    axes.plot(line.steps, line.median, lw=1.6, **style)


def _draw_far(axes: Any, one: Run, name: str, style: dict[str, Any]) -> None:
    line, away = (curve(list(one.series[what].values())) for what in (name, KL))
    distance = np.sqrt(np.maximum(np.interp(line.steps, away.steps, away.median), 0.0))
    axes.plot(distance, line.median, "-o", ms=2.5, lw=1.2, **style)
