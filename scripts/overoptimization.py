"""`mbrl report RUN --preferences`: the learned reward beside the true one, and beside answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scripts.figures import COLOURS, STYLE

Series = Mapping[str, Mapping[Any, tuple[np.ndarray, np.ndarray]]]
"""`series[metric][seed]` is a pair of arrays (steps, values)."""

LEARNED, TRUE = "preferences/reward", "preferences/true_reward"
KL = "policy/kl_from_start"
ANSWERS = {
    "preferences/agreement": "agreement with fresh answers",
    "preferences/accuracy": "accuracy on known answers",
    "preferences/correlation": "correlation with the true reward",
}


def draw(series: Series, out: Path, title: str = "") -> None:
    """Draw what a run with a learned reward has come to, one line per seed.

    At the left the learned and the true reward per step over the square root of the divergence
    from the first policy (over steps for agents that do not report one), at the right how well
    the learned reward foretells answers. What is pursued beyond where it is right shows as a
    learned reward that rises while the true one falls.

    Args:
      series: metrics of the run.
      out: file to write; its ending gives the format.
      title: headline.

    Raises:
      ValueError: when no reward was learned in the run.

    Reference: Scaling Laws for Reward Model Overoptimization (arXiv 2210.10760).
    """
    if LEARNED not in series:
        raise ValueError(
            f"RUN: got metrics without {LEARNED!r}, expected a run that learned its reward "
            "(mbrl train AGENT --preferences.labels N)"
        )
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    label = "environment steps" if KL not in series else "distance from the first policy, √KL"
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(10.5, 5.4), layout="constrained", sharex="col")
        for row, (name, what) in enumerate(((LEARNED, "learned"), (TRUE, "true"))):
            for seed, (steps, values) in series.get(name, {}).items():
                x = _distance(series, seed, steps)
                axes[row, 0].plot(x, values, lw=1.4, color=COLOURS[row], alpha=0.75)
            axes[row, 0].set_title(f"{what} reward per step", loc="left", fontsize=9)
        axes[1, 0].set_xlabel(label)
        for name, row in zip(ANSWERS, (0, 0, 1), strict=True):
            colour = COLOURS[2 + list(ANSWERS).index(name)]
            for number, (steps, values) in enumerate(series.get(name, {}).values()):
                shown = ANSWERS[name] if number == 0 else None
                axes[row, 1].plot(steps, values, lw=1.2, color=colour, alpha=0.75, label=shown)
        axes[0, 1].axhline(0.5, lw=1.0, ls=":", color=COLOURS[5])
        axes[1, 1].set_xlabel("environment steps")
        for part in axes[:, 1]:
            part.legend(loc="lower right", fontsize=8)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=160)
        plt.close(figure)


def _distance(series: Series, seed: Any, steps: np.ndarray) -> np.ndarray:
    if KL not in series:
        return steps
    at, divergence = series[KL][seed]
    return np.sqrt(np.maximum(np.interp(steps, at, divergence), 0.0))
