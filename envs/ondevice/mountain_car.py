"""An underpowered car with the dynamics of Gymnasium's MountainCarContinuous-v0."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from envs.ondevice.physics import Scalar, outcome, start_obs
from mbrl.spaces import box
from mbrl.types import MDP, Array, EnvSpec, Key, Outcome


class MountainCarParams(NamedTuple):
    """Constants of the task; `power` and `gravity` are velocity per step."""

    power: Scalar = 0.0015
    gravity: Scalar = 0.0025
    min_position: Scalar = -1.2
    max_position: Scalar = 0.6
    max_speed: Scalar = 0.07
    goal_position: Scalar = 0.45
    goal_velocity: Scalar = 0.0


class MountainCarState(NamedTuple):
    """Position along the track and velocity, both [B]."""

    position: Array
    velocity: Array


DEFAULT = MountainCarParams()


def make(constants: MountainCarParams = DEFAULT) -> MDP:
    """Make the mountain car: reward 100 at the goal, minus 0.1 times the squared action.

    Args:
      constants: used where `params` is None, and for the spaces.

    Returns:
      `MDP` with observation `[position, velocity]` and action `[force]` in [-1, 1].
    """

    def init(
        params: MountainCarParams | None, key: Key, obs: Array | None = None, batch: int = 1
    ) -> MountainCarState:
        if obs is not None:
            obs = start_obs(spec, obs)
            return MountainCarState(obs[:, 0], obs[:, 1])
        position = jax.random.uniform(key, (batch,), minval=-0.6, maxval=-0.4)
        return MountainCarState(position, jnp.zeros_like(position))

    def step(
        params: MountainCarParams | None, key: Key, state: MountainCarState, action: Array
    ) -> tuple[MountainCarState, Outcome]:
        p = constants if params is None else params
        push = p.power * jnp.clip(action[:, 0], -1.0, 1.0)
        v = state.velocity + push - p.gravity * jnp.cos(3 * state.position)
        v = jnp.clip(v, -p.max_speed, p.max_speed)
        x = jnp.clip(state.position + v, p.min_position, p.max_position)
        v = jnp.where((x <= p.min_position) & (v < 0), 0.0, v)
        reached = (x >= p.goal_position) & (v >= p.goal_velocity)
        reward = jnp.where(reached, 100.0, 0.0) - 0.1 * action[:, 0] ** 2
        return MountainCarState(x, v), outcome(reward, reached)

    def observe(params: MountainCarParams | None, state: MountainCarState) -> Array:
        return jnp.stack(state, -1)

    c = constants
    low, high = np.array([c.min_position, -c.max_speed]), np.array([c.max_position, c.max_speed])
    spec = EnvSpec("device/MountainCarContinuous", box(low, high), box(-1.0, 1.0, (1,)), 999)
    return MDP(init, step, observe, spec)
