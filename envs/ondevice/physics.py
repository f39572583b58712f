"""What the simulators share: outcomes, angles and integration."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from mbrl.types import Array, Box, EnvSpec, Outcome

Scalar = float | Array


def outcome(reward: Array, terminal: Array | None = None) -> Outcome:
    """Make the outcome of a simulator, which is certain of what it does.

    Args:
      reward: [B].
      terminal: [B] bool; None = the task never terminates.

    Returns:
      `Outcome` with a discount of 0 where `terminal` holds and no uncertainty.
    """
    reward = reward.astype(jnp.float32)
    zeros = jnp.zeros_like(reward)
    discount = zeros + 1.0 if terminal is None else 1.0 - terminal.astype(jnp.float32)
    return Outcome(reward, discount, zeros)


def start_obs(spec: EnvSpec, obs: Array) -> Array:
    """Check observations to start from.

    Returns:
      [B, *shape] float32.

    Raises:
      ValueError: for another shape than a batch of observations.
    """
    obs = jnp.asarray(obs, jnp.float32)
    space = spec.observation
    if isinstance(space, Box) and (obs.ndim == 0 or obs.shape[1:] != space.shape):
        raise ValueError(
            f"obs: {spec.id} got shape {obs.shape}, expected {('B', *space.shape)}; add the batch "
            "axis with obs[None] if it is missing"
        )
    return obs


def wrap_angle(angle: Array) -> Array:
    """Return the angle in `[-pi, pi)` that points the same way."""
    return jnp.mod(angle + jnp.pi, 2 * jnp.pi) - jnp.pi


def rk4(derivative: Callable[[Array], Array], y: Array, dt: Scalar) -> Array:
    """Take one step of the classic fourth-order Runge-Kutta method.

    Args:
      derivative: `y -> dy/dt`, both [B, D].
      y: [B, D] state.
      dt: step in seconds.

    Returns:
      [B, D] state after `dt`.
    """
    k1 = derivative(y)
    k2 = derivative(y + 0.5 * dt * k1)
    k3 = derivative(y + 0.5 * dt * k2)
    k4 = derivative(y + dt * k3)
    return y + dt / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)
