"""What every simulator promises as an `MDP`."""

from __future__ import annotations

import functools
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.ondevice import (
    acrobot,
    cartpole,
    cartpole_swingup,
    catch,
    connect_four,
    gridworld,
    memory_chain,
    mountain_car,
    pendulum,
    pixel_catch,
    pixel_gridworld,
    tic_tac_toe,
)
from mbrl import spaces
from mbrl.types import MDP, Box

MODULES = [
    acrobot,
    cartpole,
    cartpole_swingup,
    catch,
    connect_four,
    gridworld,
    memory_chain,
    mountain_car,
    pendulum,
    pixel_catch,
    pixel_gridworld,
    tic_tac_toe,
]
PARAMS = {gridworld: gridworld.corners(5), pixel_gridworld: gridworld.corners(8)}
ALIKE = (connect_four, gridworld, memory_chain, pixel_gridworld, tic_tac_toe)
"""All episodes start alike, or in one of two ways."""
STEPS, BATCH = 30, 3
leaves = jax.tree.leaves


def each(modules):
    return pytest.mark.parametrize("module", modules, ids=lambda m: m.__name__.split(".")[-1])


each_module = each(MODULES)


def play(mdp: MDP, params, key):
    """Take random actions; returns states and observations [STEPS + 1, B] and outcomes."""
    init_key, scan_key = jax.random.split(key)

    def step(state, key):
        action_key, step_key = jax.random.split(key)
        action = spaces.sample(mdp.spec.action, action_key, (BATCH,))
        new, outcome = mdp.step(params, step_key, state, action)
        return new, (state, mdp.observe(params, state), action, outcome)

    start = mdp.init(params, init_key, batch=BATCH)
    return jax.lax.scan(step, start, jax.random.split(scan_key, STEPS))[1]


@functools.cache
def played(module: ModuleType):
    mdp = module.make()
    return mdp, jax.tree.map(
        np.asarray, jax.jit(lambda key: play(mdp, None, key))(jax.random.key(0))
    )


def flat(tree):
    """Merge the axes [STEPS, BATCH] of every leaf."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


@each_module
def test_observations_lie_in_the_space_and_outcomes_are_certain(module):
    mdp, (_, obs, _, outcome) = played(module)
    ended = np.cumsum(1 - outcome.discount, 0) - (1 - outcome.discount) > 1
    for (_, box), seen in zip(spaces.leaves(mdp.spec.observation), leaves(obs), strict=True):
        assert isinstance(box, Box)
        assert seen.shape == (STEPS, BATCH, *box.shape)
        assert seen.dtype == box.dtype
        assert np.isfinite(seen).all()
        running = seen[~ended]
        assert (running >= box.low - 1e-5).all()
        assert (running <= box.high + 1e-5).all()
    assert outcome.reward.dtype == outcome.discount.dtype == np.float32
    for leaf in outcome:
        assert leaf.shape == (STEPS, BATCH)
    np.testing.assert_array_equal(outcome.uncertainty, 0.0)
    assert set(np.unique(outcome.discount)) <= {0.0, 1.0}


@each_module
def test_vmap_over_an_extra_axis_equals_separate_calls(module):
    mdp, (states, _, actions, outcomes) = played(module)
    params = PARAMS.get(module, getattr(module, "DEFAULT", None))
    twice = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * STEPS), params)
    keys = jax.random.split(jax.random.key(1), STEPS)
    new, outcome = jax.jit(jax.vmap(mdp.step))(twice, keys, states, actions)
    expected = jax.tree.map(lambda x: x[1:], states)
    got = jax.tree.map(lambda x: x[:-1], new)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), outcome, outcomes)


@each([m for m in MODULES if m is not memory_chain])
def test_init_from_an_observation_continues_like_the_original(module):
    mdp, (states, obs, actions, outcomes) = played(module)

    @jax.jit
    def resume(obs, action):
        state = mdp.init(None, jax.random.key(0), obs)
        return state, mdp.observe(None, state), mdp.step(None, jax.random.key(1), state, action)[1]

    state, seen, outcome = resume(flat(obs), flat(actions))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), seen, flat(obs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), outcome, flat(outcomes))
    originals = flat(states)
    assert jax.tree.structure(state) == jax.tree.structure(originals)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(originals), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


@each([m for m in MODULES if m not in ALIKE])
def test_start_states_differ(module):
    mdp = module.make()

    @jax.jit
    def start(key):
        return mdp.observe(None, mdp.init(None, key, batch=16)).reshape(16, -1)

    starts = np.asarray(start(jax.random.key(0)))
    assert len(np.unique(starts, axis=0)) > 3
    assert not np.array_equal(starts, start(jax.random.key(1)))
