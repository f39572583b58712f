"""The pictures of `scripts.dream`: strips and films of images, bands of numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mbrl import spaces
from mbrl.networks.observation import is_image
from mbrl.types import Box, Discrete, MultiDiscrete
from scripts.evaluate import write_video
from scripts.figures import COLOURS, FAINT, INK, STYLE

MODEL, ERRORS = COLOURS[1], COLOURS[2:]
ROWS = ("truth", "model", "difference")
STRIPS, COLUMNS, NUMBERS = 3, 20, 8
"""Largest numbers of episodes in a strip, time steps in it, and numbers with a panel."""
WIDTH = 10.5
"""Inches."""


class Part(NamedTuple):
    """What is predicted: a leaf of the observation, the reward or the survival.

    Attributes:
      name: path of the leaf.
      space: of one value.
      truth: [B, T, ...].
      samples: [B, Q, T, ...] predictions.
    """

    name: str
    space: Box | Discrete | MultiDiscrete
    truth: np.ndarray
    samples: np.ndarray


class Scene(NamedTuple):
    """What is drawn.

    Attributes:
      title: headline.
      observed: parts of the observation.
      outcomes: reward and survival.
      valid: [B, T] records that belong to the episode of their row.
      context: records that were seen.
      errors: by name, [2, T - context] of the model and of a constant.
    """

    title: str
    observed: list[Part]
    outcomes: list[Part]
    valid: np.ndarray
    context: int
    errors: dict[str, np.ndarray]


class Line(NamedTuple):
    """One panel: the truth [T] and the samples of its prediction [Q, T]."""

    name: str
    truth: np.ndarray
    samples: np.ndarray


class Film(NamedTuple):
    """Images of one episode, [T, 3, H, W, 3] from 0 to 1: truth, model, difference."""

    name: str
    images: np.ndarray


def write(scene: Scene, file: Path) -> None:
    """Draw a scene; the ending of the file gives the format."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".gif":
        write_video(file, list(frames(scene)), fps=5)
    else:
        draw(scene, file)


def episodes(scene: Scene, most: int) -> list[int]:
    """Choose the longest episodes, in their order."""
    longest = np.argsort(-scene.valid.sum(1), kind="stable")[:most]
    return sorted(int(row) for row in longest)


def lines(scene: Scene, row: int) -> list[Line]:
    """List the first numbers of the observations of an episode, its reward and survival."""
    length = int(scene.valid[row].sum())

    def split(part: Part) -> list[Line]:
        truth = part.truth[row].reshape(len(part.truth[row]), -1)[:length]
        samples = part.samples[row].reshape(*part.samples.shape[1:3], -1)[:, :length]
        many = part.truth.ndim > 2
        return [
            Line(f"{part.name}[{i}]" if many else part.name, truth[:, i], samples[:, :, i])
            for i in range(truth.shape[1])
        ]

    numbers = [line for part in scene.observed if not is_image(part.space) for line in split(part)]
    return numbers[:NUMBERS] + [line for part in scene.outcomes for line in split(part)]


def films(scene: Scene, row: int) -> list[Film]:
    """List the images of an episode, with the first sample of the model."""
    found, length = [], int(scene.valid[row].sum())
    for part in scene.observed:
        if isinstance(part.space, Box) and is_image(part.space):
            low, high = (np.asarray(x) for x in spaces.finite_bounds(part.space, part.name))
            wide = np.maximum(high - low, 1e-6)
            pair = part.truth[row], part.samples[row, 0]
            seen, said = (_rgb((x[:length] - low) / wide) for x in pair)
            found.append(Film(part.name, np.stack([seen, said, (said - seen + 1.0) / 2.0], 1)))
    return found


def _rgb(image: np.ndarray) -> np.ndarray:
    """Show [..., C] as colours if C is 3, else as the grey of its mean."""
    image = np.clip(image, 0.0, 1.0)
    if image.shape[-1] == 3:
        return image
    return np.repeat(image.mean(-1, keepdims=True), 3, -1)


def draw(scene: Scene, file: Path) -> None:
    """Write strips of the images, and panels of numbers, reward, survival and error."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = episodes(scene, STRIPS)
    strips = [(row, film) for row in rows for film in films(scene, row)]
    panels = lines(scene, rows[0])
    number = len(panels) + 1
    across = min((2, 3), key=lambda columns: -number % columns)  # the fewest empty places
    down = math.ceil(number / across)
    heights = [_strip_height(film) for _, film in strips] + [1.75 * down]
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(WIDTH, sum(heights) + 1.1), layout="constrained")
        grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
        for place, (row, film) in enumerate(strips):
            _draw_strip(figure.add_subplot(grid[place]), film, scene.context, row)
        inner = grid[len(strips)].subgridspec(down, across)
        for place, line in enumerate(panels):
            axes = figure.add_subplot(inner[divmod(place, across)])
            name = f"{line.name}, episode {rows[0] + 1}" if strips else line.name
            draw_line(axes, line._replace(name=name), scene.context)
        draw_error(figure.add_subplot(inner[divmod(len(panels), across)]), scene)
        text = f"{scene.title}: {scene.context} records seen, then open loop"
        text += "" if strips else f" (episode {rows[0] + 1} of {len(scene.valid)})"
        figure.suptitle(text, x=0.01, ha="left", fontsize=11)
        legends = [figure.axes[i].get_legend_handles_labels() for i in (len(strips), -1)]
        handles, labels = (list(itertools.chain(*found)) for found in zip(*legends, strict=True))
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
        figure.savefig(file, dpi=160)
        plt.close(figure)


def _strip_height(film: Film) -> float:
    length, rows, height, width = film.images.shape[:4]
    return rows * _cell(length) * height / width + 0.65


def _cell(length: int) -> float:
    """Return the width of an image in a strip in inches."""
    columns = math.ceil(length / math.ceil(length / COLUMNS))
    return min(0.85, (WIDTH - 1.2) / columns)


def _draw_strip(axes: Any, film: Film, context: int, row: int) -> None:
    length, _, height, width = film.images.shape[:4]
    times = np.arange(0, length, math.ceil(length / COLUMNS))
    margin, border, gap = 0.02, int(np.sum(times < context)), 0.2
    left = np.arange(len(times)) + np.where(times < context, 0.0, gap)
    for x, t in zip(left, times, strict=True):
        for y in range(len(ROWS)):
            place = (x + margin, x + 1 - margin, y + 1 - margin, y + margin)
            axes.imshow(film.images[t, y], extent=place, interpolation="nearest")
    axes.axvline(border + gap / 2, color=MODEL, lw=2.5, clip_on=False)
    axes.set(xlim=(0, len(times) + gap), ylim=(len(ROWS), 0))
    axes.set_aspect(height / width, anchor="W")
    axes.set_xticks(left + 0.5, [str(t) for t in times])
    axes.set_yticks(np.arange(len(ROWS)) + 0.5, ROWS)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("time step of the episode", loc="left")
    text = f"{film.name}, episode {row + 1}: seen | open loop (grey: no difference)"
    axes.set_title(text, loc="left", fontsize=9)


def draw_line(axes: Any, line: Line, context: int) -> None:
    """Draw the truth, and the median and the middle of samples."""
    time = np.arange(len(line.truth))
    low, middle, high = np.percentile(line.samples, (10, 50, 90), axis=0)
    _context(axes, context)
    future = slice(max(context - 1, 0), None)
    axes.fill_between(
        time[future], low[future], high[future], color=MODEL, alpha=0.25, lw=0,
        label="model, 10 to 90 % of samples",
    )  # fmt: skip
    axes.plot(time, middle, "-", color=MODEL, lw=1.6, label="model, median")
    axes.plot(time, line.truth, "-", color=INK, lw=1.2, label="truth")
    if line.name.startswith("survival"):
        axes.set_ylim(-0.05, 1.05)
    axes.set_title(line.name, loc="left", fontsize=9)
    axes.set_xlabel("time step of the episode", fontsize=8)
    _finish(axes)


def draw_error(axes: Any, scene: Scene) -> None:
    """Draw normalized errors by the number of steps ahead."""
    moving = {name: pair for name, pair in scene.errors.items() if np.isfinite(pair).any()}
    for index, (name, pair) in enumerate(moving.items()):
        colour, ahead = ERRORS[index % len(ERRORS)], np.arange(1, pair.shape[1] + 1)
        marker = "o" if len(ahead) == 1 else ""
        label = f"error of {name} (dotted: last value held)"
        axes.plot(ahead, pair[1], ":", marker=marker, ms=3, color=colour, lw=1.4)
        axes.plot(ahead, pair[0], "-", marker=marker, ms=5, color=colour, lw=1.6, label=label)
    if not moving:
        axes.text(0.5, 0.5, "the truth never changes", ha="center", transform=axes.transAxes)
    axes.set_title(f"normalized RMSE, {len(scene.valid)} episodes", loc="left", fontsize=9)
    axes.set_xlabel("steps ahead", fontsize=8)
    axes.set_ylim(bottom=0.0)
    _finish(axes)


def _context(axes: Any, context: int) -> None:
    axes.axvspan(-0.5, context - 0.5, color=FAINT, alpha=0.6, lw=0)
    axes.axvline(context - 0.5, color=INK, lw=1.0, ls="--", label="end of the context")


def _finish(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.tick_params(labelsize=8)
    axes.margins(x=0.02)


def frames(scene: Scene) -> Iterator[np.ndarray]:
    """Yield [H, W, 3] uint8: truth, model and difference side by side, episodes below."""
    from PIL import Image, ImageDraw, ImageFont

    shown = [film for row in episodes(scene, STRIPS) for film in films(scene, row)]
    edge = max(film.images.shape[2] for film in shown)
    scale, gap, head = max(1, round(160 / edge)), 6, 44
    sizes = [(film.images.shape[3] * scale, film.images.shape[2] * scale) for film in shown]
    across = max(width for width, _ in sizes)
    wide = len(ROWS) * (across + gap) + gap
    font = ImageFont.load_default(size=14)
    for t in range(scene.valid.shape[1]):
        page = Image.new("RGB", (wide, head + sum(height + gap for _, height in sizes)), "white")
        pen = ImageDraw.Draw(page)
        seen = t < scene.context
        colour, text = (INK, "seen") if seen else (MODEL, "open loop")
        pen.text((gap, 4), f"time step {t}: {text}", fill=colour, font=font)
        top = head
        for film, size in zip(shown, sizes, strict=True):
            for x, name in enumerate(ROWS):
                left = gap + x * (across + gap)
                pen.text((left, 22), name, fill=INK, font=font)
                if t < len(film.images):
                    pixels = np.round(255.0 * film.images[t, x]).astype(np.uint8)
                    image = Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)
                    page.paste(image, (left, top))
            top += size[1] + gap
        yield np.asarray(page)
