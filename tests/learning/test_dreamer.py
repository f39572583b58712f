"""Dreamer learns: naming cues in seconds by default; CartPole and memory with `-m learning`."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import envs
from agents.dreamer import DreamerConfig, make_dreamer
from agents.presets import preset
from mbrl import spaces
from mbrl.training.device import run_device
from mbrl.training.evaluation import evaluate_device
from mbrl.training.learner import DriverConfig, seed_keys
from mbrl.types import MDP, Discrete, EnvSpec, Outcome

CHOICES = 3
STEPS = 4


def cues() -> MDP:
    """Name the cue that is shown, four times; the cues follow one another in a ring."""
    spec = EnvSpec("cues", spaces.box(0.0, 1.0, (CHOICES,)), Discrete(CHOICES), STEPS)

    def init(params, key, obs=None, batch=1):
        shown = jax.random.randint(key, (batch,), 0, CHOICES)
        return jax.nn.one_hot(shown, CHOICES) if obs is None else obs

    def step(params, key, state, action):
        reward = (jnp.argmax(state, -1) == action).astype(jnp.float32)
        outcome = Outcome(reward, jnp.ones_like(reward), jnp.zeros_like(reward))
        return jnp.roll(state, 1, -1), outcome

    return MDP(init, step, lambda params, state: state, spec)


def train(mdp: MDP, config: DreamerConfig, steps: int) -> tuple[Any, Any]:
    """Return the factory and the trained agent state of one seed."""

    def factory(hyper: Any) -> Any:
        return make_dreamer(mdp.spec, dataclasses.replace(config, **hyper))

    reports = run_device(factory, mdp, DriverConfig(steps, interval=200))
    return factory, collections.deque(reports, maxlen=1).pop().learner.agent


@pytest.mark.parametrize("memory", [True, pytest.param(False, marks=pytest.mark.learning)])
def test_learns_to_name_cues(memory):
    # They can be named without memory, too: what the ablation fails at is lack of it.
    config = DreamerConfig(
        memory=memory,
        batch_size=8, length=8, horizon=4, random_steps=64, train_ratio=0.5, capacity=2000,
        learning_rate=1e-3, warmup=20,
    )  # fmt: skip
    mdp = cues()
    factory, agent = train(mdp, config, 900)
    learned = evaluate_device(factory, agent, mdp, seed_keys((1,)), 30).mean()
    assert learned >= 3.0  # chance: 4 / 3, the optimum: 4


@pytest.mark.learning
def test_the_pole_is_balanced_within_ten_thousand_steps():
    mdp: Any = envs.make("device/CartPole")
    factory, agent = train(mdp, preset("dreamer", "device/CartPole"), 10_000)
    assert evaluate_device(factory, agent, mdp, seed_keys((1,)), 20).mean() >= 475.0


@pytest.mark.learning
def test_a_cue_is_named_ten_steps_later():
    mdp: Any = envs.make("device/MemoryChain")
    factory, agent = train(mdp, preset("dreamer", "device/MemoryChain"), 5_000)
    assert evaluate_device(factory, agent, mdp, seed_keys((1,)), 20).mean() >= 0.9
