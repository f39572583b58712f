"""Losses of maximum-entropy actors, critics and temperatures.

Reference: Soft Actor-Critic Algorithms and Applications (arXiv 1812.05905).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mbrl.losses.policy_gradient import average
from mbrl.policies import Choices
from mbrl.types import Array


def soft_value(
    q: Array, choices: Choices, temperature: Array | float, pessimistic: bool = True
) -> Array:
    """Compute `E_a[q(a) - temperature log p(a)]` of the policy that `choices` come from.

    Args:
      q: [N, ..., S] of every critic and choice.
      choices: leaves [..., S].
      temperature: worth of a nat of entropy, in units of reward.
      pessimistic: take the least of the critics at every action, else their mean.

    Returns:
      [...] in units of reward.
    """
    agreed = q.min(0) if pessimistic else q.mean(0)
    return choices.expect(agreed - temperature * choices.log_prob)


def critic_target(
    reward: Array, is_terminal: Array, next_value: Array, discount: Array | float
) -> Array:
    """Compute one-step returns `r + discount (1 - is_terminal) v'`, without a gradient.

    Args:
      reward: [B] of the step.
      is_terminal: [B] whether, or how likely, the episode ended by itself with the step. One that
        was merely cut goes on.
      next_value: [B] of where the step has led.
      discount: per step.
    """
    return jax.lax.stop_gradient(reward + discount * (1.0 - is_terminal) * next_value)


def critic_loss(q: Array, target: Array, weight: Array) -> Array:
    """Compute half of the squared errors, summed over critics.

    Args:
      q: [N, B] of the actions taken; every critic has the same target, and a gradient of its own.
      target: [B].
      weight: [B] of each row.

    Returns:
      Scalar, a weighted mean over rows.
    """
    return average(0.5 * jnp.square(q - target).sum(0), weight)


def temperature_loss(log_temperature: Array, entropy: Array, target: Array | float) -> Array:
    """Return what raises the temperature while the entropy is below `target`, and lowers it above.

    The logarithm and not the temperature itself is multiplied: its steps have one size at any
    temperature.
    """
    return log_temperature * jax.lax.stop_gradient(entropy - target)
