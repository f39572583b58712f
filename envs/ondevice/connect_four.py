"""Connect four: stones that fall, and two players who line them up."""

from __future__ import annotations

import jax.numpy as jnp

from envs.ondevice.boards import Rules, board_game, opposed
from mbrl.types import MDP, Array

ROWS, COLUMNS, LINE = 6, 7, 4


def make(opponent: str = "self") -> MDP:
    """Make connect four: four stones in a row, column or diagonal win.

    Rewards, views and illegal moves are those of `boards.board_game`, against an opponent those
    of `boards.against`.

    Args:
      opponent: 'self' for a task of two players; 'random' for one player.

    Returns:
      `MDP` with observation `{"board": [42, 2], "action_mask": [7]}`, row 0 above; action `a`
      drops a stone into column `a`, onto those that lie there. It has no parameters.

    Raises:
      ValueError: for another opponent.
    """

    def legal(taken: Array) -> Array:
        return ~taken[:, 0]

    def place(taken: Array, action: Array) -> Array:
        lowest = jnp.sum(~taken, 1, keepdims=True) - 1
        landing = jnp.arange(ROWS)[:, None] == lowest
        return landing & (jnp.arange(COLUMNS) == action[:, None, None])

    game = board_game("device/ConnectFour", Rules((ROWS, COLUMNS), LINE, COLUMNS, legal, place))
    return opposed(game, opponent, {})
