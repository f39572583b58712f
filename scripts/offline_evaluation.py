"""Predict the returns of policies by a model of recorded data, beside what they really earn.

  python scripts/offline_evaluation.py --out docs/results/offline_evaluation.json \\
    --figure docs/offline_evaluation.png

The policies are those of one run of SAC at equal distances, the data is what that run has recorded,
the model the ensemble that PETS plans with. Every member predicts by itself, from the starts that
the policies have in the task too; what they disagree about is the band.

Reference: Fu et al. 2021 (arXiv:2103.16596).
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file: imports start at the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import jax
import jax.numpy as jnp
import numpy as np

import envs
from agents.pets import PETSConfig, make_pets
from agents.presets import preset
from agents.sac import make_sac
from mbrl.calibration import rank_correlation
from mbrl.models.fitted_ensemble import build_ensemble
from mbrl.training.device import run_device
from mbrl.training.evaluation import evaluate_in_model
from mbrl.training.learner import DriverConfig, seed_keys
from mbrl.training.offline import run_offline
from mbrl.training.recorded import in_order
from mbrl.types import MDP, Record
from scripts.cli import parse, run
from scripts.studies import write_study


@dataclasses.dataclass(frozen=True)
class OfflineEvaluationConfig:
    """Predict the returns of policies by a model of recorded data."""

    out: str
    """JSON file to write."""
    figure: str = ""
    """Figure to draw; '' = none."""
    env: str = "device/Pendulum"
    """The task, on the device."""
    steps: int = 3000
    """Environment steps of SAC."""
    every: int = 250
    """Steps between the policies that are judged."""
    seed: int = 1
    """Of SAC and of the model."""
    starts: int = 20
    """Recorded starts of episodes per policy, in the task and with every member of the model."""


def main(argv: list[str]) -> int:
    """Run the job."""
    config = parse(OfflineEvaluationConfig, argv, "offline_evaluation.py")
    began = time.process_time()
    env = envs.make(config.env)
    assert isinstance(env, MDP)
    steps, real, predicted = study(config, env)
    written = write_study(config.out, {
        "command": "python scripts/offline_evaluation.py",
        "config": dataclasses.asdict(config) | {"out": "", "figure": ""},
        "processor_seconds": round(time.process_time() - began), "steps": steps,
        **summary(real, predicted),
    })  # fmt: skip
    print(report(written))
    if config.figure:
        draw(written, Path(config.figure))
    return 0


def study(config: OfflineEvaluationConfig, env: MDP) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Train, and judge P policies from M recorded starts.

    Returns:
      Their steps, what they earn [P, M], and what N members predict [P, N, M].
    """
    settings = preset("sac", config.env)

    def sac(hyper: Any) -> Any:
        return make_sac(env.spec, dataclasses.replace(settings, **hyper))

    driver = DriverConfig(config.steps, seeds=(config.seed,), interval=config.every)
    steps, states, ring = [], [], None
    for found in run_device(sac, env, driver):
        steps.append(found.step)
        states.append(jax.tree.map(jnp.copy, found.learner.agent))
        ring = jax.tree.map(lambda x: np.asarray(x[0]), found.learner.ring)
    assert ring is not None
    policies = jax.tree.map(lambda *x: jnp.concatenate(x), *states)
    keys = seed_keys((config.seed + 1_000_003,) * len(states))
    record = in_order(ring)._replace(extras=())
    model, params, members = fitted(config, env, record)
    starts = jax.tree.map(lambda x: x[record.is_first], record.obs)
    rows = np.random.default_rng(config.seed).integers(record.is_first.sum(), size=config.starts)
    starts = jax.tree.map(lambda x: x[rows], starts)
    real = evaluate_in_model(sac, policies, env, None, keys, starts)[:, 0]
    return steps, real, evaluate_in_model(sac, policies, model, params, keys, starts, members)


def fitted(config: OfflineEvaluationConfig, env: MDP, record: Record) -> tuple[MDP, Any, int]:
    """Fit an ensemble to records: its MDP, its parameters and how many members predict."""
    settings = PETSConfig(hidden=(64, 64), batch_size=256, max_epochs=100)

    def pets(hyper: Any) -> Any:
        return make_pets(env.spec, settings)

    (found,) = run_offline(pets, env.spec, record, DriverConfig(1, seeds=(config.seed,)))
    params = jax.tree.map(lambda x: x[0], found.learner.agent.model)
    model = build_ensemble(env.spec, settings).mdp("tsinf", uncertainty=False)
    return model, params, settings.elites


def summary(real: np.ndarray, predicted: np.ndarray) -> dict[str, Any]:
    """Compare returns [P, M] with those that members predict [P, N, M]."""
    members, mean = predicted.mean(2), real.mean(1)
    between = (mean >= members.min(1)) & (mean <= members.max(1))
    return {
        "real": mean.tolist(),
        "members": members.tolist(),
        "rank_correlation": float(
            rank_correlation(jnp.asarray(members.mean(1)), jnp.asarray(mean))
        ),
        "mean_absolute_error": float(np.abs(members.mean(1) - mean).mean()),
        "within_band": float(between.mean()),
    }


def report(written: Mapping[str, Any]) -> str:
    """Say what was found, a line for each policy."""
    lines = [
        f"after {step} steps: {real:.0f}, predicted {np.mean(members):.0f} "
        f"({min(members):.0f} to {max(members):.0f})"
        for step, real, members in zip(
            written["steps"], written["real"], written["members"], strict=True
        )
    ]
    lines.append(
        f"rank correlation {written['rank_correlation']:.2f}, mean absolute error "
        f"{written['mean_absolute_error']:.0f}, within the band {written['within_band']:.0%}"
    )
    return "\n".join(lines)


def draw(written: Mapping[str, Any], out: Path) -> None:
    """Draw predicted over real returns, with the range of the members."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from scripts.figures import COLOURS, INK, STYLE

    real, members = np.asarray(written["real"]), np.asarray(written["members"])
    mean, rho = members.mean(1), f"{written['rank_correlation']:.2f}"
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(5.0, 4.4), layout="constrained")
        band = np.stack([mean - members.min(1), members.max(1) - mean])
        axis.errorbar(real, mean, band, fmt="o", color=COLOURS[0], capsize=3)
        for step, x, y in zip(written["steps"], real, mean, strict=True):
            axis.annotate(f"{step:,}", (x, y), (5, -11), textcoords="offset points", fontsize=7)
        ends = [min(real.min(), members.min()), max(real.max(), members.max())]
        axis.plot(ends, ends, ":", color=INK, lw=1.2)
        axis.set_xlabel("return in the task")
        axis.set_ylabel("return predicted by the model, range of its members")
        axis.set_title(f"policies of SAC by steps; rank correlation {rho}")
        figure.savefig(out, dpi=160)
        plt.close(figure)


if __name__ == "__main__":
    sys.exit(run(main))
