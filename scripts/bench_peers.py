"""Measure this library beside others, in turns, on the CPU of this machine.

  python scripts/bench_peers.py planning --python PEER/bin/python --out FILE.json
  python scripts/results.py bench FILE.json --out docs/results/planning.jsonl
  python scripts/benchmarks_page.py

`planning` is one planning step beside that of mbrl-lib, in the two cases of `mbrl bench planning`;
`ppo` a training run on CartPole beside that of Stable-Baselines3, which steps its environments on
the host; `rlhf` are the steps of `mbrl bench rlhf` beside those of TRL. PEER is an environment of
the other library alone (mbrl-lib shares its import name with this one): the scripts in
`scripts/peers/` say how to make one.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

if __name__ == "__main__":  # run as a file: imports start at the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import jax
import tyro

from agents.pets import PETSConfig
from mbrl.planning import PlannerConfig
from scripts import bench
from scripts import bench_planning as planning
from scripts import bench_ppo as ppo
from scripts import bench_rlhf as rlhf
from scripts.cli import parse, run, use_large_pages
from scripts.timing import gemm_rate

Case = dict[str, Any]


class Peer(NamedTuple):
    """Another library: its name, and the script below `scripts/peers/` that times it."""

    name: str
    script: str


PEERS = {
    "planning": Peer("mbrl-lib", "mbrl_lib.py"),
    "ppo": Peer("Stable-Baselines3", "sb3.py"),
    "rlhf": Peer("TRL", "trl.py"),
}
FOLDER = Path(__file__).resolve().parent / "peers"


@dataclasses.dataclass(frozen=True)
class PeersConfig:
    """Measure this library beside another and write JSON."""

    what: tyro.conf.Positional[Literal["planning", "ppo", "rlhf"]]
    """planning: one planning step beside mbrl-lib; ppo: a training run beside
    Stable-Baselines3; rlhf: steps on a language model beside TRL."""
    python: str
    """Python of an environment with the other library."""
    out: str
    """File for the JSON."""
    repeats: int = 20
    """planning, rlhf: warm calls per case and side, of which the median and the fastest are
    reported; ppo: runs per side, of which the fastest counts."""
    quick: bool = False
    """Tiny sizes, to see that everything runs; the figures mean nothing."""


def main(argv: list[str]) -> int:
    """Run the job."""
    config = parse(PeersConfig, argv, "bench_peers.py")
    if config.repeats < 1:
        raise ValueError(f"--repeats: got {config.repeats}, expected at least 1")
    if jax.default_backend() != "cpu":
        raise ValueError(
            f"jax: got the backend {jax.default_backend()!r}, expected 'cpu', where "
            f"{PEERS[config.what].name} runs here; set JAX_PLATFORMS=cpu"
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
      What `mbrl bench` returns without its parts, and the part `peers`, which
      `scripts/results.py bench` takes.

    Raises:
      ValueError: when the other library cannot be run, before anything is measured.
    """
    peer = PEERS[config.what]
    peer_versions = ask(config.python, peer, ["--check"])["versions"]
    module, case = {
        "planning": (planning, peers), "ppo": (ppo, ppo_peers), "rlhf": (rlhf, rlhf_peers),
    }[config.what]  # fmt: skip
    sizes: Any = module.quick_sizes() if config.quick else module.Sizes()
    result = bench.report(
        bench.BenchConfig(config.what, config.repeats, quick=config.quick),
        {"peers": lambda: case(config, sizes)},
        module.COUNTED,
    )
    # Where the environment of the other library lies is nobody's business.
    result["command"] = (
        f"python scripts/bench_peers.py {config.what} --python PEER/bin/python --out FILE.json "
        f"--repeats {config.repeats}"
    )
    result["versions"] |= peer_versions
    return result


def ppo_peers(config: PeersConfig, sizes: ppo.Sizes) -> Case:
    """Measure a training run of PPO, ours and that of Stable-Baselines3 in turns.

    Args:
      config: the Python of the peer, and how many runs.
      sizes: of the runs.

    Returns:
      `ours` (see `bench_ppo.train_case`) and `sb3` with the seconds of its fastest run, by one
      thread or two, whichever it was, and how many times faster ours is: `times_faster` when
      all is compiled, `times_faster_in_all` with compilation.
    """
    ours, theirs = [], []
    for number in range(config.repeats):
        print(f"measuring run {number + 1} of {config.repeats}, this library", file=sys.stderr)
        ours.append(ppo.train_case(sizes, 1, 1))
        for threads in (1, 2):
            print(f"measuring Stable-Baselines3, threads {threads}", file=sys.stderr)
            flags = [f"--steps={sizes.steps}", f"--threads={threads}"]
            theirs.append(ask(config.python, PEERS["ppo"], flags))
            del theirs[-1]["versions"]  # those of the whole comparison
    best = {
        name: min(case[f"{name}_seconds"] for case in ours) for name in ("first", "warm")
    }  # fmt: skip
    fastest = min(theirs, key=lambda case: case["seconds"])
    return {
        "ours": ours[0] | {f"{name}_seconds": seconds for name, seconds in best.items()},
        "sb3": fastest | {"runs": theirs},
        "times_faster": fastest["seconds"] / best["warm"],
        "times_faster_in_all": fastest["seconds"] / best["first"],
    }


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


def rlhf_peers(config: PeersConfig, sizes: rlhf.Sizes) -> dict[str, Case]:
    """Measure the steps of RLHF on a small GPT-2, ours before and after those of TRL.

    Args:
      config: the Python of the peer, and how many calls.
      sizes: of the model and the batches.

    Returns:
      By part of `bench_rlhf.parts` `ours`, its cases before and after; `trl` with the seconds of
      every step; and `times_faster`, the ratio of the medians, of which ours is the lower one. PPO
      has `shared_times_faster`, too: with the critic on the policy's transformer.
    """
    cases: dict[str, Any] = {
        "reward": rlhf.reward_case, "direct": rlhf.direct_case,
        "generate": rlhf.generate_case, "ppo": rlhf.ppo_case,
    }  # fmt: skip
    model = sizes.config
    flags = {
        "vocab": model.vocab, "layers": model.layers, "width": model.width, "heads": model.heads,
        "pairs": sizes.pairs, "prompt": sizes.prompt, "response": sizes.response,
        "batch": sizes.batch, "epochs": sizes.epochs, "repeat": config.repeats,
    }  # fmt: skip
    found: dict[str, Case] = {}
    for part, case in cases.items():
        print(f"measuring {part}", file=sys.stderr)
        ours = [case(sizes, config.repeats)]
        argv = [f"--part={part}", *(f"--{name}={value}" for name, value in flags.items())]
        seconds = ask(config.python, PEERS["rlhf"], argv)["seconds"]
        ours.append(case(sizes, config.repeats))
        theirs = {
            "seconds": seconds,
            "median_seconds": statistics.median(seconds),
            "min_seconds": min(seconds),
        }
        found[part] = {"ours": ours, "trl": theirs}
        for name in ("separate", "shared") if part == "ppo" else ("",):
            mine = min((one[name] if name else one)["median_seconds"] for one in ours)
            prefix = "shared_" if name == "shared" else ""
            found[part][f"{prefix}times_faster"] = theirs["median_seconds"] / mine
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
    answer = ask(
        config.python, PEERS["planning"], [f"--{name}={value}" for name, value in flags.items()]
    )
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


def ask(python: str, peer: Peer, flags: Sequence[str]) -> dict[str, Any]:
    """Run the script of a peer in its environment and read its answer.

    Args:
      python: interpreter of that environment.
      peer: the other library.
      flags: arguments of its script.

    Returns:
      The JSON object that it printed.

    Raises:
      ValueError: when there is no such interpreter, the library is not installed there, or
        it failed.
    """
    # Isolated: with PYTHONPATH or the working folder, mbrl-lib might import our `mbrl`.
    command = [python, "-I", str(FOLDER / peer.script), *flags]
    script = f"scripts/peers/{peer.script}"
    expected = f"expected the Python of an environment with {peer.name}"
    fix = f"make an environment with the commands at the top of {script}"
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ValueError(
            f"--python: got {python!r}, which cannot be run ({error.strerror}), {expected}; {fix}"
        ) from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ValueError(
            f"--python: got {python!r}, where the measurement failed ({last}), {expected}; {fix}"
        )
    try:
        return json.loads(done.stdout)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"--python: got {python!r}, which printed {done.stdout[:60]!r}, expected JSON of "
            f"{script}; {fix}"
        ) from error


if __name__ == "__main__":
    use_large_pages()  # both sides: the other library inherits the environment
    sys.exit(run(main))
