"""Settings that differ from an agent's defaults, per environment id.

The only place where a task's name means anything. `mbrl train` uses a preset as the
defaults of its flags and says so.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from agents import AGENTS

_SURVIVAL = {"horizon": 40, "noise_beta": 0.5, "discount": 0.99}
"""Plans that survive are worth the same: what tells them apart is the value of where they end."""

_UNSTABLE = {
    "horizon": 15, "iterations": 3, "particles": 1, "noise_beta": 0.5, "init_std": 0.2,
    "discount": 0.99,
}  # fmt: skip
"""Half a second of large random forces drops the pole: search close to the last plan, and no
further than a plan can be kept up. What follows is the business of a learned value."""

_PRECISE = {"init_std": 0.12}
"""Torques cost, and a tip near its target needs small ones: less is left to average away."""

_SMALL = {
    "batch_size": 8, "length": 32, "learning_rate": 3e-4, "warmup": 100, "train_ratio": 0.5,
    "random_steps": 400, "capacity": 20_000,
}  # fmt: skip
"""Dreamer on tasks of thousands of steps: the published step size has not warmed up there."""

_LONG = {"train_ratio": 0.25}
"""Tens of thousands of steps hold enough updates at half the rate."""

_SPARSE = _SMALL | {"entropy": 0.01}
"""One reward per episode: with the published bonus the actor settles before it is predicted."""

_REMEMBER = _SPARSE | {
    "batch_size": 16, "learning_rate": 1e-3, "beta2": 0.95, "replay_value": 0.0,
    "latent": {"variables": 1, "classes": 8, "span": 64},
}  # fmt: skip
"""A bit that is worth something much later: a state that keeps it before anybody knows, few latents
that draw noise, steps that the first gradients do not shorten, and no values of replayed states,
which train the model on chance at every record, where the reward does so at one of twelve."""

_AGING = {"td_age": 25, "target_rate": 0.02}
"""Returns of 40 rewards are those of whoever acted: what a beginner got says little soon, but where
he failed stays true."""

_BALANCE = {
    "td_age": 50, "target_rate": 0.02, "train_ratio": 0.5, "value_weight": 1.0, "anneal": 12_000,
}  # fmt: skip
"""As `_AGING`. What is worth the same for dozens of steps takes a value that is precise."""

_COSTS = {"discount": 0.97, "model": {"max_reward": 17.0}, "td_steps": 10, "anneal": 7_000}

_ONE_REWARD = {"model": {"max_value": 1.0}, "td_steps": 16, "anneal": 4_500}

_ROOM = {
    "discount": 0.9, "model": {"max_value": 1.0}, "td_steps": 2, "target_rate": 0.04,
    "epsilon": 0.5, "train_ratio": 0.5, "anneal": 4_800, "weight_decay": 0.01,
}  # fmt: skip
"""All states of a small room are met, and the value in each is that of the best way on; nothing has
to be kept from being learned by heart."""

_LANDER = {
    "discount": 0.99,
    "model": {"latent": 64, "hidden": 128, "max_reward": 100.0, "max_value": 400.0},
    "td_steps": 20, "td_age": 200, "target_rate": 0.02, "value_weight": 1.0, "anneal": 75_000,
}  # fmt: skip
"""As `_AGING`, over ten times as many steps; the end of an episode is worth 100 either way."""

_BOARD = {
    "discount": 1.0, "model": {"max_value": 1.0, "latent": 64, "hidden": 128}, "td_steps": 9,
    "simulations": 25, "epsilon": 0.25, "value_weight": 1.0, "anneal": 37_500,
}  # fmt: skip
"""Games are short enough for their results to be the targets, and a result is 1 at most. Players
who do not err would never learn to answer errors."""

_QUICK = {
    "rollout": 256, "epochs": 20, "minibatches": 1, "discount": 0.98, "trace": 0.8,
    "learning_rate": 1e-3, "anneal": 100_000,
}  # fmt: skip
"""PPO where a few thousand steps are enough: many small rollouts, few of which overlap."""

_FIXED = _QUICK | {
    "rollout": 1600, "minibatches": 16, "discount": 0.99, "trace": 0.95, "entropy": 0.01,
}  # fmt: skip
"""Whole episodes of eight environments: what follows a mistake is as long as what came before."""

_TORQUE = {
    "rollout": 1024, "minibatches": 16, "epochs": 20, "discount": 0.95, "learning_rate": 1e-3,
    "anneal": 50_000,
}  # fmt: skip
"""Costs of a swing-up are those of the next second."""

_RUNNER = {
    "rollout": 512, "epochs": 20, "minibatches": 8, "hidden": (256, 256), "log_std": -2.0,
    "learning_rate": 2e-5, "clip": 0.1, "clip_norm": 0.8, "discount": 0.98, "trace": 0.92,
    "entropy": 4e-4, "value_weight": 0.58,
}  # fmt: skip
"""As the zoo of Stable-Baselines3 has it: small noise, and many small steps."""

_LIGHT = {
    "hidden": (64, 64), "learning_rate": 1e-3, "target_rate": 0.01, "batch_size": 128,
}  # fmt: skip
"""Actor and critics where thousands of steps are enough."""

_SWING = _LIGHT | {"discount": 0.95, "temperature": 0.5, "target_entropy": -0.5}
"""Costs are those of the next second. With less noise a policy leans on gravity, and hangs."""

_UPRIGHT = _LIGHT | {"temperature": 0.1}

_CLIMB = _UPRIGHT | {"discount": 0.98, "subset": 1}
"""The reward is two seconds of swings away, and half of it has to reach the start: the lesser of
two critics, taken at every step of the way, leaves nothing of it."""

_FEW = {"random_steps": 200, "capacity": 20_000}

_MODEL = {"members": 5, "elites": 4, "train_every": 50, "train_ratio": 10.0}
"""MBPO where thousands of steps are enough."""

_SHORT = {"max_epochs": 10, "random_steps": 400}
"""Fits that go on from the last one: what is new in 50 steps is learned in a few epochs."""

_HOP = {
    "hidden": (200, 200, 200, 200), "learning_rate": 1e-3, "batch_size": 256, "length": (1, 15),
    "schedule": (20_000, 100_000), "rollouts": 100_000, "random_steps": 5_000,
    "capacity": 125_000, "sac": {"target_entropy": -1.0 / 3.0},
}  # fmt: skip
"""The published settings, for an accelerator."""

_RUN = {"random_steps": 10_000, "capacity": 1_000_000}

PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    ("pets", "CartPole-v1"): {"planner": _SURVIVAL, "value_rounds": 8},
    ("pets", "device/CartPole"): {"planner": _SURVIVAL, "value_rounds": 8},
    ("pets", "Reacher-v5"): {"train_every": 250, "batch_size": 256, "planner": _PRECISE},
    ("dreamer", "CartPole-v1"): _SMALL,
    ("dreamer", "device/CartPole"): _SMALL,
    ("dreamer", "Pendulum-v1"): _SMALL | _LONG,
    ("dreamer", "device/Pendulum"): _SMALL | _LONG,
    ("dreamer", "InvertedPendulum-v5"): _SMALL | _LONG,
    ("dreamer", "Acrobot-v1"): _SMALL,
    ("dreamer", "dm_control/cartpole-balance-v0"): _SMALL | _LONG,
    ("dreamer", "device/Catch"): _SPARSE,
    ("dreamer", "device/PixelCatch"): _SPARSE | _LONG,
    ("dreamer", "device/PixelGridWorld"): _SPARSE,
    ("dreamer", "device/MemoryChain"): _REMEMBER,
    ("muzero", "CartPole-v1"): _BALANCE,
    ("muzero", "device/CartPole"): _BALANCE,
    ("muzero", "Acrobot-v1"): _AGING | {"discount": 0.99, "anneal": 14_000},
    ("muzero", "device/Acrobot"): _AGING | {"discount": 0.99, "anneal": 14_000},
    ("muzero", "Pendulum-v1"): _COSTS,
    ("muzero", "device/Pendulum"): _COSTS,
    ("muzero", "device/Catch"): _ONE_REWARD,
    ("muzero", "device/PixelCatch"): _ONE_REWARD | {"batch_size": 64, "consistency": 2.0},
    ("muzero", "LunarLander-v3"): _LANDER,
    ("muzero", "device/GridWorld"): _ROOM,
    ("muzero", "device/GridWorld4"): _ROOM,
    ("muzero", "device/TicTacToe"): _BOARD,
    ("muzero", "device/ConnectFour"): _BOARD | {"td_steps": 42},
    ("ppo", "CartPole-v1"): _QUICK,
    ("ppo", "device/CartPole"): _QUICK,
    ("ppo", "device/CartPoleFixed"): _FIXED,
    ("ppo", "Pendulum-v1"): _TORQUE,
    ("ppo", "device/Pendulum"): _TORQUE,
    ("ppo", "HalfCheetah-v5"): _RUNNER,
    ("sac", "Pendulum-v1"): _SWING | _FEW | {"target_entropy": -1.0},
    ("sac", "device/Pendulum"): _SWING | _FEW | {"target_entropy": -1.0},
    ("mbpo", "Pendulum-v1"): _MODEL | {"random_steps": 400, "sac": _SWING},
    ("mbpo", "device/Pendulum"): _MODEL | {"random_steps": 400, "sac": _SWING},
    ("mbpo", "device/PendulumSparse"): _MODEL
    | _SHORT
    | {"length": (5, 5), "rollouts": 2_000, "sac": _CLIMB},
    ("sac", "InvertedPendulum-v5"): _UPRIGHT | _FEW,
    ("sac", "HalfCheetah-v5"): _RUN,
    ("mbpo", "Hopper-v5"): _HOP,
    ("mbpo", "InvertedPendulum-v5"): _MODEL | {"random_steps": 200, "sac": _UPRIGHT},
    ("pets", "InvertedPendulum-v5"): {
        "planner": _UNSTABLE,
        "propagation": "mean",
        "nll_beta": 0.25,
        "value_rounds": 8,
    },
}


def preset(agent: str, env: str) -> Any:
    """Return the configuration of an agent for an environment.

    Args:
      agent: key of `agents.AGENTS`.
      env: environment id; one without a preset gets the defaults.
    """
    config = AGENTS[agent].config()
    changes = {
        name: dataclasses.replace(getattr(config, name), **value)
        if isinstance(value, dict)
        else value
        for name, value in PRESETS.get((agent, env), {}).items()
    }
    return dataclasses.replace(config, **changes)
