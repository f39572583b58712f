"""Risk measures and variance splits: closed forms, order relations, one particle."""

from __future__ import annotations

from typing import get_args

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
    assert np.isnan(unc.max_deviation(means)[0])


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


def test_mopo_penalties_by_hand() -> None:
    variances = jnp.array([[[9.0, 16.0]], [[1.0, 1.0]]])
    np.testing.assert_allclose(unc.max_aleatoric(variances), [5.0])
    means = jnp.array([[[0.0, 0.0]], [[0.0, 0.0]], [[9.0, 12.0]]])  # their mean is (3, 4)
    np.testing.assert_allclose(unc.max_deviation(means), [10.0])
    np.testing.assert_array_equal(unc.max_deviation(means[:1]), [0.0])
