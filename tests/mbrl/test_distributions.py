"""Distributions: densities that integrate to one, moments, closed forms against quadrature."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mbrl import distributions as dist
from mbrl.two_hot import symexp, symexp_bins, symlog, two_hot

NORMALS = dist.Normal(jnp.array([0.3, -1.0, 4.0]), jnp.array([0.5, 2.0, 0.1]))
TANHS = dist.TanhNormal(jnp.array([0.0, 0.8, -1.5]), jnp.array([0.3, 1.0, 0.6]))
LOGITS = jnp.array([[0.0, 1.0, -2.0, 0.5], [3.0, 3.0, 3.0, 3.0]])
KEYS = jax.random.split(jax.random.key(0), 40_000)


def _integral(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.asarray(np.trapezoid(np.asarray(y, np.float64), x, axis=0))


def _grid(d: dist.Normal | dist.TanhNormal) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return points [G, 3], their log-densities [G, 3] and weights' abscissa for `d`."""
    if isinstance(d, dist.Normal):
        x = np.linspace(-20.0, 20.0, 20_001)
    else:
        # Dense towards the ends, where the density of a tanh-normal is steep.
        x = np.tanh(np.linspace(-8.0, 8.0, 20_001))
    points = jnp.asarray(np.repeat(x[:, None], 3, 1), jnp.float32)
    return x, np.asarray(jax.jit(d.log_prob)(points), np.float64), x[:, None]


@pytest.mark.parametrize("d", [NORMALS, TANHS], ids=["normal", "tanh"])
def test_densities_integrate_to_one_and_give_mean_and_entropy(
    d: dist.Normal | dist.TanhNormal,
) -> None:
    x, log_p, column = _grid(d)
    p = np.exp(log_p)
    np.testing.assert_allclose(_integral(p, x), 1.0, atol=1e-3)
    np.testing.assert_allclose(_integral(p * column, x), d.mean, atol=1e-3)
    np.testing.assert_allclose(-_integral(p * log_p, x), d.entropy(), atol=3e-3)


@pytest.mark.parametrize("d", [NORMALS, TANHS], ids=["normal", "tanh"])
def test_samples_have_the_moments_of_the_density(d: dist.Normal | dist.TanhNormal) -> None:
    x, log_p, column = _grid(d)
    samples = np.asarray(jax.jit(jax.vmap(d.sample))(KEYS))
    mean = _integral(np.exp(log_p) * column, x)
    var = _integral(np.exp(log_p) * (column - mean) ** 2, x)
    error = np.sqrt(var / len(KEYS))
    assert np.all(np.abs(samples.mean(0) - mean) < 4 * error)
    np.testing.assert_allclose(samples.var(0), var, rtol=0.04)
    assert np.all(np.abs(samples) <= 1) or isinstance(d, dist.Normal)


def test_normal_is_scipys() -> None:
    x = np.array([0.0, 3.0, 4.2])
    m, s = np.array(NORMALS.mean), np.array(NORMALS.std)
    np.testing.assert_allclose(NORMALS.log_prob(jnp.asarray(x)), stats.norm.logpdf(x, m, s), 1e-4)
    np.testing.assert_allclose(NORMALS.entropy(), stats.norm.entropy(m, s), rtol=1e-5)
    np.testing.assert_array_equal(NORMALS.mode(), NORMALS.mean)


def test_a_scalar_std_broadcasts_over_samples_and_entropy() -> None:
    d = dist.Normal(jnp.zeros(4), jnp.float32(1.0))
    assert len(np.unique(d.sample(jax.random.key(1)))) == 4
    assert d.entropy().shape == (4,)


def test_samples_are_reparameterized() -> None:
    def draw(loc: jax.Array, scale: jax.Array) -> jax.Array:
        return dist.Normal(loc, scale).sample(jax.random.key(3))

    u = draw(jnp.float32(0.0), jnp.float32(1.0))
    by_loc, by_scale = jax.grad(draw, (0, 1))(jnp.float32(0.7), jnp.float32(2.0))
    assert by_loc == 1.0
    np.testing.assert_allclose(by_scale, u, rtol=1e-6)


def test_tanh_normal_log_prob_survives_saturation() -> None:
    # With u = 20, tanh rounds to exactly 1 in float32 and log(1 - 1) would be -inf; the
    # exact Jacobian is log(4) - 2 u up to exp(-4 u).
    d = dist.TanhNormal(jnp.float32(20.0), jnp.float32(1e-6))
    x, log_prob = d.sample_and_log_prob(jax.random.key(4))
    assert x == 1.0
    peak = -0.5 * np.log(2 * np.pi) - np.log(1e-6)
    u_part = log_prob - peak - 40.0 + np.log(4.0)
    assert -20.0 < u_part <= 0.1  # -z^2 / 2 of the draw
    for end in (1.0, -1.0):
        at_end = dist.TanhNormal(jnp.float32(0.0), jnp.float32(1.0)).log_prob(jnp.float32(end))
        assert np.isfinite(at_end)
        # u = +-atanh(1 - 2^-24) = +-8.664
        expected = -0.5 * (8.664**2 + np.log(2 * np.pi)) - np.log(4.0) + 2 * 8.664
        np.testing.assert_allclose(at_end, expected, atol=0.01)


def test_tanh_normal_sample_and_log_prob_agree() -> None:
    x, log_prob = jax.jit(jax.vmap(TANHS.sample_and_log_prob))(KEYS[:500])
    np.testing.assert_allclose(jax.jit(TANHS.log_prob)(x), log_prob, atol=2e-3)
    again = jax.jit(jax.vmap(TANHS.sample))(KEYS[:500])  # another program: other last bits
    np.testing.assert_allclose(x, again, atol=1e-6)


def test_tanh_normal_gradients_are_finite_at_extremes() -> None:
    def loss(loc: jax.Array) -> jax.Array:
        d = dist.TanhNormal(loc, jnp.float32(0.5))
        return (
            d.sample_and_log_prob(jax.random.key(5))[1] + d.entropy() + d.log_prob(jnp.float32(1.0))
        )

    grads = jax.jit(jax.vmap(jax.grad(loss)))(jnp.array([-50.0, -9.0, 0.0, 9.0, 50.0]))
    assert np.all(np.isfinite(grads))


def test_tanh_normal_mode_is_the_median() -> None:
    samples = np.asarray(jax.jit(jax.vmap(TANHS.sample))(KEYS))
    np.testing.assert_allclose(np.mean(samples < TANHS.mode(), axis=0), 0.5, atol=0.01)


@pytest.mark.parametrize("kind", [dist.Normal, dist.TanhNormal])
def test_kl_of_continuous_laws_is_the_integral(kind: type) -> None:
    p = kind(jnp.array([0.3, 0.8, -1.0]), jnp.array([0.5, 1.0, 0.6]))
    q = kind(jnp.array([0.1, -0.5, -1.0]), jnp.array([0.8, 1.2, 0.5]))
    x, log_p, _ = _grid(p)
    _, log_q, _ = _grid(q)
    np.testing.assert_allclose(
        dist.kl(p, q), _integral(np.exp(log_p) * (log_p - log_q), x), atol=2e-3
    )
    np.testing.assert_allclose(dist.kl(p, p), 0.0, atol=1e-6)


def test_kl_of_normals_by_hand() -> None:
    # log 2 + (1 + 1) / (2 * 4) - 1/2
    p, q = dist.Normal(jnp.zeros(1), jnp.ones(1)), dist.Normal(jnp.ones(1), 2 * jnp.ones(1))
    np.testing.assert_allclose(dist.kl(p, q), np.log(2) + 0.25 - 0.5, rtol=1e-6)


def test_categorical_sums_to_one_and_is_scipys_entropy() -> None:
    d = dist.Categorical(LOGITS)
    log_probs = jnp.stack([d.log_prob(jnp.full(2, k)) for k in range(4)], -1)
    probs = np.exp(np.asarray(LOGITS, np.float64))
    probs /= probs.sum(-1, keepdims=True)
    np.testing.assert_allclose(np.exp(log_probs), probs, rtol=1e-5)
    np.testing.assert_allclose(d.entropy(), stats.entropy(probs, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(d.mean, probs, rtol=1e-5)
    assert d.mode()[0] == 1


def test_categorical_frequencies_are_its_probabilities() -> None:
    d = dist.Categorical(LOGITS)
    draws = np.asarray(jax.jit(jax.vmap(d.sample))(KEYS))
    assert draws.dtype == np.int32
    for row in range(2):
        freq = np.bincount(draws[:, row], minlength=4) / len(KEYS)
        np.testing.assert_allclose(freq, d.probs[row], atol=0.012)


def test_straight_through_sample_is_one_hot_with_the_gradient_of_the_probabilities() -> None:
    weights = jnp.array([1.0, -2.0, 0.5, 3.0])

    def value(logits: jax.Array, key: jax.Array) -> jax.Array:
        return dist.Categorical(logits).one_hot_sample(key) @ weights

    many = jax.random.normal(jax.random.key(9), (500, 4))
    hot = jax.jit(lambda x, k: dist.Categorical(x).one_hot_sample(k))(many, jax.random.key(6))
    assert set(np.unique(hot)) == {0.0, 1.0}
    np.testing.assert_array_equal(hot.sum(-1), 1.0)
    got = jax.grad(value)(LOGITS[0], jax.random.key(7))
    exact = jax.grad(lambda x: jax.nn.softmax(x) @ weights)(LOGITS[0])
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-7)
    assert np.abs(exact).max() > 0.1


def test_unimix_by_hand() -> None:
    logits = jnp.log(jnp.array([0.9, 0.1 - 1e-9, 1e-9]))
    got = jnp.exp(dist.unimix(logits, 0.03))
    np.testing.assert_allclose(got, [0.97 * 0.9 + 0.01, 0.97 * 0.1 + 0.01, 0.01], rtol=1e-5)
    far = dist.unimix(jnp.array([0.0, -1e6]), 0.02)
    np.testing.assert_allclose(far, np.log([0.99, 0.01]), rtol=1e-5)


def test_forbidden_categories_have_no_mass_no_entropy_and_no_nan() -> None:
    logits = jnp.array([1.0, -jnp.inf, 0.5, -jnp.inf])
    allowed = logits[jnp.array([0, 2])]
    np.testing.assert_allclose(
        dist.Categorical(logits).entropy(), dist.Categorical(allowed).entropy(), rtol=1e-6
    )
    draws = jax.jit(jax.vmap(dist.Categorical(logits).sample))(KEYS[:500])
    assert set(np.unique(draws)) == {0, 2}
    other = dist.Categorical(jnp.zeros(4))

    def value(x: jax.Array) -> jax.Array:
        d = dist.Categorical(x)
        return d.entropy() + d.log_prob(jnp.int32(0)) + dist.kl(d, other)

    assert np.all(np.isfinite(jax.jit(jax.grad(value))(logits)))
    assert dist.kl(other, dist.Categorical(logits)) == np.inf


def test_kl_of_discrete_laws_is_scipys() -> None:
    p, q = np.array([0.1, 0.2, 0.7]), np.array([0.3, 0.3, 0.4])
    log_p, log_q = jnp.log(jnp.asarray(p)) + 5.0, jnp.log(jnp.asarray(q)) - 2.0
    expected = stats.entropy(p, q)
    got = dist.kl(dist.Categorical(log_p), dist.Categorical(log_q))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    bins = jnp.array([-1.0, 0.0, 1.0])
    got = dist.kl(dist.TwoHot(log_p, bins), dist.TwoHot(log_q, bins))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    logit = [jnp.log(x / (1 - x)) for x in (0.1, 0.7)]
    got = dist.kl(dist.Bernoulli(logit[0]), dist.Bernoulli(logit[1]))
    np.testing.assert_allclose(got, stats.entropy([0.1, 0.9], [0.7, 0.3]), rtol=1e-5)


def test_kl_refuses_mixed_types() -> None:
    with pytest.raises(ValueError, match="Normal and Categorical"):
        dist.kl(NORMALS, dist.Categorical(LOGITS))


def test_bernoulli() -> None:
    d = dist.Bernoulli(jnp.log(jnp.array([3.0, 1.0 / 9.0])))
    np.testing.assert_allclose(d.mean, [0.75, 0.1], rtol=1e-5)
    both = np.exp(d.log_prob(jnp.array(True))) + np.exp(d.log_prob(jnp.array(False)))
    np.testing.assert_allclose(both, 1.0, rtol=1e-6)
    np.testing.assert_allclose(
        d.entropy(), stats.entropy([[0.75, 0.1], [0.25, 0.9]], axis=0), rtol=1e-5
    )
    np.testing.assert_array_equal(d.mode(), [True, False])
    draws = np.asarray(jax.jit(jax.vmap(d.sample))(KEYS))
    assert draws.dtype == bool
    np.testing.assert_allclose(draws.mean(0), d.mean, atol=0.01)
    sure = dist.Bernoulli(jnp.array([1e4, -1e4]))
    np.testing.assert_array_equal(sure.entropy(), 0.0)


def test_two_hot_round_trip_and_sampling() -> None:
    bins = symexp_bins(21, 5.0)
    d = dist.TwoHot(jax.random.normal(jax.random.key(8), (21,)), bins)
    probs = np.asarray(jax.nn.softmax(d.logits), np.float64)
    np.testing.assert_allclose(d.mean, probs @ np.asarray(bins, np.float64), rtol=1e-4)
    np.testing.assert_allclose(d.entropy(), stats.entropy(probs), rtol=1e-5)
    assert d.mode() == bins[np.argmax(probs)]
    draws = np.asarray(jax.jit(jax.vmap(d.sample))(KEYS), np.float64)
    std = np.sqrt(probs @ np.asarray(bins, np.float64) ** 2 - float(d.mean) ** 2)
    assert abs(draws.mean() - d.mean) < 4 * std / np.sqrt(len(KEYS))
    # log_prob of a bin centre is that bin's log-probability.
    np.testing.assert_allclose(d.log_prob(bins), np.log(probs), rtol=1e-4)


def test_two_hot_in_symlog_space_as_documented() -> None:
    bins, x = jnp.linspace(-10.0, 10.0, 101), jnp.float32(-123.0)
    perfect = dist.TwoHot(jnp.log(two_hot(symlog(x), bins) + 1e-30), bins)
    np.testing.assert_allclose(symexp(perfect.mean), x, rtol=1e-4)
    np.testing.assert_allclose(perfect.log_prob(symlog(x)), -perfect.entropy(), rtol=1e-4)


def test_distributions_pass_through_jit_vmap_and_scan() -> None:
    out = jax.jit(jax.vmap(lambda d: dist.Normal(d.mean + 1, d.std)))(NORMALS)
    np.testing.assert_allclose(out.mean, NORMALS.mean + 1)
    last, _ = jax.lax.scan(lambda d, _: (d._replace(std=2 * d.std), None), NORMALS, None, 3)
    np.testing.assert_allclose(last.std, 8 * NORMALS.std)
