"""An empty room with a reward in one cell: the smallest sparse-reward task."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from envs.ondevice.physics import outcome, start_obs
from mbrl.spaces import box
from mbrl.types import MDP, Array, Discrete, EnvSpec, Key, Outcome

MOVES = np.array([[-1, 0], [1, 0], [0, -1], [0, 1]], np.int32)
"""Row and column steps of the actions 0 up, 1 down, 2 left, 3 right."""


class GridWorldParams(NamedTuple):
    """Cells as (row, column); (0, 0) is the upper left corner."""

    start: Array | tuple[int, int]
    goal: Array | tuple[int, int]


class GridWorldState(NamedTuple):
    """Row and column of the agent; int32 [B]."""

    row: Array
    column: Array


def corners(size: int) -> GridWorldParams:
    """Return the default parameters: from the upper left to the lower right corner."""
    return GridWorldParams((0, 0), (size - 1, size - 1))


def make(size: int = 5, max_episode_steps: int = 100) -> MDP:
    """Make a `size` x `size` room: reward 1 on entering the goal, where episodes end.

    Walls stop a move; an agent at the goal stays there, at reward 0.

    Args:
      size: cells per side, at least 2.
      max_episode_steps: steps until truncation.

    Returns:
      `MDP` with a one-hot cell `[size * size]` as observation and four actions. Its
      parameters are `GridWorldParams`; None = `corners(size)`.

    Raises:
      ValueError: for a room without a second cell.
    """
    if size < 2:
        raise ValueError(f"size: expected at least 2, got {size}")
    default = corners(size)

    def init(
        params: GridWorldParams | None, key: Key, obs: Array | None = None, batch: int = 1
    ) -> GridWorldState:
        if obs is not None:
            cell = jnp.argmax(start_obs(spec, obs), -1).astype(jnp.int32)
            return GridWorldState(cell // size, cell % size)
        start = jnp.asarray((default if params is None else params).start, jnp.int32)
        return GridWorldState(*(jnp.full((batch,), start[i], jnp.int32) for i in range(2)))

    def at_goal(params: GridWorldParams | None, row: Array, column: Array) -> Array:
        goal = jnp.asarray((default if params is None else params).goal, jnp.int32)
        return (row == goal[0]) & (column == goal[1])

    def step(
        params: GridWorldParams | None, key: Key, state: GridWorldState, action: Array
    ) -> tuple[GridWorldState, Outcome]:
        over = at_goal(params, state.row, state.column)
        move = jnp.where(over[:, None], 0, jnp.asarray(MOVES)[action])
        row = jnp.clip(state.row + move[:, 0], 0, size - 1)
        column = jnp.clip(state.column + move[:, 1], 0, size - 1)
        arrived = at_goal(params, row, column)
        return GridWorldState(row, column), outcome(arrived & ~over, arrived)

    def observe(params: GridWorldParams | None, state: GridWorldState) -> Array:
        cell = state.row * size + state.column
        return (jnp.arange(size * size) == cell[:, None]).astype(jnp.float32)

    spec = EnvSpec(
        "device/GridWorld", box(0.0, 1.0, (size * size,)), Discrete(4), max_episode_steps
    )
    return MDP(init, step, observe, spec)
