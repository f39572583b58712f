"""Every planner, and imagination, on a simulator and on learned models."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.ondevice import pendulum
from mbrl import spaces
from mbrl.imagination import imagine
from mbrl.models.rssm import rssm
from mbrl.models.value_equivalent import ValueEquivalentConfig, value_equivalent
from mbrl.planning import PLANNERS, PlannerConfig, planner
from tests.agents.tiny import SIZE
from tests.mbrl import plain
from tests.mbrl.test_posterior import fitted as sampled
from tests.mbrl.test_probabilistic import fitted


def simulator() -> Any:
    mdp = pendulum.make()
    return mdp, None, jnp.array([[1.0, 0.0, 0.5], [0.8, 0.6, -0.5]])


def learned() -> Any:
    model, state, _ = fitted()
    return model.mdp("ts1", uncertainty=False), state, jnp.array([[0.6, 0.1], [-0.8, -0.2]])


def samples() -> Any:
    model, state, _ = sampled("laplace")
    return model.mdp("tsinf", uncertainty=False), state.model, jnp.array([[0.6, 0.1], [-0.8, -0.2]])


def value_equivalent_model() -> Any:
    """A model whose heads have left zero, as if it had learned something."""
    spec = pendulum.make().spec
    model = value_equivalent(spec, ValueEquivalentConfig(latent=8, hidden=16, max_value=50.0), 0.97)
    state = model.init(jax.random.key(0))
    leaves, structure = jax.tree.flatten(state.weights)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.5 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    weights = jax.tree.unflatten(structure, moved)
    return (
        model.mdp,
        state._replace(weights=weights),
        jnp.array([[1.0, 0.0, 0.5], [0.8, 0.6, -0.5]]),
    )


def latent_model() -> Any:
    """A recurrent model with random weights; its heads predict rewards around 1."""
    spec = pendulum.make().spec
    model = rssm(spec, SIZE)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    weights = plain.random_weights(shapes.weights, 3, gain=2.0)
    head = weights["reward"]["Dense_1"]
    near = head["bias"] - 2.0 * jnp.square(jnp.linspace(-20.0, 20.0, 255) - 0.5)
    weights["reward"]["Dense_1"] = {**head, "bias": near}
    statistics = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes.statistics)
    obs = jnp.array([[1.0, 0.0, 0.5], [0.8, 0.6, -0.5]])
    return model.mdp, shapes._replace(weights=weights, statistics=statistics), obs


CASES = {
    "pendulum": simulator, "ensemble": learned, "posterior": samples,
    "value-equivalent": value_equivalent_model, "latent": latent_model,
}  # fmt: skip


@functools.cache
def case(name: str) -> Any:
    return CASES[name]()


def plan(name: str, config: PlannerConfig) -> Any:
    mdp, params, obs = case(name)
    mpc = planner(mdp, config)

    @jax.jit
    def run(key: Any) -> Any:
        return mpc.plan(params, key, mdp.init(params, key, obs), mpc.init(2))

    return run(jax.random.key(0))


@functools.cache
def one_random_plan(name: str) -> float:
    config = PlannerConfig("shooting", 6, population=1, iterations=1, particles=3)
    return float(plan(name, config)[2]["value"].mean())


@pytest.mark.parametrize("method", PLANNERS)
@pytest.mark.parametrize("name", CASES)
def test_plans_of_every_planner_beat_a_random_one(name: str, method: Any) -> None:
    config = PlannerConfig(method, 6, population=32, iterations=4, particles=3, elites=6)
    action, _, info = plan(name, config)
    assert case(name)[0].spec.action.high[0] >= np.abs(action).max()
    assert float(info["value"].mean()) > one_random_plan(name)


@pytest.mark.parametrize("name", CASES)
def test_imagination_runs_through_all(name: str) -> None:
    mdp, params, obs = case(name)
    space = mdp.spec.action

    def act(key: Any, state: Any) -> Any:
        rows = jax.tree.leaves(state)[0].shape[0]
        return spaces.encode_action(space, spaces.sample(space, key, (rows,)))

    start = mdp.init(params, jax.random.key(0), obs)
    dream = jax.jit(lambda key: imagine(mdp, params, key, start, act, 4, 0.9))(jax.random.key(1))
    assert dream.reward.shape == (4, 2)
    assert np.isfinite(dream.reward).all()
    if name in ("pendulum", "ensemble"):
        assert np.all(np.asarray(dream.reward) < 0.0)  # both tasks are paid in costs
    assert np.all(np.asarray(dream.discount) <= 0.9 + 1e-6)
