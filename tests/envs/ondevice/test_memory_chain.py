"""The memory chain against every policy that has none."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.ondevice import memory_chain
from mbrl.mdp import episodic, timestep

KEY = jax.random.key(0)


def both_cues(batch: int) -> memory_chain.MemoryChainState:
    """Start `batch` episodes with the cue -1, and as many with the cue 1."""
    cue = jnp.repeat(jnp.array([-1, 1]), batch)
    return memory_chain.MemoryChainState(jnp.zeros_like(cue), cue)


def play(length, state, policy):
    """Run one episode; `policy(obs, carry) -> (action, carry)`. Leaves [T, B]."""
    mdp = memory_chain.make(length)

    def step(carry, _):
        state, memory = carry
        obs = mdp.observe(None, state)
        action, memory = policy(obs, memory)
        state, outcome = mdp.step(None, KEY, state, action)
        return (state, memory), (obs, outcome)

    carry = state, jnp.zeros(state.cue.shape)
    return jax.jit(lambda carry: jax.lax.scan(step, carry, None, length + 3)[1])(carry)


def test_an_episode_by_hand():
    # Both name the cue 1, and go on after the end.
    obs, outcome = play(3, both_cues(1), lambda obs, memory: (jnp.ones(2, int), memory))
    third = np.float32(1 / 3)
    for row, cue in enumerate((-1, 1)):
        expected = [[0, cue, 0], [third, 0, 0], [2 * third, 0, 0], [1, 0, 1], [1, 0, 0], [1, 0, 0]]
        np.testing.assert_allclose(obs[:, row], expected, rtol=1e-6)
        np.testing.assert_array_equal(outcome.reward[:, row], [0, 0, 0, cue, 0, 0])
        np.testing.assert_array_equal(outcome.discount[:, row], [1, 1, 1, 0, 0, 0])


@pytest.mark.parametrize("length", [1, 10])
def test_who_remembers_the_cue_is_always_right(length):
    def remember(obs, memory):
        memory = memory + obs[:, 1]
        return (memory > 0).astype(int), memory

    _, outcome = play(length, both_cues(1), remember)
    np.testing.assert_array_equal(outcome.reward.sum(0), 1.0)
    np.testing.assert_array_equal(outcome.discount.sum(0), length)


@pytest.mark.parametrize("length", [1, 10])
def test_no_policy_of_the_current_observation_expects_more_than_nothing(length):
    # One action for each of the two cues and for each of the later observations.
    every = jnp.array(list(itertools.product((0, 1), repeat=2 + length)))
    table, rows = jnp.concatenate([every, every]), jnp.arange(2 * len(every))

    def reflex(obs, memory):
        t = jnp.round(length * obs[:, 0]).astype(int)
        return table[rows, jnp.where(t == 0, (obs[:, 1] > 0).astype(int), 1 + t)], memory

    _, outcome = play(length, both_cues(len(every)), reflex)
    returns = outcome.reward.sum(0).reshape(2, -1)
    np.testing.assert_array_equal(np.abs(returns), 1.0)
    np.testing.assert_array_equal(returns.mean(0), 0.0)


def test_cues_are_even():
    cue = np.asarray(memory_chain.make().init(None, KEY, batch=4000).cue)
    assert set(cue) == {-1, 1}
    assert abs(cue.mean()) < 3 / np.sqrt(4000)


def test_a_stream_shows_a_new_cue_every_twelve_records():
    mdp = memory_chain.make()
    stream = episodic(mdp, mdp.spec.max_episode_steps)

    def step(state, key):
        state, _ = stream.step(None, key, state, jnp.zeros(8, int))
        return state, timestep(stream, None, state)

    start = stream.init(None, KEY, batch=8)
    seen = jax.jit(lambda s, k: jax.lax.scan(step, s, k)[1])(start, jax.random.split(KEY, 48))
    t = np.arange(1, 49) % 12
    np.testing.assert_array_equal(seen.is_first, np.broadcast_to(t[:, None] == 0, (48, 8)))
    np.testing.assert_array_equal(seen.is_terminal, np.broadcast_to(t[:, None] == 11, (48, 8)))
    np.testing.assert_array_equal(seen.is_last, seen.is_terminal)
    np.testing.assert_array_equal(seen.obs[..., 1] != 0, seen.is_first)
    np.testing.assert_array_equal(seen.obs[..., 2], np.broadcast_to(t[:, None] == 10, (48, 8)))
    # Who always answers 0 is right for the cue -1.
    np.testing.assert_array_equal(seen.reward[10::12][1:], -seen.obs[11::12, :, 1][:-1])
    assert len(np.unique(seen.obs[11::12, :, 1], axis=1)) > 1


def test_what_cannot_be_told_or_made_is_refused():
    mdp = memory_chain.make()
    with pytest.raises(ValueError, match="MemoryChain cannot tell its state from an observation"):
        mdp.init(None, KEY, jnp.zeros((1, 3)))
    with pytest.raises(ValueError, match="length: expected at least 1, got 0"):
        memory_chain.make(0)
