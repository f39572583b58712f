"""Accuracy, calibration and distances of rewards: golden numbers, closed forms, invariance."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl.losses.preference import pair_nll
from mbrl.preferences import evaluation
from mbrl.preferences.evaluation import canonical_reward, epic_distance
from mbrl.types import Transition

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "preferences.json").read_text("utf-8"))
accuracy = jax.jit(evaluation.accuracy)
log_loss = jax.jit(evaluation.log_loss)
fit_temperature = jax.jit(evaluation.fit_temperature)
reward_correlation = jax.jit(evaluation.reward_correlation)
expected_calibration_error = jax.jit(
    evaluation.expected_calibration_error, static_argnames=("bins", "low")
)
SCORES = jnp.array([[3.0, 2.0, 1.0], [1.0, 5.0, jnp.nan], [2.0, 2.0, 0.0], [0.0, 1.0, 2.0]])
RANK = jnp.array([[0, 2, 1], [0, 1, -1], [0, 1, 1], [-1, 0, -1]])


def test_golden_accuracy_of_a_ranking_and_of_pairs():
    entry = GOLDEN["bt_ranking_k5"]
    scores = jnp.array([entry["inputs"]["rewards_best_first"]])
    assert accuracy(scores, jnp.arange(5)[None]) == pytest.approx(entry["outputs"]["pair_accuracy"])
    entry = GOLDEN["bt_pair_variants"]
    pairs = jnp.array([entry["inputs"]["chosen"], entry["inputs"]["rejected"]]).T
    rank = jnp.tile(jnp.arange(2), (6, 1))
    assert accuracy(pairs, rank) == pytest.approx(entry["outputs"]["accuracy"])


def test_accuracy_counts_untied_present_pairs():
    # Row 0: 2 of 3. Row 1: 0 of 1. Row 2: a half and 1 of 2, the third is a tie. Row 3: none.
    assert accuracy(SCORES, RANK) == pytest.approx(3.5 / 6)
    assert accuracy(SCORES, RANK, jnp.array([True, False, False, True])) == pytest.approx(2 / 3)
    assert accuracy(SCORES, RANK, jnp.zeros(4, bool)) == 0.0
    assert accuracy(SCORES[3:], RANK[3:]) == 0.0


def test_log_loss_weighs_rankings_alike_and_leaves_out_empty_ones():
    nll = jax.jit(pair_nll)
    each = [float(nll(s, r)) for s, r in zip(SCORES, RANK, strict=True)]
    assert log_loss(SCORES, RANK) == pytest.approx(sum(each[:3]) / 3, rel=1e-6)
    mask = jnp.array([True, True, False, True])
    assert log_loss(SCORES, RANK, mask) == pytest.approx(sum(each[:2]) / 2, rel=1e-6)
    assert log_loss(jnp.zeros((2, 3)), RANK[:2]) == pytest.approx(math.log(2.0))
    assert log_loss(SCORES, RANK, jnp.zeros(4, bool)) == 0.0


def test_golden_calibration_error():
    entry = GOLDEN["ece_5bins_from_.5"]
    prob, correct = (jnp.asarray(x, jnp.float32) for x in entry["inputs"].values())
    got = expected_calibration_error(prob, correct, bins=5)
    np.testing.assert_allclose(got, entry["outputs"]["ece"], rtol=1e-5)
    assert abs(float(expected_calibration_error(prob, correct, bins=2)) - float(got)) > 1e-3


def test_calibration_errors_by_hand():
    prob = jnp.array([0.125, 0.125, 0.125, 0.125, 0.875, 0.875, jnp.nan])
    correct = jnp.array([0, 0, 1, 0, 1, 1, 1])
    mask = jnp.isfinite(prob)
    # Bins of a quarter: |1/4 - 1/8| of four, |1 - 7/8| of two; a mask counts for nothing.
    got = expected_calibration_error(prob, correct, mask, bins=4, low=0.0)
    assert got == pytest.approx(0.125)
    # In one bin gaps of opposite sign cancel: 3 correct of 6 against a mean of 3/8.
    one = expected_calibration_error(prob, correct, mask, bins=1, low=0.0)
    assert one == pytest.approx(abs(3 / 6 - 3 / 8))
    sure = expected_calibration_error(jnp.ones(3), jnp.ones(3))
    assert sure == 0.0  # the upper edge belongs to the last bin
    assert expected_calibration_error(prob, correct, jnp.zeros(7, bool)) == 0.0


@pytest.mark.parametrize("truth", [0.05, 0.7, 1.0, 3.0, 40.0])
def test_the_temperature_of_soft_labels_is_recovered(truth: float):
    difference = jnp.linspace(-2.0, 3.0, 41)
    outcome = jax.nn.sigmoid(difference / truth)
    got = fit_temperature(difference, outcome)
    assert got == pytest.approx(truth, rel=2e-3)
    # Units of score are units of temperature.
    assert fit_temperature(1e3 * difference, outcome) == pytest.approx(1e3 * truth, rel=2e-3)


def test_the_temperature_minimizes_the_likelihood_of_noisy_labels():
    key, draw = jax.random.split(jax.random.key(0))
    difference = 4.0 * jax.random.normal(key, (200,))
    outcome = jax.random.bernoulli(draw, jax.nn.sigmoid(difference / 2.5)).astype(jnp.float32)

    def nll(t: Any) -> Any:
        logit = np.asarray(difference, np.float64) / t
        return np.mean(np.logaddexp(0.0, logit) - np.asarray(outcome) * logit)

    got = float(fit_temperature(difference, outcome))
    grid = np.geomspace(0.5, 12.0, 2001)
    best = grid[np.argmin([nll(t) for t in grid])]
    assert got == pytest.approx(best, rel=5e-3) and 1.5 < got < 4.0
    padded = jnp.append(difference, jnp.nan), jnp.append(outcome, jnp.nan)
    mask = jnp.arange(201) < 200
    assert fit_temperature(*padded, mask) == pytest.approx(got, rel=1e-5)


def test_labels_that_no_temperature_fits_end_at_a_bound():
    difference = jnp.array([-2.0, -1.0, 1.0, 2.0])
    rms = math.sqrt(2.5)
    right = (difference > 0).astype(jnp.float32)
    assert fit_temperature(difference, right) == pytest.approx(1e-3 * rms, rel=1e-3)
    assert fit_temperature(difference, 1.0 - right) == pytest.approx(1e3 * rms, rel=1e-3)
    assert fit_temperature(difference, jnp.full(4, 0.5)) == pytest.approx(1e3 * rms, rel=1e-3)
    assert fit_temperature(jnp.zeros(4), right) == 1.0
    assert fit_temperature(difference, right, jnp.zeros(4, bool)) == 1.0


def test_correlation_is_that_of_numpy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 60)).astype(np.float32)
    b = (0.6 * a + b + 100.0).astype(np.float32)
    want = np.corrcoef(a.astype(np.float64), b.astype(np.float64))[0, 1]
    got = reward_correlation(jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(got, want, rtol=1e-4)
    mask = jnp.arange(60) < 30
    holes = jnp.where(mask, b, jnp.nan)
    want = np.corrcoef(a[:30].astype(np.float64), b[:30].astype(np.float64))[0, 1]
    np.testing.assert_allclose(reward_correlation(jnp.asarray(a), holes, mask), want, rtol=1e-4)
    assert reward_correlation(jnp.asarray(a), jnp.asarray(5.0 - 3.0 * a)) == pytest.approx(-1.0)
    assert reward_correlation(jnp.asarray(a), jnp.full(60, 20.1)) == 0.0
    assert reward_correlation(jnp.asarray(a), jnp.asarray(b), jnp.zeros(60, bool)) == 0.0


S, A, GAMMA = 4, 3, 0.9


def tabular(table: Any) -> Any:
    """A reward of a finite problem: observations and actions are numbers."""
    table = jnp.asarray(table, jnp.float32)
    return lambda obs, action, next_obs: table[obs, action, next_obs]


def shaping(potential: Any, gamma: float = GAMMA) -> np.ndarray:
    phi = np.asarray(potential)
    return np.broadcast_to(gamma * phi[None, None, :] - phi[:, None, None], (S, A, S))


def every_step() -> Transition:
    obs, action, after = (
        jnp.array(x) for x in zip(*itertools.product(range(S), range(A), range(S)), strict=True)
    )
    return Transition(obs, action, jnp.zeros(0), after, jnp.zeros(0, bool))


def every_pair() -> tuple[Any, Any]:
    states, actions = (
        jnp.array(x) for x in zip(*itertools.product(range(S), range(A)), strict=True)
    )
    return states, actions


def table(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(S, A, S))


POTENTIAL = [5.0, -3.0, 0.5, 10.0]


@jax.jit
def distance(a: Any, b: Any) -> Any:
    return epic_distance(tabular(a), tabular(b), every_step(), *every_pair(), GAMMA)


def test_the_canonical_reward_is_that_of_the_definition():
    r = table(0)
    onward = r.mean((1, 2))  # E R(s, A, S')
    want = r + GAMMA * onward[None, None, :] - onward[:, None, None] - GAMMA * onward.mean()
    got = canonical_reward(tabular(r), every_step(), *every_pair(), GAMMA)
    np.testing.assert_allclose(got, want.reshape(-1), atol=1e-5)
    shaped = canonical_reward(tabular(r + shaping(POTENTIAL)), every_step(), *every_pair(), GAMMA)
    np.testing.assert_allclose(shaped, want.reshape(-1), atol=1e-4)


def test_equivalent_rewards_have_no_distance():
    r = table(0)
    assert distance(r, r) == 0.0
    assert distance(r, 3.0 * r + 2.0 * shaping(POTENTIAL) + 7.0) < 1e-5
    # Shaping with another discount, or a scale that is negative, is another task.
    assert distance(r, r + shaping(POTENTIAL, 0.5)) > 0.1
    assert distance(r, -r) == pytest.approx(1.0, abs=1e-6)


def test_the_distance_is_that_of_the_definition_and_a_metric():
    def canonical(r: Any) -> np.ndarray:
        onward = r.mean((1, 2))
        return (r + GAMMA * onward[None, None, :] - onward[:, None, None]).reshape(-1)

    tables = [table(i) for i in range(3)]
    got = {(i, j): float(distance(tables[i], tables[j])) for i in range(3) for j in range(3)}
    for (i, j), value in got.items():
        rho = np.corrcoef(canonical(tables[i]), canonical(tables[j]))[0, 1]
        assert value == pytest.approx(math.sqrt(max(1.0 - rho, 0.0) / 2.0), abs=1e-4)
    assert got[0, 1] == pytest.approx(got[1, 0], abs=1e-6)
    assert got[0, 2] <= got[0, 1] + got[1, 2] + 1e-6


def test_a_reward_of_pure_shaping_is_no_reward():
    assert distance(shaping(POTENTIAL), table(0)) == pytest.approx(0.5, abs=1e-6)
    assert distance(shaping(POTENTIAL), np.zeros((S, A, S))) == 0.0


def test_any_sample_is_blind_to_shaping():
    # Continuous observations, few draws: shaping cancels draw by draw.
    key, state_key, action_key = jax.random.split(jax.random.key(0), 3)
    obs, after = jax.random.normal(key, (2, 30, 2))
    step = Transition(obs, jnp.zeros((30, 1)), jnp.zeros(0), after, jnp.zeros(0, bool))
    states = jax.random.normal(state_key, (7, 2))
    actions = jax.random.normal(action_key, (7, 1))

    def plain(obs: Any, action: Any, next_obs: Any) -> Any:
        return jnp.sin(obs[:, 0]) - action[:, 0] ** 2 + next_obs[:, 1]

    def phi(obs: Any) -> Any:
        return 3.0 * jnp.cos(obs).sum(-1)

    def shaped(obs: Any, action: Any, next_obs: Any) -> Any:
        return 0.5 * plain(obs, action, next_obs) + GAMMA * phi(next_obs) - phi(obs)

    @jax.jit
    def distances() -> Any:
        other = epic_distance(plain, lambda o, a, n: phi(n), step, states, actions, GAMMA)
        return epic_distance(plain, shaped, step, states, actions, GAMMA), other

    same, other = distances()
    assert same < 1e-5 and other > 0.1


def test_every_measure_maps_over_seeds():
    keys = jax.random.split(jax.random.key(4), 3)
    scores = jax.vmap(lambda key: jax.random.normal(key, (8, 2)))(keys)
    rank = jnp.tile(jnp.array([[0, 1], [1, 0]]), (3, 4, 1))
    mask = jnp.arange(8) < jnp.array([[8], [5], [0]])
    traces = []

    def measure(scores: Any, rank: Any, mask: Any) -> Any:
        traces.append(1)
        gap = scores[:, 0] - scores[:, 1]
        won = (rank[:, 0] == 0).astype(jnp.float32)
        confidence = jax.nn.sigmoid(jnp.abs(gap))
        right = ((gap > 0) == (won > 0)).astype(jnp.float32)
        return (
            accuracy(scores, rank, mask),
            log_loss(scores, rank, mask),
            expected_calibration_error(confidence, right, mask),
            fit_temperature(gap, won, mask),
            reward_correlation(gap, won, mask),
        )

    program = jax.jit(jax.vmap(measure))
    together = program(scores, rank, mask)
    program(scores + 1.0, rank, ~mask)
    assert len(traces) == 1
    single = jax.jit(measure)
    for seed in range(3):
        alone = single(scores[seed], rank[seed], mask[seed])
        for got, want in zip(together, alone, strict=True):
            np.testing.assert_allclose(got[seed], want, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose([x[2] for x in together], [0.0, 0.0, 0.0, 1.0, 0.0])
