"""Tic-tac-toe: the smallest game of two players, with an opponent that never errs."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np

from envs.ondevice.boards import BoardState, Rules, board_game, has_line, opposed
from mbrl import spaces
from mbrl.types import MDP, Array, Discrete, Key

SIZE, CELLS = 3, 9
POWERS = 3 ** np.arange(CELLS)
"""Code of a position: the sum of 1 (own stone) or 2 (the other's) times the power of its cell."""


def make(opponent: str = "self") -> MDP:
    """Make tic-tac-toe: three stones in a row, column or diagonal win.

    Rewards, views and illegal moves are those of `boards.board_game`, against an opponent those
    of `boards.against`. The perfect opponent draws uniformly among all moves that keep the value
    of the game; with best play of both sides that is a draw.

    Args:
      opponent: 'self' for a task of two players; 'random' or 'perfect' for one player.

    Returns:
      `MDP` with observation `{"board": [9, 2], "action_mask": [9]}`; action `a` puts a stone
      in row `a // 3`, column `a % 3`. It has no parameters.

    Raises:
      ValueError: for another opponent.
    """

    def legal(taken: Array) -> Array:
        return ~taken.reshape(-1, CELLS)

    def place(taken: Array, action: Array) -> Array:
        return (jnp.arange(CELLS) == action[:, None]).reshape(taken.shape)

    game = board_game("device/TicTacToe", Rules((SIZE, SIZE), SIZE, CELLS, legal, place))
    return opposed(game, opponent, {"perfect": perfect_player})


def perfect_player(key: Key, state: BoardState) -> Array:
    """Draw uniformly among the optimal moves; [B], anything in a finished game."""
    cells = (state.own + 2 * state.other).reshape(-1, CELLS)
    optimal = jnp.asarray(optimal_moves())[cells @ jnp.asarray(POWERS)]
    return spaces.sample(Discrete(CELLS), key, state.over.shape, ~optimal)


@functools.cache
def optimal_moves() -> np.ndarray:
    """Solve the game backwards from full boards.

    Returns:
      [3^9, 9] bool: by the code of a position (see `POWERS`), the moves that are worth as much
      to the player to move as the best one.
    """
    cells = np.arange(3**CELLS)[:, None] // POWERS % 3
    empty = cells == 0
    # A stone more, seen by the other player: 1 and 2 change places.
    after = np.where(empty, (2 * cells % 3 @ POWERS)[:, None] + 2 * POWERS, 0)
    lost = has_line((cells == 2).reshape(-1, SIZE, SIZE), SIZE)
    value = -lost.astype(np.int8)
    for stones in reversed(range(CELLS)):
        codes = np.flatnonzero((empty.sum(1) == CELLS - stones) & ~lost)
        value[codes] = np.where(empty[codes], -value[after[codes]], -2).max(1)
    return empty & (-value[after] == value[:, None])
