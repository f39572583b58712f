"""MuZero learns: a small room in seconds by default, CartPole to a threshold with `-m learning`."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from agents.muzero import MuZeroConfig, make_muzero
from agents.presets import preset
from mbrl.models.value_equivalent import value_equivalent
from mbrl.training.device import run_device
from mbrl.training.evaluation import evaluate_device
from mbrl.training.learner import DriverConfig, seed_keys
from mbrl.types import MDP
from scripts.value_error import solve


def train(mdp: MDP, config: MuZeroConfig, driver: DriverConfig) -> tuple[Any, Any]:
    """Return the factory and the trained agent state [S, ...]."""

    def factory(hyper: Any) -> Any:
        return make_muzero(mdp.spec, dataclasses.replace(config, **hyper))

    reports = run_device(factory, mdp, driver)
    return factory, collections.deque(reports, maxlen=1).pop().learner.agent


def room(size: int) -> MDP:
    mdp = envs.make("device/GridWorld", size=size)
    assert isinstance(mdp, MDP)
    return mdp


def test_exact_values_of_a_room_are_powers_of_the_discount():
    exact = solve(room(3), 0.5)
    steps = np.array([4, 3, 2, 3, 2, 1, 2, 1])
    np.testing.assert_allclose(exact.action_value.max(-1), [*0.5 ** (steps - 1), 0.0])
    up, right, down, left = exact.action_value[0]
    assert sorted([up, right, down, left]) == [0.0625, 0.0625, 0.125, 0.125]


def test_learns_the_way_through_a_room_and_what_it_is_worth():
    mdp = room(3)
    config = dataclasses.replace(
        preset("muzero", "device/GridWorld"), simulations=8, batch_size=32, random_steps=128,
        capacity=5000, train_ratio=0.25, anneal=350,
    )  # fmt: skip
    factory, agent = train(mdp, config, DriverConfig(1536, num_envs=8, interval=512))
    returns = evaluate_device(factory, agent, mdp, seed_keys((1,)), 4)
    np.testing.assert_array_equal(returns, 1.0)
    exact = solve(mdp, config.discount)
    state = jax.tree.map(lambda x: x[0], agent)
    model = value_equivalent(mdp.spec, config.model, config.discount)
    latent = model.mdp.init(state.target, jax.random.key(0), exact.obs)
    value = np.asarray(model.predictor.predict(state.target, latent)[1])
    best = exact.action_value.max(-1)
    assert np.corrcoef(value[:-1], best[:-1])[0, 1] > 0.8
    first = jnp.ones(len(best), bool)
    action = factory({}).act(state, (), exact.obs, first, jax.random.key(0), "greedy")[0]
    chosen = exact.action_value[np.arange(len(best)), np.asarray(action)]
    assert np.isclose(chosen, best)[:-1].mean() >= 0.75  # chance: 0.55


@pytest.mark.learning
def test_cartpole_stays_up_within_twenty_five_thousand_steps():
    mdp: Any = envs.make("device/CartPole")
    driver = DriverConfig(25_000, num_envs=16)
    factory, agent = train(mdp, preset("muzero", "device/CartPole"), driver)
    assert evaluate_device(factory, agent, mdp, seed_keys((1,)), 20).mean() >= 475.0
