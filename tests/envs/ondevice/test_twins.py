"""The simulators against their Gymnasium twins, one step at a time from the same states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.ondevice import acrobot, cartpole, mountain_car, pendulum
from envs.spec import action_space, observation_space
from mbrl.types import MDP, Box


class Twin(NamedTuple):
    """A simulator, its twin's id, its state class, and bounds of the states to try."""

    mdp: MDP
    id: str
    state: Callable[..., Any]
    low: list[float]
    high: list[float]


TWINS = [
    Twin(pendulum.make(), "Pendulum-v1", pendulum.PendulumState, [-3.1, -8], [3.1, 8]),
    Twin(
        cartpole.make(),
        "CartPole-v1",
        cartpole.CartPoleState,
        [-2.4, -3, -0.21, -3],
        [2.4, 3, 0.21, 3],
    ),
    Twin(
        acrobot.make(),
        "Acrobot-v1",
        acrobot.AcrobotState,
        [-3.1, -3.1, -12, -28],
        [3.1, 3.1, 12, 28],
    ),
    Twin(
        mountain_car.make(),
        "MountainCarContinuous-v0",
        mountain_car.MountainCarState,
        [-1.2, -0.07],
        [0.6, 0.07],
    ),
]
each_twin = pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.id)


def twin_steps(twin: Twin, count: int) -> list[np.ndarray]:
    """Step the Gymnasium twin: half along random episodes, half from states anywhere."""
    env = gym.make(twin.id).unwrapped
    env.action_space.seed(0)
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        if i >= count // 2:
            env.reset()
            env.state = rng.uniform(twin.low, twin.high)  # pyright: ignore
        state = np.array(env.state, np.float32)  # pyright: ignore
        env.state = state.astype(np.float64)  # pyright: ignore
        action = env.action_space.sample()
        obs, reward, terminated, _, _ = env.step(action)
        rows.append((state, action, np.array(obs), reward, terminated))
        if terminated:
            env.reset()
    return [np.array(column) for column in zip(*rows, strict=True)]


@each_twin
def test_one_step_agrees_with_gymnasium(twin):
    state, action, obs, reward, terminated = twin_steps(twin, 600)
    assert terminated.any() == (twin.id != "Pendulum-v1")
    assert not terminated.all()
    start = twin.state(*jnp.asarray(state.T))
    # Compiled as users compile it: one row of Acrobot is off by 2.5e-5 without optimization.
    step = jax.jit(twin.mdp.step, compiler_options={"xla_backend_optimization_level": 3})
    new, outcome = step(None, jax.random.key(0), start, jnp.asarray(action))
    got, scale = np.asarray(jax.jit(twin.mdp.observe)(None, new)), np.abs(obs).max(0)
    np.testing.assert_allclose(got / scale, obs / scale, atol=1e-5)
    np.testing.assert_allclose(outcome.reward, reward, atol=1e-5)
    np.testing.assert_array_equal(outcome.discount, 1.0 - terminated)


@each_twin
def test_spaces_and_time_limit_are_those_of_gymnasium(twin):
    env = gym.make(twin.id)
    expected = observation_space(env.observation_space)
    got = twin.mdp.spec.observation
    assert isinstance(got, Box)
    assert isinstance(expected, Box)
    assert got.dtype == expected.dtype
    np.testing.assert_allclose(got.low, expected.low, rtol=1e-6)
    np.testing.assert_allclose(got.high, expected.high, rtol=1e-6)
    assert twin.mdp.spec.max_episode_steps == gym.spec(twin.id).max_episode_steps
    action = action_space(env.action_space)
    if isinstance(action, Box):
        np.testing.assert_array_equal(twin.mdp.spec.action.low, action.low)
        np.testing.assert_array_equal(twin.mdp.spec.action.high, action.high)
    else:
        assert twin.mdp.spec.action == action


@each_twin
def test_start_states_have_the_range_of_gymnasium(twin):
    env = gym.make(twin.id).unwrapped
    env.reset(seed=1)
    starts = []
    for _ in range(500):
        env.reset()
        starts.append(np.array(env.state))  # pyright: ignore
    theirs = np.array(starts)
    ours = np.stack(twin.mdp.init(None, jax.random.key(1), batch=2000), -1)
    spread = theirs.max(0) - theirs.min(0)
    np.testing.assert_allclose(ours.min(0), theirs.min(0), atol=0.03 * spread.max())
    np.testing.assert_allclose(ours.max(0), theirs.max(0), atol=0.03 * spread.max())
    np.testing.assert_allclose(ours.mean(0), theirs.mean(0), atol=0.1 * spread.max())


def test_changed_gravity_agrees_with_gymnasium():
    env = gym.make("Pendulum-v1", g=4.0).unwrapped
    env.reset(seed=0)
    env.state = np.array([1.0, 0.5])  # pyright: ignore
    obs, *_ = env.step(np.array([1.5], np.float32))
    state = pendulum.PendulumState(jnp.array([1.0]), jnp.array([0.5]))
    params = pendulum.PendulumParams(gravity=4.0)
    mdp = pendulum.make()
    new, _ = mdp.step(params, jax.random.key(0), state, jnp.array([[1.5]]))
    np.testing.assert_allclose(mdp.observe(params, new)[0], obs, atol=1e-6)


def test_a_fixed_episode_of_cartpole_pays_where_the_other_goes_on():
    free, fixed = cartpole.make(), cartpole.make(fixed=50)
    assert fixed.spec.max_episode_steps == 50
    key = jax.random.key(0)
    low, high = jnp.array([-2.6, -3, -0.25, -3]), jnp.array([2.6, 3, 0.25, 3])
    state = cartpole.CartPoleState(
        *jax.random.uniform(key, (4, 64)) * (high - low)[:, None] + low[:, None]
    )
    action = jax.random.bernoulli(key, 0.5, (64,)).astype(jnp.int32)
    (one, goes_on), (other, pays) = (m.step(None, key, state, action) for m in (free, fixed))
    up = (jnp.abs(state.position) <= 2.4) & (jnp.abs(state.angle) <= 12 * 2 * np.pi / 360)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[up], b[up]), one, other)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[~up], b[~up]), state, other)
    np.testing.assert_array_equal(pays.reward, np.where(up, goes_on.discount, 0.0))
    assert 0 < pays.reward.mean() < 1
    np.testing.assert_array_equal(pays.discount, 1.0)


def test_a_sparse_pendulum_hangs_and_is_paid_at_the_top_alone():
    mdp, dense, key = pendulum.make(sparse=True), pendulum.make(), jax.random.key(0)
    start = mdp.init(None, key, batch=500)
    hanging = np.pi - np.abs(start.angle)
    assert 0.0 <= hanging.min() < 0.01 < 0.09 < hanging.max() <= 0.1001
    np.testing.assert_array_equal(start.speed, 0.0)
    # The cosine of 0.45 is above 0.9, that of 0.46 is not.
    angle, torque = jnp.array([0.0, 0.45, 0.46, -0.3, 3.0]), jnp.array([0.0, 0.0, 0.0, -1.0, 9.0])
    state = pendulum.PendulumState(angle, jnp.array([0.0, 5.0, 0.0, 1.0, 0.0]))
    (one, paid), (other, _) = (m.step(None, key, state, torque[:, None]) for m in (mdp, dense))
    np.testing.assert_allclose(paid.reward, [1.0, 1.0, 0.0, 1.0 - 0.025, -0.1], rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_random_torques_never_bring_a_sparse_pendulum_up():
    mdp = pendulum.make(sparse=True)

    def step(state, key):
        action = jax.random.uniform(key, (64, 1), minval=-2.0, maxval=2.0)
        state, outcome = mdp.step(None, key, state, action)
        return state, outcome.reward

    start = mdp.init(None, jax.random.key(1), batch=64)
    rewards = jax.lax.scan(step, start, jax.random.split(jax.random.key(2), 200))[1]
    assert rewards.max() <= 0.0
