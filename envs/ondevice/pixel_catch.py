"""Catch as images: the smallest task that has to be seen."""

from __future__ import annotations

import jax.numpy as jnp

from envs.ondevice import catch
from envs.ondevice.catch import CatchState
from envs.ondevice.images import GREEN, RED, board_space, draw, locate
from mbrl.types import MDP, Array, EnvSpec, Key


def make(size: int = 8, cell: int = 2) -> MDP:
    """Make Catch on a square board, seen as an image: red ball, green paddle.

    Dynamics and rewards are those of `catch.make(size, size)`.

    Args:
      size: cells per side of the board, at least 2.
      cell: pixels per side of a cell; an image has `size * cell` pixels per side.

    Returns:
      `MDP` with uint8 images `[size * cell, size * cell, 3]` as observation; actions 0, 1,
      2 move the paddle left, not at all and right. It has no parameters.

    Raises:
      ValueError: for a board without room, or cells without a pixel.
    """
    space = board_space(size, cell)
    board = catch.make(size, size)

    def init(params: None, key: Key, obs: Array | None = None, batch: int = 1) -> CatchState:
        if obs is None:
            return board.init(params, key, batch=batch)
        image = jnp.asarray(obs)
        row, column = locate(image, RED, size)
        _, paddle = locate(image, GREEN, size)
        return CatchState(row, column, paddle)

    def observe(params: None, state: CatchState) -> Array:
        floor = jnp.full_like(state.paddle, size - 1)
        return draw({RED: (state.row, state.column), GREEN: (floor, state.paddle)}, size, cell)

    spec = EnvSpec("device/PixelCatch", space, board.spec.action, board.spec.max_episode_steps)
    return MDP(init, board.step, observe, spec)
