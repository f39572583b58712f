"""`mbrl bench`: how fast this machine plans and learns, as JSON."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":  # run as a file: imports start at the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import jax
import tyro

from mbrl.training.run_directory import versions
from scripts.cli import parse, run
from scripts.timing import gemm_rate

GEMM, QUICK_GEMM = (10_000, 200), (64, 16)
"""Rows and width of the product that stands for what the machine can do."""


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """Measure speed on this machine and print JSON."""

    what: tyro.conf.Positional[Literal["planning", "dreamer", "muzero", "ppo", "mbpo", "rlhf"]]
    """planning: planners, model learning and seeds; dreamer: updates and policy steps;
    muzero: searches, training and updates; ppo: training runs of one seed and several; mbpo: an
    epoch, its rollouts and its updates; rlhf: steps of every stage."""
    repeats: int = 20
    """Warm calls per figure, of which the median and the fastest are reported."""
    parts: tuple[str, ...] = ()
    """What to measure: planning, preset, batch, epoch, seeds; or 1m, 12m, image, start,
    seeds; or search, reanalysis, train, update; or train, seeds; or epoch, imagine, update; or
    reward, direct, generate, ppo, members, rankings, and full on an accelerator; all when empty."""
    out: str = ""
    """File for the JSON; standard output when empty."""
    quick: bool = False
    """Tiny sizes, to see that everything runs; the figures mean nothing."""


def main(argv: list[str]) -> int:
    """Run the job."""
    config = parse(BenchConfig, argv, "mbrl bench")
    if not config.quick:  # a program read from the disk compiles in no time
        jax.config.update("jax_enable_compilation_cache", False)
    text = json.dumps(measure(config), indent=2, allow_nan=False)
    if config.out:
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
        Path(config.out).write_text(text + "\n", "utf-8")
        print(f"wrote {config.out}", file=sys.stderr)
    else:
        print(text)
    return 0


def measure(config: BenchConfig) -> dict[str, Any]:
    """Measure all parts that were asked for, with the GEMM rate before and after.

    Raises:
      ValueError: for an unknown part, or no repeats.
    """
    module = importlib.import_module(f"scripts.bench_{config.what}")
    jobs = module.parts(config.quick, config.repeats)
    wanted = config.parts or tuple(jobs)
    if not set(wanted) <= set(jobs) or config.repeats < 1:
        raise ValueError(
            f"--parts and --repeats: expected some of {', '.join(jobs)} and at least 1, got "
            f"{' '.join(config.parts)} and {config.repeats}"
        )
    return report(config, {name: jobs[name] for name in jobs if name in wanted}, module.COUNTED)


def report(config: BenchConfig, jobs: dict[str, Callable[[], Any]], counted: str) -> dict[str, Any]:
    """Run `jobs` and put their results under their names, beside the state of the machine."""
    shape = QUICK_GEMM if config.quick else GEMM
    started = time.perf_counter()
    result: dict[str, Any] = {
        "benchmark": config.what,
        "quick": config.quick,
        "command": f"{_pinned()}mbrl bench {config.what} --repeats {config.repeats} --parts "
        + " ".join(jobs),
        "date": time.strftime("%Y-%m-%d"),
        **machine(),
        "counted": counted,
        "gemm": {"shape": [*shape, shape[1]], "before_gflops": gemm_rate(shape)},
    }  # fmt: skip
    for name, job in jobs.items():
        print(f"measuring {name}", file=sys.stderr)
        result[name] = job()
    result["gemm"]["after_gflops"] = gemm_rate(shape)
    result["load_after"] = list(os.getloadavg())
    result["seconds"] = time.perf_counter() - started
    return result


def _cores() -> list[int]:
    """List the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _pinned() -> str:
    """Return what came before the command when it was kept off some of the cores."""
    cores = _cores()
    whole = len(cores) == os.cpu_count()
    return "" if whole else f"taskset -c {','.join(map(str, cores))} "


def machine() -> dict[str, Any]:
    """Return commit, versions and hardware, and how busy the machine is."""
    found = versions()
    commit, cpu = found.pop("commit", "unknown"), found.pop("cpu")
    accelerator = found.pop("accelerator", None)
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    return {
        "commit": commit,
        "versions": found,
        "hardware": {
            "cpu": cpu,
            "cores": len(_cores()),
            "all_cores": os.cpu_count(),
            "accelerator": accelerator,
            "cpu_bf16": [flag for flag in ("avx512_bf16", "amx_bf16") if flag in text],
        },
        "load_before": list(os.getloadavg()),
    }


if __name__ == "__main__":
    sys.exit(run(main))
