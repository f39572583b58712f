"""`mbrl report RUN... --rlhf`: what the pursuit of a learned reward has made of the true one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mbrl.preferences.overoptimization_fit import Course, course_at, fit_course, summit
from mbrl.preferences.overoptimization_fit import Pursuit as Form
from mbrl.training.metrics import FILE
from scripts.figures import COLOURS, INK, STYLE, finish

REWARDS = {"gold": "true reward", "score": "learned reward"}
TIME = {
    "kl": "nats per response from the reference",
    "score/spread": "deviation between the members",
    "length": "tokens per response",
}
"""What is drawn over updates."""
SEEN = 0.3
"""Distance below which a divergence is mostly noise of its estimate."""


class Pursuit(NamedTuple):
    """A run of PPO.

    Attributes:
      label: of the run.
      series: metrics by name, [M] each, `update` among them.
    """

    label: str
    series: dict[str, np.ndarray]

    @property
    def distance(self) -> np.ndarray:
        """Return the square root of the divergence, [M]."""
        return np.sqrt(np.maximum(self.series["kl"], 0.0))


def load(folder: Path, label: str) -> list[Pursuit]:
    """Read the metrics of a run of `mbrl rlhf ppo`, or of the pipeline around it, by seed.

    Raises:
      ValueError: for a folder without such a run.
    """
    files = [path / FILE for path in (folder / "ppo", folder)]
    file = next((file for file in files if file.exists()), files[-1])
    if not file.exists():
        raise ValueError(f"RUN: {folder} has no {FILE}, expected the folder of mbrl rlhf ppo")
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    names = ("score", *TIME)
    if not lines or any(name not in line for line in lines for name in names):
        raise ValueError(
            f"RUN: {folder} lacks one of the metrics {', '.join(names)}, expected the folder of "
            "mbrl rlhf ppo or mbrl rlhf run"
        )
    names += ("gold",) if all("gold" in line for line in lines) else ()
    names += ("step",)
    found = []
    for seed in dict.fromkeys(line.get("seed") for line in lines):
        mine = [line for line in lines if line.get("seed") == seed]
        series = {name: np.array([line[name] for line in mine]) for name in names}
        series["update"] = series.pop("step")
        found.append(Pursuit(label if seed is None else f"{label}, seed {seed}", series))
    return found


def fits(runs: Sequence[Pursuit], name: str, form: Form = "rl") -> Course | None:
    """Fit one of Gao's curves to what all runs have gained; None for too few points."""
    away = np.concatenate([one.distance for one in runs])
    gain = np.concatenate([one.series[name] - one.series[name][0] for one in runs])
    far = away > SEEN
    if far.sum() < 3:
        return None
    return fit_course(jnp.asarray(away[far]), jnp.asarray(gain[far]), form)


def summary(runs: Sequence[Pursuit]) -> list[dict[str, Any]]:
    """Tell what each run began with, its best and its last true (or learned) reward."""
    rows = []
    for one in runs:
        row: dict[str, Any] = {"run": one.label, "kl": float(one.series["kl"][-1])}
        for name in REWARDS:
            if name in one.series:
                values = one.series[name]
                row[name] = {
                    "first": float(values[0]),
                    "best": float(values.max()),
                    "last": float(values[-1]),
                }
        rows.append(row)
    return rows


def told_of(course: Course, form: Form) -> dict[str, Any]:
    """Return what a fit has found, as JSON."""
    return {
        "alpha": float(course.alpha),
        "beta": float(course.beta),
        "r_squared": float(course.r_squared),
        "summit": float(summit(course, form)),
    }


def draw(runs: Sequence[Pursuit], out: Path, title: str = "") -> dict[str, dict[str, Any]]:
    """Draw rewards over the distance from the reference, and what explains them over updates.

    Args:
      runs: of PPO on a language model.
      out: file to write; its ending gives the format.
      title: headline.

    Returns:
      The fit `d (alpha - beta log d)` to all runs, by reward: alpha, beta, R2, the distance of its
      summit; and in `best_of_n` the same of the other form, `d (alpha - beta d)`.

    Reference: Scaling Laws for Reward Model Overoptimization (arXiv 2210.10760).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = {}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 4, figsize=(14.0, 3.4), layout="constrained")
        for colour, (name, text) in zip(COLOURS, REWARDS.items(), strict=False):
            shown = [one for one in runs if name in one.series]
            for one in shown:
                axes[0].plot(one.distance, one.series[name], "o", ms=2.5, color=colour, alpha=0.6)
            course = fits(shown, name) if shown else None
            if course is None:
                continue
            fine = np.linspace(SEEN, max(one.distance.max() for one in shown), 100)
            start = np.mean([one.series[name][0] for one in shown])
            line = np.asarray(course_at(course, jnp.asarray(fine), "rl")) + start
            told = f"{text}, $R^2$ = {float(course.r_squared):.3f}"
            axes[0].plot(fine, line, color=colour, lw=1.6, label=told)
            found[name] = told_of(course, "rl")
            other = fits(shown, name, "best_of_n")
            if other is not None:
                found[name]["best_of_n"] = told_of(other, "best_of_n")
        axes[0].set_xlabel("distance from the reference, √KL")
        axes[0].set_title("reward of responses", loc="left", fontsize=9)
        axes[0].legend(loc="best", fontsize=8)
        for part, (name, text) in zip(axes[1:], TIME.items(), strict=True):
            for number, one in enumerate(runs):
                style = {"color": COLOURS[number % len(COLOURS)], "label": one.label}
                part.plot(one.series["update"], one.series[name], lw=1.4, **style)
            part.set_title(text, loc="left", fontsize=9)
            part.set_xlabel("updates")
        if len(runs) > 1:
            axes[1].legend(loc="best", fontsize=8)
        for part in axes:
            finish(part, ticks=5)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", color=INK)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=160)
        plt.close(figure)
    return found
