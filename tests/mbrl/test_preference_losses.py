"""Losses of comparisons: golden numbers, closed forms, every order by brute force, extremes."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl.losses import preference
from mbrl.losses.preference import centering_loss, ranked_pairs, segment_scores

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "preferences.json").read_text("utf-8"))
OPTIONS = ("margin", "smoothing", "uniform")
pair_nll = jax.jit(preference.pair_nll, static_argnames=OPTIONS)
plackett_luce_nll = jax.jit(preference.plackett_luce_nll)
bradley_terry_nll = jax.jit(preference.bradley_terry_nll, static_argnames=OPTIONS[1:])
SLOPES = {
    pair_nll: jax.jit(jax.value_and_grad(preference.pair_nll)),
    plackett_luce_nll: jax.jit(jax.value_and_grad(preference.plackett_luce_nll)),
}
SCORES = np.array([0.3, -1.2, 2.0, 0.7, -0.4], np.float32)


def golden(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs as float32 arrays, outputs as they are."""
    entry = GOLDEN[name]
    inputs = {
        k: jnp.asarray(v, jnp.float32) if isinstance(v, list) else v
        for k, v in entry["inputs"].items()
    }
    return inputs, entry["outputs"]


def sigmoid(x: Any) -> Any:
    return 1.0 / (1.0 + np.exp(-np.asarray(x, np.float64)))


def plain_nll(d: float, margin: float, smoothing: float, uniform: float) -> float:
    """One pair in float64, from the probability itself."""

    def one(x: float) -> float:
        return -math.log((1.0 - uniform) * sigmoid(x) + uniform / 2.0)

    return (1.0 - smoothing) * one(d - margin) + smoothing * one(margin - d)


def plain_ranking(scores: Any, rank: Any, margin: float, smoothing: float, uniform: float) -> float:
    losses = []
    for (s, r), (z, q) in itertools.combinations(zip(scores, rank, strict=True), 2):
        if min(r, q) < 0:
            continue
        s, z = float(s), float(z)
        both = [plain_nll(s - z, 0, smoothing, uniform), plain_nll(z - s, 0, smoothing, uniform)]
        if r == q:
            losses.append(sum(both) / 2)
        else:
            d = s - z if r < q else z - s
            losses.append(plain_nll(d, margin, smoothing, uniform))
    return sum(losses) / len(losses) if losses else 0.0


def test_golden_ranking_of_five():
    inputs, want = golden("bt_ranking_k5")
    rewards, pairs = inputs["rewards_best_first"], np.array(inputs["pairs"], int)
    nll = bradley_terry_nll(rewards[pairs[:, 0]], rewards[pairs[:, 1]])
    np.testing.assert_allclose(nll, want["pair_losses"], rtol=1e-5)
    loss, slope = SLOPES[pair_nll](rewards, jnp.arange(5))
    np.testing.assert_allclose(loss, want["loss_mean_over_pairs"], rtol=1e-5)
    np.testing.assert_allclose(slope, want["grad"], atol=1e-6)


def test_golden_rankings_of_different_lengths_in_one_batch():
    inputs, want = golden("bt_ragged_rankings")
    scores = inputs["rewards_best_first_padded"]
    place = jnp.arange(scores.shape[1])
    rank = jnp.where(place < inputs["k"][:, None], place, -1)
    nll = jax.vmap(pair_nll)(scores, rank)
    np.testing.assert_allclose(nll, want["per_prompt"], rtol=1e-5)
    np.testing.assert_allclose(nll.mean(), want["mean_over_prompts"], rtol=1e-5)
    np.testing.assert_array_equal(ranked_pairs(scores, rank).present.sum(-1), want["n_pairs"])


def test_golden_plackett_luce():
    inputs, want = golden("plackett_luce_k5")
    nll = plackett_luce_nll(inputs["rewards_best_first"], jnp.arange(5))
    np.testing.assert_allclose(nll, want["nll"], rtol=1e-5)


def test_golden_variants_of_pairs():
    inputs, want = golden("bt_pair_variants")
    chosen, rejected = inputs["chosen"], inputs["rejected"]
    plain = bradley_terry_nll(chosen, rejected).mean()
    centering = centering_loss(jnp.stack([chosen, rejected], 1))
    smoothing = inputs["label_smoothing"]
    got = {
        "plain": plain,
        "margin": bradley_terry_nll(chosen, rejected, inputs["margin"]).mean(),
        "plain_plus_centering": plain + inputs["center_coef"] * centering,
        "smoothed": bradley_terry_nll(chosen, rejected, smoothing=smoothing).mean(),
        "tie_half_half": bradley_terry_nll(chosen, rejected, smoothing=0.5).mean(),
    }
    for name, value in got.items():
        np.testing.assert_allclose(value, want[name], rtol=1e-5, err_msg=name)
    tie = jax.vmap(pair_nll)(jnp.stack([chosen, rejected], 1), jnp.zeros((6, 2), int))
    np.testing.assert_allclose(tie.mean(), want["tie_half_half"], rtol=1e-5)


def test_golden_segments():
    inputs, want = golden("segment_preference")
    pair = jnp.stack([inputs["r1"], inputs["r2"]])
    plain = segment_scores(pair)
    late = segment_scores(pair[:, ::-1], inputs["gamma_myopic"])
    early = segment_scores(pair, inputs["discount_imitation"])
    noise = inputs["noise_prob"]

    def first(score: Any, uniform: float = 0.0) -> Any:
        return jnp.exp(-bradley_terry_nll(score[0], score[1], uniform=uniform))

    np.testing.assert_allclose(first(plain), want["p_first_sum"], rtol=1e-5)
    np.testing.assert_allclose(first(late), want["p_first_myopic"], rtol=1e-5)
    np.testing.assert_allclose(first(early), want["p_first_discounted"], rtol=1e-5)
    np.testing.assert_allclose(first(plain, noise), want["p_first_noise10"], rtol=1e-5)


@pytest.mark.parametrize("uniform", [0.0, 0.1])
def test_extreme_scores_have_finite_losses_and_slopes(uniform: float):
    gap = jnp.array([-1e4, -90.0, 0.0, 90.0, 1e4])

    def loss(gap: Any, smoothing: float) -> Any:
        return bradley_terry_nll(gap, 0.0, 0.5, smoothing=smoothing, uniform=uniform).sum()

    for smoothing in (0.0, 0.2):
        value, slope = jax.jit(jax.value_and_grad(loss), static_argnums=1)(gap, smoothing)
        assert np.isfinite(value) and np.isfinite(slope).all()
        assert slope[0] <= 0.0
    worst = bradley_terry_nll(gap[0], 0.0, uniform=uniform)
    np.testing.assert_allclose(worst, -math.log(0.05) if uniform else 1e4, rtol=1e-6)
    assert bradley_terry_nll(gap[-1], 0.0, uniform=uniform) == pytest.approx(
        -math.log(1.0 - uniform / 2.0), abs=1e-7
    )


def test_random_answers_are_a_mixture():
    d = np.linspace(-6.0, 6.0, 13)
    want = -np.log(0.8 * sigmoid(d) + 0.1)
    nll = bradley_terry_nll(jnp.asarray(d, jnp.float32), jnp.zeros(13), uniform=0.2)
    np.testing.assert_allclose(nll, want, rtol=1e-5)
    # Both answers together are certain.
    other = bradley_terry_nll(jnp.zeros(13), jnp.asarray(d, jnp.float32), uniform=0.2)
    np.testing.assert_allclose(jnp.exp(-nll) + jnp.exp(-other), 1.0, rtol=1e-6)


@pytest.mark.parametrize("rank", [[0, 1, 2, 3, 4], [3, 0, 0, -1, 2], [1, 1, 1, 1, 0], [0, -1] * 2])
@pytest.mark.parametrize("options", [(0.0, 0.0, 0.0), (0.4, 0.1, 0.1)])
def test_all_pairs_are_those_of_a_loop(rank: list[int], options: Any):
    scores = SCORES[: len(rank)]
    got = pair_nll(jnp.asarray(scores), jnp.array(rank), *options)
    np.testing.assert_allclose(got, plain_ranking(scores, rank, *options), rtol=1e-5)


def test_a_tie_wants_equal_scores():
    tied = jnp.array([3, 3])
    _, pull = SLOPES[pair_nll](jnp.array([1.0, 1.0]), tied, 5.0)
    np.testing.assert_allclose(pull, 0.0, atol=1e-7)
    _, pull = SLOPES[pair_nll](jnp.array([2.0, 1.0]), tied, 5.0)
    np.testing.assert_allclose(pull, [sigmoid(1.0) - 0.5, 0.5 - sigmoid(1.0)], rtol=1e-5)


@pytest.mark.parametrize("nll", [pair_nll, plackett_luce_nll])
def test_only_differences_and_ranks_matter(nll: Any):
    scores, rank = jnp.asarray(SCORES), jnp.array([2, 0, 2, -1, 1])
    want = nll(scores, rank)
    order = jnp.array([4, 2, 0, 1, 3])
    np.testing.assert_allclose(nll(scores + 7.0, rank), want, rtol=1e-5)
    np.testing.assert_allclose(nll(scores[order], rank[order]), want, rtol=1e-5)
    np.testing.assert_allclose(nll(scores, jnp.where(rank < 0, -1, 10 * rank)), want, rtol=1e-6)
    assert nll(2.0 * scores, rank) != pytest.approx(want)


@pytest.mark.parametrize("nll", [pair_nll, plackett_luce_nll])
@pytest.mark.parametrize("hole", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_is_absent_does_not_matter(nll: Any, hole: float):
    scores, rank = jnp.array([0.3, hole, 2.0, hole]), jnp.array([1, -1, 0, -1])
    value, slope = SLOPES[nll](scores, rank)
    want, rest = SLOPES[nll](scores[::2], rank[::2])
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(slope, [rest[0], 0.0, rest[1], 0.0], rtol=1e-6)


@pytest.mark.parametrize("nll", [pair_nll, plackett_luce_nll])
@pytest.mark.parametrize("rank", [[-1, 0, -1], [-1, -1, -1]])
def test_fewer_than_two_answers_say_nothing(nll: Any, rank: list[int]):
    value, slope = SLOPES[nll](jnp.array([1.0, 2.0, jnp.nan]), jnp.array(rank))
    assert value == 0.0
    np.testing.assert_array_equal(slope, 0.0)


def test_the_orders_of_plackett_luce_are_a_distribution():
    orders = np.array(list(itertools.permutations(range(4))))
    nll = jax.vmap(plackett_luce_nll, (None, 0))(jnp.asarray(SCORES[:4]), jnp.asarray(orders))
    np.testing.assert_allclose(jnp.exp(-nll).sum(), 1.0, rtol=1e-5)
    assert np.unique(np.round(nll, 4)).size == 24


def test_plackett_luce_of_two_is_bradley_terry():
    for rank in ([0, 1], [1, 0], [0, 0]):
        pair = pair_nll(jnp.asarray(SCORES[:2]), jnp.array(rank))
        want = pair * (2.0 if rank == [0, 0] else 1.0)
        got = plackett_luce_nll(jnp.asarray(SCORES[:2]), jnp.array(rank))
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_tied_answers_are_each_chosen_from_the_whole_pool():
    rank = [1, 0, 1, 2, 1]
    weight = np.exp(SCORES.astype(np.float64))
    total, three, last = weight.sum(), weight.sum() - weight[1], weight[3]
    want = -math.log(weight[1] / total) - math.log(last / last)
    want -= sum(math.log(weight[k] / three) for k in (0, 2, 4))
    got = plackett_luce_nll(jnp.asarray(SCORES), jnp.array(rank))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    # More than any order of the three costs on average, for the pool never shrinks.
    orders = [[1 + p[0], 0, 1 + p[1], 4, 1 + p[2]] for p in itertools.permutations(range(3))]
    nll = jax.vmap(plackett_luce_nll, (None, 0))(jnp.asarray(SCORES), jnp.array(orders))
    assert got > nll.mean()


def test_centering_is_the_squared_sum_of_a_pair_and_blind_to_length():
    scores = jnp.array([[1.0, 3.0, jnp.nan], [2.0, 2.0, 2.0], [jnp.nan] * 3])
    rank = jnp.array([[0, 1, -1], [0, 0, 1], [-1, -1, -1]])
    value, slope = jax.value_and_grad(centering_loss)(scores, rank)
    assert value == pytest.approx((16.0 + 16.0) / 2)
    # d/ds (2 mean)^2 = 8 mean / K, over two rankings; an empty one has no part.
    want = [[4.0, 4.0, 0.0], [8.0 / 3.0] * 3, [0.0] * 3]
    np.testing.assert_allclose(slope, want, rtol=1e-6)
    assert centering_loss(scores[2:], rank[2:]) == 0.0
    assert centering_loss(scores[:1, :2]) == pytest.approx(16.0)


def test_masked_steps_of_a_segment_do_not_count():
    reward = jnp.array([[1.0, 2.0, jnp.nan], [4.0, jnp.inf, 8.0]])
    mask = jnp.isfinite(reward)
    np.testing.assert_allclose(segment_scores(reward, mask=mask), [3.0, 12.0])
    np.testing.assert_allclose(segment_scores(reward, 0.5, mask), [2.0, 6.0])
    slope = jax.grad(lambda r: segment_scores(r, 0.5, mask).sum())(reward)
    np.testing.assert_allclose(slope, [[1.0, 0.5, 0.0], [1.0, 0.0, 0.25]])


@pytest.mark.parametrize("nll", [pair_nll, plackett_luce_nll])
def test_one_program_serves_every_ranking(nll: Any):
    traces = []

    def batched(scores: Any, rank: Any) -> Any:
        traces.append(1)
        return jax.vmap(nll)(scores, rank)

    program = jax.jit(batched)
    scores = jax.random.normal(jax.random.key(0), (4, 5))
    for rank in ([[0, 1, 2, 3, 4]] * 4, [[0, 0, -1, 2, 1], [-1] * 5, [3, 2, 1, 0, 4], [0] * 5]):
        looped = [nll(s, r) for s, r in zip(scores, jnp.array(rank), strict=True)]
        np.testing.assert_allclose(program(scores, jnp.array(rank)), looped, rtol=1e-5, atol=1e-7)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"smoothing": 0.6}, "smoothing: got 0.6"), ({"uniform": 1.0}, "uniform: got 1.0")],
)
def test_options_out_of_range_are_refused(options: Any, message: str):
    with pytest.raises(ValueError, match=message):
        pair_nll(jnp.zeros(2), jnp.arange(2), **options)


@pytest.mark.parametrize("nll", [pair_nll, plackett_luce_nll])
def test_ranks_of_another_shape_are_refused(nll: Any):
    with pytest.raises(ValueError, match=r"rank: got shape \(2,\), expected .* \(3,\)"):
        nll(jnp.zeros(3), jnp.arange(2))
