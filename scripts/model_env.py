"""Let an agent of Stable-Baselines3, as it is, train inside a learned model.

  python scripts/model_env.py RUN --out docs/results/model_env.json

The model of a run of PETS or MBPO becomes a Gymnasium environment whose episodes begin where
recorded ones have begun. What was trained there is judged there and in the task itself.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":  # run as a file: imports start at the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import gymnasium as gym
import numpy as np
import tyro

from envs.mdp_env import mdp_to_env
from mbrl.mdp import with_resets
from mbrl.training import run_directory
from scripts import results, runs
from scripts.cli import parse, run
from scripts.learned_models import LearnedModel, learned_model


@dataclasses.dataclass(frozen=True)
class ModelEnvConfig:
    """Train an agent of Stable-Baselines3 inside the model that a run has learned."""

    run: tyro.conf.Positional[str]
    """Folder of a run of pets or mbpo."""
    out: str
    """JSON file to write."""
    algorithm: Literal["sac", "ppo"] = "sac"
    """Of Stable-Baselines3, with small networks and a step size of 1e-3."""
    steps: int = 6000
    """Imagined steps to train for."""
    episodes: int = 20
    """Episodes to judge it by, in the model and in the task."""
    seed: int = 0
    """Of the agent and of the episodes."""


def main(argv: list[str]) -> int:
    """Run the job."""
    config = parse(ModelEnvConfig, argv, "model_env.py")
    found = study(config)
    versions = run_directory.versions()
    written = {
        "command": f"python scripts/model_env.py {Path(config.run).name}",
        "config": dataclasses.asdict(config) | {"run": Path(config.run).name, "out": ""},
        **results.origin(versions), "commit": versions.get("commit", "unknown"),
        "date": time.strftime("%Y-%m-%d"), "cores": len(os.sched_getaffinity(0)), **found,
    }  # fmt: skip
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    Path(config.out).write_text(json.dumps(written, indent=1) + "\n", "utf-8")
    for name, one in found["returns"].items():
        print(f"{name}: {one['mean']:.1f} +- {one['std']:.1f} over {config.episodes} episodes")
    return 0


def study(config: ModelEnvConfig) -> dict[str, Any]:
    """Train in the model, and judge there and in the task.

    Raises:
      ValueError: for a run without a model that can be used, see `learned_model`.
    """
    model = learned_model(Path(config.run), "ts1")
    inside, outside = model_env(model), task_env(model.run)
    began = time.process_time()
    agent = train(config, inside)
    return {
        "env": model.run.env_id,
        "model": model.run.agent_name,
        "model_steps": model.step,
        "processor_seconds": round(time.process_time() - began),
        "returns": {
            "in the model": judge(agent, inside, config),
            "in the task": judge(agent, outside, config),
            "random actions in the task": judge(None, outside, config),
        },
    }


def model_env(model: LearnedModel) -> gym.Env[Any, Any]:
    """Make a learned model a Gymnasium environment with starts as they were recorded.

    Raises:
      ValueError: where episodes of the task have no maximal length.
    """
    if model.run.spec.max_episode_steps is None:
        raise ValueError(
            f"{model.run.env_id}: episodes in a model need a maximal length, got None; name an "
            "environment with a time limit"
        )
    return mdp_to_env(with_resets(model.mdp, model.starts), model.params)


def task_env(job: runs.Run) -> gym.Env[Any, Any]:
    """Make the task itself, from Gymnasium or of the MDP on the device."""
    return gym.make(job.env_id) if job.env is None else mdp_to_env(job.env, None)


def train(config: ModelEnvConfig, env: gym.Env[Any, Any]) -> Any:
    """Train an agent of Stable-Baselines3 that knows nothing of where it is.

    Raises:
      ValueError: where Stable-Baselines3 is not installed.
    """
    try:
        sb3: Any = importlib.import_module("stable_baselines3")
    except ImportError as error:
        raise ValueError(f'{error}; install it with: pip install "modelrl[bench]"') from error
    settings: dict[str, Any] = {
        "learning_rate": 1e-3, "seed": config.seed, "policy_kwargs": {"net_arch": [64, 64]},
        "device": "cpu",
    }  # fmt: skip
    if config.algorithm == "sac":
        agent = sb3.SAC("MlpPolicy", env, learning_starts=200, **settings)
    else:
        agent = sb3.PPO("MlpPolicy", env, gamma=0.9, n_steps=1024, **settings)
    return agent.learn(config.steps)


def judge(agent: Any, env: gym.Env[Any, Any], config: ModelEnvConfig) -> dict[str, Any]:
    """Play episodes without noise, or with random actions where there is no agent."""
    env.action_space.seed(config.seed)
    returns = []
    for episode in range(config.episodes):
        obs, _ = env.reset(seed=config.seed + 1_000_003 + episode)
        total, over = 0.0, False
        while not over:
            action = (
                env.action_space.sample()
                if agent is None
                else agent.predict(obs, deterministic=True)[0]
            )
            obs, reward, terminated, truncated, _ = env.step(action)
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    return {"mean": float(np.mean(returns)), "std": float(np.std(returns)), "returns": returns}


if __name__ == "__main__":
    sys.exit(run(main))
