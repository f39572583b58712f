"""Two-link swing-up with the dynamics of Gymnasium's Acrobot-v1."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from envs.ondevice.physics import Scalar, outcome, rk4, start_obs, wrap_angle
from mbrl.spaces import box
from mbrl.types import MDP, Array, Discrete, EnvSpec, Key, Outcome


class AcrobotParams(NamedTuple):
    """Physics constants, in SI units; `centre` is the distance of a link's centre of mass."""

    gravity: Scalar = 9.8
    mass_1: Scalar = 1.0
    mass_2: Scalar = 1.0
    length_1: Scalar = 1.0
    centre_1: Scalar = 0.5
    centre_2: Scalar = 0.5
    inertia: Scalar = 1.0
    torque: Scalar = 1.0
    dt: Scalar = 0.2
    max_spin_1: Scalar = 4 * math.pi
    max_spin_2: Scalar = 9 * math.pi


class AcrobotState(NamedTuple):
    """Angle of link 1 from hanging, of link 2 from link 1, and their rates, all [B]."""

    angle_1: Array
    angle_2: Array
    spin_1: Array
    spin_2: Array


DEFAULT = AcrobotParams()


def acceleration(params: AcrobotParams, y: Array, torque: Array) -> Array:
    """Return the time derivative of `[angle_1, angle_2, spin_1, spin_2]`.

    Reference: Sutton and Barto 1998, Reinforcement Learning, section 11.3.

    Args:
      params: physics constants.
      y: [B, 4] state.
      torque: [B] newton metres between the links.

    Returns:
      [B, 4].
    """
    p = params
    angle_1, angle_2, spin_1, spin_2 = (y[:, i] for i in range(4))
    arm, couple = p.mass_2 * p.centre_2, p.mass_2 * p.length_1 * p.centre_2
    cos_2, sin_2 = jnp.cos(angle_2), jnp.sin(angle_2)
    d1 = p.mass_1 * p.centre_1**2 + p.mass_2 * (p.length_1**2 + p.centre_2**2)
    d1 = d1 + 2 * couple * cos_2 + 2 * p.inertia
    d2 = arm * p.centre_2 + couple * cos_2 + p.inertia
    phi_2 = arm * p.gravity * jnp.sin(angle_1 + angle_2)
    lift = (p.mass_1 * p.centre_1 + p.mass_2 * p.length_1) * p.gravity * jnp.sin(angle_1)
    phi_1 = lift + phi_2 - couple * sin_2 * (spin_2**2 + 2 * spin_2 * spin_1)
    spin_2_rate = (torque + d2 / d1 * phi_1 - couple * spin_1**2 * sin_2 - phi_2) / (
        arm * p.centre_2 + p.inertia - d2**2 / d1
    )
    spin_1_rate = -(d2 * spin_2_rate + phi_1) / d1
    return jnp.stack([spin_1, spin_2, spin_1_rate, spin_2_rate], -1)


def make(constants: AcrobotParams = DEFAULT) -> MDP:
    """Make the acrobot: reward -1 a step until the tip is one link above the pivot.

    Args:
      constants: used where `params` is None, and for the spaces.

    Returns:
      `MDP` with observation `[cos 1, sin 1, cos 2, sin 2, spin 1, spin 2]`; actions 0, 1,
      2 apply a negative, no and a positive torque.
    """

    def init(
        params: AcrobotParams | None, key: Key, obs: Array | None = None, batch: int = 1
    ) -> AcrobotState:
        if obs is not None:
            obs = start_obs(spec, obs)
            angle_1 = jnp.arctan2(obs[:, 1], obs[:, 0])
            return AcrobotState(angle_1, jnp.arctan2(obs[:, 3], obs[:, 2]), obs[:, 4], obs[:, 5])
        y = jax.random.uniform(key, (batch, 4), minval=-0.1, maxval=0.1)
        return AcrobotState(y[:, 0], y[:, 1], y[:, 2], y[:, 3])

    def step(
        params: AcrobotParams | None, key: Key, state: AcrobotState, action: Array
    ) -> tuple[AcrobotState, Outcome]:
        p = constants if params is None else params
        torque = p.torque * (action.astype(jnp.float32) - 1.0)
        y = rk4(lambda y: acceleration(p, y, torque), jnp.stack(state, -1), p.dt)
        new = AcrobotState(
            wrap_angle(y[:, 0]),
            wrap_angle(y[:, 1]),
            jnp.clip(y[:, 2], -p.max_spin_1, p.max_spin_1),
            jnp.clip(y[:, 3], -p.max_spin_2, p.max_spin_2),
        )
        up = -jnp.cos(new.angle_1) - jnp.cos(new.angle_1 + new.angle_2) > 1.0
        return new, outcome(jnp.where(up, 0.0, -1.0), up)

    def observe(params: AcrobotParams | None, state: AcrobotState) -> Array:
        trig = [f(a) for a in (state.angle_1, state.angle_2) for f in (jnp.cos, jnp.sin)]
        return jnp.stack([*trig, state.spin_1, state.spin_2], -1)

    high = np.array([1.0, 1.0, 1.0, 1.0, constants.max_spin_1, constants.max_spin_2])
    spec = EnvSpec("device/Acrobot", box(-high, high), Discrete(3), max_episode_steps=500)
    return MDP(init, step, observe, spec)
