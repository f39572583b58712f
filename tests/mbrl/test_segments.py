"""Segments lie within an episode, reach its last step, and carry what happened in them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl.preferences.segments import draw, streams, successors, whole
from mbrl.types import Batch, Record

LENGTHS = (5, 3, 6)
"""Records per episode; the last one is cut short by the end of the data."""


def record(num: int = 1) -> Record:
    """Streams of three episodes; the observation says (episode, step)."""
    rows = [(e, t) for e, length in enumerate(LENGTHS) for t in range(length)]
    obs = jnp.broadcast_to(jnp.array(rows, jnp.float32), (num, len(rows), 2))
    step = obs[..., 1]
    last = (obs[..., 0] < 2) & (step == jnp.array(LENGTHS)[obs[..., 0].astype(int)] - 1)
    reward = jnp.where(step == 0, 0.0, 10 * obs[..., 0] + step)
    return Record(obs, step[..., None], reward, step == 0, last, last, {"wide": obs})


def batch(kind: str) -> Batch:
    one = record()
    if kind == "latest":
        return Batch(one, jnp.ones(one.reward.shape, bool))
    two = jax.tree.map(lambda x: jnp.stack([x, x]), one)
    return Batch(two, jnp.ones(two.reward.shape, bool), jnp.zeros((2, 1, 2), jnp.int32))


@pytest.mark.parametrize("kind", ["latest", "sequences"])
def test_a_transition_starts_where_its_successor_is_of_the_same_episode(kind):
    rows, starts = streams(batch(kind))
    assert rows.reward.shape == starts.shape == (1 if kind == "latest" else 2, 14)
    wanted = [1, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 1, 1, 0]
    np.testing.assert_array_equal(starts, np.broadcast_to(np.array(wanted, bool), starts.shape))


def test_a_ring_knows_its_own_transitions():
    one, valid = record(), jnp.arange(14)[None] % 3 == 0
    rows, starts = streams(Batch(one, valid), ring=True)
    np.testing.assert_array_equal(starts, valid)
    np.testing.assert_array_equal(rows.reward, one.reward)


@pytest.mark.parametrize("length", [1, 2, 4])
def test_whole_segments_by_brute_force(length):
    starts = jax.random.bernoulli(jax.random.key(length), 0.7, (3, 20))
    got = np.asarray(whole(starts, length))
    for row in range(3):
        for t in range(20):
            wanted = all(bool(starts[row, (t + i) % 20]) for i in range(length))
            assert got[row, t] == wanted


def test_segments_stay_within_an_episode_and_reach_its_end():
    rows, starts = streams(batch("sequences"))
    found, enough = draw(rows, starts, jax.random.key(0), 400, 2)
    assert bool(enough)
    episode, step = np.moveaxis(np.asarray(found.obs), -1, 0)
    assert (episode == episode[:, :1]).all()
    np.testing.assert_array_equal(np.diff(step), 1.0)
    np.testing.assert_array_equal(found.next_obs[..., 1], step + 1)
    np.testing.assert_array_equal(found.action[..., 0], step)
    # The reward of a step is what arrives with the next record.
    np.testing.assert_array_equal(found.reward, 10 * episode + step + 1)
    starts_seen = {(int(e), int(t)) for e, t in zip(episode[:, 0], step[:, 0], strict=True)}
    assert starts_seen == {(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1), (2, 2), (2, 3)}
    wanted = np.isin(episode[:, 0] * 10 + step[:, 0], [2, 10])
    np.testing.assert_array_equal(np.asarray(found.is_terminal)[:, -1], wanted)


def test_segments_are_drawn_uniformly():
    rows, starts = streams(batch("latest"))
    found, _ = draw(rows, starts, jax.random.key(1), 8000, 2)
    counts = np.unique(np.asarray(found.obs)[:, 0] @ [10, 1], return_counts=True)[1]
    np.testing.assert_allclose(counts, 1000, atol=150)


def test_no_episode_that_is_long_enough_is_said():
    rows, starts = streams(batch("latest"))
    assert bool(draw(rows, starts, jax.random.key(0), 3, 5)[1])
    assert not bool(draw(rows, starts, jax.random.key(0), 3, 6)[1])


def test_a_segment_may_pass_the_seam_of_a_ring():
    one: Any = record()
    ring = jax.tree.map(lambda x: jnp.roll(x, 5, 1), one)
    starts = jnp.roll(streams(batch("latest"))[1], 5, 1)
    found, _ = draw(ring, starts, jax.random.key(0), 400, 2)
    episode, step = np.moveaxis(np.asarray(found.obs), -1, 0)
    assert (episode == episode[:, :1]).all()
    np.testing.assert_array_equal(np.diff(step), 1.0)
    assert ((episode[:, 0] == 2) & (step[:, 0] == 0)).any()


def test_successors_are_those_of_the_stream():
    step = successors(record())
    np.testing.assert_array_equal(step.next_obs[:, :-1], record().obs[:, 1:])
    np.testing.assert_array_equal(step.reward[:, :-1], record().reward[:, 1:])
