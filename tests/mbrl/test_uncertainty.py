"""Risk measures and variance splits: closed forms, order relations, one particle."""

from __future__ import annotations

import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl import uncertainty as unc

VALUES = jnp.array([[4.0, 0.0], [-2.0, 0.0], [1.0, 0.0], [9.0, 0.0]])
MEAN, VAR = 3.0, (1 + 25 + 4 + 36) / 4


def test_risk_by_hand() -> None:
    std = np.sqrt(VAR)
    for kind, coef, expected in [
        ("mean", 7.0, MEAN),
        ("lcb", 2.0, MEAN - 2 * std),
        ("ucb", 0.5, MEAN + 0.5 * std),
        ("uwo", 0.1, MEAN - 0.1 * VAR),
        ("cvar", 0.5, -0.5),
        ("cvar", 0.375, (-2.0 + 0.5 * 1.0) / 1.5),
        ("worst", 7.0, -2.0),
    ]:
        np.testing.assert_allclose(unc.risk(VALUES, kind, coef), [expected, 0.0], rtol=1e-6)


def test_risk_is_ordered() -> None:
    values = jax.random.normal(jax.random.key(0), (20, 6))
    worst, lcb, mean, ucb = (
        unc.risk(values, kind, 1.0) for kind in ("worst", "lcb", "mean", "ucb")
    )
    assert np.all(lcb < mean)
    assert np.all(mean < ucb)
    assert np.all(worst < lcb)  # with 20 particles the minimum is beyond one deviation


@pytest.mark.parametrize("kind", get_args(unc.RiskKind))
def test_one_particle_has_no_risk_and_a_finite_gradient(kind: unc.RiskKind) -> None:
    values = jnp.array([[1.5, -2.0]])
    np.testing.assert_array_equal(unc.risk(values, kind, 0.7), values[0])
    for same in (values, jnp.ones((3, 2))):  # also where several particles agree
        grad = jax.grad(lambda v: unc.risk(v, kind, 0.7).sum())(same)
        assert np.all(np.isfinite(grad))
        np.testing.assert_allclose(grad.sum(0), 1.0, rtol=1e-6)


@pytest.mark.parametrize("kind", get_args(unc.RiskKind))
def test_risk_moves_with_a_constant_and_ignores_the_order(kind: unc.RiskKind) -> None:
    base = unc.risk(VALUES, kind, 0.4)
    np.testing.assert_allclose(unc.risk(VALUES + 5.0, kind, 0.4), base + 5.0, rtol=1e-5)
    np.testing.assert_allclose(unc.risk(VALUES[::-1], kind, 0.4), base, rtol=1e-5, atol=1e-6)


def test_cvar_grows_with_alpha_from_the_minimum_to_the_mean() -> None:
    values = jax.random.normal(jax.random.key(1), (10, 3))
    alphas = jnp.linspace(0.01, 1.0, 34)
    curve = np.asarray(jax.vmap(lambda a: unc.risk(values, "cvar", a))(alphas))
    assert np.all(np.diff(curve, axis=0) >= -1e-6)
    assert np.all(curve[-1] - curve[0] > 0.5)
    np.testing.assert_allclose(curve[0], values.min(0), rtol=1e-6)
    np.testing.assert_allclose(curve[-1], values.mean(0), atol=1e-6)
    np.testing.assert_allclose(unc.cvar(values, 0.3), np.sort(values, 0)[:3].mean(0), rtol=1e-5)


def test_cvar_of_a_normal_is_its_closed_form() -> None:
    # E[z | z < z_alpha] = -pdf(z_alpha) / alpha = -1.7550 at alpha = 0.1.
    values = jax.random.normal(jax.random.key(2), (100_000,))
    np.testing.assert_allclose(unc.cvar(values, 0.1), -1.7550, atol=0.03)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="kind: got 'median'"):
        unc.risk(VALUES, "median")  # pyright: ignore[reportArgumentType]
    for alpha in (0.0, 1.5, -1):
        with pytest.raises(ValueError, match="alpha"):
            unc.risk(VALUES, "cvar", alpha)


def test_disagreement_is_the_std_over_members() -> None:
    means = jnp.array([[[0.0, 1.0]], [[2.0, 1.0]], [[4.0, 1.0]]])
    np.testing.assert_allclose(unc.member_disagreement(means), [[np.sqrt(8 / 3), 0.0]])
    np.testing.assert_array_equal(unc.member_disagreement(means[:1]), 0.0)
    grad = jax.grad(lambda m: unc.member_disagreement(m).sum())(means)
    assert np.all(np.isfinite(grad))


def test_a_prediction_that_is_not_a_number_never_looks_certain() -> None:
    means = jnp.array([[[jnp.nan, 1.0]], [[2.0, 1.0]]])
    np.testing.assert_array_equal(np.isnan(unc.member_disagreement(means)), [[True, False]])


def test_total_variance_is_the_variance_of_the_mixture() -> None:
    rng = np.random.default_rng(0)
    means, variances = rng.normal(size=(3, 2, 2)), rng.uniform(0.1, 2, size=(3, 2, 2))
    split = unc.total_variance(jnp.asarray(means), jnp.asarray(variances))
    second = (variances + means**2).mean(0)  # E[x^2] of the mixture
    np.testing.assert_allclose(
        split.aleatoric + split.epistemic, second - means.mean(0) ** 2, rtol=1e-5
    )
    np.testing.assert_allclose(split.aleatoric, variances.mean(0), rtol=1e-6)
    agreeing = unc.total_variance(jnp.ones((3, 2, 2)), jnp.asarray(variances))
    np.testing.assert_array_equal(agreeing.epistemic, 0.0)


MEANS = jnp.array([[[0.0, 0.0]], [[3.0, 4.0]]])
VARIANCES = jnp.array([[[9.0, 16.0]], [[1.0, 1.0]]])


def test_kinds_of_uncertainty_by_hand() -> None:
    gain = np.log(1 + 2.25 / 5.0) + np.log(1 + 4.0 / 8.5)
    for kind, expected in [
        ("std", 2.5), ("pairwise", 5.0), ("aleatoric", 5.0), ("information_gain", gain),
    ]:  # fmt: skip
        np.testing.assert_allclose(unc.member_uncertainty(MEANS, VARIANCES, kind), [expected])


def test_jensen_renyi_is_the_integral_over_squared_densities() -> None:
    x = np.linspace(-40.0, 40.0, 200_001)
    mean, std = np.array([-1.0, 0.5, 3.0])[:, None], np.array([1.0, 1.2, 0.9])[:, None]
    density = np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))
    entropy = -np.log(np.trapezoid(np.vstack([density.mean(0), density]) ** 2, x, axis=1))
    found = unc.member_uncertainty(mean[:, None], std[:, None] ** 2, "jensen_renyi")
    np.testing.assert_allclose(found, entropy[0] - entropy[1:].mean(), rtol=1e-4)
    apart = 1e3 * jnp.arange(3.0)[:, None, None]
    far = unc.member_uncertainty(apart, jnp.ones((3, 1, 1)), "jensen_renyi")
    np.testing.assert_allclose(far, np.log(3), rtol=1e-5)


@pytest.mark.parametrize("kind", get_args(unc.UncertaintyKind))
def test_members_that_agree_are_certain_and_nothing_that_is_not_a_number_is(kind: Any) -> None:
    same = jnp.ones((3, 2, 2))
    sure = unc.member_uncertainty(same, same, kind)
    np.testing.assert_allclose(sure, 2.0**0.5 if kind == "aleatoric" else 0.0, atol=1e-6)
    slopes = jax.grad(lambda m: unc.member_uncertainty(m, same, kind).sum())(same)
    assert np.all(np.isfinite(slopes))
    bad = (same, same.at[0, 0, 0].set(jnp.nan))
    means, variances = bad if kind == "aleatoric" else bad[::-1]
    np.testing.assert_array_equal(
        np.isnan(unc.member_uncertainty(means, variances, kind)), [True, False]
    )


def test_reported_uncertainty_is_in_units_of_reward_or_as_published() -> None:
    spread = jnp.array([2.0, 10.0])
    report = functools.partial(unc.reported_uncertainty, MEANS, VARIANCES, spread)
    np.testing.assert_allclose(report("std"), 10.0 * np.sqrt((2.25 + 4.0) / 2), rtol=1e-6)
    np.testing.assert_allclose(report("pairwise", "raw"), np.hypot(6.0, 40.0), rtol=1e-6)
    np.testing.assert_allclose(report("aleatoric", "raw"), np.hypot(6.0, 40.0), rtol=1e-6)
    for kind in get_args(unc.UncertaintyKind):
        value = report(kind)
        # Another target that behaves as the rest does not count twice, nor do the units of one.
        means, variances = (jnp.tile(x, (1, 1, 2)) for x in (MEANS, VARIANCES))
        twice = unc.reported_uncertainty(means, variances, jnp.tile(spread, 2), kind)
        units = unc.reported_uncertainty(MEANS, VARIANCES, jnp.array([2e3, 10.0]), kind)
        np.testing.assert_allclose(units, value)
        if kind != "jensen_renyi":  # whose bound is log N
            np.testing.assert_allclose(twice, value, rtol=1e-5)
        # Without the reward among the targets it is the unit of the others still.
        first = unc.member_uncertainty(MEANS[..., :1], VARIANCES[..., :1], kind)
        np.testing.assert_allclose(report(kind, own_reward=False), 10.0 * first, rtol=1e-6)
    np.testing.assert_allclose(report("pairwise", "raw", own_reward=False), 6.0, rtol=1e-6)
    with pytest.raises(ValueError, match="kind: got 'variance'"):
        report("variance")
    with pytest.raises(ValueError, match="scale: got 'meters'"):
        report("std", "meters")
