"""The parts of `mbrl bench ppo`: training runs on the device, of one seed and of several."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

import envs
from agents.ppo import make_ppo
from agents.presets import preset
from mbrl.training.device import run_device
from mbrl.training.learner import DriverConfig
from scripts.bench import GEMM, QUICK_GEMM
from scripts.timing import gemm_rate

COUNTED = (
    "Seconds of whole training runs: `first_seconds` with compilation from nothing, "
    "`warm_seconds` at the speed of all reports after the second."
)
TASK, NUM_ENVS = "device/CartPole", 8


class Sizes(NamedTuple):
    """Steps of a run, reports of it, seeds in one program, and the GEMM."""

    steps: int = 100_000
    reports: int = 20
    seeds: int = 8
    gemm: tuple[int, int] = GEMM


def quick_sizes() -> Sizes:
    """Return sizes that only show that everything runs."""
    return Sizes(2_048, 4, 2, QUICK_GEMM)


def parts(quick: bool, repeats: int) -> dict[str, Callable[[], Any]]:
    """Return what can be measured, by name.

    Args:
      quick: sizes that show that everything runs.
      repeats: training runs per figure, of which the fastest counts.
    """
    sizes = quick_sizes() if quick else Sizes()
    return {
        "train": functools.partial(train_case, sizes, 1, repeats),
        "seeds": functools.partial(seeds_case, sizes, repeats),
    }


def train_case(sizes: Sizes, seeds: int, repeats: int) -> dict[str, Any]:
    """Train some seeds in one program, several times.

    Returns:
      The fastest of each: `first_seconds` of a run with all that it compiles, and `warm_seconds`
      that the run takes at the speed of its reports after the second, when all is compiled.
    """
    before = gemm_rate(sizes.gemm)
    runs = [_train(sizes, seeds) for _ in range(repeats)]
    return {
        "task": TASK,
        "steps": sizes.steps,
        "num_envs": NUM_ENVS,
        "seeds": seeds,
        "first_seconds": min(first for first, _ in runs),
        "warm_seconds": min(warm for _, warm in runs),
        "gemm_before_gflops": before,
        "gemm_after_gflops": gemm_rate(sizes.gemm),
    }


def seeds_case(sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Train several seeds in one program and one alone: how many times the time of one?"""
    one, many = (train_case(sizes, seeds, repeats) for seeds in (1, sizes.seeds))
    return many | {"one": one, "ratio": many["warm_seconds"] / one["warm_seconds"]}


def _train(sizes: Sizes, seeds: int) -> tuple[float, float]:
    env: Any = envs.make(TASK, NUM_ENVS)
    config = preset("ppo", TASK)
    driver = DriverConfig(
        sizes.steps, NUM_ENVS, tuple(range(seeds)), interval=sizes.steps // sizes.reports
    )
    started, ends = time.perf_counter(), []
    for report in run_device(lambda hyper: make_ppo(env.spec, config), env, driver):
        jax.block_until_ready(report.learner)
        ends.append((report.step, time.perf_counter()))
    # The first report holds what comes before the first update, the second compiles the loop.
    (second_step, second), (last_step, last) = ends[1], ends[-1]
    return last - started, (last - second) * last_step / (last_step - second_step)
