"""Annotators of K answers: the order of Plackett and Luce, ties, mistakes, and pairs as before."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl.losses.preference import plackett_luce_nll
from mbrl.preferences import rankings
from mbrl.preferences.teachers import TEACHERS, TeacherConfig, label_probabilities

rank_answers = jax.jit(rankings.rank_answers, static_argnums=0)
KEY = jax.random.key(0)
N = 20000
ROOM = 4.5 * 0.5 / math.sqrt(N)
"""Four and a half standard deviations of a frequency."""


def test_without_noise_the_order_is_that_of_the_scores():
    score = jax.random.normal(KEY, (50, 6)).at[0, :2].set(1.5)
    rank, keep = rank_answers(TeacherConfig(), KEY, score)
    assert keep.all()
    for ranks, scores in zip(np.asarray(rank), np.asarray(score), strict=True):
        places = sorted(set(scores), reverse=True)  # equal scores share a place
        assert ranks.tolist() == [places.index(s) for s in scores]


def test_orders_are_drawn_as_plackett_and_luce_have_it():
    score = jnp.array([0.9, 0.0, -0.7])
    drawn, _ = rank_answers(TEACHERS["stochastic"], KEY, jnp.tile(score, (N, 1)))
    for order in itertools.permutations(range(3)):
        want = math.exp(-plackett_luce_nll(score, jnp.array(order)))
        assert abs((np.asarray(drawn) == order).all(1).mean() - want) < ROOM


def test_pairs_are_ranked_as_by_the_annotators_of_segments():
    # All faults at once, in a pair that differs, one that hardly does, and a poor one.
    config = TeacherConfig(beta=2.0, mistake=0.1, equal=0.1, skip=0.1)
    pairs = jnp.array([[1.0, 0.4], [0.3, 0.35], [0.02, 0.05], [0.0, 0.3]])
    rank, keep = rank_answers(config, KEY, jnp.tile(pairs, (N, 1)))
    want = label_probabilities(config, pairs[:, :, None])
    answers = [(0, 1), (1, 0), (0, 0), (-1, -1)]
    drawn = np.asarray(rank).reshape(N, 4, 2)
    found = np.stack([(drawn == answer).all(2).mean(0) for answer in answers], 1)
    np.testing.assert_allclose(found, want, atol=ROOM)
    np.testing.assert_allclose(np.asarray(keep).reshape(N, 4).mean(0), 1.0 - want[:, 3], atol=ROOM)


def test_a_mistake_exchanges_neighbours():
    score = jnp.tile(jnp.array([3.0, 2.0, 1.0, 0.0]), (N, 1))
    rank, _ = rank_answers(TeacherConfig(mistake=0.3), KEY, score)
    found = {
        tuple(row): n / N
        for row, n in zip(*np.unique(rank, axis=0, return_counts=True), strict=True)
    }
    want = {(0, 1, 2, 3): 0.7, (1, 0, 2, 3): 0.1, (0, 2, 1, 3): 0.1, (0, 1, 3, 2): 0.1}
    assert found.keys() == want.keys()
    assert all(abs(found[order] - want[order]) < ROOM for order in want)


def test_close_neighbours_are_tied_and_ranks_have_no_gaps():
    score = jnp.array([[0.0, 1.0, 1.05, 2.0, 1.1]])
    rank, _ = rank_answers(TeacherConfig(equal=0.06), KEY, score)
    assert rank.tolist() == [[2, 1, 1, 0, 1]]
    rank, _ = rank_answers(TeacherConfig(equal=0.006), KEY, score, 10.0)
    assert rank.tolist() == [[2, 1, 1, 0, 1]]


def test_single_answers_cannot_be_ordered():
    with pytest.raises(ValueError, match="^score: got shape"):
        rankings.rank_answers(TeacherConfig(), KEY, jnp.zeros((3, 1)))
