"""Catch: move a paddle under a falling ball."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from envs.ondevice.physics import outcome, start_obs
from mbrl.spaces import box
from mbrl.types import MDP, Array, Discrete, EnvSpec, Key, Outcome


class CatchState(NamedTuple):
    """Row and column of the ball, column of the paddle; int32 [B]."""

    row: Array
    column: Array
    paddle: Array


def make(rows: int = 10, columns: int = 5) -> MDP:
    """Make Catch: +1 when the ball lands on the paddle, -1 when beside it.

    The ball falls one row a step from a random column of the top row and the episode ends
    in the bottom row, where the paddle is; a finished episode stays as it is, at reward 0.

    Reference: bsuite, Osband et al. 2019 (arXiv:1908.03568).

    Args:
      rows: height of the board, at least 2.
      columns: width of the board, at least 1.

    Returns:
      `MDP` with a float32 board `[rows, columns]` as observation; actions 0, 1, 2 move the
      paddle left, not at all and right. It has no parameters.

    Raises:
      ValueError: for a board without room.
    """
    if rows < 2 or columns < 1:
        raise ValueError(f"rows, columns: expected at least 2 x 1, got {rows} x {columns}")
    bottom = rows - 1

    def init(params: None, key: Key, obs: Array | None = None, batch: int = 1) -> CatchState:
        if obs is None:
            column = jax.random.randint(key, (batch,), 0, columns)
            return CatchState(jnp.zeros_like(column), column, jnp.full_like(column, columns // 2))
        # Above the bottom row a board is unambiguous; a finished one may show two pieces
        # there, and no longer matters.
        board = start_obs(spec, obs)
        falling, floor = board[:, :bottom], board[:, bottom]
        paddle = jnp.argmax(floor, -1).astype(jnp.int32)
        last = (columns - 1 - jnp.argmax(floor[:, ::-1], -1)).astype(jnp.int32)
        in_air = jnp.any(falling > 0, (1, 2))
        row = jnp.argmax(jnp.any(falling > 0, 2), -1).astype(jnp.int32)
        column = jnp.argmax(jnp.any(falling > 0, 1), -1).astype(jnp.int32)
        return CatchState(jnp.where(in_air, row, bottom), jnp.where(in_air, column, last), paddle)

    def step(
        params: None, key: Key, state: CatchState, action: Array
    ) -> tuple[CatchState, Outcome]:
        over = state.row >= bottom
        paddle = jnp.clip(state.paddle + action.astype(jnp.int32) - 1, 0, columns - 1)
        paddle = jnp.where(over, state.paddle, paddle)
        row = jnp.where(over, state.row, state.row + 1)
        landed = row >= bottom
        caught = jnp.where(paddle == state.column, 1.0, -1.0)
        reward = jnp.where(landed & ~over, caught, 0.0)
        return CatchState(row, state.column, paddle), outcome(reward, landed)

    def observe(params: None, state: CatchState) -> Array:
        cells = jnp.arange(rows * columns)
        ball = cells == (state.row * columns + state.column)[:, None]
        paddle = cells == (bottom * columns + state.paddle)[:, None]
        return (ball | paddle).astype(jnp.float32).reshape(-1, rows, columns)

    spec = EnvSpec("device/Catch", box(0.0, 1.0, (rows, columns)), Discrete(3), 2 * rows)
    return MDP(init, step, observe, spec)
