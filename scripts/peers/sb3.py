"""Time a training run of PPO of Stable-Baselines3, in an environment of its own; print JSON.

  python3.11 -m venv PEER
  PEER/bin/pip install torch==2.13.0 stable-baselines3==2.9.2

The settings are those of its zoo (rl-baselines3-zoo) for CartPole-v1, from which the preset of
this library for the task was taken.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

PACKAGES = {"stable-baselines3": "stable-baselines3", "torch": "torch"}
"""Name in the result, and name of the distribution."""


def main(argv: Sequence[str]) -> int:
    """Print the timing as one JSON object; return 2 where the library cannot be imported."""
    flags = argparse.ArgumentParser(description="Time PPO of Stable-Baselines3 on CartPole-v1.")
    flags.add_argument("--steps", type=int, default=100_000, help="environment steps of the run")
    flags.add_argument("--threads", type=int, default=1, help="of torch")
    flags.add_argument("--check", action="store_true", help="print versions and time nothing")
    args = flags.parse_args(argv)
    try:
        found: dict[str, Any] = {
            "versions": {name: importlib.metadata.version(what) for name, what in PACKAGES.items()}
        }
        library, torch = (
            importlib.import_module("stable_baselines3"),
            importlib.import_module("torch"),
        )
    except ImportError as error:
        print(f"Stable-Baselines3 cannot be imported: {error}", file=sys.stderr)
        return 2
    if not args.check:
        torch.set_num_threads(args.threads)
        found |= timing(library, args.steps) | {"threads": args.threads}
    print(json.dumps(found, allow_nan=False))
    return 0


def timing(library: Any, steps: int) -> dict[str, float]:
    """Train, and play greedy episodes to see that it learned.

    Returns:
      Seconds of `learn`, and the mean return of 20 episodes after it.
    """
    vector = importlib.import_module("stable_baselines3.common.env_util")
    evaluation = importlib.import_module("stable_baselines3.common.evaluation")
    model = library.PPO(
        "MlpPolicy", vector.make_vec_env("CartPole-v1", 8, seed=0), n_steps=32, batch_size=256,
        n_epochs=20, gae_lambda=0.8, gamma=0.98, ent_coef=0.0, learning_rate=falling(1e-3),
        clip_range=falling(0.2), seed=0, device="cpu",
    )  # fmt: skip
    start = time.perf_counter()
    model.learn(steps)
    seconds = time.perf_counter() - start
    games = vector.make_vec_env("CartPole-v1", 1, seed=1)
    mean, _ = evaluation.evaluate_policy(model, games, 20, deterministic=True)
    return {"seconds": seconds, "return": float(mean)}


def falling(value: float) -> Callable[[float], float]:
    """Return a schedule from `value` to 0, a function of the share of the run that is left."""
    return lambda left: left * value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
