"""The figure of `scripts.best_of_n`: true and learned reward over the distance from the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mbrl.preferences.overoptimization_fit import Course, course_at
from scripts.figures import COLOURS, INK, STYLE, finish

LABELS = {
    "single": "one proxy",
    "mean": "mean of 5",
    "worst": "worst of 5",
    "uwo": "mean less half the variance",
}


def draw(written: dict[str, Any], out: Path) -> None:
    """Draw a column per way of training.

    Above, what one proxy says of itself and the true reward, with the course fitted to it; below,
    the true reward under each rule. Bands are standard errors over true rewards.

    Args:
      written: what `scripts.best_of_n` has written.
      out: file to write; its ending gives the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    variants, distance = written["variants"], np.sqrt(np.asarray(written["kl"]))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            2, len(variants), figsize=(12.0, 6.4), layout="constrained", sharex=True, sharey="row"
        )
        for (top, bottom), (name, found) in zip(axes.T, variants.items(), strict=True):
            _line(top, distance, found["proxy/single"], COLOURS[1], "one proxy, by itself")
            _line(top, distance, found["gold/single"], COLOURS[0], "true reward")
            fit = dict(found["gold/single"]["fit"])
            label = f"$d(\\alpha - \\beta d)$, $R^2$ = {fit['r_squared']:.3f}"
            fine = np.linspace(0.0, distance[-1], 100)
            course = course_at(Course(**fit), jnp.asarray(fine))
            start = found["gold/single"]["mean"][0]
            top.plot(fine, np.asarray(course) + start, ":", color=INK, lw=1.4, label=label)
            for colour, (rule, text) in zip(COLOURS, LABELS.items(), strict=False):
                _line(bottom, distance, found[f"gold/{rule}"], colour, text)
            accuracy = [found[f"{which}_accuracy"]["mean"] for which in ("single", "ensemble")]
            top.set_title(
                f"{name}\naccuracy {accuracy[0]:.3f}, of the mean {accuracy[1]:.3f}",
                loc="left", fontsize=9,
            )  # fmt: skip
            top.legend(loc="upper left", fontsize=8)
            bottom.set_xlabel("distance from the policy, √KL")
            finish(top, ticks=5)
            finish(bottom, ticks=5)
        axes[0, 0].set_ylabel("reward of the best of n")
        axes[1, 0].set_ylabel("true reward of the best of n")
        axes[1, 0].legend(loc="upper left", fontsize=8)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=160)
        plt.close(figure)


def _line(axes: Any, distance: np.ndarray, found: dict[str, Any], colour: str, label: str) -> None:
    mean, error = np.asarray(found["mean"]), np.asarray(found["error"])
    axes.fill_between(distance, mean - error, mean + error, color=colour, alpha=0.18, lw=0)
    axes.plot(distance, mean, "-o", ms=2.5, lw=1.5, color=colour, label=label)
