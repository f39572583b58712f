"""Continuous cart-pole swing-up, the smallest task of the PETS paper."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from envs.ondevice.physics import Scalar, outcome, rk4, start_obs, wrap_angle
from mbrl.spaces import box
from mbrl.types import MDP, Array, EnvSpec, Key, Outcome


class SwingUpParams(NamedTuple):
    """Physics constants, in SI units; the pole is a uniform rod.

    Attributes:
      force: newtons at action 1.
      friction: of the cart, newton seconds per metre.
      rail: the cart stops dead at this distance from the middle.
      max_velocity: of the cart; only a bound for the observation space.
      max_spin: of the pole; only a bound for the observation space.
      noise: standard deviation of the start state.
    """

    gravity: Scalar = 9.81
    cart_mass: Scalar = 0.5
    pole_mass: Scalar = 0.5
    length: Scalar = 0.6
    force: Scalar = 15.0
    friction: Scalar = 0.1
    dt: Scalar = 0.04
    rail: Scalar = 3.0
    max_velocity: Scalar = 20.0
    max_spin: Scalar = 40.0
    noise: Scalar = 0.05


class SwingUpState(NamedTuple):
    """Cart position and velocity, pole angle from upright and its rate, all [B]."""

    position: Array
    velocity: Array
    angle: Array
    spin: Array


DEFAULT = SwingUpParams()


def acceleration(params: SwingUpParams, y: Array, force: Array) -> Array:
    """Return the time derivative of `[position, velocity, angle, spin]`.

    The equations of motion of a rod (mass m, length l, centre at l/2) on a cart (mass M):
    `(M + m) x'' + m l/2 (cos a a'' - sin a a'^2) = F - b x'` and
    `l/2 cos a x'' + l^2/3 a'' = g l/2 sin a`.

    Args:
      params: physics constants.
      y: [B, 4] state.
      force: [B] newtons on the cart.

    Returns:
      [B, 4].
    """
    v, angle, spin = y[:, 1], y[:, 2], y[:, 3]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    mass, moment = params.cart_mass + params.pole_mass, 0.5 * params.pole_mass * params.length
    pull = force - params.friction * v + moment * sin * spin**2
    v_rate = (pull - 0.75 * params.pole_mass * params.gravity * sin * cos) / (
        mass - 0.75 * params.pole_mass * cos**2
    )
    spin_rate = 1.5 / params.length * (params.gravity * sin - cos * v_rate)
    return jnp.stack([v, v_rate, spin, spin_rate], -1)


def make(constants: SwingUpParams = DEFAULT) -> MDP:
    """Make the swing-up: bring the tip above the middle of the rail and keep it there.

    The reward is `exp(-|tip - goal|^2 / l^2) - 0.01 a^2` of the state that was reached;
    a trial starts hanging down and never terminates.

    Reference: PETS, Chua et al. 2018 (arXiv:1805.12114).

    Args:
      constants: used where `params` is None, and for the spaces.

    Returns:
      `MDP` with observation `[x, x', cos, sin, spin]` and action `[force]` in [-1, 1].
    """

    def init(
        params: SwingUpParams | None, key: Key, obs: Array | None = None, batch: int = 1
    ) -> SwingUpState:
        p = constants if params is None else params
        if obs is not None:
            obs = start_obs(spec, obs)
            angle = jnp.arctan2(obs[:, 3], obs[:, 2])
            return SwingUpState(obs[:, 0], obs[:, 1], angle, obs[:, 4])
        y = p.noise * jax.random.normal(key, (batch, 4)) + jnp.array([0.0, 0.0, jnp.pi, 0.0])
        return SwingUpState(y[:, 0], y[:, 1], wrap_angle(y[:, 2]), y[:, 3])

    def step(
        params: SwingUpParams | None, key: Key, state: SwingUpState, action: Array
    ) -> tuple[SwingUpState, Outcome]:
        p = constants if params is None else params
        control = jnp.clip(action[:, 0], -1.0, 1.0)
        y = rk4(lambda y: acceleration(p, y, p.force * control), jnp.stack(state, -1), p.dt)
        x, v = (
            jnp.clip(y[:, 0], -p.rail, p.rail),
            jnp.clip(y[:, 1], -p.max_velocity, p.max_velocity),
        )
        v = jnp.where((jnp.abs(y[:, 0]) > p.rail) & (v * x > 0), 0.0, v)
        spin = jnp.clip(y[:, 3], -p.max_spin, p.max_spin)
        new = SwingUpState(x, v, wrap_angle(y[:, 2]), spin)
        miss = (x + p.length * jnp.sin(new.angle)) ** 2 + (
            p.length * jnp.cos(new.angle) - p.length
        ) ** 2
        return new, outcome(jnp.exp(-miss / p.length**2) - 0.01 * control**2)

    def observe(params: SwingUpParams | None, state: SwingUpState) -> Array:
        cos, sin = jnp.cos(state.angle), jnp.sin(state.angle)
        return jnp.stack([state.position, state.velocity, cos, sin, state.spin], -1)

    c = constants
    high = np.array([c.rail, c.max_velocity, 1.0, 1.0, c.max_spin])
    spec = EnvSpec("device/CartPoleSwingUp", box(-high, high), box(-1.0, 1.0, (1,)), 200)
    return MDP(init, step, observe, spec)
