"""Epistemic and aleatoric standard deviation of every posterior on a regression in one dimension.

  python scripts/posteriors.py --out docs/results/posteriors.json --figure docs/posteriors.png

An ensemble and the Bayesian networks see the same noisy curve between -1 and 1. Away from there a
model should know that it does not know.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any, get_args

if __name__ == "__main__":  # run as a file: imports start at the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import jax
import jax.numpy as jnp
import numpy as np

from mbrl import spaces
from mbrl.models.fitted_ensemble import (
    EnsembleConfig,
    Fitter,
    build_ensemble,
    ensemble_optimizer,
    fit_ensemble,
    init_ensemble,
)
from mbrl.models.posterior import PosteriorKind
from mbrl.models.probabilistic import predicted_variance
from mbrl.types import EnvSpec, Transition
from scripts.cli import parse, run
from scripts.figures import COLOURS, INK, STYLE, finish
from scripts.studies import write_study

SPEC = EnvSpec("curve", spaces.box(-np.inf, np.inf, (1,)), spaces.box(-1.0, 1.0, (1,)))
NOISE = 0.1
POINTS = np.linspace(-4.0, 4.0, 161, dtype=np.float32)
INSIDE, OUTSIDE = np.abs(POINTS) <= 1.0, np.abs(POINTS) >= 2.0


@dataclasses.dataclass(frozen=True)
class CurveConfig:
    """Fit a curve with every posterior."""

    out: str
    """JSON file to write."""
    figure: str = ""
    """PNG file to write, of the first seed."""
    rows: int = 400
    """Data points."""
    members: int = 20
    """Networks of the ensemble, or samples of a posterior."""
    hidden: tuple[int, ...] = (64, 64)
    """Hidden layers."""
    epochs: int = 200
    """Passes over the data."""
    seeds: int = 5
    """Data sets and fits of each posterior."""


def main(argv: list[str]) -> int:
    """Run the job."""
    config = parse(CurveConfig, argv, "posteriors.py")
    curves = {kind: curve(config, kind) for kind in get_args(PosteriorKind)}
    written = write_study(config.out, {
        "command": f"python scripts/posteriors.py {shlex.join(argv)}",
        "config": dataclasses.asdict(config),
        "found": {kind: summary(*found) for kind, found in curves.items()},
    })  # fmt: skip
    for kind, found in written["found"].items():
        print(kind, json.dumps(found), flush=True)
    if config.figure:
        draw(config, curves)
    return 0


def target(x: Any) -> Any:
    """Return the curve."""
    return jnp.sin(3.0 * x)


def data_set(config: CurveConfig, seed: Any) -> Transition:
    """Draw points of the curve: the next observation is its value, the reward is a part of it."""
    place, noise = jax.random.split(jax.random.fold_in(jax.random.key(0), seed))
    x = jax.random.uniform(place, (config.rows, 1), minval=-1.0)
    value = target(x) + NOISE * jax.random.normal(noise, x.shape)
    return Transition(x, jnp.zeros_like(x), value[:, 0], value, jnp.zeros(config.rows, bool))


def curve(config: CurveConfig, kind: PosteriorKind) -> tuple[Any, Any, Any]:
    """Return mean, epistemic and aleatoric standard deviation at `POINTS`, [seeds, points]."""
    settings = EnsembleConfig(
        members=config.members, elites=config.members, posterior=kind, hidden=config.hidden,
        targets=("absolute",), max_epochs=config.epochs, patience=config.epochs,
    )  # fmt: skip
    model, optimizer = build_ensemble(SPEC, settings), ensemble_optimizer(settings)
    held, valid = jnp.arange(config.rows) % 10 == 0, jnp.ones(config.rows, bool)

    def fit(seed: Any) -> Any:
        start_key, fit_key, ending_key = jax.random.split(jax.random.key(seed), 3)
        fitter = Fitter(optimizer, data_set(config, seed), held)
        start = init_ensemble(model, optimizer, start_key)
        fitted = fit_ensemble(model, settings, start, fitter, valid, fit_key, ending_key)[0]
        x = POINTS[:, None]
        out = model.predict(fitted.model, x, jnp.zeros_like(x))
        split = predicted_variance(fitted.model, out)
        units = fitted.model.targets
        mean = units.mean[0] + units.std[0] * out.mean.mean(0)[:, 0]
        return mean, jnp.sqrt(split.epistemic[:, 0]), jnp.sqrt(split.aleatoric[:, 0])

    each = jax.jit(fit)
    found = [each(seed) for seed in range(config.seeds)]
    mean, epistemic, aleatoric = (np.stack(x) for x in zip(*found, strict=True))
    return mean, epistemic, aleatoric


def summary(mean: Any, epistemic: Any, aleatoric: Any) -> dict[str, Any]:
    """Return medians over points, by seed."""
    inside, outside = (np.median(epistemic[:, where], 1) for where in (INSIDE, OUTSIDE))
    error = np.sqrt(np.mean((mean - np.asarray(target(POINTS)))[:, INSIDE] ** 2, 1))
    return {
        "epistemic_inside": inside.tolist(),
        "epistemic_outside": outside.tolist(),
        "growth": (outside / inside).tolist(),
        "aleatoric_inside": np.median(aleatoric[:, INSIDE], 1).tolist(),
        "error_inside": error.tolist(),
    }


def draw(config: CurveConfig, curves: dict[str, Any]) -> None:
    """Draw the first seed of every posterior: data, mean and two epistemic deviations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    data = data_set(config, 0)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(curves), figsize=(11.0, 3.0), layout="constrained", sharey=True
        )
        for axis, (kind, found), colour in zip(axes, curves.items(), COLOURS, strict=False):
            mean, epistemic, aleatoric = (x[0] for x in found)
            axis.plot(data.obs[:, 0], data.next_obs[:, 0], ".", color="0.6", ms=3, label="data")
            axis.plot(POINTS, target(POINTS), "--", color=INK, lw=1.0, label="curve")
            axis.plot(POINTS, mean, color=colour, lw=1.5, label="mean")
            for share, alpha, label in ((1.0, 0.3, "2 epistemic"), (0.0, 0.15, "2 in all")):
                spread = 2.0 * np.sqrt(epistemic**2 + (1.0 - share) * aleatoric**2)
                axis.fill_between(
                    POINTS,
                    mean - spread,
                    mean + spread,
                    color=colour,
                    alpha=alpha,
                    lw=0,
                    label=label,
                )
            axis.set_title(kind, loc="left")
            axis.set_ylim(-6.0, 6.0)
            axis.set_xlabel("input")
            finish(axis, ticks=5)
        axes[0].legend(loc="lower left", fontsize=7)
        Path(config.figure).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(config.figure, dpi=160)
        plt.close(figure)


if __name__ == "__main__":
    sys.exit(run(main))
