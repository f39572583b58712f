"""The figure of `scripts.pursuit_study`: true and learned reward over the distance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from scripts.figures import COLOURS, INK, STYLE, finish

REWARDS = {"score": (COLOURS[1], "learned reward"), "gold": (COLOURS[0], "true reward")}


def draw(written: dict[str, Any], out: Path) -> None:
    """Draw a column per arm: above the best of n, below PPO; bands are standard errors over seeds.

    Args:
      written: what `scripts.pursuit_study` has written.
      out: file to write; its ending gives the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    arms = list(written["ppo"])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            2, len(arms), figsize=(2.6 * len(arms), 5.6), layout="constrained",
            sharex="row", sharey="row",
        )  # fmt: skip
        for (top, bottom), name in zip(axes.T, arms, strict=True):
            ways = (written["best_of_n"][name], written["ppo"][name])
            lengths = (written["best_of_n"]["kl"], ways[1]["kl"]["mean"])
            for part, found, kl in zip((top, bottom), ways, lengths, strict=True):
                distance = np.sqrt(np.maximum(np.asarray(kl), 0.0))
                for what, (colour, text) in REWARDS.items():
                    mean, error = (np.asarray(found[what][x]) for x in ("mean", "error"))
                    low, high = mean - error, mean + error
                    part.fill_between(distance, low, high, color=colour, alpha=0.18, lw=0)
                    part.plot(distance, mean, "-o", ms=2, lw=1.3, color=colour, label=text)
                finish(part, ticks=5)
            top.set_title(name, loc="left", fontsize=9)
            edge = written["config"]["budget"] ** 0.5
            bottom.axvline(edge, color=INK, lw=0.8, ls=":", label="budget")
            bottom.set_xlabel("√KL")
        axes[0, 0].set_ylabel("best of n")
        axes[1, 0].set_ylabel("PPO")
        axes[1, 0].legend(loc="best", fontsize=8)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=160)
        plt.close(figure)
