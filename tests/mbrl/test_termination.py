"""Termination is learned from few ends, for states that were never visited."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mbrl import spaces
from mbrl.fitting import FitConfig, fit_members
from mbrl.models.termination import (
    MAX_BALANCE,
    UNKNOWN,
    cautious,
    fit_bounds,
    termination_model,
)
from mbrl.types import EnvSpec, Transition

SPEC = EnvSpec("toy", spaces.box(-np.inf, np.inf, (3,)), spaces.box(-1.0, 1.0, (1,)))


def steps(next_obs: Any, ends: Any) -> Transition:
    num = len(next_obs)
    nothing = jnp.zeros((num, 1))
    x = jnp.asarray(next_obs, jnp.float32)
    return Transition(x, nothing, nothing[:, 0], x, jnp.asarray(ends))


def learned(data: Transition, epochs: int = 30) -> Any:
    model = termination_model(SPEC, 3, 3, lambda flat: flat)
    everything = jnp.ones(len(data.reward), bool)
    state = model.standardize(model.init(jax.random.key(0)), data, everything)
    optimizer = optax.adam(5e-3)

    @jax.jit
    def fit(key: Any) -> Any:
        return fit_members(
            lambda weights, rows: model.loss(weights, state, rows), None, optimizer,
            state.weights, optimizer.init(state.weights), data, everything & state.unexplained,
            ~everything, key, FitConfig(64, epochs, bootstrap=False),
        ).weights  # fmt: skip

    state = state._replace(weights=fit(jax.random.key(1)))

    def survival(x: Any) -> Any:
        x = jnp.broadcast_to(jnp.asarray(x, jnp.float32), (3, *np.shape(x)))
        return np.asarray(jax.jit(model.survival)(state, state.weights, x).mean(0))

    return survival


def test_bounds_are_found_from_few_ends_and_hold_far_from_the_data():
    rng = np.random.default_rng(0)
    first = rng.uniform(-1.1, 1.1, 1500)  # the other coordinates move along with it
    others = first[:, None] * [1.0, -1.0] + 0.3 * rng.normal(size=(1500, 2))
    x = np.concatenate([first[:, None], others], 1)
    ended = np.abs(first) > 1.0
    chosen = np.concatenate([x[~ended], x[ended][:8]])
    survival = learned(steps(chosen, np.abs(chosen[:, 0]) > 1.0))
    off = [[0.5, -0.5, 0.5], [-0.7, 0.7, 0.7], [0.0, 0.8, 0.8], [0.98, -3.0, 4.0], [0, 20, 20]]
    np.testing.assert_array_equal(survival(off), 1.0)
    on = [[1.15, 1.2, -1.2], [-1.15, 1.0, 1.0], [1.2, 0.0, 0.0], [9.0, 0.0, 0.0]]
    np.testing.assert_array_equal(survival(on), 0.0)


def test_a_bound_is_taken_only_where_it_explains_an_end_that_others_do_not():
    odd = 9e9  # rows that are neither: not to be looked at
    x = np.array([[0.0, 0.0], [1.0, 2.0], [3.0, 2.5], [5.0, 1.0], [0.5, -4.0], [odd, odd]])
    survived = np.array([1, 1, 0, 0, 0, 0], bool)
    ended = np.array([0, 0, 1, 1, 1, 0], bool)
    bounds = jax.jit(fit_bounds)(x, survived, ended)
    # [3, 2.5] is beyond every survivor in both coordinates; one bound explains it.
    np.testing.assert_array_equal(bounds.high, [2.0, UNKNOWN])
    np.testing.assert_array_equal(bounds.low, [-UNKNOWN, -2.0])
    nothing = jax.jit(fit_bounds)(x, survived & False, ended)
    np.testing.assert_array_equal(np.concatenate([nothing.high, -nothing.low]), UNKNOWN)


def test_caution_closes_what_nobody_has_left_but_only_where_the_other_side_ends_episodes():
    x = np.random.default_rng(3).uniform(-1.0, 1.0, (400, 3)) * [2.0, 1.0, 1.0]
    ends = (x[:, 0] > 1.0) | (np.abs(x[:, 1]) > 0.9)  # left of the first, nobody was below -2
    model = termination_model(SPEC, 3, 3, lambda flat: flat)
    state = model.init(jax.random.key(0))
    survival = jax.jit(lambda state, x: model.survival(state, state.weights, x))
    queries = jnp.array([[-1.9, 0.0, 0.0], [-2.5, 0.0, 0.0], [0.0, 0.0, 9.0], [1.5, 0.0, 0.0]])
    queries = jnp.broadcast_to(queries, (3, 4, 3))
    np.testing.assert_array_equal(survival(cautious(state), queries), 1.0)  # nothing known yet
    fitted = jax.jit(model.standardize)(state, steps(x, ends), jnp.ones(400, bool))
    np.testing.assert_array_equal(survival(fitted, queries)[0], [1.0, 1.0, 1.0, 0.0])
    careful = jax.jit(cautious)(fitted)
    np.testing.assert_array_equal(survival(careful, queries)[0], [1.0, 0.0, 1.0, 0.0])
    np.testing.assert_array_equal(careful.bounds.high, fitted.bounds.high)
    np.testing.assert_array_equal(careful.bounds.low[1:], fitted.bounds.low[1:])
    nobody = jax.jit(model.standardize)(state, steps(x, ends), jnp.zeros(400, bool))
    finite = [np.isfinite(leaf).all() for leaf in jax.tree.leaves(cautious(nobody))]
    assert all(finite)


def test_a_rule_over_two_coordinates_together_is_left_to_the_network_and_calibrated():
    x = np.random.default_rng(1).uniform(-1.0, 1.0, (1500, 3))
    ends = x[:, 0] * x[:, 1] > 0.3
    survival = learned(steps(x, ends))
    test = np.random.default_rng(2).uniform(-1.0, 1.0, (1000, 3))
    product = test[:, 0] * test[:, 1]
    clear = np.abs(product - 0.3) > 0.15
    assert np.mean((survival(test) < 0.5)[clear] == (product > 0.3)[clear]) > 0.95

    # What cannot be told from the observation: one end in forty, wherever it happens.
    noise = np.random.default_rng(3).uniform(size=1500) < 1 / 40
    chances = 1 - learned(steps(x, noise), epochs=2)(0.5 * test)
    assert 0.01 < np.median(chances) < 0.06  # 0.5 if ends counted as the loss weighs them


@pytest.mark.parametrize(("ends", "balance"), [(0, 50.0), (1, 50.0), (50, 1.0), (20, 4.0)])
def test_unexplained_ends_are_balanced_within_limits(ends, balance):
    assert MAX_BALANCE == 50.0
    model = termination_model(SPEC, 1, 3, lambda flat: flat)
    data = steps(np.zeros((100, 3)), np.arange(100) < ends)
    state = model.standardize(model.init(jax.random.key(0)), data, jnp.ones(100, bool))
    assert float(state.balance) == balance
    assert bool(state.unexplained) == (ends > 0)


def test_survival_is_certain_before_any_end_was_seen():
    survival = learned(steps(np.random.default_rng(0).normal(size=(100, 3)), np.zeros(100, bool)))
    np.testing.assert_array_equal(survival([[0.0, 50.0, 0.0], [1.0, 1.0, 1.0]]), 1.0)
