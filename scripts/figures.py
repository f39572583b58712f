"""Colours and settings that all figures share."""

from __future__ import annotations

from typing import Any

COLOURS = ("#2f6fb0", "#d1603d", "#3d9970", "#8e5ea2", "#c9a227", "#4a5568", "#c2477f", "#5bb5c4")
INK, FAINT = "#2d3748", "#d8dee6"

STYLE: dict[Any, Any] = {
    "font.size": 10.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
}


def finish(axes: Any, ticks: int = 7) -> None:
    """Give axes few ticks, with large steps written in thousands and millions."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    def short(value: float, _: Any) -> str:
        for unit, name in ((1e6, "M"), (1e3, "k")):
            if abs(value) >= 10 * unit:
                return f"{value / unit:g}{name}"
        return f"{value:g}"

    axes.xaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(short))
    axes.margins(x=0.02)
