"""PETS learns: a toy in seconds by default, Pendulum to a threshold with `-m learning`."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from agents.pets import PETSConfig, make_pets
from mbrl import spaces
from mbrl.planning import PlannerConfig
from mbrl.training.device import run_device
from mbrl.training.evaluation import evaluate_device
from mbrl.training.learner import DriverConfig, seed_keys
from mbrl.types import MDP, EnvSpec, Outcome

TARGET = 0.7
STEPS = 5


def point_mass() -> MDP:
    """Bring a point to TARGET in five steps; reward is minus the squared distance."""
    box = spaces.box(-np.inf, np.inf, (1,))
    spec = EnvSpec("point", box, spaces.box(-1.0, 1.0, (1,)), STEPS)

    def init(params, key, obs=None, batch=1):
        return jax.random.uniform(key, (batch, 1), minval=-1.0) if obs is None else obs

    def step(params, key, state, action):
        state = state + 0.5 * action
        reward = -jnp.square(state[:, 0] - TARGET)
        return state, Outcome(reward, jnp.ones_like(reward), jnp.zeros_like(reward))

    return MDP(init, step, lambda params, state: state, spec)


def returns_of(choose: Any) -> np.ndarray:
    """Play 500 episodes of the point by numpy alone."""
    rng = np.random.default_rng(0)
    x, total = rng.uniform(-1, 1, 500), np.zeros(500)
    for _ in range(STEPS):
        x = x + 0.5 * choose(x, rng)
        total -= (x - TARGET) ** 2
    return total


def test_learns_to_reach_a_point():
    config = PETSConfig(
        members=2, elites=2, hidden=(32,), batch_size=32, max_epochs=20, random_steps=50,
        train_every=50, capacity=200,
        planner=PlannerConfig(horizon=5, population=32, iterations=3, particles=2, elites=6),
    )  # fmt: skip
    mdp = point_mass()

    def factory(hyper: Any) -> Any:
        return make_pets(mdp.spec, dataclasses.replace(config, **hyper))

    reports = run_device(factory, mdp, DriverConfig(150, interval=50))
    agent = collections.deque(reports, maxlen=1).pop().learner.agent
    learned = evaluate_device(factory, agent, mdp, seed_keys((1,)), 30).mean()
    random = returns_of(lambda x, rng: rng.uniform(-1, 1, x.shape)).mean()
    best = returns_of(lambda x, rng: np.clip((TARGET - x) / 0.5, -1, 1)).mean()
    assert random < -3.0 < -0.9 < best  # the scale on which to read the next line
    assert learned > random + 0.75 * (best - random)


@pytest.mark.learning
def test_pendulum_swings_up_within_a_thousand_steps():
    mdp: Any = envs.make("device/Pendulum")

    def factory(hyper: Any) -> Any:
        return make_pets(mdp.spec, dataclasses.replace(PETSConfig(), **hyper))

    reports = run_device(factory, mdp, DriverConfig(1000))
    agent = collections.deque(reports, maxlen=1).pop().learner.agent
    returns = evaluate_device(factory, agent, mdp, seed_keys((100,)), 10)
    assert returns.mean() >= -400.0  # random actions: about -1200
