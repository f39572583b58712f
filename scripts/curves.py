"""Metrics of runs, and their statistics over seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Seed = tuple[int, int]
"""Number of the file and seed in it: one seed may lie in several folders of a sweep."""


class Run(NamedTuple):
    """Metrics of one run: `series[name][seed]` is a pair of arrays (steps, values)."""

    label: str
    series: dict[str, dict[Seed, tuple[np.ndarray, np.ndarray]]]


class Curve(NamedTuple):
    """Statistics over seeds on a common grid of steps; all [G]."""

    steps: np.ndarray
    median: np.ndarray
    low: np.ndarray
    high: np.ndarray


def load(folder: Path, label: str) -> Run:
    """Read every `metrics.jsonl` in or below a folder.

    Raises:
      ValueError: when there is none, it holds no number, or a line is malformed.
    """
    files = [folder] if folder.is_file() else sorted(folder.rglob("metrics.jsonl"))
    if not files:
        raise ValueError(
            f"RUN: got {folder}, expected a folder with metrics.jsonl (mbrl train --out)"
        )
    points: dict[str, dict[Seed, list[tuple[float, float]]]] = {}
    for number, file in enumerate(files):
        for row in read_lines(file):
            seed = (number, row.get("seed") or 0)
            prefix = "" if row.get("kind", "train") == "train" else f"{row['kind']}/"
            for name, value in row.items():
                if name in ("step", "seed", "time") or isinstance(value, bool):
                    continue
                if isinstance(value, int | float) and math.isfinite(value):
                    name = prefix + name.removeprefix(prefix)
                    points.setdefault(name, {}).setdefault(seed, []).append((row["step"], value))
    if not points:
        raise ValueError(f"RUN: {folder} holds no metrics yet; train for longer first")
    return Run(label, {name: _arrays(seeds) for name, seeds in points.items()})


def _arrays(seeds: Mapping[Seed, list[tuple[float, float]]]) -> dict[Seed, Any]:
    pairs = {seed: np.array(sorted(rows, key=lambda row: row[0])) for seed, rows in seeds.items()}
    return {seed: (rows[:, 0], rows[:, 1]) for seed, rows in sorted(pairs.items())}


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSONL file; a torn last line (a killed writer) is skipped.

    Raises:
      ValueError: naming file and line, for any other line without an object and a step.
    """
    lines = file.read_text("utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int | float):
                raise ValueError("expected an object with a number 'step'")
        except ValueError as error:
            if number == len(lines):
                return
            raise ValueError(f"{file}, line {number}: {error}; got {line[:80]!r}") from error
        yield row


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Average each value of [T] with up to `window - 1` values before it."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    index = np.arange(1, len(values) + 1)
    start = np.maximum(index - window, 0)
    return (total[index] - total[start]) / (index - start)


def curve(seeds: Sequence[tuple[np.ndarray, np.ndarray]], window: int = 1) -> Curve:
    """Summarize the curves of several seeds where all of them have data.

    Args:
      seeds: (steps [T], values [T]) of each seed, steps ascending; lengths may differ.
      window: values in the moving average of each seed.

    Returns:
      The median, with the middle half as band from four seeds on, else minimum to maximum.
    """
    start = max(steps[0] for steps, _ in seeds)
    stop = min(steps[-1] for steps, _ in seeds)
    if start >= stop:
        grid = np.array([stop])
    else:
        every = np.unique(np.concatenate([steps for steps, _ in seeds]))
        grid = every[(every >= start) & (every <= stop)]
        grid = grid if len(grid) <= 400 else np.linspace(start, stop, 400)
    values = np.stack([np.interp(grid, steps, smooth(v, window)) for steps, v in seeds])
    quantiles = (25, 75) if len(seeds) >= 4 else (0, 100)
    low, high = np.percentile(values, quantiles, axis=0)
    return Curve(grid, np.median(values, 0), low, high)
