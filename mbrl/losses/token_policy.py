"""What turns scored sequences into advantages of their tokens, under a penalty on divergence.

A response is [B, L] tokens, `response` bool [B, L] marks those that were written, the one that
ended it included. They come first: behind them is padding.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from mbrl import returns
from mbrl.types import Array

KlKind = Literal["k1", "k2", "k3"]
ScorePlace = Literal["end", "after"]


def kl_estimate(log_prob: Array, reference: Array, kind: KlKind = "k1") -> Array:
    """Estimate KL(policy || reference) from tokens that the policy has drawn.

    Args:
      log_prob: [...] of the tokens under the policy, at the temperature they were drawn with.
      reference: [...] under the reference, at the same temperature.
      kind: 'k1' = log-ratio, unbiased, and the only one whose gradient as a reward is that of
        the divergence; 'k2' = half its square, biased, never negative; 'k3' = unbiased, never
        negative.

    Returns:
      [...] nats.

    Raises:
      ValueError: for an unknown kind.

    Reference: Approximating KL Divergence, Schulman 2020.
    """
    if kind not in get_args(KlKind):
        raise ValueError(f"kind: got {kind!r}, expected one of {list(get_args(KlKind))}")
    log_ratio = log_prob - reference
    match kind:
        case "k2":
            return 0.5 * jnp.square(log_ratio)
        case "k3":
            return jnp.expm1(-log_ratio) + log_ratio
    return log_ratio


def exact_kl(logits: Array, reference: Array) -> Array:
    """Compute KL(policy || reference) over the whole vocabulary.

    Args:
      logits: [..., V] of the policy; -inf = never.
      reference: [..., V] of the reference; finite where those of the policy are.

    Returns:
      [...] nats.
    """
    log_prob = jax.nn.log_softmax(logits)
    never = jnp.isneginf(logits)
    # Not multiplied by 0: infinity times 0 is no number.
    log_ratio = jnp.where(never, 0.0, log_prob - jax.nn.log_softmax(reference))
    return jnp.sum(jnp.where(never, 0.0, jnp.exp(log_prob)) * log_ratio, -1)


def adapt_kl_coef(
    coef: Array,
    kl: Array,
    sequences: Array | int,
    target: Array | float = 6.0,
    horizon: Array | float = 10_000.0,
) -> Array:
    """Raise the weight of the divergence where it is above its target, lower it below.

    Args:
      coef: scalar, all the state there is.
      kl: scalar, mean divergence of the newest sequences, in nats per sequence.
      sequences: how many there were.
      target: of the divergence, in nats per sequence; 0 = the weight stays as it is.
      horizon: sequences over which an error of 100 % would change the weight by that much;
        errors beyond 20 % count as that.

    Returns:
      Scalar, the next weight.

    Reference: Fine-Tuning Language Models from Human Preferences (arXiv:1909.08593), section 2.2.
    """
    target = jnp.asarray(target, jnp.float32)
    error = jnp.clip(kl / jnp.where(target > 0.0, target, 1.0) - 1.0, -0.2, 0.2)
    return coef * (1.0 + jnp.where(target > 0.0, error, 0.0) * sequences / horizon)


def until_stop(tokens: Array, stop: int, least: int = 0) -> Array:
    """Mark the tokens of a response up to the first stop token, which is included.

    Args:
      tokens: int [B, L].
      stop: the token that ends a response.
      least: tokens before which nothing stops.

    Returns:
      bool [B, L]; all of them where nothing stops.
    """
    stops = (tokens == stop) & (jnp.arange(tokens.shape[-1]) >= least)
    return jnp.cumsum(stops, -1) - stops == 0


def penalize_unended(
    score: Array, ended: Array, penalty: Array | float, replace: bool = False
) -> Array:
    """Make responses that did not end cost something.

    Args:
      score: [B].
      ended: bool [B], the response has a stop token.
      penalty: what the others lose, in units of score.
      replace: score them `-penalty`, whatever they say.

    Returns:
      [B].
    """
    return jnp.where(ended, score, -penalty if replace else score - penalty)


def token_rewards(
    kl: Array,
    score: Array,
    response: Array,
    kl_coef: Array | float,
    place: ScorePlace = "end",
) -> Array:
    """Pay for divergence at every token, and for the whole response at its end.

    Args:
      kl: [B, L] divergence at each token, in nats.
      score: [B] of the responses.
      response: bool [B, L].
      kl_coef: units of score per nat.
      place: 'end' = the last token of the response, such as EOS; 'after' = the first of the
        padding behind it where there is any, as TRL does.

    Returns:
      [B, L]; 0 in the padding, but for a score placed there.

    Raises:
      ValueError: for an unknown place.
    """
    if place not in get_args(ScorePlace):
        raise ValueError(f"place: got {place!r}, expected one of {list(get_args(ScorePlace))}")
    at = last_position(response) + (1 if place == "after" else 0)
    at = jnp.minimum(at, response.shape[-1] - 1)
    scored = jnp.arange(response.shape[-1]) == at[:, None]
    return jnp.where(response, -kl_coef * kl, 0.0) + jnp.where(scored, score[:, None], 0.0)


def last_position(response: Array) -> Array:
    """Return the place int [B] of the last token of each response [B, L]; 0 where it is empty."""
    return jnp.maximum(response.sum(-1) - 1, 0)


def token_advantages(
    reward: Array,
    value: Array,
    steps: Array,
    discount: Array | float = 1.0,
    trace: Array | float = 0.95,
) -> tuple[Array, Array]:
    """Compute generalized advantages of tokens, and what values should have been.

    Args:
      reward: [B, L].
      value: [B, L] before each token; it may be anything where there is no step.
      steps: bool [B, L], tokens that count: those of the response, which come first. With
        scores placed after it, one more.
      discount: per token.
      trace: lambda, per token.

    Returns:
      `(advantage, target)` [B, L], 0 where there is no step. Nothing is worth anything behind
      the last step.
    """
    value = jnp.where(steps, value, 0.0)
    after = jnp.pad(value[:, 1:], ((0, 0), (0, 1)))
    reward = jnp.where(steps, reward, 0.0)
    discounts = discount * steps.astype(jnp.float32)
    advantage = jax.vmap(returns.gae, (0, 0, 0, 0, None))(reward, discounts, value, after, trace)
    return advantage, advantage + value


def leave_one_out_advantage(score: Array) -> Array:
    """Compare each response with the mean of the others to the same prompt (RLOO).

    Args:
      score: [G, K] of K >= 2 responses to each of G prompts.

    Returns:
      [G, K] in units of score; unbiased, since no baseline depends on its own response.

    Raises:
      ValueError: for a single response.

    Reference: Back to Basics, Ahmadian et al. 2024 (arXiv:2402.14740).
    """
    size = _group(score)
    return (score - score.mean(-1, keepdims=True)) * (size / (size - 1))


def group_relative_advantage(score: Array, scale: bool = True) -> Array:
    """Standardize each response among those to the same prompt (GRPO).

    Args:
      score: [G, K] of K >= 2 responses to each of G prompts.
      scale: divide by their deviation (unbiased variance); without it prompts count by how much
        their responses differ (Dr. GRPO).

    Returns:
      [G, K]; 0 where all score the same.

    Raises:
      ValueError: for a single response.

    Reference: DeepSeekMath (arXiv:2402.03300); Understanding R1-Zero-Like Training
    (arXiv:2503.20783) for `scale`.
    """
    _group(score)
    centered = score - score.mean(-1, keepdims=True)
    return centered / (score.std(-1, keepdims=True, ddof=1) + 1e-4) if scale else centered


def _group(score: Array) -> int:
    size = score.shape[-1]
    if size < 2:
        raise ValueError(
            f"score: got {size} response per prompt, expected at least 2 to compare; sample more "
            "responses to every prompt"
        )
    return size
