"""What two-player board games share: alternating moves, lines of stones, and opponents."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from envs.ondevice.physics import outcome, start_obs
from mbrl import spaces
from mbrl.spaces import ACTION_MASK, box
from mbrl.types import MDP, Array, Discrete, EnvSpec, Key, Outcome, reset_rows


class BoardState(NamedTuple):
    """Stones as the player to move sees them, and whether the game is over.

    Attributes:
      own: [B, rows, columns] bool, stones of the player to move.
      other: [B, rows, columns] bool, those of the player who has just moved.
      over: [B] bool.
    """

    own: Array
    other: Array
    over: Array


class Rules(NamedTuple):
    """What tells one board game from another.

    Attributes:
      shape: rows and columns.
      line: stones in a row, column or diagonal that win.
      num_actions: moves A that there are.
      legal: `(taken [B, rows, columns]) -> [B, A]` bool; none is on a full board.
      place: `(taken, action [B]) -> [B, rows, columns]` bool, the cell that a legal move takes.
    """

    shape: tuple[int, int]
    line: int
    num_actions: int
    legal: Callable[[Array], Array]
    place: Callable[[Array, Array], Array]


Reply = Callable[[Key, BoardState], Array]
"""A player: `(key, state) -> action [B]`."""


def has_line(stones: Any, length: int) -> Any:
    """Find `length` stones in a row, column or diagonal.

    Args:
      stones: [B, rows, columns] bool, jax or numpy; at least `length` rows and columns.
      length: of a line.

    Returns:
      [B] bool.
    """
    rows, columns = stones.shape[1:]
    reach = length - 1
    found = []
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        height, width = rows - down * reach, columns - abs(right) * reach
        corners = [(i * down, i * right + reach * (right < 0)) for i in range(length)]
        parts = [stones[:, top : top + height, left : left + width] for top, left in corners]
        found.append(functools.reduce(operator.and_, parts).any((1, 2)))
    return functools.reduce(operator.or_, found)


def board_game(id: str, rules: Rules) -> MDP:
    """Make the game that two players play by `rules`, moving in turn.

    Each state is seen by the player to move, so that the planes swap at every step. The reward
    belongs to the player who has just moved: 1 for completing a line, which ends the game, and -1
    for an illegal move, which puts no stone and loses at once. A full board ends the game at
    reward 0. A finished game stays as it is, at reward 0, and has no legal move.

    Args:
      id: name of the environment.
      rules: see `Rules`.

    Returns:
      `MDP` of two players without parameters, with a Dict as observation: `board` [rows *
      columns, 2], the stones of the player to move and those of the other, row by row (rank
      three would be an image, and too small for convolutions); and `action_mask` [A], 1 where a
      move is legal. Both are float32. No game reaches the limit of its length without
      being over.
    """
    rows, columns = rules.shape

    def init(params: None, key: Key, obs: Any = None, batch: int = 1) -> BoardState:
        if obs is None:
            empty = jnp.zeros((batch, rows, columns), bool)
            return BoardState(empty, empty, jnp.zeros(batch, bool))
        seen = _entries(spec, obs)
        board = (seen["board"] > 0).reshape(-1, rows, columns, 2)
        # An illegal move ends a game without a trace on the board.
        return BoardState(board[..., 0], board[..., 1], ~jnp.any(seen[ACTION_MASK] > 0, -1))

    def legal_moves(state: BoardState) -> Array:
        return rules.legal(state.own | state.other) & ~state.over[:, None]

    def step(
        params: None, key: Key, state: BoardState, action: Array
    ) -> tuple[BoardState, Outcome]:
        chosen = jnp.arange(rules.num_actions) == action[:, None]
        legal = jnp.any(legal_moves(state) & chosen, -1)
        stone = rules.place(state.own | state.other, action) & legal[:, None, None]
        own = state.own | stone
        won = legal & has_line(own, rules.line)
        full = ~jnp.any(rules.legal(own | state.other), -1)
        reward = jnp.where(state.over, 0.0, jnp.where(legal, won, -1.0))
        moved = BoardState(state.other, own, state.over | won | full | ~legal)
        return reset_rows(state.over, state, moved), outcome(reward, moved.over)

    def observe(params: None, state: BoardState) -> dict[str, Array]:
        board = jnp.stack([state.own, state.other], -1).reshape(-1, rows * columns, 2)
        mask = legal_moves(state)
        return {ACTION_MASK: mask.astype(jnp.float32), "board": board.astype(jnp.float32)}

    observation = {
        ACTION_MASK: box(0.0, 1.0, (rules.num_actions,)),
        "board": box(0.0, 1.0, (rows * columns, 2)),
    }
    spec = EnvSpec(id, observation, Discrete(rules.num_actions), rows * columns, players=2)
    return MDP(init, step, observe, spec)


def _entries(spec: EnvSpec, obs: Any) -> dict[str, Array]:
    """Check the entries of Dict observations to start from, each as `start_obs` does."""
    space: Any = spec.observation
    if not isinstance(obs, Mapping) or obs.keys() != space.keys():
        got = sorted(obs) if isinstance(obs, Mapping) else type(obs).__name__
        raise ValueError(f"obs: {spec.id} got {got}, expected a dict of {sorted(space)}")
    return {name: start_obs(spec._replace(observation=space[name]), obs[name]) for name in space}


def against(game: MDP, reply: Reply) -> MDP:
    """Make the task of one player: a step is a move and the opponent's reply to it.

    The player starts in half of the games; in the others a first move of the opponent is on the
    board. All observations are those of the player, the last one included.

    Args:
      game: a `board_game`.
      reply: the opponent; what it answers to a finished game is ignored.

    Returns:
      `MDP` of one player with the spaces of `game` and half of its length. The reward is 1 for a
      game won, -1 for one lost (by an illegal move as well), and 0 for a draw and before the end.
    """

    def init(params: Any, key: Key, obs: Any = None, batch: int = 1) -> BoardState:
        if obs is not None:
            return game.init(params, key, obs)
        seat_key, reply_key, step_key, key = jax.random.split(key, 4)
        start = game.init(params, key, batch=batch)
        answered, _ = game.step(params, step_key, start, reply(reply_key, start))
        return reset_rows(jax.random.bernoulli(seat_key, 0.5, (batch,)), answered, start)

    def step(params: Any, key: Key, state: BoardState, action: Array) -> tuple[BoardState, Outcome]:
        move_key, reply_key, answer_key = jax.random.split(key, 3)
        moved, mine = game.step(params, move_key, state, action)
        answered, theirs = game.step(params, answer_key, moved, reply(reply_key, moved))
        # Where there was nothing left to answer, the view is still that of the opponent.
        ended = moved.over & ~state.over
        swapped = moved._replace(own=moved.other, other=moved.own)
        answered = reset_rows(ended, swapped, answered)
        return answered, outcome(mine.reward - theirs.reward, answered.over)

    limit = game.spec.max_episode_steps
    half = None if limit is None else (limit + 1) // 2
    return MDP(init, step, game.observe, game.spec._replace(max_episode_steps=half, players=1))


def random_player(game: MDP) -> Reply:
    """Make the player who draws uniformly among the legal moves of `game`."""

    def reply(key: Key, state: BoardState) -> Array:
        invalid = spaces.invalid_actions(game.spec, game.observe(None, state))
        return spaces.sample(game.spec.action, key, state.over.shape, invalid)

    return reply


def opposed(game: MDP, opponent: str, players: Mapping[str, Reply]) -> MDP:
    """Let one of `players` take the other side of a game.

    Args:
      game: a `board_game`.
      opponent: key of `players`, or 'self' for the game of two players as it is.
      players: opponents by name, besides 'random'.

    Returns:
      `game`, or a task of one player whose id ends in the name of the opponent.

    Raises:
      ValueError: for an opponent that the game does not have.
    """
    players = {"random": random_player(game), **players}
    if opponent == "self":
        return game
    if opponent not in players:
        raise ValueError(
            f"opponent: {game.spec.id} got {opponent!r}, expected one of {['self', *players]}"
        )
    mdp = against(game, players[opponent])
    return mdp._replace(spec=mdp.spec._replace(id=game.spec.id + opponent.capitalize()))
