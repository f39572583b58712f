"""Whether an ensemble knows what it does not know: coverage, recalibration, and rank correlation.

  python scripts/calibration.py --out docs/results/calibration.json --figure docs/calibration.png

An ensemble is fitted to records of two policies of a simulator: half of the streams act at random,
half by a planner on the simulator itself. It is judged

- held out: on fresh episodes of the same two policies;
- off the distribution: on single steps from states drawn uniformly from a box `wider` times as wide
  as the records, about the same centre, cut at the bounds of the observation space, with uniform
  actions.
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
from mbrl import replay, spaces
from mbrl.calibration import INTERVALS, LEVELS, calibration, mixture_nll
from mbrl.mdp import episodic, timestep
from mbrl.models.fitted_ensemble import (
    EnsembleConfig,
    Fitter,
    build_ensemble,
    ensemble_optimizer,
    fit_ensemble,
    init_ensemble,
)
from mbrl.models.probabilistic import ProbabilisticEnsemble
from mbrl.models.propagation import EnsembleState
from mbrl.normalization import MIN_STD
from mbrl.planning import PlannerConfig, planner
from mbrl.settings import check_whole, check_within
from mbrl.types import MDP, Array, Batch, Key, Record, Transition, reset_rows
from mbrl.uncertainty import member_disagreement
from scripts import calibration_figure
from scripts.cli import parse, run
from scripts.studies import write_study

WAYS = ("as fitted", "recalibrated", "by likelihood")
"""The deviations that are judged: those of the networks, those scaled by `interval_scale`, which
the model keeps, and for comparison those scaled to the greatest likelihood of the same rows."""
SETS = ("held_out", "off_distribution")
PARTS = 10
"""Equal parts that rows are cut into by what is told of them, for the figure."""


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """Fit ensembles, and compare what they predict with what comes."""

    out: str
    """JSON file to write."""
    figure: str = ""
    """Figure to draw; '' = none."""
    tasks: tuple[str, ...] = ("device/Pendulum", "device/CartPole", "device/Acrobot")
    """Simulators."""
    seeds: int = 5
    """Data sets and ensembles per task."""
    streams: int = 10
    """Environments that data comes from; half of them act at random."""
    records: int = 300
    """Of each stream, to fit to; and as many to judge by."""
    off: int = 2000
    """Single steps off the distribution."""
    wider: float = 2.0
    """Width of the box that they start in, in widths of the data."""

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit.

        Raises:
          ValueError: naming the field.
        """
        check_whole(self, "seeds", "streams", "records", "off")
        check_within(self, "wider", 1, ends="[]")


def main(argv: list[str]) -> int:
    """Run the job."""
    config = parse(StudyConfig, argv, "calibration.py")
    clocks = time.perf_counter(), time.process_time()
    found: dict[str, Any] = {}
    for task in config.tasks:
        seeds, found[task] = study(task, config), []
        for seed in range(config.seeds):
            found[task].append(as_json(jax.device_get(seeds(jax.random.key(seed)))))
            print(f"{task}, seed {seed}: {time.perf_counter() - clocks[0]:.0f} s", flush=True)
    written = write_study(config.out, {
        "config": dataclasses.asdict(config),
        "command": f"python scripts/calibration.py --out {config.out} --figure {config.figure}",
        "seconds": time.perf_counter() - clocks[0],
        "processor_seconds": time.process_time() - clocks[1],
        "intervals": INTERVALS, "levels": LEVELS, "tasks": found,
    })  # fmt: skip
    print(report(written))
    if config.figure:
        calibration_figure.draw(written, Path(config.figure))
    return 0


def study(task: str, config: StudyConfig) -> Any:
    """Build the study of a task: `(key) -> what is found`, compiled."""
    env = envs.make(task, config.streams)
    if not isinstance(env, MDP):
        raise ValueError(f"tasks: got {task!r}, expected simulators on the device, 'device/NAME'")
    settings = EnsembleConfig(recalibrate=True)
    model, optimizer = build_ensemble(env.spec, settings), ensemble_optimizer(settings)

    def seed(key: Key) -> dict[str, Any]:
        keys = jax.random.split(key, 7)
        batch = collect(env, keys[0], config.streams, config.records)
        data, valid = replay.transitions(batch)
        held = replay.holdout_mask((config.streams, config.records), settings.holdout).reshape(-1)
        start = init_ensemble(model, optimizer, keys[1])
        fitted, metrics = fit_ensemble(
            model, settings, start, Fitter(optimizer, data, valid & held), valid, *keys[2:4]
        )
        state = fitted.model
        fresh, counts = replay.transitions(collect(env, keys[4], config.streams, config.records))
        sets = {
            "held_out": (fresh, counts),
            "off_distribution": elsewhere(env, config, keys[5], data.obs, valid),
        }
        plain = state._replace(scale=jnp.ones_like(state.scale))
        likeliest = plain._replace(scale=likelihood_scale(model, plain, data, valid & held))
        ways: dict[str, EnsembleState] = dict(zip(WAYS, (plain, state, likeliest), strict=True))
        return {
            "varies": state.targets.var > MIN_STD**2,
            "rows": counts.sum(), "holdout": (valid & held).sum(),
            "scale": {way: one.scale for way, one in ways.items()},
            "epochs": metrics["model/epochs"],
            **{name: judge(model, ways, *part) for name, part in sets.items()},
        }  # fmt: skip

    return jax.jit(seed)


def collect(env: MDP, key: Key, streams: int, records: int) -> Batch:
    """Record episodes, half of the streams at random and half by planning on the simulator."""
    stream, spec = episodic(env, env.spec.max_episode_steps), env.spec
    mpc = planner(env, PlannerConfig(particles=1))

    def step(carry: Any, key: Key) -> tuple[Any, Record]:
        state, plan = carry
        draw_key, plan_key, step_key = jax.random.split(key, 3)
        now = timestep(stream, None, state)
        plan = reset_rows(now.is_first, mpc.init(streams), plan)
        chosen, plan, _ = mpc.plan(None, plan_key, state.inner, plan)
        drawn = spaces.sample(spec.action, draw_key, (streams,))
        action = reset_rows(jnp.arange(streams) < streams // 2, drawn, chosen)
        state, _ = stream.step(None, step_key, state, action)
        record = Record(now.obs, action, now.reward, now.is_first, now.is_last, now.is_terminal)
        return (state, plan), record

    start_key, key = jax.random.split(key)
    start = stream.init(None, start_key, None, streams), mpc.init(streams)
    _, record = jax.lax.scan(step, start, jax.random.split(key, records))
    record = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), record)
    valid = ~record.is_last & ~jnp.roll(record.is_first, -1, 1)
    return Batch(record, valid.at[:, -1].set(False))


def elsewhere(
    env: MDP, config: StudyConfig, key: Key, obs: Array, valid: Array
) -> tuple[Transition, Array]:
    """Take single steps from states that the data may be far from; see the module. All count."""
    place_key, init_key, action_key, step_key = jax.random.split(key, 4)
    counted = valid[:, None]
    low = jnp.where(counted, obs, jnp.inf).min(0)
    high = jnp.where(counted, obs, -jnp.inf).max(0)
    centre, half = (low + high) / 2.0, (high - low) / 2.0 * config.wider
    space: Any = env.spec.observation
    low, high = jnp.maximum(centre - half, space.low), jnp.minimum(centre + half, space.high)
    drawn = jax.random.uniform(place_key, (config.off, obs.shape[-1]), minval=low, maxval=high)
    state = env.init(None, init_key, drawn)
    action = spaces.sample(env.spec.action, action_key, (config.off,))
    after, outcome = env.step(None, step_key, state, action)
    now, later = env.observe(None, state), env.observe(None, after)
    found = Transition(now, action, outcome.reward, later, outcome.discount == 0.0)
    return found, jnp.ones(config.off, bool)


def likelihood_scale(
    model: ProbabilisticEnsemble, state: EnsembleState, data: Transition, held: Array
) -> Array:
    """Find the scale [D] of the deviations that makes the held-out rows likeliest, on a grid."""
    mean, var = model.predict(state, data.obs, data.action)
    target = model.target(state, data)
    grid = 2.0 ** jnp.linspace(-5.0, 5.0, 201)

    def loss(scale: Array) -> Array:
        return jnp.where(held[:, None], mixture_nll(mean, scale**2 * var, target), 0.0).sum(0)

    return grid[jnp.argmin(jax.lax.map(loss, grid), 0)]


def judge(
    model: ProbabilisticEnsemble, ways: Mapping[str, EnsembleState], data: Transition, mask: Array
) -> dict[str, Any]:
    """Compare predictions of transitions with the truth, for every way to scale deviations."""
    found: dict[str, Any] = {}
    for way, state in ways.items():
        mean, var = model.predict(state, data.obs, data.action)
        target = model.target(state, data)
        found[way] = calibration(mean, var, target, mask)._asdict()
        found["correlation"] = found[way].pop("correlation")  # the same: a scale moves no mean
    wrong = jnp.sqrt(jnp.mean((mean.mean(0) - target) ** 2, -1))
    unsure = jnp.sqrt(jnp.mean(member_disagreement(mean) ** 2, -1))
    order = jnp.argsort(jnp.where(mask, unsure, jnp.inf))
    rank = jnp.argsort(order) * PARTS // jnp.maximum(mask.sum(), 1)  # PARTS of what does not count
    count = jax.ops.segment_sum(jnp.ones(len(rank)), rank, PARTS)
    parts = [jax.ops.segment_sum(x, rank, PARTS) / count for x in (unsure, wrong)]
    found["parts"] = dict(zip(("epistemic", "error"), parts, strict=True))
    return found


def as_json(tree: Any) -> Any:
    """Turn arrays into lists and numbers."""
    return jax.tree.map(lambda x: np.asarray(x).tolist(), tree)


def mean_coverage(one: dict[str, Any], part: str, way: str) -> np.ndarray:
    """Average the coverage of `INTERVALS` over targets that vary at all, [3]."""
    return np.asarray(one[part][way]["coverage"])[:, one["varies"]].mean(1)


def report(written: dict[str, Any]) -> str:
    """Say what was found, a line per task, set of data and way."""
    lines = []
    for task, seeds in written["tasks"].items():
        for part in SETS:
            for way in WAYS:
                cover = np.stack([mean_coverage(one, part, way) for one in seeds])
                gap = [np.asarray(x[part][way]["error"])[x["varies"]].mean() for x in seeds]
                lines.append(
                    f"{task}, {part}, {way}: coverage of 95 % "
                    + " ".join(f"{100 * x:.1f}" for x in cover[:, -1])
                    + f"; of 50, 80 %: {100 * cover[:, 0].mean():.1f}, "
                    f"{100 * cover[:, 1].mean():.1f}; gap {np.mean(gap):.3f}"
                )
            ranks = " ".join(f"{one[part]['correlation']:.2f}" for one in seeds)
            lines.append(f"{task}, {part}: rank correlation {ranks}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(main))
