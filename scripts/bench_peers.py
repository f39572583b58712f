"""Measure one planning step beside that of mbrl-lib, in turns, on this machine.

  python scripts/bench_peers.py --python PEER/bin/python --out FILE.json
  python scripts/results.py bench FILE.json --out docs/results/planning.jsonl
  python scripts/benchmarks_page.py

PEER is an environment with mbrl-lib, which shares its import name with this library:
`scripts/peers/mbrl_lib.py` says how to make one. Both sides plan on the CPU, float32, in the
two cases of `mbrl bench planning`, with the GEMM rate taken before and after each.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file: imports start at the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import jax

from agents.pets import PETSConfig
from mbrl.planning import PlannerConfig
from scripts import bench
from scripts import bench_planning as planning
from scripts.cli import parse, run
from scripts.timing import gemm_rate

PEER = Path(__file__).resolve().parent / "peers" / "mbrl_lib.py"
FIX = "make an environment with the commands at the top of scripts/peers/mbrl_lib.py"
Case = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class PeersConfig:
    """Measure one planning step beside that of mbrl-lib and write JSON."""

    python: str
    """Python of an environment with mbrl-lib."""
    out: str
    """File for the JSON."""
    repeats: int = 20
    """Warm calls per case and side, of which the median and the fastest are reported."""
    quick: bool = False
    """Tiny sizes, to see that everything runs; the figures mean nothing."""


def main(argv: list[str]) -> int:
    """Run the job."""
    config = parse(PeersConfig, argv, "bench_peers.py")
    if config.repeats < 1:
        raise ValueError(f"--repeats: got {config.repeats}, expected at least 1")
    if jax.default_backend() != "cpu":
        raise ValueError(
            f"jax: got the backend {jax.default_backend()!r}, expected 'cpu', where mbrl-lib "
            "runs here; set JAX_PLATFORMS=cpu"
        )
    if not config.quick:  # a program read from the disk compiles in no time
        jax.config.update("jax_enable_compilation_cache", False)
    result = measure(config)
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", "utf-8")
    print(f"wrote {out}", file=sys.stderr)
    return 0


def measure(config: PeersConfig) -> dict[str, Any]:
    """Measure both sides in turns.

    Args:
      config: settings of the job.

    Returns:
      What `mbrl bench planning` returns without its parts, and the part `peers`, which
      `scripts/results.py bench` takes.

    Raises:
      ValueError: when mbrl-lib cannot be run, before anything is measured.
    """
    peer_versions = ask(config.python, ["--check"])["versions"]
    sizes = planning.quick_sizes() if config.quick else planning.Sizes()
    result = bench.report(
        bench.BenchConfig("planning", config.repeats, quick=config.quick),
        {"peers": lambda: peers(config, sizes)},
        planning.COUNTED,
    )
    # Where the environment of mbrl-lib lies is nobody's business.
    result["command"] = (
        "python scripts/bench_peers.py --python PEER/bin/python --out FILE.json "
        f"--repeats {config.repeats}"
    )
    result["versions"] |= peer_versions
    return result


def peers(config: PeersConfig, sizes: planning.Sizes) -> dict[str, Case]:
    """Measure one act() of PETS-CEM on a small and a large task, ours and theirs in turns.

    Args:
      config: the Python of the peer, and how many calls.
      sizes: tasks, planners and network.

    Returns:
      Per task `ours` (see `planning.act_case`), `mbrl_lib` (see `peer_case`) and the ratio of
      their median times, `times_faster`.
    """
    found: dict[str, Case] = {}
    net = PETSConfig(hidden=sizes.hidden)
    cases = (("a", sizes.small_task, sizes.small), ("b", sizes.large_task, sizes.large))
    for name, (obs, act), plan in cases:
        plan = dataclasses.replace(plan, method="cem")
        print(f"measuring {name}, this library", file=sys.stderr)
        ours = planning.act_case(sizes, obs, act, plan, net, config.repeats)
        print(f"measuring {name}, mbrl-lib", file=sys.stderr)
        theirs = peer_case(config, sizes, ours, plan)
        faster = theirs["median_seconds"] / ours["median_seconds"]
        found[name] = {"ours": ours, "mbrl_lib": theirs, "times_faster": faster}
    return found


def peer_case(config: PeersConfig, sizes: planning.Sizes, ours: Case, plan: PlannerConfig) -> Case:
    """Measure mbrl-lib at the sizes of one of our cases.

    Args:
      config: the Python of the peer, and how many calls.
      sizes: the GEMM and the network, whose layers have one width.
      ours: what `planning.act_case` returned; the work is the same.
      plan: sizes of the planner.

    Returns:
      The seconds of every call, their median and minimum, threads, and GFLOP/s beside the
      GEMM rate.

    Raises:
      ValueError: when mbrl-lib fails, or planned with another number of elites.
    """
    flags = {
        "repeat": config.repeats, "obs": ours["obs"], "act": ours["act"],
        "population": plan.population, "elites": plan.elites, "horizon": plan.horizon,
        "iterations": plan.iterations, "particles": plan.particles, "members": ours["members"],
        "layers": len(sizes.hidden), "width": sizes.hidden[0],
    }  # fmt: skip
    before = gemm_rate(sizes.gemm)
    answer = ask(config.python, [f"--{name}={value}" for name, value in flags.items()])
    after = gemm_rate(sizes.gemm)
    if answer.pop("elites") != plan.elites:
        raise ValueError(f"mbrl-lib rounds {plan.elites} elites of {plan.population} differently")
    del answer["versions"]  # those of the whole comparison
    rate = ours["gflop"] / answer["median_seconds"]
    return answer | {
        "gflops": rate,
        "gemm_before_gflops": before,
        "gemm_after_gflops": after,
        "share_of_gemm": 2.0 * rate / (before + after),
    }


def ask(python: str, flags: Sequence[str]) -> dict[str, Any]:
    """Run the script of the peer in its environment and read its answer.

    Args:
      python: interpreter of that environment.
      flags: arguments of `scripts/peers/mbrl_lib.py`.

    Returns:
      The JSON object that it printed.

    Raises:
      ValueError: when there is no such interpreter, mbrl-lib is not installed there, or
        it failed.
    """
    # Isolated: with PYTHONPATH or the working folder, the peer might import our `mbrl`.
    command = [python, "-I", str(PEER), *flags]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ValueError(
            f"--python: got {python!r}, which cannot be run ({error.strerror}), expected the "
            f"Python of an environment with mbrl-lib; {FIX}"
        ) from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ValueError(
            f"--python: got {python!r}, where the measurement failed ({last}), expected the "
            f"Python of an environment with mbrl-lib; {FIX}"
        )
    try:
        return json.loads(done.stdout)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"--python: got {python!r}, which printed {done.stdout[:60]!r}, expected JSON of "
            f"scripts/peers/mbrl_lib.py; {FIX}"
        ) from error


if __name__ == "__main__":
    sys.exit(run(main))
