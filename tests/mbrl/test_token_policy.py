"""Rewards and advantages of tokens: golden numbers of TRL and papers, closed forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl import returns
from mbrl.distributions import Categorical
from mbrl.losses.policy_gradient import (
    average,
    clipped_surrogate_loss,
    clipped_value_loss,
    whiten,
)
from mbrl.losses.token_policy import (
    adapt_kl_coef,
    exact_kl,
    group_relative_advantage,
    kl_estimate,
    leave_one_out_advantage,
    penalize_unended,
    token_advantages,
    token_rewards,
    until_stop,
)
from mbrl.uncertainty import risk

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "rlhf.json").read_text("utf-8"))


def golden(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Lists as arrays."""
    entry = GOLDEN[name]
    inputs, outputs = (
        {k: np.asarray(v) if isinstance(v, list) else v for k, v in entry[part].items()}
        for part in ("inputs", "outputs")
    )
    floats = {
        k: jnp.asarray(v, jnp.float32)
        for k, v in inputs.items()
        if isinstance(v, np.ndarray) and v.dtype == np.float64
    }
    return inputs | floats, outputs


def close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def up_to(last: Any, more: int = 0, length: int = 6) -> Any:
    return jnp.arange(length) <= jnp.asarray(last)[:, None] + more


def test_golden_estimators_of_divergence():
    x, want = golden("kl_estimators")
    response = up_to(x["last_response_index"])
    for kind in ("k1", "k2", "k3"):
        got = jnp.where(response, kl_estimate(x["logprobs"], x["ref_logprobs"], kind), 0.0)
        close(got, want[kind])
        if kind != "k2":
            close(got.sum(-1), want[f"sum_per_seq_{kind}"])


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_golden_rewards_and_advantages(kind):
    x, want = golden(f"ppo_rewards_gae_{kind}")
    response = up_to(x["last_response_index"])
    kl = kl_estimate(x["logprobs"], x["ref_logprobs"], kind)
    rewards = token_rewards(kl, x["scores"], response, x["kl_coef"], place="after")
    close(rewards, want["rewards"])
    # TRL keeps rewards and values one position further than actions.
    steps = up_to(x["last_response_index"], 1)
    close(jnp.where(steps, x["values"], 0.0), want["values_masked"])
    advantage, target = token_advantages(rewards, x["values"], steps, x["gamma"], x["lam"])
    close(target, want["returns"])
    whitened = whiten(advantage, response.astype(jnp.float32), unbiased=True)
    close(jnp.where(response, whitened, 0.0), want["advantages_whitened"])
    close(advantage, want["advantages"])


def test_golden_control_advantages_with_the_same_function():
    x, want = golden("gae_control")
    values, discount = x["values_T_plus_1"], x["gamma"] * (1.0 - x["dones"])
    got = jax.jit(returns.gae)(x["rewards"], discount, values[:-1], values[1:], x["lam"])
    close(got, want["advantages"])
    close(got + values[:-1], want["returns"])


def test_golden_whitening():
    x, want = golden("whitening")
    values, mask = x["values"], jnp.asarray(x["mask"], jnp.float32)
    mean = average(values, mask)
    close(mean, want["mean"])
    close(average(jnp.square(values - mean), mask), want["var_biased"])
    close(whiten(values, mask, unbiased=True), want["whitened"])
    close(whiten(values, mask, shift=False, unbiased=True), want["whitened_keep_mean"])
    biased = whiten(values, mask) * np.sqrt(want["var_biased"] / want["var_unbiased"])
    close(biased, want["whitened"])


def test_golden_losses_and_gradients_of_ppo():
    x, want = golden("ppo_loss")
    given = golden("ppo_rewards_gae_k3")[1]
    advantage, target, old_value = (
        jnp.asarray(given[n], jnp.float32)
        for n in ("advantages_whitened", "returns", "values_masked")
    )
    # Values are kept one position further than actions.
    taken, valued = (1.0 * up_to(x["last_response_index"], more) for more in (0, 1))

    def loss(log_prob, value):
        actor = clipped_surrogate_loss(log_prob, x["old_logprobs"], advantage, 0.2, taken)
        critic = clipped_value_loss(value, old_value, target, 0.2, valued)
        return actor + x["vf_coef"] * critic, (actor, critic)

    slope = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (total, parts), grads = slope(x["new_logprobs"], x["new_values"])
    close(total, want["loss"], 1e-6)
    close(parts, (want["pg_loss"], want["vf_loss"]), 1e-6)
    close(grads[0], want["grad_new_logprobs"], 1e-6)
    close(grads[1], want["grad_new_values"], 1e-6)
    change = x["new_logprobs"] - x["old_logprobs"]
    sign = jnp.where(advantage > 0, 1.0, -1.0)
    close(average(sign * (jnp.exp(change) - 1.0) > 0.2, taken), want["pg_clipfrac"])
    near = jnp.clip(x["new_values"], old_value - 0.2, old_value + 0.2)
    clipped = jnp.square(near - target) > jnp.square(x["new_values"] - target)
    close(average(clipped, valued), want["vf_clipfrac"])
    # TRL's mean counts the padding, where nothing has changed.
    change = taken * kl_estimate(x["new_logprobs"], x["old_logprobs"], "k2")
    close(change.mean(), want["approxkl"])


def test_golden_controller():
    x, want = golden("adaptive_kl")
    step = jax.jit(adapt_kl_coef)
    coef = fixed = jnp.float32(x["init"])
    for kl, after in zip(x["observed_kl"], want["kl_coef"], strict=True):
        coef = step(coef, kl, x["batch"], x["target"], x["horizon"])
        close(coef, after, 1e-6)
        fixed = step(fixed, kl, x["batch"], 0.0, x["horizon"])
    assert float(fixed) == np.float32(x["init"])


def test_golden_truncation():
    x, want = golden("truncate_response")
    kept = until_stop(jnp.asarray(x["tokens"]), x["stop"])
    np.testing.assert_array_equal(np.where(kept, x["tokens"], x["pad"]), want["out"])


def test_golden_log_probabilities_of_tokens():
    x, want = golden("selective_log_softmax")
    close(Categorical(x["logits"]).log_prob(jnp.asarray(x["index"])), want["logps"])


def test_golden_ensembles():
    x, want = golden("ensemble")
    scores = x["rewards_models_x_items"]
    close(risk(scores), want["mean"])
    close(risk(scores, "worst"), want["worst_case"])
    close(scores.var(0), want["variance_population"])
    close(risk(scores, "uwo", x["uwo_coef"]), want["uwo"])


def test_estimators_have_the_mean_of_the_exact_divergence():
    logits, reference = jnp.log(jnp.array([0.7, 0.2, 0.1])), jnp.log(jnp.array([0.5, 0.3, 0.2]))
    want = 0.7 * np.log(0.7 / 0.5) + 0.2 * np.log(0.2 / 0.3) + 0.1 * np.log(0.1 / 0.2)
    close(exact_kl(logits, reference), want)
    for kind in ("k1", "k3"):
        close(jnp.sum(jnp.exp(logits) * kl_estimate(logits, reference, kind)), want)
    assert float(jnp.abs(exact_kl(logits + 3.0, logits))) < 1e-6


def test_tokens_that_are_never_drawn_cost_no_divergence_and_spoil_no_slope():
    logits = jnp.array([0.0, -jnp.inf, 0.0])
    for reference in (jnp.zeros(3), jnp.array([0.0, -jnp.inf, 0.0])):
        value, slope = jax.value_and_grad(exact_kl)(logits, reference)
        close(value, np.log(1.5) if jnp.all(jnp.isfinite(reference)) else 0.0)
        assert bool(jnp.all(jnp.isfinite(slope)))


def test_score_is_paid_at_the_end_of_the_response():
    response = up_to([1, 3], length=4)
    score, kl = jnp.array([5.0, 7.0]), jnp.ones((2, 4))
    close(token_rewards(kl, score, response, 0.5), [[-0.5, 4.5, 0, 0], [-0.5, -0.5, -0.5, 6.5]])
    after = token_rewards(kl, score, response, 0.5, "after")
    close(after, [[-0.5, -0.5, 5, 0], [-0.5, -0.5, -0.5, 6.5]])


def test_undiscounted_advantages_are_what_follows_less_the_value():
    response = up_to([1, 3], length=4)
    reward = jnp.arange(8.0).reshape(2, 4)
    value = jnp.where(response, 0.5 * reward, jnp.nan)
    advantage, target = token_advantages(reward, value, response, 1.0, 1.0)
    close(target, [[1, 1, 0, 0], [22, 18, 13, 7]])
    close(advantage, [[1, 0.5, 0, 0], [20, 15.5, 10, 3.5]])


def test_where_a_response_stops():
    tokens = jnp.array([[7, 0, 7, 0, 7], [7, 7, 7, 7, 7]])
    np.testing.assert_array_equal(until_stop(tokens, 0).sum(-1), [2, 5])
    np.testing.assert_array_equal(until_stop(tokens, 0, least=2).sum(-1), [4, 5])


def test_responses_without_end_lose_a_penalty_or_their_score():
    score, ended = jnp.array([2.0, 3.0]), jnp.array([True, False])
    close(penalize_unended(score, ended, 1.0), [2.0, 2.0])
    close(penalize_unended(score, ended, 1.0, replace=True), [2.0, -1.0])


def test_advantages_within_a_group():
    score = jnp.array([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
    # Each less the mean of the two others.
    close(leave_one_out_advantage(score), [[-3.0, -1.5, 4.5], [0, 0, 0]])
    close(group_relative_advantage(score, scale=False), [[-2.0, -1.0, 3.0], [0, 0, 0]])
    spread = np.std([1, 2, 6], ddof=1) + 1e-4
    close(group_relative_advantage(score)[0] * spread, [-2.0, -1.0, 3.0])
    close(group_relative_advantage(score)[1], [0, 0, 0])


@pytest.mark.parametrize("advantage", [leave_one_out_advantage, group_relative_advantage])
def test_one_response_has_nothing_to_be_compared_with(advantage):
    with pytest.raises(ValueError, match="^score: got 1 response per prompt"):
        advantage(jnp.ones((3, 1)))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="^kind: got 'k4'"):
        kl_estimate(jnp.zeros(1), jnp.zeros(1), "k4")
    with pytest.raises(ValueError, match="^place: got 'pad'"):
        token_rewards(jnp.zeros((1, 1)), jnp.zeros(1), jnp.ones((1, 1), bool), 0.1, "pad")
