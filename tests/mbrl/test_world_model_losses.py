"""The two sided divergence, and the losses of actor and critic: values and gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl.distributions import Categorical, Normal, TwoHot, unimix
from mbrl.losses.policy_gradient import reinforce_loss, two_hot_critic_loss
from mbrl.losses.world_model import balanced_kl
from mbrl.two_hot import symexp_bins
from tests.mbrl import plain

S, C = 6, 4


def laws(gap: float) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    one = rng.normal(size=(3, S, C))
    return one, one + gap * rng.normal(size=(3, S, C))


def categorical_kl(p: Any, q: Any) -> Any:
    p, q = plain.unimix(p, 0.01), plain.unimix(q, 0.01)
    return (p * np.log(p / q)).sum((-1, -2))


def terms(posterior: Any, prior: Any, free_nats: float = 1.0) -> Any:
    p, q = (Categorical(unimix(x, 0.01)) for x in (posterior, prior))
    return balanced_kl(p, q, free_nats)


def test_both_halves_are_the_divergence_summed_over_the_latents() -> None:
    p, q = laws(1.0)
    expected = categorical_kl(p, q)
    assert expected.min() > 1.0
    got = jax.jit(terms)(p, q)
    np.testing.assert_allclose(got.dynamics, expected, rtol=1e-5)
    np.testing.assert_allclose(got.representation, expected, rtol=1e-5)


def test_free_nats_are_granted_once_for_all_latents() -> None:
    p, q = laws(0.985)
    whole = categorical_kl(p, q)
    # No latent alone has a nat, all of them together do: nothing is granted any more.
    each = [categorical_kl(p[:, i : i + 1], q[:, i : i + 1]).max() for i in range(S)]
    assert max(each) < 1.0 < whole.min()
    np.testing.assert_allclose(jax.jit(terms)(p, q).dynamics, whole, rtol=1e-5)
    near = categorical_kl(*laws(0.2))
    assert near.max() < 1.0
    np.testing.assert_array_equal(jax.jit(terms)(*laws(0.2)).dynamics, np.ones(3))


@pytest.mark.parametrize("gap", [1.0, 0.2])
def test_each_half_trains_one_side_and_only_above_the_free_nats(gap: float) -> None:
    p, q = laws(gap)

    def total(p: Any, q: Any, half: str) -> Any:
        return jnp.sum(getattr(terms(p, q), half))

    slopes = {
        half: jax.jit(jax.grad(lambda p, q: total(p, q, half), (0, 1)))(p, q)
        for half in ("dynamics", "representation")
    }
    assert not np.any(slopes["dynamics"][0])
    assert not np.any(slopes["representation"][1])
    for half, side in (("dynamics", 1), ("representation", 0)):
        got, expected = slopes[half][side], np.zeros((3, S, C))
        for index in np.ndindex(3, S, C) if gap == 1.0 else []:
            args = [[np.array(p), np.array(q)] for _ in range(2)]
            args[0][side][index] += 1e-5
            args[1][side][index] -= 1e-5
            up, down = (categorical_kl(*x).sum() for x in args)
            expected[index] = (up - down) / 2e-5
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)
        assert np.any(got) == (gap == 1.0)


def test_gaussian_latents_have_the_same_two_halves() -> None:
    rng = np.random.default_rng(1)
    mean, std = rng.normal(size=(2, 3, S)), rng.uniform(0.3, 2.0, (2, 3, S))
    expected = (
        np.log(std[1] / std[0]) + (std[0] ** 2 + (mean[0] - mean[1]) ** 2) / (2 * std[1] ** 2) - 0.5
    ).sum(-1)

    @jax.jit
    def halves(mean: Any, std: Any) -> Any:
        return balanced_kl(Normal(mean[0], std[0]), Normal(mean[1], std[1]), 1.0)

    assert expected.min() > 1.0
    for half in halves(jnp.float32(mean), jnp.float32(std)):
        np.testing.assert_allclose(half, expected, rtol=1e-4)
    slope = jax.jit(jax.grad(lambda m: halves(m, jnp.float32(std)).dynamics.sum()))
    toward = slope(jnp.float32(mean))
    assert not np.any(toward[0]) and np.all(toward[1])


def test_the_actor_loss_and_what_it_trains() -> None:
    rng = np.random.default_rng(2)
    log_prob, advantage, entropy, weight = rng.normal(size=(4, 5, 3))
    loss = jax.jit(jax.value_and_grad(reinforce_loss, (0, 1, 2, 4)))
    value, slopes = loss(
        *map(jnp.float32, (log_prob, advantage, entropy)), 0.3, jnp.float32(weight)
    )
    np.testing.assert_allclose(
        value, -(weight * (log_prob * advantage + 0.3 * entropy)).mean(), rtol=1e-5
    )
    np.testing.assert_allclose(slopes[0], -weight * advantage / 15, rtol=1e-5)
    np.testing.assert_allclose(slopes[2], -weight * 0.3 / 15, rtol=1e-5)
    assert not np.any(slopes[1]) and not np.any(slopes[3])


def test_the_critic_loss_and_what_it_trains() -> None:
    rng = np.random.default_rng(3)
    logits, slow = rng.normal(size=(2, 4, 255)) - 0.5 * np.linspace(-20, 20, 255) ** 2
    target, weight = 3.0 * rng.normal(size=4), rng.uniform(size=4)
    bins = symexp_bins(255)

    def loss(logits: Any, target: Any, slow: Any, weight: Any) -> Any:
        return two_hot_critic_loss(TwoHot(logits, bins), target, TwoHot(slow, bins), weight, 0.7)

    args = [jnp.float32(x) for x in (logits, target, slow, weight)]
    value, slopes = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(*args)
    means = plain.two_hot_mean(slow)
    expected = plain.two_hot_nll(logits, target) + 0.7 * plain.two_hot_nll(logits, means)
    np.testing.assert_allclose(value, (weight * expected).mean(), rtol=1e-4)
    hot = np.stack(
        [plain.two_hot(x) + 0.7 * plain.two_hot(y) for x, y in zip(target, means, strict=True)]
    )
    slope = weight[:, None] * (1.7 * plain.softmax(logits) - hot) / 4
    np.testing.assert_allclose(slopes[0], slope, rtol=1e-3, atol=1e-4)
    assert not any(np.any(x) for x in slopes[1:])
