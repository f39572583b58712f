"""Pendulum swing-up with the dynamics of Gymnasium's Pendulum-v1, and one with a rare reward."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from envs.ondevice.physics import Scalar, outcome, start_obs, wrap_angle
from mbrl.spaces import box
from mbrl.types import MDP, Array, EnvSpec, Key, Outcome


class PendulumParams(NamedTuple):
    """Physics constants, in SI units."""

    gravity: Scalar = 10.0
    mass: Scalar = 1.0
    length: Scalar = 1.0
    dt: Scalar = 0.05
    max_torque: Scalar = 2.0
    max_speed: Scalar = 8.0


class PendulumState(NamedTuple):
    """Angle from upright in `[-pi, pi)` and its rate, both [B]."""

    angle: Array
    speed: Array


DEFAULT = PendulumParams()


def make(constants: PendulumParams = DEFAULT, sparse: bool = False) -> MDP:
    """Make the pendulum: keep it upright with little torque; it never terminates.

    The state keeps the angle wrapped, which changes no observation and no reward, and
    saves the float32 digits that a growing angle would lose.

    Args:
      constants: used where `params` is None, and for the spaces.
      sparse: begin at rest within 0.1 rad of the lowest point; reward 1 while the cosine of the
        angle is above 0.9, minus 0.1 for all of the torque, in its square. Who has never been
        up sees costs alone (after Curi et al. 2020, arXiv:2006.08684).

    Returns:
      `MDP` with observation `[cos, sin, speed]` and action `[torque]`.
    """

    def init(
        params: PendulumParams | None, key: Key, obs: Array | None = None, batch: int = 1
    ) -> PendulumState:
        if obs is not None:
            obs = start_obs(spec, obs)
            return PendulumState(jnp.arctan2(obs[:, 1], obs[:, 0]), obs[:, 2])
        u = jax.random.uniform(key, (batch, 2), minval=-1.0, maxval=1.0)
        if sparse:
            return PendulumState(wrap_angle(jnp.pi + 0.1 * u[:, 0]), jnp.zeros(batch))
        return PendulumState(jnp.pi * u[:, 0], u[:, 1])

    def step(
        params: PendulumParams | None, key: Key, state: PendulumState, action: Array
    ) -> tuple[PendulumState, Outcome]:
        p = constants if params is None else params
        torque = jnp.clip(action[:, 0], -p.max_torque, p.max_torque)
        angle, speed = wrap_angle(state.angle), state.speed
        if sparse:
            cost = 0.1 * (torque / p.max_torque) ** 2 - (jnp.cos(angle) > 0.9)
        else:
            cost = angle**2 + 0.1 * speed**2 + 0.001 * torque**2
        gravity = 1.5 * p.gravity / p.length * jnp.sin(angle)
        speed = speed + (gravity + 3.0 / (p.mass * p.length**2) * torque) * p.dt
        speed = jnp.clip(speed, -p.max_speed, p.max_speed)
        return PendulumState(wrap_angle(angle + speed * p.dt), speed), outcome(-cost)

    def observe(params: PendulumParams | None, state: PendulumState) -> Array:
        return jnp.stack([jnp.cos(state.angle), jnp.sin(state.angle), state.speed], -1)

    high = np.array([1.0, 1.0, constants.max_speed])
    spec = EnvSpec(
        "device/PendulumSparse" if sparse else "device/Pendulum",
        box(-high, high),
        box(-constants.max_torque, constants.max_torque, (1,)),
        max_episode_steps=200,
    )
    return MDP(init, step, observe, spec)
