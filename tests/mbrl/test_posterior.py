"""Bayesian networks: their noise in training, their samples, and what those are as a model."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl.mdp import rollout
from mbrl.models.fitted_ensemble import (
    EnsembleConfig,
    Fitter,
    build_ensemble,
    ensemble_optimizer,
    ensemble_world,
    fit_ensemble,
    init_ensemble,
)
from mbrl.models.posterior import last_layer_samples, posterior
from mbrl.models.probabilistic import predicted_variance
from mbrl.networks import bayesian
from mbrl.networks.core import mlp
from tests.mbrl.test_probabilistic import NOISE, SPEC, toy_data

KINDS = ("variational", "dropout", "laplace")
every_kind = pytest.mark.parametrize("kind", KINDS)
KEY = jax.random.key(0)


@functools.cache
def fitted(kind: Any) -> Any:
    """Fit 6 members to 600 rows, of which the last 200 do not count."""
    config = EnsembleConfig(
        members=6, elites=4, posterior=kind, hidden=(24, 24), batch_size=64, max_epochs=25,
        patience=25, termination_epochs=1,
    )  # fmt: skip
    model, optimizer = build_ensemble(SPEC, config), ensemble_optimizer(config)
    data, valid = toy_data(600), jnp.arange(600) < 400
    spoiled = data._replace(obs=data.obs.at[500:].set(jnp.nan))

    @jax.jit
    def fit(key: Any) -> Any:
        keys = jax.random.split(key, 3)
        fitter = Fitter(optimizer, spoiled, valid & (jnp.arange(600) % 10 == 0))
        start = init_ensemble(model, optimizer, keys[0])
        return fit_ensemble(model, config, start, fitter, valid, keys[1], keys[2])

    state, metrics = fit(jax.random.key(1))
    return model, state, metrics


@every_kind
def test_samples_learn_dynamics_and_noise_and_differ_off_the_data(kind: Any) -> None:
    model, state, metrics = fitted(kind)
    assert metrics["model/skipped_updates"] == 0
    test = toy_data(200, seed=7)
    out = jax.jit(model.predict)(state.model, test.obs, test.action)
    assert out.mean.shape == (6, 200, 3)
    units = state.model.targets
    change = units.mean + units.std * out.mean.mean(0)
    error = change[:, 1] - 0.1 * test.action[:, 0]
    assert np.sqrt(np.mean(np.square(error))) < 0.25 * units.std[1]
    split = predicted_variance(state.model, out)
    assert 0.7 * NOISE < np.sqrt(np.median(split.aleatoric[:, 0])) < 2.0 * NOISE
    step = jax.jit(model.mdp("tsinf").step)
    obs = jnp.array([[0.0, 0.0], [8.0, -8.0]])
    near, far = step(state.model, KEY, obs, jnp.zeros((2, 1)))[1].uncertainty
    assert far > 3 * near > 0


@every_kind
def test_a_sample_is_the_same_along_a_trajectory_and_whatever_the_key_of_a_step(kind: Any) -> None:
    model, state, _ = fitted(kind)
    silent = jnp.full_like(state.model.weights.logvar_low, -60.0)
    params = state.model._replace(
        weights=state.model.weights._replace(logvar_low=silent, logvar_high=silent)
    )
    config = EnsembleConfig(members=6, elites=4, posterior=kind)
    mdp = ensemble_world(model, config, reports=True)

    @jax.jit
    def path(key: Any) -> Any:
        start = mdp.init(params, KEY, jnp.full((12, 2), 0.5))
        return rollout(mdp, params, key, start, lambda key, state, t: jnp.ones((12, 1)), 3)[1]

    one, other = path(jax.random.key(1)), path(jax.random.key(2))
    np.testing.assert_array_equal(one.obs, other.obs)
    np.testing.assert_array_equal(one.outcome.reward, other.outcome.reward)
    np.testing.assert_array_equal(one.outcome.uncertainty, other.outcome.uncertainty)
    ends = np.asarray(one.obs[-1, :, 0])
    np.testing.assert_allclose(ends[::3], ends[2::3], rtol=1e-5)  # three rows per elite
    assert np.ptp(ends[::3]) > 1e-5, "members are the same"


@every_kind
def test_samples_are_drawn_anew_by_the_key_of_a_fit(kind: Any) -> None:
    model, state, _ = fitted(kind)
    data, valid = toy_data(100), jnp.ones(100, bool)
    draw = jax.jit(model.posterior.sample)
    one, again, other = (
        draw(state.posterior, state.model, data, valid, jax.random.key(i)).network
        for i in (1, 1, 2)
    )
    last = jax.tree.leaves(one["Dense_2"])
    assert all(leaf.shape[0] == 6 for leaf in last)
    for leaf, same, fresh in zip(
        last, *(jax.tree.leaves(x["Dense_2"]) for x in (again, other)), strict=True
    ):
        np.testing.assert_array_equal(leaf, same)
        if leaf.ndim == 3:
            assert np.any(leaf != fresh) and np.any(leaf[0] != leaf[1])
    # Recalibration scales intervals; what the weights say of the noise stays as it was fitted.
    scaled = state.model._replace(scale=0.1 * state.model.scale)
    jax.tree.map(
        np.testing.assert_array_equal,
        draw(state.posterior, scaled, data, valid, jax.random.key(1)).network, one,
    )  # fmt: skip


def test_the_divergence_from_the_prior_counts_once_per_data_set() -> None:
    law = posterior("variational", SPEC, 2, (8,))
    weights = jax.jit(law.init)(KEY)
    state = fitted("variational")[1]
    rows = jax.tree.map(lambda x: x[None], toy_data(16))
    loss = jax.jit(law.loss)
    few, many = (loss(weights, state.model, rows, KEY, jnp.float32(n))[0] for n in (50.0, 1e12))
    mean, logvar = (jax.tree.map(lambda x: x[0], weights.network[k]) for k in ("mean", "logvar"))
    total = 0.0
    for name, layer in mean.items():
        for part, m in layer.items():
            s2 = np.exp(np.asarray(logvar[name][part]))
            prior = 1.0 / m.shape[0] if part == "kernel" else 1.0
            terms = 0.5 * (np.log(prior / s2) + (s2 + np.square(m)) / prior - 1.0)
            total += float(terms.sum())
    np.testing.assert_allclose(few - many, total / (50 * 3), rtol=1e-3)


def perceptron(*hidden: int) -> Any:
    network = mlp(hidden, 2)
    params = jax.jit(network.init)(jax.random.key(1), jnp.zeros((1, 3)))
    return network, jax.tree.map(lambda x: x + 0.3, params), jnp.array([[0.5, -1.0, 2.0]])


def test_local_noise_has_the_moments_of_random_weights_and_differs_between_rows() -> None:
    _, mean, x = perceptron()
    logvar = jax.tree.map(lambda m: jnp.full_like(m, -1.0), mean)
    out = jax.jit(bayesian.local_apply, static_argnums=4)(
        mean, logvar, KEY, jnp.tile(x, (20_000, 1)), "float32"
    )
    layer = mean["Dense_0"]
    np.testing.assert_allclose(out.mean(0), (x @ layer["kernel"] + layer["bias"])[0], atol=0.05)
    np.testing.assert_allclose(out.var(0), np.exp(-1.0) * (np.sum(x**2) + 1.0), rtol=0.05)
    keys = jax.random.split(KEY, 4000)
    drawn = jax.jit(jax.vmap(lambda key: bayesian.sample_weights(mean, logvar, key)))(keys)
    sampled = x @ drawn["Dense_0"]["kernel"] + drawn["Dense_0"]["bias"][:, None]
    np.testing.assert_allclose(sampled.var((0, 1)), out.var(0), rtol=0.1)


def test_dropout_takes_whole_units_and_keeps_the_mean() -> None:
    network, params, x = perceptron(40)
    keys = jax.random.split(KEY, 3000)
    drawn = jax.jit(jax.vmap(lambda key: bayesian.drop_units(params, key, 0.25)))(keys)
    ratio = drawn["Dense_1"]["kernel"] / params["Dense_1"]["kernel"]
    dropped = np.isclose(ratio, 0.0)
    np.testing.assert_array_equal(dropped, np.broadcast_to(dropped[..., :1], ratio.shape))
    np.testing.assert_allclose(ratio[~dropped], 1 / 0.75, rtol=1e-5)
    np.testing.assert_allclose(dropped.mean(), 0.25, atol=0.01)
    plain = jax.jit(network.apply)(params, x)
    sampled = jax.jit(jax.vmap(network.apply, (0, None)))(drawn, x)
    np.testing.assert_allclose(sampled.mean(0), plain, rtol=0.05)
    rows = jnp.tile(x, (3000, 1))
    trained = jax.jit(bayesian.dropout_apply, static_argnums=(3, 4))(
        params, KEY, rows, 0.25, "float32"
    )
    np.testing.assert_allclose(trained.mean(0), plain[0], rtol=0.05)
    np.testing.assert_allclose(trained.std(0), sampled.std((0, 1)), rtol=0.1)


def test_the_last_layer_has_the_covariance_of_a_linear_regression() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(500, 3)).astype(np.float32) @ np.diag([1.0, 3.0, 0.0])
    variance = np.tile(np.float32([0.5, 4.0]), (500, 1))
    mask = np.arange(500) < 300
    features[400:] = np.nan  # no data, and no harm
    layer = {"kernel": jnp.ones((4000, 3, 4)), "bias": jnp.zeros((4000, 4))}
    drawn = jax.jit(last_layer_samples)(layer, features, variance, mask, KEY)
    np.testing.assert_array_equal(drawn["kernel"][..., 2:], 1.0)  # of log-variances
    np.testing.assert_array_equal(drawn["bias"][..., 2:], 0.0)
    x = np.concatenate([features[:300, :2], np.ones((300, 1))], 1)
    for output, noise in enumerate((0.5, 4.0)):
        parts = drawn["kernel"][:, :2, output], drawn["bias"][:, output][:, None]
        found = np.concatenate(parts, 1)
        np.testing.assert_allclose(found.mean(0), [1.0, 1.0, 0.0], atol=0.01)
        want = noise * np.linalg.inv(x.T @ x)
        np.testing.assert_allclose(
            np.sqrt(np.diag(np.cov(found.T))), np.sqrt(np.diag(want)), rtol=0.1
        )
        unseen = np.std(drawn["kernel"][:, 2, output])
        assert unseen > 0.5, "what no row has shown is as uncertain as before"


def test_refuses_what_cannot_be_bayesian() -> None:
    with pytest.raises(ValueError, match="posterior must be one of ensemble, .*got 'swag'"):
        EnsembleConfig(posterior="swag")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="propagation must be one of auto, ts1, .*got 'ts2'"):
        EnsembleConfig(propagation="ts2")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="uncertainty must be one of"):
        EnsembleConfig(uncertainty="entropy")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="network: got one with posterior='dropout'"):
        build_ensemble(SPEC, EnsembleConfig(posterior="dropout"), lambda out: mlp((4,), out))
    with pytest.raises(ValueError, match="hidden: got no layers"):
        build_ensemble(SPEC, EnsembleConfig(posterior="laplace", hidden=()))
