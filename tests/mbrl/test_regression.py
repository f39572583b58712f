"""Regression losses: hand-computed numbers, inverses, gradients where they must not vanish."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mbrl.losses import regression as reg


def test_gaussian_nll_by_hand() -> None:
    # 0.5 * (log(2 pi) + 0 + 0), 0.5 * (log(2 pi) + log 4 + 3^2 / 4)
    got = reg.gaussian_nll(
        jnp.array([0.0, 1.0]), jnp.log(jnp.array([1.0, 4.0])), jnp.array([0.0, 4.0])
    )
    np.testing.assert_allclose(got, [0.9189385, 0.9189385 + 0.6931472 + 1.125], rtol=1e-6)


def test_gaussian_nll_is_scipys_and_is_smallest_at_the_true_variance() -> None:
    x = np.linspace(-3, 5, 9)
    got = reg.gaussian_nll(jnp.full(9, 0.7), jnp.full(9, -1.3), jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, -stats.norm.logpdf(x, 0.7, np.exp(-0.65)), rtol=1e-5)
    # d/dlogvar = (1 - error^2 / var) / 2 is 0 at error^2 = var = 4.
    slope = jax.grad(lambda v: reg.gaussian_nll(jnp.float32(0), v, jnp.float32(2)))
    assert abs(slope(jnp.log(4.0))) < 1e-6
    assert slope(jnp.log(3.0)) < -0.1
    assert slope(jnp.log(5.0)) > 0.05


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_beta_nll_scales_the_gradients_by_the_power_of_the_variance(beta: float) -> None:
    mean, logvar, target = jnp.float32(1.0), jnp.log(4.0), jnp.float32(4.0)
    by_mean, by_logvar = jax.grad(reg.gaussian_nll, (0, 1))(mean, logvar, target, beta)
    np.testing.assert_allclose(by_mean, -3.0 / 4.0 * 4.0**beta, rtol=1e-6)
    np.testing.assert_allclose(by_logvar, 0.5 * (1 - 9 / 4) * 4.0**beta, rtol=1e-6)
    # A traced beta takes the general path; both must agree.
    traced = jax.jit(reg.gaussian_nll)(mean, logvar, target, beta)
    np.testing.assert_allclose(traced, reg.gaussian_nll(mean, logvar, target, beta), rtol=1e-6)


def published_clamp(logvar: Any, low: Any, high: Any) -> Any:
    below_high = high - jax.nn.softplus(high - logvar)
    return low + jax.nn.softplus(below_high - low)


def test_bounded_variance_is_the_exponential_of_the_published_clamp() -> None:
    x = jnp.concatenate([jnp.linspace(-30.0, 20.0, 101), jnp.array([-1e4, 1e4])])
    want = published_clamp(x, -10.0, 0.5)
    got = reg.bounded_variance(x, -10.0, 0.5)
    np.testing.assert_allclose(jnp.log(got), want, atol=5e-5)
    np.testing.assert_allclose(got[jnp.array([-2, -1])], np.exp([-10.0, 0.5]), rtol=1e-4)
    np.testing.assert_allclose(reg.bounded_variance(-4.0, -10.0, 0.5), np.exp(-4.0), rtol=0.02)


def test_bounded_variance_keeps_a_gradient_outside_and_moves_learned_bounds() -> None:
    def gradient(function: Any, x: float) -> Any:
        return jax.grad(function, (0, 1, 2))(jnp.float32(x), jnp.float32(-10.0), jnp.float32(0.5))

    for x in (6.0, -16.0):
        got = gradient(lambda *args: jnp.log(reg.bounded_variance(*args)), x)
        assert got[0] > 1e-3  # a hard clip has exactly 0 here
        np.testing.assert_allclose(got, gradient(published_clamp, x), atol=1e-3)
        np.testing.assert_allclose(got[1:], [0.0, 1.0] if x > 0 else [1.0, 0.0], atol=0.01)


def test_symlog_by_hand_and_its_inverse() -> None:
    x = jnp.array([-1e6, -np.e + 1, -1e-4, 0.0, 1e-4, np.e - 1, 1e6])
    np.testing.assert_allclose(reg.symlog(x)[np.array([1, 3, 5])], [-1.0, 0.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(reg.symexp(reg.symlog(x)), x, rtol=1e-5)
    np.testing.assert_array_equal(reg.symlog(-x), -reg.symlog(x))


def test_symlog_and_symexp_have_slope_one_at_zero() -> None:
    # sign(x) * log1p(abs(x)) has a derivative of 0 there in JAX.
    assert jax.grad(reg.symlog)(0.0) == 1.0
    assert jax.grad(reg.symexp)(0.0) == 1.0
    np.testing.assert_allclose(jax.grad(reg.symlog)(-3.0), 0.25)


@pytest.mark.parametrize("num", [255, 101, 4])
def test_symexp_bins_are_symmetric_and_increasing(num: int) -> None:
    bins = reg.symexp_bins(num, 20.0)
    assert bins.shape == (num,)
    np.testing.assert_array_equal(bins, -bins[::-1])
    assert np.all(np.diff(bins) > 0)
    np.testing.assert_allclose(bins[-1], np.expm1(20.0), rtol=1e-5)
    if num % 2:
        assert bins[num // 2] == 0.0
    with pytest.raises(ValueError, match="num"):
        reg.symexp_bins(1)


def test_two_hot_by_hand() -> None:
    bins = jnp.array([-2.0, 0.0, 1.0, 4.0])
    x = jnp.array([-2.0, -0.5, 0.0, 0.25, 3.25, 4.0, 9.0, -9.0])
    expected = [
        [1, 0, 0, 0],
        [0.25, 0.75, 0, 0],
        [0, 1, 0, 0],
        [0, 0.75, 0.25, 0],
        [0, 0, 0.25, 0.75],
        [0, 0, 0, 1],
        [0, 0, 0, 1],
        [1, 0, 0, 0],
    ]
    np.testing.assert_array_equal(reg.two_hot(x, bins), expected)


def test_two_hot_sums_to_one_has_two_neighbours_and_keeps_the_mean() -> None:
    bins = reg.symexp_bins()
    x = np.concatenate([[0.0, 1e-6, -3e8, 4e8], np.random.default_rng(0).normal(0, 100, 200)])
    probs = np.asarray(reg.two_hot(jnp.asarray(x, jnp.float32), bins), np.float64)
    np.testing.assert_allclose(probs.sum(-1), 1.0, atol=2e-6)
    np.testing.assert_allclose(probs @ np.asarray(bins, np.float64), x, rtol=1e-4, atol=1e-6)
    for row in probs:
        (hot,) = np.nonzero(row)
        assert len(hot) <= 2
        assert hot[-1] - hot[0] <= 1
    ends = np.asarray(reg.two_hot(jnp.array([bins[0], bins[-1], -1e30, 1e30]), bins))
    np.testing.assert_array_equal(ends[:, [0, -1]], [[1, 0], [0, 1], [1, 0], [0, 1]])
    np.testing.assert_array_equal(ends[:, 1:-1], 0.0)


def test_two_hot_mean_is_exactly_zero_for_equal_logits_also_under_jit() -> None:
    bins = reg.symexp_bins()
    for logits in (jnp.zeros((3, 255)), jnp.full((3, 255), 1.7)):
        np.testing.assert_array_equal(reg.two_hot_mean(logits, bins), 0.0)
        np.testing.assert_array_equal(jax.jit(reg.two_hot_mean)(logits, bins), 0.0)


@pytest.mark.parametrize("num", [6, 7])
def test_two_hot_mean_is_the_expectation_for_any_bins(num: int) -> None:
    rng = np.random.default_rng(num)
    bins, logits = np.sort(rng.normal(size=num)), rng.normal(size=(4, num))
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    got = reg.two_hot_mean(jnp.asarray(logits, jnp.float32), jnp.asarray(bins, jnp.float32))
    np.testing.assert_allclose(got, probs @ bins, rtol=1e-5, atol=1e-6)


def test_two_hot_loss_is_least_at_the_target_and_equals_its_entropy_there() -> None:
    bins = jnp.array([-2.0, 0.0, 1.0, 4.0])
    logits = jnp.log(jnp.array([1e-30, 0.75, 0.25, 1e-30]))
    nll = reg.two_hot_nll(logits, jnp.float32(0.25), bins)
    np.testing.assert_allclose(nll, -0.75 * np.log(0.75) - 0.25 * np.log(0.25), rtol=1e-5)
    grad = jax.grad(reg.two_hot_nll)(logits, jnp.float32(0.25), bins)
    np.testing.assert_allclose(grad, 0.0, atol=1e-6)
    # Uniform logits cost log M whatever the target.
    pair = reg.two_hot_loss(jnp.zeros((2, 4)), jnp.array([0.3, 99.0]), bins)
    np.testing.assert_allclose(pair, np.log(4.0), rtol=1e-6)


def test_two_hot_targets_get_no_gradient() -> None:
    bins = jnp.array([-1.0, 0.0, 1.0])
    logits = jnp.array([0.3, 0.2, 0.9])
    assert jax.grad(reg.two_hot_nll, 1)(logits, jnp.float32(0.4), bins) == 0.0


def test_binary_nll_by_hand_and_at_extremes() -> None:
    logit = jnp.array([0.0, 0.0, np.log(3.0), 1e4, -1e4, 1e4])
    label = jnp.array([0.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    expected = [np.log(2), np.log(2), np.log(4), 0.0, 1e4, 1e4]
    np.testing.assert_allclose(reg.binary_nll(logit, label), expected, rtol=1e-6)
    # The gradient is probability minus label, and is never NaN.
    grad = jax.vmap(jax.grad(reg.binary_nll))(logit, label)
    np.testing.assert_allclose(grad, [0.5, -0.5, 0.75, 0, -1, 1], atol=1e-6)
    soft = reg.binary_nll(jnp.log(3.0), jnp.float32(0.75))
    np.testing.assert_allclose(soft, stats.entropy([0.75, 0.25]), rtol=1e-6)
