"""Learn from a narrow data set with and without pessimism, by a policy and by planning.

  python scripts/pessimism.py --out docs/results/pessimism.json --figure docs/pessimism.png

The data are steps of one policy that has learned for a while and acts without noise, so that they
say little of what other actions would do. MBPO learns a policy in a model of them (with a penalty:
MOPO; with a halt: MOReL), CEM plans in a model of the same data. They act in the task itself only
to be judged.

Reference: Yu et al. 2020 (arXiv:2005.13239); Kidambi et al. 2020 (arXiv:2005.05951).
"""

from __future__ import annotations

import collections
import dataclasses
import json
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
from agents.mbpo import MBPOConfig, make_mbpo
from agents.pets import PETSConfig, make_pets
from agents.presets import preset
from agents.sac import make_sac
from mbrl.planning import PlannerConfig
from mbrl.training.collection import collect_device
from mbrl.training.device import run_device
from mbrl.training.evaluation import evaluate_device
from mbrl.training.learner import DriverConfig, Report, seed_keys
from mbrl.training.offline import run_offline
from mbrl.types import MDP, Record
from scripts.cli import parse, run
from scripts.studies import write_study

AGENTS = ("cem", "mbpo")


@dataclasses.dataclass(frozen=True)
class PessimismConfig:
    """Learn from a narrow data set with and without pessimism."""

    out: str
    """JSON file to write."""
    figure: str = ""
    """Figure to draw; '' = none."""
    env: str = "device/Pendulum"
    """The task, on the device."""
    medium: int = 2500
    """Environment steps that the policy of the data has learned for, with SAC."""
    records: int = 10_000
    """Size of the data set."""
    streams: int = 10
    """Environments that it is recorded in."""
    data_seed: int = 0
    """Seed of that policy and of the data."""
    seeds: int = 5
    """Learners per setting, all on the same data."""
    penalties: tuple[float, ...] = (0.0, 1.0, 5.0, 25.0)
    """Coefficients of the disagreement; the first is none."""
    halt: float = 0.99
    """Share of the recorded steps whose disagreement is trusted where imagined episodes halt."""
    updates: int = 10
    """Updates of MBPO, each a fit of the model and 1,000 steps of SAC."""
    episodes: int = 20
    """Episodes per learner, for MBPO."""
    plans: int = 2
    """Episodes per learner, for CEM."""


def main(argv: list[str]) -> int:
    """Run the job."""
    config = parse(PessimismConfig, argv, "pessimism.py")
    began = time.perf_counter(), time.process_time()
    env = envs.make(config.env)
    assert isinstance(env, MDP)
    record, recorded = narrow(config, env)
    print(f"data: returns {recorded.mean():.0f} +- {recorded.std():.0f}", flush=True)
    found: dict[str, Any] = {}
    for name, learn in zip(AGENTS, (cem_returns, mbpo_returns), strict=True):
        found[name] = summary(config, learn(config, env, record))
        print(report(name, found[name]), flush=True)
        data = {"mean": float(recorded.mean()), "returns": recorded.tolist()}
        write(config, began, {"data": data, "found": found})  # the next part may take long
    if config.figure:
        draw(json.loads(Path(config.out).read_text("utf-8")), Path(config.figure))
    return 0


def write(config: PessimismConfig, began: tuple[float, float], found: Mapping[str, Any]) -> None:
    """Write what has been found, and how."""
    write_study(config.out, {
        "command": "python scripts/pessimism.py",
        "config": dataclasses.asdict(config) | {"out": "", "figure": ""},
        "seconds": round(time.perf_counter() - began[0]),
        "processor_seconds": round(time.process_time() - began[1]),
        **found,
    })  # fmt: skip


def narrow(config: PessimismConfig, env: MDP) -> tuple[Record, np.ndarray]:
    """Let SAC learn for a while, and record its policy without noise.

    Returns:
      Records [E, T, ...], and the returns of the same policy in episodes of their own.
    """
    settings = preset("sac", config.env)

    def factory(hyper: Any) -> Any:
        return make_sac(env.spec, dataclasses.replace(settings, **hyper))

    driver = DriverConfig(config.medium, seeds=(config.data_seed,), interval=config.medium)
    state = last(run_device(factory, env, driver)).learner.agent
    keys = seed_keys((config.data_seed + 1_000_003,))
    record = collect_device(factory, state, env, keys, config.records, config.streams, "greedy")
    returns = evaluate_device(factory, state, env, keys, config.episodes)
    return jax.tree.map(lambda x: x[0], record), returns[0]


def last(reports: Any) -> Report:
    """Run a driver to its end."""
    return collections.deque(reports, maxlen=1).pop()


def settings_of(config: PessimismConfig) -> dict[str, tuple[float, float]]:
    """Name the settings: penalty and halt."""
    settings = {f"penalty {c:g}": (c, 0.0) for c in config.penalties}
    return settings | {f"halt {config.halt:g}": (0.0, config.halt)}


def hyper_of(config: PessimismConfig) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Return one value per setting and seed, and the seeds, settings first."""
    values = np.repeat(np.array(list(settings_of(config).values())), config.seeds, 0)
    hyper = {"penalty": jnp.asarray(values[:, 0]), "halt": jnp.asarray(values[:, 1])}
    return hyper, tuple(range(config.seeds)) * len(settings_of(config))


def mbpo_returns(config: PessimismConfig, env: MDP, record: Record) -> np.ndarray:
    """Learn policies in models of the data: returns [settings, seeds, episodes]."""
    settings: MBPOConfig = preset("mbpo", config.env)
    base = dataclasses.replace(
        settings, hidden=(64, 64), batch_size=256, max_epochs=10, patience=3,
        elites=5, length=(5, 5), rollouts=2000, train_ratio=20.0, train_every=50, real_ratio=0.25,
        # Nothing is explored: the noise of the task's preset would leave what the data knows.
        sac=dataclasses.replace(settings.sac, target_entropy=-1.0),
    )  # fmt: skip

    def factory(hyper: Any) -> Any:
        return make_mbpo(env.spec, dataclasses.replace(base, **hyper))

    hyper, seeds = hyper_of(config)
    driver = DriverConfig(config.updates, seeds=seeds, interval=1)
    for at in run_offline(factory, env.spec, record, driver, hyper):
        parts = np.asarray(at.metrics["imagined/reward"]).reshape(-1, config.seeds).mean(1)
        rewards = "  ".join(f"{x:.1f}" for x in parts)
        print(f"update {at.step}: imagined reward {rewards}", flush=True)
    keys = seed_keys(tuple(seed + 1_000_003 for seed in seeds))
    returns = evaluate_device(factory, at.learner.agent, env, keys, config.episodes, hyper)
    return returns.reshape(-1, config.seeds, config.episodes)


def cem_returns(config: PessimismConfig, env: MDP, record: Record) -> np.ndarray:
    """Plan in models of the data, one per seed: returns [settings, seeds, episodes]."""
    planning = PlannerConfig(
        "cem", horizon=15, population=32, iterations=3, particles=1, elites=5, discount=0.95
    )
    base = PETSConfig(
        hidden=(64, 64), batch_size=256, max_epochs=40, propagation="mean", planner=planning
    )

    def factory(hyper: Any) -> Any:
        return make_pets(env.spec, dataclasses.replace(base, **hyper))

    hyper, seeds = hyper_of(config)
    once = {"penalty": jnp.zeros(config.seeds), "halt": jnp.full(config.seeds, config.halt)}
    driver = DriverConfig(1, seeds=tuple(range(config.seeds)))
    state: Any = last(run_offline(factory, env.spec, record, driver, once)).learner.agent
    state = jax.tree.map(lambda x: jnp.concatenate([x] * (len(seeds) // config.seeds)), state)
    # The models are the same in all settings; only some of them halt.
    limit = jnp.where(hyper["halt"] > 0, state.halt.threshold, jnp.inf)
    state = state._replace(halt=state.halt._replace(threshold=limit))
    keys = seed_keys(tuple(seed + 1_000_003 for seed in seeds))
    returns = evaluate_device(factory, state, env, keys, config.plans, hyper)
    return returns.reshape(-1, config.seeds, config.plans)


def summary(config: PessimismConfig, returns: np.ndarray) -> dict[str, Any]:
    """Reduce returns [settings, seeds, episodes]; errors are those of means over seeds."""
    found: dict[str, Any] = {}
    means = returns.mean(2)
    errors = means.std(1, ddof=1) / config.seeds**0.5
    for name, mean, error in zip(settings_of(config), means, errors, strict=True):
        gain, spread = mean.mean() - means[0].mean(), float(np.hypot(error, errors[0]))
        found[name] = {
            "mean": float(mean.mean()), "error": float(error), "seeds": mean.tolist(),
            "gain": float(gain), "gain_error": spread,
        }  # fmt: skip
    return found


def report(name: str, found: Mapping[str, Any]) -> str:
    """Say what was found, a line for each setting."""
    return "\n".join(
        f"{name}, {setting}: {x['mean']:.0f} +- {x['error']:.0f}, gain {x['gain']:+.0f} +- "
        f"{x['gain_error']:.0f}"
        for setting, x in found.items()
    )


def draw(written: Mapping[str, Any], out: Path) -> None:
    """Draw the return of each setting, every seed a dot, for a policy and for planning."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from scripts.figures import COLOURS, INK, STYLE

    titles = {"mbpo": "policy learned in the model (MBPO)", "cem": "planning in the model (CEM)"}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.6), layout="constrained", sharey=True)
        for axis, name in zip(axes, AGENTS, strict=True):
            found = written["found"][name]
            for place, one in enumerate(found.values()):
                colour = COLOURS[0 if place == 0 else 1]
                axis.errorbar(
                    place, one["mean"], 2 * one["error"], fmt="s", color=colour, capsize=4
                )
                axis.plot([place + 0.18] * len(one["seeds"]), one["seeds"], ".", color=colour)
            axis.axhline(written["data"]["mean"], ls=":", color=INK, lw=1.2, label="policy of data")
            axis.set_xticks(range(len(found)), [x.replace(" ", "\n") for x in found])
            axis.set_title(titles[name])
        axes[0].set_ylabel("return, two standard errors")
        axes[0].legend()
        figure.savefig(out, dpi=160)
        plt.close(figure)


if __name__ == "__main__":
    sys.exit(run(main))
