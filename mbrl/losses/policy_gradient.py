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
