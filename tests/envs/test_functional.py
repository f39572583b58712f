"""MDPs as Gymnasium environments, and functional environments as MDPs."""

from __future__ import annotations

import functools
import re
import warnings
from typing import Any, NamedTuple

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from envs import registry
from envs.functional import func_env_to_mdp, mdp_to_env, mdp_to_func_env, mdp_to_vector_env
from envs.host import HostEnv
from envs.vector import from_vector_env
from mbrl import spaces
from mbrl.mdp import with_resets
from mbrl.types import MDP, Discrete, EnvSpec, MultiDiscrete, Outcome
from tests.mbrl.test_probabilistic import fitted


class WalkParams(NamedTuple):
    survival: float = 1.0


class WalkState(NamedTuple):
    x: jax.Array


def walk(limit: int | None = None) -> MDP:
    """Add the action to a position; survive each step with a given probability."""

    def init(params, key, obs=None, batch=1):
        if obs is not None:
            return WalkState(obs["x"][:, 0])
        return WalkState(jax.random.uniform(key, (batch,)))

    def step(params, key, state, action):
        x = state.x + action[:, 0]
        survival = jnp.full_like(x, params.survival)
        return WalkState(x), Outcome(2.0 * x, survival, jnp.zeros_like(x))

    def observe(params, state):
        image = jnp.broadcast_to(state.x[:, None, None, None] * 100, (state.x.shape[0], 2, 2, 1))
        cell = jnp.stack([state.x > 0, state.x > 1], -1).astype(jnp.int32)
        return {"x": state.x[:, None], "image": image, "sign": cell[:, 0], "cells": cell}

    observation = {
        "x": spaces.box([-1.5], [np.inf]),
        "image": spaces.box(0, 255, (2, 2, 1), np.uint8),
        "sign": Discrete(2),
        "cells": MultiDiscrete((2, 2)),
    }
    return MDP(init, step, observe, EnvSpec("walk", observation, spaces.box([-0.5], [2.0]), limit))


@functools.cache
def gym_warnings(id: str) -> set[str]:
    """What the checker says about Gymnasium's own environment (recommendations only)."""
    return checked(gym.make(id).unwrapped)


def test_the_checker_accepts_a_learned_ensemble():
    model, state, _ = fitted()
    starts = jnp.array([[0.2, -0.1], [-0.3, 0.4]])
    for propagation in ("ts1", "mean"):
        env = mdp_to_env(with_resets(model.mdp(propagation), starts), state)
        # It has the spaces of its task, and nothing is known of their size here.
        assert all("Box" in warning for warning in checked(env))
        obs, _ = env.reset(seed=3)
        assert np.isclose(obs, starts).all(-1).any()
        np.testing.assert_allclose(env.step(np.ones(1, np.float32))[0][1] - obs[1], 0.1, atol=0.05)


def checked(env: gym.Env[Any, Any]) -> set[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env, skip_render_check=env.render_mode is None)
    return {re.sub(r"\x1b\[\d+m", "", str(w.message)) for w in caught}


@pytest.mark.parametrize("id", registry.DEVICE)
def test_the_checker_of_gymnasium_says_nothing_that_it_does_not_say_of_the_twin(id):
    mdp = registry.DEVICE[id]()
    pendulum, cartpole = ("Pendulum-v1", 1), ("CartPole-v1", 2)
    twins = {
        "device/Pendulum": pendulum, "device/PendulumSparse": pendulum,
        "device/CartPole": cartpole, "device/CartPoleFixed": cartpole,
    }  # fmt: skip
    twin, warned = twins.get(id, ("", 0))
    expected = gym_warnings(twin) if twin else set()
    assert len(expected) == warned
    assert checked(mdp_to_env(mdp, None)) == expected


def test_the_checker_accepts_rendering_and_nested_observations():
    def render(params, state):
        return np.full((4, 4, 3), int(100 * state.x[0]) % 256, np.uint8)

    env = mdp_to_env(walk(9), WalkParams(0.9), render=render)
    assert checked(env) == {
        "WARN: A Box observation space maximum value is infinity. This is probably too high.",
        "WARN: For Box action spaces, we recommend using a symmetric and normalized space "
        "(range=[-1, 1] or [0, 1]). See https://stable-baselines3.readthedocs.io/en/master/"
        "guide/rl_tips.html for more information.",
    }
    env.reset(seed=0)
    assert env.render().shape == (4, 4, 3)  # pyright: ignore
    with pytest.raises(ValueError, match="render_mode: expected one of"):
        env.spec.make(render_mode="human")  # pyright: ignore


def test_env_follows_the_mdp_and_truncates_without_terminating():
    env = mdp_to_env(walk(limit=3), WalkParams())
    obs, _ = env.reset(seed=4)
    x = float(obs["x"][0])
    for t, action in enumerate([2.0, -0.5, -0.5]):
        obs, reward, terminated, truncated, _ = env.step(np.array([action], np.float32))
        x += action
        np.testing.assert_allclose(obs["x"], [x], rtol=1e-6)
        np.testing.assert_allclose(float(reward), 2 * x, rtol=1e-6)
        assert not terminated
        assert truncated == (t == 2)
        assert env.observation_space.contains(obs)
    assert env.spec is not None
    assert env.spec.max_episode_steps == 3


def test_observations_are_clipped_where_the_space_is_bounded():
    env = mdp_to_env(walk(), WalkParams())
    obs, _ = env.reset(seed=0, options={"obs": {"x": np.array([-1.4], np.float32)}})
    np.testing.assert_allclose(obs["x"], [-1.4])
    obs, *_ = env.step(np.array([-0.5], np.float32))
    np.testing.assert_allclose(obs["x"], [-1.5])
    assert obs["image"].dtype == np.uint8
    assert obs["image"].max() == 0
    for _ in range(9):
        obs, *_ = env.step(np.array([2.0], np.float32))
    np.testing.assert_allclose(obs["x"], [16.1], rtol=1e-6)
    assert obs["image"].min() == 255


def test_seeds_determine_episodes_and_episodes_differ():
    env, other = (mdp_to_env(walk(5), WalkParams(0.7)) for _ in range(2))

    def run(env, seed):
        trace = [env.reset(seed=seed)[0]["x"][0]]
        for _ in range(20):
            obs, _, terminated, truncated, _ = env.step(np.zeros(1, np.float32))
            trace += [obs["x"][0], terminated]
            if terminated or truncated:
                trace.append(env.reset()[0]["x"][0])
        return trace

    first = run(env, 1)
    assert first == run(env, 1) == run(other, 1)
    assert first != run(env, 2)
    starts = [env.reset()[0]["x"][0] for _ in range(9)]
    assert len(set(starts)) == 9


def test_predicted_discounts_end_single_episodes_that_often():
    env = mdp_to_env(walk(), WalkParams(0.6))
    env.reset(seed=0)
    ended = 0
    for _ in range(600):
        _, _, terminated, truncated, _ = env.step(np.zeros(1, np.float32))
        assert not truncated
        ended += terminated
        if terminated:
            env.reset()
    assert abs(ended / 600 - 0.4) < 3 * np.sqrt(0.4 * 0.6 / 600)


def test_predicted_discounts_end_episodes_that_often():
    venv = mdp_to_vector_env(walk(), WalkParams(0.7), 64)
    venv.reset(seed=0)
    zero, ended, steps = np.zeros((64, 1), np.float32), 0, 0
    over = np.zeros(64, bool)
    for _ in range(60):
        _, _, terminated, truncated, _ = venv.step(zero)
        assert not truncated.any()
        steps += (~over).sum()
        ended += terminated.sum()
        over = terminated
    assert abs(ended / steps - 0.3) < 3 * np.sqrt(0.3 * 0.7 / steps)


def test_vector_env_is_next_step_and_one_compiled_program():
    mdp = registry.DEVICE["device/CartPole"]()
    venv = mdp_to_vector_env(mdp, None, 8, max_episode_steps=30)
    assert venv.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    stream = from_vector_env(venv)
    rng = np.random.default_rng(0)
    now = stream.reset(3)
    step = jax.jit(mdp.step)
    count = np.zeros(8, int)
    seen_terminal = seen_truncated = False
    starts = [*now.obs]
    for _ in range(90):
        action = rng.integers(0, 2, 8).astype(np.int32)
        action[:2] = now.obs[:2, 2] + 0.3 * now.obs[:2, 3] > 0  # balanced: these truncate
        before, now = now, stream.step(action)
        state = mdp.init(None, jax.random.key(0), before.obs)
        new, outcome = step(None, jax.random.key(0), state, action)
        running = ~before.is_last
        expected = np.asarray(mdp.observe(None, new))
        np.testing.assert_allclose(now.obs[running], expected[running], atol=1e-5)
        count = np.where(running, count + 1, 0)
        assert (now.is_first == ~running).all()
        assert (now.reward == running).all()
        assert (now.is_terminal == (running & (outcome.discount == 0))).all()
        assert (now.is_last == (now.is_terminal | (count >= 30))).all()
        seen_terminal |= now.is_terminal.any()
        seen_truncated |= (now.is_last & ~now.is_terminal).any()
        starts += [*now.obs[now.is_first]]
    assert seen_terminal
    assert seen_truncated
    assert len(np.unique(starts, axis=0)) == len(starts) > 12
    assert venv._step._cache_size() == 1  # pyright: ignore


def test_vector_env_is_reproducible_and_checks_actions():
    venv = mdp_to_vector_env(walk(4), WalkParams(0.5), 3)
    zero = np.zeros((3, 1), np.float32)

    def run(seed):
        obs = [venv.reset(seed=seed)[0]["x"]]
        return np.array(obs + [venv.step(zero)[0]["x"] for _ in range(9)])

    np.testing.assert_array_equal(run(0), run(0))
    assert not np.array_equal(run(0), run(1))
    with pytest.raises(ValueError, match=r"action: expected float32 of shape \(3, 1\)"):
        venv.step(np.zeros(3, np.float32))
    with pytest.raises(gym.error.ResetNeeded, match="call reset"):
        mdp_to_vector_env(walk(), WalkParams(), 3).step(zero)
    with pytest.raises(ValueError, match="num_envs: expected at least 1, got 0"):
        mdp_to_vector_env(walk(), WalkParams(), 0)


def test_env_refuses_bad_actions():
    env = mdp_to_env(registry.DEVICE["device/Catch"](), None)
    with pytest.raises(gym.error.ResetNeeded, match="call reset"):
        env.step(0)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="expected 0 <= a < 3, got 3"):
        env.step(3)
    with pytest.raises(ValueError, match="action: expected int32"):
        env.step(np.array(0.5))


def test_an_mdp_in_a_host_env_is_restored_bit_for_bit():
    env, again = (
        HostEnv(lambda: mdp_to_env(walk(6), WalkParams(0.8)), num_envs=2) for _ in range(2)
    )
    assert env.spec.max_episode_steps == 6
    action = np.full((2, 1), 0.3, np.float32)
    env.reset(0)
    for _ in range(10):
        env.step(action)
    again.restore(env.state())
    for _ in range(10):
        jax.tree.map(np.testing.assert_array_equal, again.step(action), env.step(action))


def test_func_env_and_back_keeps_the_dynamics():
    mdp = walk()
    back = func_env_to_mdp(mdp_to_func_env(mdp, WalkParams()), "walk")
    assert back.spec.id == "walk"
    assert spaces.describe(back.spec.observation) == spaces.describe(mdp.spec.observation)
    state = jax.jit(functools.partial(back.init, batch=5))(None, jax.random.key(0))
    x = back.observe(None, state)["x"]
    assert x.shape == (5, 1)
    assert len(np.unique(x)) == 5
    action = jnp.linspace(-0.5, 2.0, 5)[:, None]
    new, outcome = jax.jit(back.step)(None, jax.random.key(1), state, action)
    np.testing.assert_allclose(back.observe(None, new)["x"], x + action, rtol=1e-6)
    np.testing.assert_allclose(outcome.reward, 2 * (x + action)[:, 0], rtol=1e-6)
    np.testing.assert_array_equal(outcome.discount, 1.0)
    with pytest.raises(ValueError, match="walk cannot tell its state from an observation"):
        back.init(None, jax.random.key(0), jnp.zeros((1, 1)))


def test_func_env_samples_terminations_and_takes_parameters():
    func = mdp_to_func_env(walk(), WalkParams(0.25))
    back = func_env_to_mdp(func)
    state = jax.jit(functools.partial(back.init, batch=2000))(None, jax.random.key(0))
    action = jnp.zeros((2000, 1))
    step = jax.jit(back.step)
    for params, survival in ((None, 0.25), (WalkParams(0.6), 0.6)):
        _, outcome = step(params, jax.random.key(1), state, action)
        assert abs(float(outcome.discount.mean()) - survival) < 0.04
        assert set(np.unique(outcome.discount)) == {0.0, 1.0}


def test_functional_cartpole_of_gymnasium_agrees_with_ours():
    phys2d = pytest.importorskip("gymnasium.envs.phys2d.cartpole")
    theirs, ours = (
        func_env_to_mdp(phys2d.CartPoleFunctional()),
        registry.DEVICE["device/CartPole"](),
    )
    # Its default adds mass and length where the equations multiply them.
    params = phys2d.CartPoleParams(polemass_length=0.1 * 0.5)
    state = jax.jit(lambda key: theirs.init(params, key, batch=32))(jax.random.key(0))
    mine = ours.init(None, jax.random.key(0), theirs.observe(params, state))
    action = jax.random.randint(jax.random.key(1), (32,), 0, 2)
    their_step, our_step = jax.jit(theirs.step), jax.jit(ours.step)
    ended = 0
    for _ in range(12):
        state, a = their_step(params, jax.random.key(2), state, action)
        mine, b = our_step(None, jax.random.key(2), mine, action)
        np.testing.assert_allclose(
            theirs.observe(params, state), ours.observe(None, mine), atol=1e-4
        )
        np.testing.assert_array_equal(a.discount, b.discount)
        ended += float((1 - a.discount).sum())
    assert ended > 0
