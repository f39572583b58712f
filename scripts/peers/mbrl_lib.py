"""Time one `act()` of mbrl-lib's PETS-CEM, in an environment of its own, and print JSON.

mbrl-lib and this library share the import name `mbrl`. `scripts/bench_peers.py` runs this
file with the Python of an environment that has mbrl-lib and nothing of ours:

  python3.11 -m venv PEER
  PEER/bin/pip install torch==2.13.0 hydra-core==1.3.2 gymnasium==0.26.3 termcolor tqdm
  PEER/bin/pip install --no-deps mbrl==0.2.0

mbrl-lib pins hydra-core 1.0.3, which Python 3.11 cannot import (a mutable default of a
dataclass), and with it an omegaconf whose metadata newer versions of pip refuse; hence
`--no-deps` and hydra-core 1.3.2. The library itself runs unchanged.

What is timed are mbrl-lib's own classes, put together as in its PETS example, but for the
normalizer of the inputs: single precision, which is faster than the example's double.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

PACKAGES = {"mbrl-lib": "mbrl", "torch": "torch", "hydra-core": "hydra-core"}
"""Name in the result, and name of the distribution."""


def main(argv: Sequence[str]) -> int:
    """Print the timing as one JSON object; return 2 where mbrl-lib cannot be imported."""
    args = parser().parse_args(argv)
    try:
        found: dict[str, Any] = {"versions": versions()}
        libraries = load()
    except (ImportError, ValueError) as error:  # hydra-core 1.0 raises a ValueError
        print(f"mbrl-lib cannot be imported: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if not args.check:
        found |= timing(args, libraries)
    print(json.dumps(found, allow_nan=False))
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the flags; the defaults are the small case of `mbrl bench planning`."""
    flags = argparse.ArgumentParser(description="Time one act() of mbrl-lib's PETS-CEM.")
    sizes = {
        "repeat": 20, "obs": 4, "act": 1, "population": 500, "elites": 50, "horizon": 15,
        "iterations": 5, "particles": 20, "members": 5, "layers": 4, "width": 200,
    }  # fmt: skip
    for name, size in sizes.items():
        flags.add_argument(f"--{name}", type=int, default=size, help=f"{size} when not given")
    flags.add_argument("--check", action="store_true", help="print versions and time nothing")
    return flags


def versions() -> dict[str, str]:
    """Return the versions of mbrl-lib and of what it computes with, before importing them."""
    return {name: importlib.metadata.version(package) for name, package in PACKAGES.items()}


def load() -> dict[str, Any]:
    """Import mbrl-lib and what it is configured with.

    By name, as they are only installed where this file runs: a reader of the import
    statements would find the `mbrl` of this checkout.
    """
    names = (
        "torch", "numpy", "gymnasium.spaces", "omegaconf", "mbrl.models", "mbrl.planning",
        "mbrl.env.termination_fns",
    )  # fmt: skip
    return {name: importlib.import_module(name) for name in names}


def make_agent(args: argparse.Namespace, libraries: dict[str, Any]) -> Any:
    """Put an ensemble with learned rewards and its CEM agent together, TS1 propagation."""
    torch, np, models = libraries["torch"], libraries["numpy"], libraries["mbrl.models"]
    network = models.GaussianMLP(
        args.obs + args.act,
        args.obs + 1,
        device="cpu",
        num_layers=args.layers,
        ensemble_size=args.members,
        hid_size=args.width,
        propagation_method="random_model",
        activation_fn_cfg={"_target_": "torch.nn.SiLU"},
    )
    model = models.OneDTransitionRewardModel(
        network, target_is_delta=True, normalize=True, learned_rewards=True
    )
    box = libraries["gymnasium.spaces"].Box
    task = argparse.Namespace(
        observation_space=box(-np.inf, np.inf, (args.obs,), np.float32),
        action_space=box(-1.0, 1.0, (args.act,), np.float32),
    )
    ending = libraries["mbrl.env.termination_fns"].no_termination
    generator = torch.Generator().manual_seed(0)
    model_env = models.ModelEnv(task, model, ending, None, generator)
    config = libraries["omegaconf"].OmegaConf.create({
        "_target_": "mbrl.planning.TrajectoryOptimizerAgent",
        "_recursive_": False,  # as in hydra-core 1.0: the agent fills in and makes its optimizer
        "action_lb": "???",
        "action_ub": "???",
        "planning_horizon": args.horizon,
        "optimizer_cfg": {
            "_target_": "mbrl.planning.CEMOptimizer",
            "num_iterations": args.iterations,
            "elite_ratio": args.elites / args.population,
            "population_size": args.population,
            "lower_bound": "???",
            "upper_bound": "???",
            "alpha": 0.1,
            "device": "cpu",
            "return_mean_elites": True,
            "clipped_normal": False,
        },
    })  # fmt: skip
    make = libraries["mbrl.planning"].create_trajectory_optim_agent_for_model
    return make(model_env, config, num_particles=args.particles)


def timing(args: argparse.Namespace, libraries: dict[str, Any]) -> dict[str, Any]:
    """Time warm calls, which start from the plan of the call before.

    Args:
      args: sizes, and how many calls.
      libraries: imported modules by name.

    Returns:
      Seconds of every call, their median and minimum, and the number of threads.
    """
    torch, np = libraries["torch"], libraries["numpy"]
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(threads or 1)
    torch.manual_seed(0)
    agent = make_agent(args, libraries)
    obs = np.random.default_rng(0).standard_normal(args.obs).astype(np.float32)
    for _ in range(2):
        agent.act(obs)
    seconds = []
    for _ in range(args.repeat):
        start = time.perf_counter()
        agent.act(obs)
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "min_seconds": min(seconds),
        "elites": int(agent.optimizer.optimizer.elite_num),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
