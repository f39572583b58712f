"""The empty room as images: a sparse reward that has to be seen."""

from __future__ import annotations

import jax.numpy as jnp

from envs.ondevice import gridworld
from envs.ondevice.gridworld import GridWorldParams, GridWorldState
from envs.ondevice.images import GREEN, RED, board_space, draw, locate
from mbrl.types import MDP, Array, EnvSpec, Key


def make(size: int = 8, cell: int = 2, max_episode_steps: int = 100) -> MDP:
    """Make a `size` x `size` room, seen as an image: red agent, green goal.

    Dynamics and rewards are those of `gridworld.make(size, max_episode_steps)`.

    Args:
      size: cells per side, at least 2.
      cell: pixels per side of a cell; an image has `size * cell` pixels per side.
      max_episode_steps: steps until truncation.

    Returns:
      `MDP` with uint8 images `[size * cell, size * cell, 3]` as observation and four
      actions. Its parameters are `GridWorldParams`; None = `gridworld.corners(size)`.

    Raises:
      ValueError: for a room without a second cell, or cells without a pixel.
    """
    space = board_space(size, cell)
    room = gridworld.make(size, max_episode_steps)

    def init(
        params: GridWorldParams | None, key: Key, obs: Array | None = None, batch: int = 1
    ) -> GridWorldState:
        if obs is None:
            return room.init(params, key, batch=batch)
        return GridWorldState(*locate(jnp.asarray(obs), RED, size))

    def observe(params: GridWorldParams | None, state: GridWorldState) -> Array:
        goal = jnp.asarray((gridworld.corners(size) if params is None else params).goal, jnp.int32)
        return draw({RED: (state.row, state.column), GREEN: (goal[:1], goal[1:])}, size, cell)

    spec = EnvSpec("device/PixelGridWorld", space, room.spec.action, room.spec.max_episode_steps)
    return MDP(init, room.step, observe, spec)
