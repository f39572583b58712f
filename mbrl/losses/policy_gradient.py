"""Losses of actors and critics."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mbrl.distributions import TwoHot
from mbrl.types import Array


def reinforce_loss(
    log_prob: Array, advantage: Array, entropy: Array, entropy_coef: Array | float, weight: Array
) -> Array:
    """Compute `-mean(weight (log_prob sg(advantage) + entropy_coef entropy))`.

    Args:
      log_prob: [...] log-probability of the actions taken.
      advantage: [...]; no gradient flows through it.
      entropy: [...] of the policy where they were taken, in nats.
      entropy_coef: bonus per nat.
      weight: [...]; no gradient flows through it.

    Returns:
      Scalar.
    """
    stop = jax.lax.stop_gradient
    gain = log_prob * stop(advantage) + entropy_coef * entropy
    return -jnp.mean(stop(weight) * gain)


def average(x: Array, weight: Array) -> Array:
    """Return the mean of `x` [...] weighted by `weight` [...], 0 where nothing counts."""
    return jnp.sum(weight * x) / jnp.maximum(jnp.sum(weight), 1e-8)


def whiten(x: Array, weight: Array, shift: bool = True, unbiased: bool = False) -> Array:
    """Shift and scale `x` to mean 0 and variance 1 over what counts.

    Args:
      x: [...].
      weight: [...] of each entry.
      shift: without it the mean is left as it was, as rewards need: a constant would pay for
        length.
      unbiased: variance of a sample, `n / (n - 1)` times that of the population; the weights
        then count entries.

    Returns:
      [...]; what does not count is transformed too.
    """
    mean, variance = average(x, weight), _variance(x, weight)
    if unbiased:
        count = jnp.sum(weight)
        variance = variance * count / jnp.maximum(count - 1.0, 1.0)
    scaled = (x - mean) * jax.lax.rsqrt(variance + 1e-8)
    return scaled if shift else scaled + mean


def clipped_surrogate_loss(
    log_prob: Array, old_log_prob: Array, advantage: Array, clip: Array | float, weight: Array
) -> Array:
    """Compute the negative clipped surrogate of PPO.

    Args:
      log_prob: [...] of the actions taken, under the policy that learns.
      old_log_prob: [...] under the policy that took them.
      advantage: [...].
      clip: distance from 1 at which a ratio of probabilities gains nothing more.
      weight: [...] of each entry.

    Returns:
      Scalar, a weighted mean.

    Reference: Proximal Policy Optimization Algorithms (arXiv 1707.06347).
    """
    ratio = jnp.exp(log_prob - old_log_prob)
    gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1.0 - clip, 1.0 + clip) * advantage)
    return -average(gain, weight)


def clipped_value_loss(
    value: Array, old_value: Array, target: Array, clip: Array | float, weight: Array
) -> Array:
    """Compute half of the squared error of values that may not move far at once.

    Args:
      value: [...] of the critic that learns.
      old_value: [...] before the update.
      target: [...] returns.
      clip: distance from `old_value` beyond which a value gains nothing; 0 = no limit.
      weight: [...] of each entry.

    Returns:
      Scalar, a weighted mean.
    """
    limit = jnp.where(jnp.asarray(clip) > 0.0, clip, jnp.inf)
    near = old_value + jnp.clip(value - old_value, -limit, limit)
    error = jnp.maximum(jnp.square(value - target), jnp.square(near - target))
    return 0.5 * average(error, weight)


def policy_change(log_prob: Array, old_log_prob: Array, weight: Array) -> Array:
    """Estimate the divergence KL(old || new) from actions of the old policy: never negative.

    Reference: Approximating KL Divergence, Schulman 2020 (the estimator k3).
    """
    log_ratio = log_prob - old_log_prob
    return average(jnp.expm1(log_ratio) - log_ratio, weight)


def explained(value: Array, target: Array, weight: Array) -> Array:
    """Return the share of the variance of `target` [...] that `value` [...] explains."""
    return 1.0 - _variance(target - value, weight) / jnp.maximum(_variance(target, weight), 1e-8)


def _variance(x: Array, weight: Array) -> Array:
    return average(jnp.square(x - average(x, weight)), weight)


def two_hot_critic_loss(
    critic: TwoHot, target: Array, slow_critic: TwoHot, weight: Array, slow_coef: float = 1.0
) -> Array:
    """Fit a value distribution to returns, and to the slow critic so that it moves slowly.

    Args:
      critic: logits [..., M].
      target: [...] returns; no gradient flows through them.
      slow_critic: logits [..., M] of the slowly following critic; likewise.
      weight: [...] of each entry; likewise.
      slow_coef: weight of the second term.

    Returns:
      Scalar, a mean over all entries.

    Reference: Mastering Diverse Domains through World Models (arXiv 2301.04104).
    """
    stop = jax.lax.stop_gradient
    log_prob = critic.log_prob(stop(target)) + slow_coef * critic.log_prob(stop(slow_critic.mean))
    return -jnp.mean(stop(weight) * log_prob)
