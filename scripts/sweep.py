"""`mbrl sweep`: expand a grid into `mbrl train` commands and run those that are missing."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

if __name__ == "__main__":  # run as a file: imports start at the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro

from mbrl.training.run_directory import StopSignal
from scripts.cli import parse, run

TRAIN = (sys.executable, str(Path(__file__).with_name("cli.py")), "train")


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """Run a grid of training commands; the same command again runs what is missing."""

    agent: str = "pets"
    """Agent to train."""
    envs: str = "Pendulum-v1"
    """Environment ids, separated by commas."""
    seeds: str = "0..4"
    """Seeds: FIRST..LAST, both included, or a list separated by commas."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=VALUE,VALUE: settings of mbrl train to try, once per name."""
    out: str = "runs/sweep"
    """Folder of the runs, one in each folder below it."""
    jobs: int = 1
    """Runs at a time."""
    dry_run: bool = False
    """Print the commands that are missing and run none."""
    vary: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=VALUE,VALUE: settings to change one at a time, beside a run without any of these
    changes, as an ablation does."""


class Job(NamedTuple):
    """One training run: its folder, and the arguments after `mbrl train`."""

    out: Path
    arguments: list[str]


def main(argv: list[str]) -> int:
    """Run the sweep; returns 1 when any run is missing at the end, 75 when it was stopped."""
    config = parse(SweepConfig, argv, "mbrl sweep")
    if config.jobs < 1:
        raise ValueError(f"--jobs: expected at least 1, got {config.jobs}")
    jobs = expand(config)
    _check(config, jobs)
    if config.dry_run:
        for job in jobs:
            if not finished(job):
                print(shlex.join(["mbrl", "train", *job.arguments]))
        return 0
    with StopSignal() as stop:
        codes = run_jobs(jobs, config.jobs, TRAIN, lambda: stop.requested)
    print(table(jobs, codes))
    if stop.requested:
        return 75
    return 0 if all(map(finished, jobs)) else 1


def expand(config: SweepConfig) -> list[Job]:
    """List the runs of a grid: environments, times settings, times seeds."""
    choices = read_settings("--set", config.set)
    changes = [(name, v) for name, vs in read_settings("--vary", config.vary).items() for v in vs]
    if repeated := choices.keys() & {name for name, _ in changes}:
        raise ValueError(
            f"--vary: {sorted(repeated)[0]!r} is given by --set as well; leave out one"
        )
    ids = [env.strip() for env in config.envs.split(",")]
    if not all(ids):
        raise ValueError(f"--envs: got {config.envs!r}, expected ids separated by commas")
    found = []
    held = [
        tuple(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())
    ]
    grid = [(*settings, *change) for settings in held for change in ((), *((c,) for c in changes))]
    for env, settings, seed in itertools.product(ids, grid, seeds(config)):
        parts = [config.agent, env, *(f"{k}={v}" for k, v in settings), str(seed)]
        out = Path(config.out) / re.sub(r"[^\w.=-]", "-", "-".join(parts))
        flags = [flag for k, v in settings for flag in as_flags(k, v)]
        found.append(
            Job(out, [config.agent, "--env", env, "--seed", str(seed), *flags, "--out", str(out)])
        )
    return found


def read_settings(flag: str, texts: Sequence[str]) -> dict[str, list[str]]:
    """Read `NAME=VALUE,VALUE` of a flag into the values of each name."""
    found: dict[str, list[str]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or not name or not all(values.split(",")):
            raise ValueError(f"{flag}: got {text!r}, expected NAME=VALUE or NAME=VALUE,VALUE")
        name = name.removeprefix("--").replace("_", "-")
        if name in found or name in ("env", "seed", "num-seeds", "out"):
            raise ValueError(f"{flag}: {name!r} is given twice, or set by --envs, --seeds or --out")
        found[name] = values.split(",")
    return found


def seeds(config: SweepConfig) -> list[int]:
    """Read `0..4` or `0,2,5`."""
    first, dots, last = config.seeds.partition("..")
    try:
        if dots:
            found = list(range(int(first), int(last) + 1))
        else:
            found = [int(seed) for seed in config.seeds.split(",")]
    except ValueError:
        found = []
    if not found or len(set(found)) < len(found):
        raise ValueError(f"--seeds: got {config.seeds!r}, expected FIRST..LAST or a list of seeds")
    return found


def as_flags(name: str, value: str) -> list[str]:
    """Return the arguments that give a setting a value; booleans have flags of their own."""
    if value.lower() in ("true", "false"):
        prefix, dot, last = name.rpartition(".")
        return [f"--{prefix}{dot}{'no-' if value.lower() == 'false' else ''}{last}"]
    return [f"--{name}", *value.split()]


def _check(config: SweepConfig, jobs: Sequence[Job]) -> None:
    """Refuse what `mbrl train` would refuse, before the first run."""
    from agents import AGENTS
    from scripts.train import settings

    if config.agent not in AGENTS:
        raise ValueError(f"--agent: got {config.agent!r}, expected one of {', '.join(AGENTS)}")
    for job in jobs:
        settings(job.arguments[0], job.arguments[1:])


def finished(job: Job) -> bool:
    """Return whether a run has been evaluated, which is the last thing that it does."""
    return (job.out / "evaluation.json").exists()


def run_jobs(
    jobs: Sequence[Job],
    workers: int,
    command: Sequence[str],
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[Path, int]:
    """Run what is not finished, a few at a time; one that fails does not stop the others.

    Args:
      jobs: see `expand`.
      workers: processes at a time.
      command: what the arguments of a job are handed to.
      should_stop: asked all the time; then the running ones are asked to save and stop.

    Returns:
      Exit codes by folder, of those that were started.
    """
    waiting = [job for job in jobs if not finished(job)]
    running: dict[Path, subprocess.Popen[bytes]] = {}
    codes: dict[Path, int] = {}
    told = False
    while running or (waiting and not should_stop()):
        while waiting and len(running) < workers and not should_stop():
            job = waiting.pop(0)
            job.out.mkdir(parents=True, exist_ok=True)
            with (job.out / "output.log").open("ab") as log:
                running[job.out] = subprocess.Popen(
                    [*command, *job.arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            print(f"started {job.out}", file=sys.stderr)
        if should_stop() and not told:
            told = True
            for process in running.values():
                process.terminate()
        for out in [out for out, process in running.items() if process.poll() is not None]:
            codes[out] = running.pop(out).returncode
            print(f"{out}: exit code {codes[out]}", file=sys.stderr)
        time.sleep(0.05)
    return codes


def table(jobs: Sequence[Job], codes: Mapping[Path, int]) -> str:
    """List every run with its mean greedy return or how it ended, and n of N."""
    lines = []
    for job in jobs:
        if finished(job):
            result = json.loads((job.out / "evaluation.json").read_text("utf-8"))
            means = [seed["return_mean"] for seed in result["seeds"].values()]
            state = f"{sum(means) / len(means):.1f}"
        elif job.out in codes:
            state = f"failed with exit code {codes[job.out]}, see {job.out / 'output.log'}"
        else:
            state = "not run"
        lines.append(f"{job.out.name}  {state}")
    return "\n".join([*lines, f"{sum(map(finished, jobs))} of {len(jobs)} runs are finished"])


if __name__ == "__main__":
    sys.exit(run(main))
