"""Losses of actors and critics in closed form; their golden numbers are in test_token_policy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl.losses.policy_gradient import (
    clipped_surrogate_loss,
    clipped_value_loss,
    explained,
    policy_change,
    whiten,
)


def test_a_ratio_beyond_its_bounds_gains_and_teaches_nothing_more():
    def loss(ratio, advantage):
        one, a = jnp.ones(1), jnp.array([advantage])
        return clipped_surrogate_loss(jnp.log(ratio * one), 0.0 * one, a, 0.2, one)

    slope = jax.grad(loss)
    assert slope(1.1, 2.0) == pytest.approx(-2.0)
    assert (slope(1.3, 2.0), float(loss(1.3, 2.0))) == (0.0, pytest.approx(-2.4))
    assert (slope(0.7, -2.0), float(loss(0.7, -2.0))) == (0.0, pytest.approx(1.6))
    # What went wrong can always be made good.
    assert slope(0.7, 2.0) == pytest.approx(-2.0)
    assert slope(1.3, -2.0) == pytest.approx(2.0)


def test_values_without_a_limit_are_fitted_by_squares():
    value, target = jnp.array([0.0, 3.0, 9.0]), jnp.array([1.0, 1.0, 1.0])
    weight = jnp.array([1.0, 1.0, 0.0])
    loss = clipped_value_loss(value, jnp.zeros(3), target, 0.0, weight)
    np.testing.assert_allclose(loss, 0.5 * (1.0 + 4.0) / 2)


def test_change_of_a_policy_estimates_its_divergence():
    old, new = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.3, 0.2])
    weight = jnp.asarray(old)  # every action, as often as the old policy takes it
    got = policy_change(jnp.log(new), jnp.log(old), weight)
    np.testing.assert_allclose(got, np.sum(old * np.log(old / new)), rtol=1e-5)
    assert float(policy_change(jnp.log(old), jnp.log(old), weight)) == 0.0


def test_explained_variance_of_a_perfect_a_constant_and_a_noisy_critic():
    target, weight = jnp.array([1.0, 2.0, 3.0, 99.0]), jnp.array([1.0, 1.0, 1.0, 0.0])
    assert float(explained(target, target, weight)) == 1.0
    np.testing.assert_allclose(explained(jnp.full(4, 7.0), target, weight), 0.0, atol=1e-6)
    np.testing.assert_allclose(explained(-target, target, weight), -3.0, rtol=1e-6)


@pytest.mark.parametrize("unbiased", [False, True])
def test_whitening_without_shift_keeps_the_mean_and_only_that(unbiased: bool):
    x, weight = np.array([3.0, 5.0, 10.0, -7.0]), np.array([1.0, 1.0, 1.0, 0.0])
    deviation = x[:3].std(ddof=int(unbiased))
    got = np.asarray(whiten(jnp.asarray(x), jnp.asarray(weight), False, unbiased))
    np.testing.assert_allclose(got[:3], (x[:3] - 6.0) / deviation + 6.0, rtol=1e-5)


def test_nothing_that_counts_is_no_loss():
    nothing = jnp.zeros(3)
    values, grads = jax.value_and_grad(
        lambda x: clipped_surrogate_loss(x, nothing, whiten(nothing, nothing), 0.2, nothing)
    )(jnp.ones(3))
    assert float(values) == 0.0
    np.testing.assert_array_equal(grads, 0.0)
