"""Pole balancing with the dynamics of Gymnasium's CartPole-v1."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from envs.ondevice.physics import Scalar, outcome, start_obs
from mbrl.spaces import box
from mbrl.types import MDP, Array, Discrete, EnvSpec, Key, Outcome, reset_rows


class CartPoleParams(NamedTuple):
    """Physics constants, in SI units; `half_length` is that of the pole."""

    gravity: Scalar = 9.8
    cart_mass: Scalar = 1.0
    pole_mass: Scalar = 0.1
    half_length: Scalar = 0.5
    force: Scalar = 10.0
    dt: Scalar = 0.02
    max_position: Scalar = 2.4
    max_angle: Scalar = 12 * 2 * math.pi / 360


class CartPoleState(NamedTuple):
    """Cart position and velocity, pole angle from upright and its rate, all [B]."""

    position: Array
    velocity: Array
    angle: Array
    spin: Array


DEFAULT = CartPoleParams()


def make(constants: CartPoleParams = DEFAULT, fixed: int | None = None) -> MDP:
    """Make pole balancing: reward 1 a step until the pole falls or the cart leaves.

    Args:
      constants: used where `params` is None, and for the spaces.
      fixed: steps of every episode. Nothing ends it earlier, so that its length tells nothing of
        its reward: what has fallen stays where it is, for a reward of 0. None = as in Gymnasium.

    Returns:
      `MDP` with the four state variables as observation; action 0 pushes left, 1 right.
    """

    def init(
        params: CartPoleParams | None, key: Key, obs: Array | None = None, batch: int = 1
    ) -> CartPoleState:
        if obs is None:
            obs = jax.random.uniform(key, (batch, 4), minval=-0.05, maxval=0.05)
        obs = start_obs(spec, obs)
        return CartPoleState(obs[:, 0], obs[:, 1], obs[:, 2], obs[:, 3])

    def step(
        params: CartPoleParams | None, key: Key, state: CartPoleState, action: Array
    ) -> tuple[CartPoleState, Outcome]:
        p = constants if params is None else params
        x, v, angle, spin = state
        force = jnp.where(action == 1, p.force, -p.force)
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        mass, moment = p.cart_mass + p.pole_mass, p.pole_mass * p.half_length
        push = (force + moment * spin**2 * sin) / mass
        spin_rate = (p.gravity * sin - cos * push) / (
            p.half_length * (4.0 / 3.0 - p.pole_mass * cos**2 / mass)
        )
        acceleration = push - moment * spin_rate * cos / mass
        new = CartPoleState(
            x + p.dt * v, v + p.dt * acceleration, angle + p.dt * spin, spin + p.dt * spin_rate
        )
        if fixed:
            down = fallen(p, state)
            return reset_rows(down, state, new), outcome(1.0 - (down | fallen(p, new)))
        return new, outcome(jnp.ones_like(x), fallen(p, new))

    def fallen(p: CartPoleParams, state: CartPoleState) -> Array:
        return (jnp.abs(state.position) > p.max_position) | (jnp.abs(state.angle) > p.max_angle)

    def observe(params: CartPoleParams | None, state: CartPoleState) -> Array:
        return jnp.stack(state, -1)

    high = np.array([2 * constants.max_position, np.inf, 2 * constants.max_angle, np.inf])
    spec = EnvSpec("device/CartPole", box(-high, high), Discrete(2), max_episode_steps=500)
    if fixed:
        spec = spec._replace(id="device/CartPoleFixed", max_episode_steps=fixed)
    return MDP(init, step, observe, spec)
