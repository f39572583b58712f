"""Best of n by every subset, and the course of a pursued reward with known coefficients."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl.preferences.best_of_n import best_of_n, best_of_n_kl
from mbrl.preferences.overoptimization_fit import course_at, fit_course, summit

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "rlhf.json").read_text("utf-8"))


def by_all_subsets(score, value, n):
    """Mean over subsets, and over the best ones of each where they tie."""
    means = []
    for subset in itertools.combinations(range(len(score)), n):
        top = max(score[i] for i in subset)
        means.append(np.mean([value[i] for i in subset if score[i] == top]))
    return np.mean(means)


@pytest.mark.parametrize("ties", [False, True])
def test_estimate_is_the_mean_over_all_subsets(ties):
    rng = np.random.default_rng(3)
    score, value = rng.normal(size=8).astype(np.float32), rng.normal(size=8).astype(np.float32)
    score = np.round(score) if ties else score
    assert (len(set(score.tolist())) < 8) == ties
    want = [by_all_subsets(score, value, n) for n in range(1, 9)]
    got = best_of_n(jnp.asarray(score), jnp.asarray(value), range(1, 9))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_best_of_n_ranks_has_the_mean_of_an_order_statistic():
    pool, n = 32_768, np.array([1, 2, 16, 256, 1024, 32_768])
    rank = jnp.arange(1.0, pool + 1)
    shuffled = jax.random.permutation(jax.random.key(0), rank)
    want = n / (n + 1.0) * (pool + 1.0)
    np.testing.assert_allclose(best_of_n(shuffled, shuffled, n), want, rtol=1e-5)
    # Of opposite sign it is the worst one.
    np.testing.assert_allclose(best_of_n(-shuffled, shuffled, n), pool + 1 - want, rtol=5e-4)


def test_a_score_that_says_nothing_gains_nothing():
    value = jnp.array([1.0, 5.0, 3.0])
    np.testing.assert_allclose(best_of_n(jnp.zeros(3), value, [1, 2, 3]), 3.0, rtol=1e-6)


def test_golden_divergence():
    entry = GOLDEN["bon_kl"]
    want = entry["outputs"]["kl_nats"]
    np.testing.assert_allclose(best_of_n_kl(jnp.array(entry["inputs"]["n"])), want, atol=1e-6)


def test_divergence_of_the_best_of_two_among_many():
    # Of N equally likely draws the one of rank i is the best of 2 with (2 i - 1) / N^2.
    rank = np.arange(1, 10_001)
    chance = (2 * rank - 1) / 10_000**2
    np.testing.assert_allclose(best_of_n_kl(2.0), np.sum(chance * np.log(chance * 1e4)), atol=1e-4)


@pytest.mark.parametrize("n", [[0], [4], 2])
def test_more_draws_than_the_pool_holds_are_refused(n):
    with pytest.raises(ValueError, match="^n: got"):
        best_of_n(jnp.ones(3), jnp.ones(3), n)


def test_pools_of_different_shape_are_refused():
    with pytest.raises(ValueError, match="^score, value: got"):
        best_of_n(jnp.ones(3), jnp.ones((3, 2)), [1])


@pytest.mark.parametrize(("pursuit", "top"), [("best_of_n", 1.5), ("rl", np.exp(2.0))])
def test_fit_finds_the_coefficients_and_the_summit(pursuit, top):
    d = np.array([0.0, 0.4, 0.8, 1.3, 1.9, 2.4])
    falls = d**2 if pursuit == "best_of_n" else d * np.log(np.maximum(d, 1e-9))
    reward = 1.2 * d - 0.4 * falls
    course = fit_course(jnp.asarray(d), jnp.asarray(reward), pursuit)
    np.testing.assert_allclose(course, [1.2, 0.4, 1.0], rtol=1e-4)
    np.testing.assert_allclose(course_at(course, jnp.asarray(d), pursuit), reward, atol=1e-5)
    np.testing.assert_allclose(summit(course, pursuit), top, rtol=1e-3)


def test_what_the_fit_leaves_over_is_told():
    d = jnp.array([1.0, 2.0, 3.0])
    reward = jnp.array([1.0, -1.0, 1.0])
    course = fit_course(d, reward)
    want, *_ = np.linalg.lstsq(np.stack([d, -(d**2)], 1), np.asarray(reward), rcond=None)
    rest = np.asarray(reward) - np.stack([d, -(d**2)], 1) @ want
    np.testing.assert_allclose(course.r_squared, 1 - np.sum(rest**2) / (8 / 3), atol=1e-5)
    assert float(summit(fit_course(d, d))) > 1e3  # a straight rise never falls


def test_fits_without_a_meaning_are_refused():
    with pytest.raises(ValueError, match="^pursuit: got 'ppo'"):
        fit_course(jnp.ones(3), jnp.ones(3), "ppo")
    with pytest.raises(ValueError, match="^distance, reward: got"):
        fit_course(jnp.ones(1), jnp.ones(1))
