"""Direct preference losses: golden numbers, closed forms, what a reversed label does."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl.losses.direct_preference import (
    direct_preference_error,
    direct_preference_loss,
    implicit_reward,
    kto_baseline,
    kto_error,
    robust_nll,
    sequence_log_prob,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "rlhf.json").read_text("utf-8"))
GIVEN, WANTED = GOLDEN["dpo_family"]["inputs"], GOLDEN["dpo_family"]["outputs"]


def pair(what: str) -> jax.Array:
    names = [n for n in GIVEN if n.startswith(what)]
    return jnp.array([GIVEN[n] for n in names], jnp.float32).T


POLICY, REFERENCE = pair("policy"), pair("ref")
LENGTH = jnp.array([GIVEN["chosen_len"], GIVEN["rejected_len"]]).T


@pytest.mark.parametrize(
    ("kind", "smoothing", "want"),
    [
        ("sigmoid", 0.0, "sigmoid_mean"),
        ("sigmoid", 0.1, "conservative_dpo_mean_eps.1"),
        ("robust", 0.1, "robust_mean_eps.1"),
        ("hinge", 0.0, "hinge_mean"),
        ("ipo_sum", 0.0, "ipo_sum_mean"),
        ("ipo", 0.0, "ipo_length_normalised_mean(TRL)"),
    ],
)
def test_golden_losses(kind, smoothing, want):
    loss, metrics = direct_preference_loss(
        POLICY, REFERENCE, kind, GIVEN["beta"], smoothing, LENGTH
    )
    np.testing.assert_allclose(loss, WANTED[want], rtol=1e-5)
    assert float(metrics["accuracy"]) == WANTED["accuracy"]


def test_golden_losses_of_each_pair_and_implicit_rewards():
    ratio = POLICY - REFERENCE
    for kind in ("sigmoid", "ipo_sum"):
        got = direct_preference_error(ratio, kind, GIVEN["beta"])
        np.testing.assert_allclose(got, WANTED[f"{kind}_per_example"], rtol=1e-5)
    reward = implicit_reward(POLICY, REFERENCE, GIVEN["beta"])
    np.testing.assert_allclose(reward[:, 0], WANTED["chosen_implicit_rewards"], rtol=1e-5)
    np.testing.assert_allclose(reward[:, 1], WANTED["rejected_implicit_rewards"], rtol=1e-5)


def test_a_policy_that_is_its_reference_is_undecided():
    loss, metrics = direct_preference_loss(POLICY, POLICY)
    np.testing.assert_allclose(loss, math.log(2.0), rtol=1e-6)
    assert float(metrics["accuracy"]) == 0.5
    assert float(metrics["reward/margin"]) == 0.0
    kto, _ = direct_preference_loss(POLICY, POLICY, "kto")
    np.testing.assert_allclose(kto, 0.5)


def test_the_mean_over_tokens_does_not_care_how_long_a_sequence_is():
    token = jnp.array([[-0.2, 0.3]])
    short, long = (
        direct_preference_error(n * token, "ipo", 0.1, length=jnp.full((1, 2), n)) for n in (2, 50)
    )
    np.testing.assert_allclose(short, long, rtol=1e-6)
    np.testing.assert_allclose(short, (-0.5 - 5.0) ** 2, rtol=1e-6)


def test_robust_loss_is_on_average_that_of_the_right_labels():
    d, flipped = jnp.array([-2.0, 0.3, 4.0]), 0.2
    expected = (1.0 - flipped) * robust_nll(d, flipped) + flipped * robust_nll(-d, flipped)
    np.testing.assert_allclose(expected, np.log1p(np.exp(-np.asarray(d))), rtol=1e-5)


def test_kto_values_gains_and_losses_against_the_baseline():
    good = jnp.array([True, False, True, False])
    ratio = jnp.array([1.0, 1.0, 1e4, 1e4])
    got = kto_error(ratio, good, jnp.array(1.0), 0.5, 2.0, 3.0)
    np.testing.assert_allclose(got, [1.0, 1.5, 0.0, 3.0], atol=1e-6)
    slope = jax.grad(lambda x: kto_error(x, good[:2], jnp.array(0.0), 0.5, 2.0, 3.0).sum())
    d = 0.25 * 0.5  # sigmoid'(0) beta
    np.testing.assert_allclose(slope(jnp.zeros(2)), [-2.0 * d, 3.0 * d], rtol=1e-6)


def test_baseline_is_the_mean_log_ratio_but_never_negative_nor_learned():
    ratio, weight = jnp.array([1.0, 3.0, 100.0]), jnp.array([1.0, 1.0, 0.0])
    assert float(kto_baseline(ratio, weight)) == 2.0
    assert float(kto_baseline(-ratio)) == 0.0
    np.testing.assert_array_equal(jax.grad(kto_baseline)(ratio), 0.0)


def test_padding_of_sequences_and_of_batches_does_not_count():
    token = jnp.array([[-1.0, -2.0, jnp.nan]])
    assert float(sequence_log_prob(token, jnp.array([[True, True, False]]))[0]) == -3.0
    weight = jnp.array([1.0, 1.0, 0.0, 0.0])
    for kind in ("sigmoid", "kto"):
        whole, metrics = direct_preference_loss(POLICY, REFERENCE, kind, weight=weight)
        part, fewer = direct_preference_loss(POLICY[:2], REFERENCE[:2], kind)
        np.testing.assert_allclose(whole, part, rtol=1e-6)
        for name, value in fewer.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)


def test_only_the_policy_learns():
    slope = jax.grad(lambda p, r: direct_preference_loss(p, r)[0], (0, 1))
    learned, fixed = slope(POLICY, REFERENCE)
    np.testing.assert_array_equal(fixed, 0.0)
    assert bool(jnp.all(learned[:, 0] < 0)) and bool(jnp.all(learned[:, 1] > 0))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kind", {"kind": "dpo"}),
        ("length", {"kind": "ipo"}),
        ("smoothing", {"kind": "hinge", "smoothing": 0.1}),
        ("smoothing", {"kind": "robust", "smoothing": 0.5}),
        ("log_ratio", {"log_ratio": jnp.zeros(4)}),
    ],
)
def test_what_makes_no_sense_is_refused(name, options):
    with pytest.raises(ValueError, match=f"^{name}: got"):
        direct_preference_error(**{"log_ratio": POLICY, **options})
