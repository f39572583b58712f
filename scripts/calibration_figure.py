"""The figure of `scripts.calibration`: reliability, and error by what the members disagree on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from scripts.figures import COLOURS, INK, STYLE, finish

SHOWN = (
    ("held_out", "as fitted", COLOURS[0], "--"),
    ("held_out", "recalibrated", COLOURS[0], "-"),
    ("off_distribution", "recalibrated", COLOURS[1], "-"),
)


def draw(written: dict[str, Any], out: Path) -> None:
    """Draw a column per task.

    Above, the share of targets below each predicted quantile, over the targets that vary; below,
    error by tenths of the epistemic deviation. Lines are means over seeds, bands their range.

    Args:
      written: what `scripts.calibration` has written.
      out: file to write; its ending gives the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tasks, levels = written["tasks"], np.asarray(written["levels"])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            2, len(tasks), figsize=(3.5 * len(tasks), 6.4), layout="constrained", squeeze=False
        )
        for (top, bottom), (task, seeds) in zip(axes.T, tasks.items(), strict=True):
            top.plot((0, 1), (0, 1), ":", color=INK, lw=1.2)
            for part, way, colour, style in SHOWN:
                curves = [
                    np.asarray(x[part][way]["reliability"])[:, x["varies"]].mean(1) for x in seeds
                ]
                label = f"{part.replace('_', ' ')}, {way}"
                _band(top, levels, np.stack(curves), colour, style, label)
            for part, colour in (("held_out", COLOURS[0]), ("off_distribution", COLOURS[1])):
                x, y = (
                    np.stack([one[part]["parts"][k] for one in seeds])
                    for k in ("epistemic", "error")
                )
                rank = np.mean([one[part]["correlation"] for one in seeds])
                label = f"{part.replace('_', ' ')}, rank correlation {rank:.2f}"
                _band(bottom, x.mean(0), y, colour, "-o", label)
            top.set_title(task, loc="left", fontweight="bold", fontsize=10)
            top.set_xlabel("predicted quantile")
            bottom.set(xscale="log", yscale="log", xlabel="epistemic deviation")
            finish(top, ticks=5)
            top.set(xlim=(0, 1), ylim=(0, 1))
            bottom.legend(loc="upper left", fontsize=8)
        axes[0, 0].set_ylabel("share of targets below it")
        axes[1, 0].set_ylabel("error of the mean")
        lines, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=160)
        plt.close(figure)


def _band(axes: Any, x: np.ndarray, y: np.ndarray, colour: str, style: str, label: str) -> None:
    axes.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.15, lw=0)
    axes.plot(x, y.mean(0), style, ms=3, lw=1.6, color=colour, label=label)
