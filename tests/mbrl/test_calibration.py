"""Calibration: what is told of predictions with known faults, and the scale that mends them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl import spaces
from mbrl.calibration import (
    calibration,
    interval_coverage,
    interval_scale,
    mixture_cdf,
    mixture_nll,
    rank_correlation,
)
from mbrl.models.fitted_ensemble import (
    EnsembleConfig,
    Fitter,
    build_ensemble,
    ensemble_optimizer,
    fit_ensemble,
    init_ensemble,
)
from mbrl.types import EnvSpec, Transition

ROWS = 4000


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_a_mixture_is_not_the_gaussian_of_its_mean_and_variance():
    # Two members far apart: nothing lies between them, whatever their mean says.
    means, variances = jnp.array([-1.0, 1.0]).reshape(2, 1, 1), jnp.full((2, 1, 1), 1e-4)
    np.testing.assert_allclose(mixture_cdf(means, variances, jnp.zeros((1, 1))), 0.5, atol=1e-6)
    np.testing.assert_allclose(mixture_cdf(means, variances, jnp.ones((1, 1))), 0.75, atol=1e-6)
    at_member = mixture_nll(means, variances, jnp.ones((1, 1)))
    density = 0.5 / (0.01 * np.sqrt(2.0 * np.pi))
    np.testing.assert_allclose(at_member, -np.log(density), rtol=1e-5)


def test_what_is_calibrated_is_told_so_and_what_is_not_by_how_much():
    target = jnp.asarray(normal(ROWS, 3))
    means, deviations = jnp.zeros((2, ROWS, 3)), jnp.array([1.0, 0.5, 1.0])
    means = means.at[..., 2].set(1.0)  # the third is biased, the second too sure
    found = jax.jit(calibration)(means, jnp.broadcast_to(deviations**2, means.shape), target)
    np.testing.assert_allclose(found.coverage[:, 0], [0.5, 0.8, 0.95], atol=0.02)
    np.testing.assert_allclose(found.coverage[2, 1], 0.673, atol=0.02)  # 1.96 of half a deviation
    assert float(found.error[0]) < 0.02
    assert float(found.error[1]) > 0.08
    assert float(found.error[2]) > 0.2
    # Below the predicted median lie those below one deviation: the curve tells the sign of a bias.
    np.testing.assert_allclose(found.reliability[9, 2], 0.841, atol=0.02)
    # Rows that do not count may hold anything.
    spoilt, counts = target.at[::3].set(jnp.nan), jnp.arange(ROWS) % 3 > 0
    masked = jax.jit(calibration)(
        means, jnp.broadcast_to(deviations**2, means.shape), spoilt, counts
    )
    rest = jax.jit(calibration)(
        means[:, counts], jnp.broadcast_to(deviations**2, means[:, counts].shape), target[counts]
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), masked, rest)
    np.testing.assert_allclose(found.nll[0], 0.5 * np.log(2 * np.pi) + 0.5, atol=0.04)


def test_rows_that_do_not_count_are_not_counted():
    below = jnp.array([[0.5], [0.5], [0.999], [np.nan]])
    mask = jnp.array([True, True, True, False])
    np.testing.assert_allclose(interval_coverage(below, jnp.array([0.9]), mask), [[2 / 3]])


def test_the_scale_makes_the_interval_right_where_likelihood_does_not():
    # One error in fifty is huge, as at contacts; 80 % are small.
    target = normal(ROWS, 2)
    target[::50] *= 40.0
    means, variances = jnp.zeros((3, ROWS, 2)), jnp.full((3, ROWS, 2), 0.25)
    everything = jnp.ones(ROWS, bool)
    scale = jax.jit(interval_scale)(means, variances, jnp.asarray(target), everything)

    def covered(scale: np.ndarray) -> np.ndarray:
        below = mixture_cdf(means, scale**2 * variances, jnp.asarray(target))
        return np.asarray(interval_coverage(below, jnp.array([0.95])))[0]

    np.testing.assert_allclose(covered(np.asarray(scale)), 0.95, atol=0.001)
    likeliest = np.sqrt(np.mean(target**2, 0) / 0.25)
    assert covered(likeliest).min() > 0.97
    # The smallest that will do: fewer rows are covered by any less.
    needed = np.ceil((ROWS + 1) * 0.95) / ROWS
    assert (covered(np.asarray(scale)) >= needed - 1e-6).all()
    assert (covered(0.999 * np.asarray(scale)) < needed).all()


def test_the_scale_without_rows_with_few_and_with_members_that_disagree_too_much():
    target = jnp.asarray(normal(40, 1))
    means, variances = jnp.zeros((1, 40, 1)), jnp.ones((1, 40, 1))
    assert float(interval_scale(means, variances, target, jnp.zeros(40, bool))[0]) == 1.0
    few = jnp.arange(40) < 3
    scale = interval_scale(means, variances, target, few)
    np.testing.assert_allclose(scale, np.abs(target[:3]).max() / 1.96, rtol=1e-3)
    apart = jnp.array([-50.0, 50.0])[:, None, None] + means
    scale = interval_scale(apart, jnp.broadcast_to(variances, apart.shape), target, few >= 0)
    assert float(scale[0]) < 0.01


def test_rank_correlation_sees_order_alone_and_ties():
    x = normal(200)
    np.testing.assert_allclose(rank_correlation(jnp.asarray(x), jnp.exp(3.0 * x)), 1.0, atol=1e-5)
    np.testing.assert_allclose(rank_correlation(jnp.asarray(x), -jnp.asarray(x)), -1.0, atol=1e-5)
    a, b = jnp.array([1.0, 2.0, 2.0, 3.0]), jnp.array([1.0, 3.0, 2.0, 4.0])
    np.testing.assert_allclose(rank_correlation(a, b), 0.9487, atol=1e-4)  # as scipy has it
    longer, mask = (jnp.append(x, jnp.array([9.0, -9.0])) for x in (a, b)), jnp.arange(6) < 4
    np.testing.assert_allclose(rank_correlation(*longer, mask), 0.9487, atol=1e-4)


SPEC = EnvSpec("heavy", spaces.box(-np.inf, np.inf, (2,)), spaces.box(-1.0, 1.0, (1,)))
TINY = {"members": 3, "elites": 2, "hidden": (8,), "max_epochs": 8, "learn_bounds": False}


def heavy(num: int, seed: int) -> Transition:
    """x' = x with errors that are now and then large; y' = y."""
    rng = np.random.default_rng(seed)
    obs = rng.normal(size=(num, 2)).astype(np.float32)
    noise = np.zeros((num, 2), np.float32)
    noise[:, 0] = 0.1 * rng.standard_t(2, num)
    never = jnp.zeros(num, bool)
    return Transition(*map(jnp.asarray, (obs, obs[:, :1], obs[:, 0], obs + noise, never)))


def fit(recalibrate: bool) -> tuple[object, object, dict[str, jax.Array]]:
    config = EnsembleConfig(**TINY, holdout=0.3, recalibrate=recalibrate)
    model, optimizer = build_ensemble(SPEC, config), ensemble_optimizer(config)
    state = init_ensemble(model, optimizer, jax.random.key(0))
    data, rows = heavy(600, 1), jnp.arange(600)
    fitter = Fitter(optimizer, data, rows % 3 == 0)

    def run(state, key):
        model_key, ending_key = jax.random.split(key)
        return fit_ensemble(model, config, state, fitter, rows < 590, model_key, ending_key)

    fitted, metrics = jax.jit(run)(state, jax.random.key(1))
    return model, fitted.model, metrics


def test_an_ensemble_is_recalibrated_when_asked_and_its_rollouts_follow():
    model, plain, _ = fit(False)
    _, scaled, metrics = fit(True)
    np.testing.assert_array_equal(plain.scale, 1.0)
    jax.tree.map(np.testing.assert_array_equal, plain.weights, scaled.weights)
    assert float(metrics["model/scale"]) == pytest.approx(float(scaled.scale.mean()))
    fresh = heavy(2000, 2)

    def coverage(state) -> np.ndarray:
        out = model.predict(state, fresh.obs, fresh.action)
        mean, var = (x[state.elites] for x in out)
        below = mixture_cdf(mean, var, model.target(state, fresh))
        return np.asarray(interval_coverage(below, jnp.array([0.95])))[0]

    before, after = coverage(plain), coverage(scaled)
    assert np.abs(before - 0.95).max() > 0.03
    assert np.abs(after - 0.95).max() < np.abs(before - 0.95).max() / 2
    # Every propagation that draws draws by the scale; the mean, and disagreement, do not change.
    wide = plain._replace(scale=jnp.array([30.0, 1.0, 1.0]))
    obs, action, key = jnp.zeros((500, 2)), jnp.zeros((500, 1)), jax.random.key(5)
    for kind in ("ts1", "tsinf", "moment_matching", "mean"):
        step = jax.jit(model.mdp(kind).step)
        (one, _), (other, _) = (step(state, key, obs, action) for state in (plain, wide))
        if kind == "mean":
            np.testing.assert_array_equal(one, other)
            continue
        ratio = np.asarray(other).std(0) / np.asarray(one).std(0)
        np.testing.assert_allclose(ratio[1], 1.0, rtol=1e-3)
        assert 10.0 < ratio[0] < 31.0, kind
    pair = [model.mdp().step(s, key, obs, action)[1].uncertainty for s in (plain, wide)]
    np.testing.assert_array_equal(*pair)


def test_recalibration_needs_a_holdout():
    with pytest.raises(ValueError, match="recalibrate needs .* got holdout 0.0; .*--holdout 0.1"):
        EnsembleConfig(recalibrate=True, holdout=0.0)
