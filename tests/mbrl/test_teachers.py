"""Annotators: the probability of every answer by hand, and draws that follow it."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl.losses.preference import pair_nll
from mbrl.preferences import teachers
from mbrl.preferences.teachers import TEACHERS, TeacherConfig

label_probabilities = jax.jit(teachers.label_probabilities, static_argnums=0)
teach = jax.jit(teachers.teach, static_argnums=0)

# Sums 3 and 6; 2 and 2; 0.05 and 0.06; -1 and -3; 5 and 4.95.
PAIRS = jnp.array(
    [
        [[2.0, 1.0], [1.0, 5.0]],
        [[2.0, 0.0], [0.0, 2.0]],
        [[0.05, 0.0], [0.0, 0.06]],
        [[0.0, -1.0], [-3.0, 0.0]],
        [[5.0, 0.0], [0.0, 4.95]],
    ]
)
FIRST, SECOND, EQUAL, SKIPPED = np.eye(4)


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def mix(first: float) -> Any:
    return first * FIRST + (1.0 - first) * SECOND


WANT = {
    "oracle": [SECOND, EQUAL, SECOND, FIRST, FIRST],
    "stochastic": [mix(sigmoid(d)) for d in (-3.0, 0.0, -0.01, 2.0, 0.05)],
    # Weights 0.9 and 1: the late rewards of pairs 1 and 4 win; -1 against -2.7 does not.
    "myopic": [SECOND, SECOND, SECOND, FIRST, SECOND],
    # Nothing above 0.1.
    "skip": [SECOND, EQUAL, SKIPPED, SKIPPED, FIRST],
    "mistake": [mix(0.1), EQUAL, mix(0.1), mix(0.9), mix(0.9)],
    "equal": [SECOND, EQUAL, EQUAL, FIRST, EQUAL],
}


@pytest.mark.parametrize("name", TEACHERS)
def test_the_answers_of_every_annotator_have_known_probabilities(name: str):
    np.testing.assert_allclose(label_probabilities(TEACHERS[name], PAIRS), WANT[name], atol=1e-6)


def test_every_annotator_is_tested():
    assert set(TEACHERS) == set(WANT)


def test_faults_combine_in_the_order_of_b_pref():
    config = TeacherConfig(beta=0.5, myopia=0.5, mistake=0.2, skip=0.1, equal=0.1)
    p = sigmoid(0.5 * ((0.5 * 2.0 + 1.0) - (0.5 * 1.0 + 5.0)))
    want = [mix(0.8 * p + 0.2 * (1 - p)), EQUAL, SKIPPED, SKIPPED, EQUAL]
    np.testing.assert_allclose(label_probabilities(config, PAIRS), want, atol=1e-6)


@pytest.mark.parametrize("name", ["skip", "equal"])
def test_thresholds_are_relative_to_the_scale(name: str):
    base = label_probabilities(TEACHERS[name], PAIRS)
    np.testing.assert_allclose(label_probabilities(TEACHERS[name], 7 * PAIRS, 7.0), base, atol=1e-6)
    # 0.1 of 30 = 3: the best sum of a pair must exceed it, the difference must reach it.
    got = label_probabilities(TEACHERS[name], PAIRS, 30.0)
    want = {
        "skip": [SECOND, SKIPPED, SKIPPED, SKIPPED, FIRST],
        "equal": [SECOND, EQUAL, EQUAL, EQUAL, EQUAL],
    }
    np.testing.assert_allclose(got, want[name], atol=1e-6)


def test_where_returns_are_negative_nothing_is_skipped():
    got = label_probabilities(TEACHERS["skip"], -PAIRS, -3.0)
    np.testing.assert_array_equal(got[:, 3], 0.0)
    equal = label_probabilities(TEACHERS["equal"], -PAIRS, jnp.array(-1.0))
    np.testing.assert_array_equal(equal[:, 2], [0, 1, 1, 0, 1])


def test_draws_follow_the_probabilities_and_ranks_mean_what_they_say():
    config = TeacherConfig(beta=0.3, mistake=0.1, skip=0.1, equal=0.02)
    num = 4000
    want = np.asarray(label_probabilities(config, PAIRS))
    rank, keep = teach(config, jax.random.key(1), jnp.repeat(PAIRS, num, 0))
    assert rank.dtype == jnp.int32
    rank, keep = np.asarray(rank).reshape(5, num, 2), np.asarray(keep).reshape(5, num)
    labels = [[0, 1], [1, 0], [0, 0], [-1, -1]]
    share = np.stack([(rank == label).all(-1).mean(1) for label in labels], 1)
    assert (np.abs(share - want) < 4 * np.sqrt(want * (1 - want) / num) + 1e-9).all()
    np.testing.assert_array_equal(keep, (rank >= 0).all(-1))
    assert 0.0 < want[0, 0] < 1.0 and want[:, 2:].max() == 1.0


def test_an_annotator_who_skips_all_keeps_nothing():
    rank, keep = teach(TeacherConfig(skip=100.0), jax.random.key(0), PAIRS)
    assert not keep.any()
    np.testing.assert_array_equal(rank, -1)
    np.testing.assert_array_equal(jax.vmap(pair_nll)(jnp.zeros((5, 2)), rank), 0.0)


def test_seeds_annotate_alike_alone_and_together():
    keys = jax.random.split(jax.random.key(3), 4)
    config = TeacherConfig(beta=0.3, equal=0.02)
    traces = []

    def ask(key: Any, reward: Any, scale: Any) -> Any:
        traces.append(1)
        return teachers.teach(config, key, reward, scale)

    program = jax.jit(jax.vmap(ask, (0, None, None)))
    for scale in (1.0, 40.0):
        rank, _ = program(keys, PAIRS, jnp.float32(scale))
        alone = [teach(config, key, PAIRS, scale)[0] for key in keys]
        np.testing.assert_array_equal(rank, alone)
    assert len(traces) == 1
    assert np.unique(rank[:, 0], axis=0).shape[0] > 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("beta", -1.0), ("myopia", 0.0), ("mistake", 1.5), ("skip", -0.1), ("equal", -0.1)],
)
def test_settings_without_a_meaning_are_refused(field: str, value: float):
    with pytest.raises(ValueError, match=f"{field}.*got"):
        TeacherConfig(**{field: value})


def test_rewards_that_are_no_pairs_are_refused():
    with pytest.raises(ValueError, match=r"reward: got shape \(5, 3, 2\), expected \[M, 2, L\]"):
        label_probabilities(TEACHERS["oracle"], jnp.zeros((5, 3, 2)))
