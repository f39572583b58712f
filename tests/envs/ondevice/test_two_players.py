"""Tic-tac-toe and connect four against rules written in plain Python, and their opponents."""

from __future__ import annotations

import dataclasses
import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import agents
import envs
from agents.dreamer import make_dreamer
from agents.pets import make_pets
from envs.ondevice import connect_four, tic_tac_toe
from envs.ondevice.boards import BoardState, against, random_player
from mbrl import spaces
from mbrl.mdp import rollout
from mbrl.types import MDP, Agent, SampleSpec
from scripts.cli import main

KEY = jax.random.key(0)
GAMES = {"TicTacToe": tic_tac_toe, "ConnectFour": connect_four}
SHAPES = {"TicTacToe": (3, 3), "ConnectFour": (6, 7)}
each_game = pytest.mark.parametrize("name", GAMES)


@functools.cache
def made(name: str):
    mdp = GAMES[name].make()
    return mdp, jax.jit(lambda state, action: mdp.step(None, KEY, state, action))


def observed(name: str, state):
    seen = made(name)[0].observe(None, state)
    board = np.asarray(seen["board"]).reshape(-1, *SHAPES[name], 2)
    return board.astype(int), np.asarray(seen["action_mask"]).astype(int)


def played(name: str, moves, batch: int = 1):
    """Play moves [T] or [T, B]; returns the state, rewards and discounts [T, B]."""
    mdp, step = made(name)
    state, rewards, discounts = mdp.init(None, KEY, batch=batch), [], []
    for move in moves:
        state, outcome = step(state, jnp.broadcast_to(jnp.asarray(move, jnp.int32), (batch,)))
        rewards.append(outcome.reward)
        discounts.append(outcome.discount)
    return state, np.array(rewards), np.array(discounts)


class Plain:
    """A game in plain Python: a grid of 0, 1 and 2, and who is to move."""

    def __init__(self, name: str) -> None:
        self.falls = name == "ConnectFour"
        self.rows, self.columns, self.line = (6, 7, 4) if self.falls else (3, 3, 3)
        self.grid = [[0] * self.columns for _ in range(self.rows)]
        self.player, self.over = 1, False

    def cell(self, move: int) -> tuple[int, int] | None:
        column = move if self.falls else move % self.columns
        rows = reversed(range(self.rows)) if self.falls else [move // self.columns]
        return next(((row, column) for row in rows if not self.grid[row][column]), None)

    def legal(self) -> list[int]:
        moves = self.columns if self.falls else self.rows * self.columns
        return [int(not self.over and self.cell(move) is not None) for move in range(moves)]

    def move(self, move: int) -> float:
        if self.over:
            return 0.0
        cell, player, self.player = self.cell(move), self.player, 3 - self.player
        if cell is None:
            self.over = True
            return -1.0
        self.grid[cell[0]][cell[1]] = player
        reward = float(
            any(self.run(cell, player, step) for step in ((0, 1), (1, 0), (1, 1), (1, -1)))
        )
        self.over = bool(reward) or all(map(all, self.grid))
        return reward

    def run(self, cell: tuple[int, int], player: int, step: tuple[int, int]) -> bool:
        length = 1
        for sign in (1, -1):
            row, column = cell
            while True:
                row, column = row + sign * step[0], column + sign * step[1]
                inside = 0 <= row < self.rows and 0 <= column < self.columns
                if not inside or self.grid[row][column] != player:
                    break
                length += 1
        return length >= self.line

    def board(self) -> np.ndarray:
        grid = np.array(self.grid)
        return np.stack([grid == self.player, grid == 3 - self.player], -1).astype(int)


@each_game
def test_random_games_agree_with_plain_python(name):
    batch, rng = 40, random.Random(1)
    mdp, step = made(name)
    games, state = [Plain(name) for _ in range(batch)], mdp.init(None, KEY, batch=batch)
    rewards = set()
    for _ in range(mdp.spec.max_episode_steps + 1):  # pyright: ignore
        board, mask = observed(name, state)
        np.testing.assert_array_equal(board, [game.board() for game in games])
        np.testing.assert_array_equal(mask, [game.legal() for game in games])
        legal = [[i for i, fits in enumerate(game.legal()) if fits] for game in games]
        every = range(len(games[0].legal()))
        moves = [rng.choice(some if some and rng.random() < 0.98 else every) for some in legal]
        again = mdp.init(None, KEY, mdp.observe(None, state))
        jax.tree.map(np.testing.assert_array_equal, again, state)
        expected = [game.move(move) for game, move in zip(games, moves, strict=True)]
        state, outcome = step(state, jnp.array(moves, jnp.int32))
        np.testing.assert_array_equal(outcome.reward, expected)
        np.testing.assert_array_equal(outcome.discount, [not game.over for game in games])
        rewards |= set(expected)
    assert rewards == {-1.0, 0.0, 1.0}
    assert all(game.over for game in games)


def test_rewards_go_to_the_mover_and_views_swap():
    state, rewards, discounts = played("TicTacToe", [0, 3, 1, 4])
    board, mask = observed("TicTacToe", state)
    np.testing.assert_array_equal(board[0, ..., 0], [[1, 1, 0], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(board[0, ..., 1], [[0, 0, 0], [1, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(mask[0], [0, 0, 1, 0, 0, 1, 1, 1, 1])
    assert not rewards.any()
    assert discounts.all()
    lost, outcome = made("TicTacToe")[1](state, jnp.array([2]))
    assert outcome.reward[0] == 1.0
    assert outcome.discount[0] == 0.0
    board, mask = observed("TicTacToe", lost)
    np.testing.assert_array_equal(board[0, ..., 1], [[1, 1, 1], [0, 0, 0], [0, 0, 0]])
    assert not mask.any()
    # The other side wins as well, with the same sign.
    state, rewards, _ = played("TicTacToe", [0, 3, 1, 4, 8, 5])
    np.testing.assert_array_equal(rewards[:, 0], [0, 0, 0, 0, 0, 1])


def test_the_eight_lines_of_tic_tac_toe_win():
    cells = np.arange(9).reshape(3, 3)
    lines = [*cells, *cells.T, cells.diagonal(), cells[:, ::-1].diagonal()]
    stones = np.array([np.isin(np.arange(9), trio) for trio in np.ndindex(9, 9, 9)])
    trios = np.unique(stones[stones.sum(1) == 3], axis=0)
    assert len(trios) == 84
    # Three own stones, of which the last is still to be put, on a board that is else empty.
    last = trios.argmax(1)
    own = trios & (np.arange(9) != last[:, None])
    state = BoardState(
        jnp.asarray(own.reshape(-1, 3, 3)), jnp.zeros((84, 3, 3), bool), jnp.zeros(84, bool)
    )
    _, outcome = made("TicTacToe")[1](state, jnp.asarray(last, jnp.int32))
    found = {tuple(np.flatnonzero(trio)) for trio in trios[np.asarray(outcome.reward) == 1.0]}
    assert found == {tuple(sorted(line)) for line in lines}
    np.testing.assert_array_equal(outcome.discount, 1.0 - outcome.reward)


@pytest.mark.parametrize(
    ("moves", "won"),
    [
        ([0, 0, 1, 1, 2, 2, 3], True),  # along the floor
        ([3, 0, 4, 0, 5, 0, 6], True),  # up to the wall
        ([6, 1, 6, 2, 6, 3, 6], True),  # a column
        ([0, 1, 1, 2, 2, 3, 2, 3, 3, 6, 3], True),  # rising to the right
        ([6, 5, 5, 4, 4, 3, 4, 3, 3, 0, 3], True),  # rising to the left
        ([0, 0, 1, 1, 2, 2, 6, 0, 5], False),  # three, and one beyond a gap
        ([4, 0, 5, 0, 6, 0, 1, 1, 1, 2, 0], False),  # a row does not go on in the next
    ],
)
def test_lines_of_connect_four(moves, won):
    _, rewards, discounts = played("ConnectFour", moves)
    np.testing.assert_array_equal(rewards[:, 0], [0.0] * (len(moves) - 1) + [float(won)])
    np.testing.assert_array_equal(discounts[:, 0], [1.0] * (len(moves) - 1) + [float(not won)])


def test_lines_do_not_wrap_around_the_edges_of_connect_four():
    # Cells that follow each other in memory, or a diagonal that leaves the board.
    for cells in ([(4, 5), (4, 6), (5, 0), (5, 1)], [(2, 5), (3, 6), (5, 0), (5, 1)],
                  [(2, 1), (3, 0), (4, 6), (5, 5)], [(3, 6), (4, 0), (5, 1), (2, 5)]):  # fmt: skip
        grid = np.zeros((1, 6, 7), bool)
        for cell in cells:
            grid[0][cell] = True
        state = BoardState(jnp.asarray(grid), jnp.zeros((1, 6, 7), bool), jnp.zeros(1, bool))
        _, outcome = made("ConnectFour")[1](state, jnp.array([3]))
        assert outcome.reward[0] == 0.0


def test_stones_fall_and_a_full_column_is_illegal():
    state, rewards, _ = played("ConnectFour", [2] * 6)
    board, mask = observed("ConnectFour", state)
    np.testing.assert_array_equal(board[0, :, 2, 0], [0, 1, 0, 1, 0, 1])  # row 0 is above
    np.testing.assert_array_equal(board[0, :, 2, 1], [1, 0, 1, 0, 1, 0])
    assert board.sum() == 6
    np.testing.assert_array_equal(mask[0], [1, 1, 0, 1, 1, 1, 1])
    assert not rewards.any()
    lost, outcome = made("ConnectFour")[1](state, jnp.array([2]))
    assert (outcome.reward[0], outcome.discount[0]) == (-1.0, 0.0)
    board, mask = observed("ConnectFour", lost)
    assert board.sum() == 6
    assert not mask.any()


def test_a_draw_ends_and_a_finished_game_stays_as_it_is():
    _, rewards, discounts = played("TicTacToe", [0, 1, 2, 4, 3, 5, 7, 6, 8])
    assert not rewards.any()
    np.testing.assert_array_equal(discounts[:, 0], [1] * 8 + [0])
    for moves in ([0, 1, 2, 4, 3, 5, 7, 6, 8], [0, 3, 1, 4, 2], [0, 0]):
        state, *_ = played("TicTacToe", moves)
        every = jax.tree.map(lambda x: jnp.repeat(x, 9, 0), state)
        after, outcome = made("TicTacToe")[1](every, jnp.arange(9))
        jax.tree.map(np.testing.assert_array_equal, after, every)
        assert not outcome.reward.any()
        assert not outcome.discount.any()


def best(grid: tuple[int, ...], player: int) -> tuple[int, set[int]]:
    """Minimax: the value to `player`, who is to move, and the moves that keep it."""
    lines = [(0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6)]
    if any(all(grid[i] == 3 - player for i in line) for line in lines):
        return -1, set()
    values = {
        i: -solved((*grid[:i], player, *grid[i + 1 :]), 3 - player)[0]
        for i in range(9)
        if not grid[i]
    }
    value = max(values.values(), default=0)
    return value, {i for i, v in values.items() if v == value}


solved = functools.cache(best)


def test_optimal_moves_are_those_of_minimax():
    assert solved((0,) * 9, 1) == (0, set(range(9)))
    table = tic_tac_toe.optimal_moves()
    positions = reached()
    assert len(positions) == 4520  # 5478 without those that are over
    for grid, player in positions:
        digits = [0 if cell == 0 else 1 if cell == player else 2 for cell in grid]
        moves = np.flatnonzero(table[np.dot(digits, tic_tac_toe.POWERS)])
        assert set(moves.tolist()) == solved(grid, player)[1]


def reached() -> set[tuple[tuple[int, ...], int]]:
    """List the positions of legal games that are not over."""
    found, new = set(), {((0,) * 9, 1)}
    while new:
        new = {x for x in new if solved(*x)[1]} - found
        found |= new
        new = {
            ((*grid[:i], player, *grid[i + 1 :]), 3 - player)
            for grid, player in new
            for i in range(9)
            if not grid[i]
        }
    return found


def whole_games(mdp: MDP, player, batch: int, steps: int):
    """Play games to their end: first and last states, observations and outcomes [H, B]."""

    @jax.jit
    def run(key):
        init_key, key = jax.random.split(key)
        start = mdp.init(None, init_key, batch=batch)

        def keep(obs, action, outcome):
            return obs, outcome

        end, (obs, outcome) = rollout(
            mdp, None, key, start, lambda key, state, t: player(key, state), steps, keep
        )
        return start, end, obs, outcome

    return run(KEY)


def test_perfect_play_of_both_sides_is_a_draw():
    for mdp, steps in ((tic_tac_toe.make(), 9), (tic_tac_toe.make("perfect"), 5)):
        _, end, _, outcome = whole_games(mdp, tic_tac_toe.perfect_player, 200, steps)
        assert not outcome.reward.any()
        assert end.over.all()
        assert len(np.unique(end.own.reshape(200, 9), axis=0)) > 5  # not always the same game


def test_the_perfect_opponent_never_loses_and_starts_half_of_the_games():
    mdp = tic_tac_toe.make("perfect")
    assert (mdp.spec.players, mdp.spec.max_episode_steps) == (1, 5)
    start, end, obs, outcome = whole_games(mdp, random_player(mdp), 500, 5)
    total = np.asarray(outcome.reward.sum(0))
    assert set(np.unique(total)) == {-1.0, 0.0}
    assert end.over.all()
    second = np.asarray(start.other).any((1, 2))
    assert abs(second.mean() - 0.5) < 3 * 0.5 / np.sqrt(500)
    assert not np.asarray(start.own).any()
    assert (total[second] < 0).any() and (total[~second] < 0).any()
    # The player's view to the end: the other has a line where the game is lost, nobody else has.
    cells = [np.asarray(x).reshape(-1, 9) for x in (end.own, end.other)]
    lines = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 3, 6], [1, 4, 7], [2, 5, 8],
                      [0, 4, 8], [2, 4, 6]])  # fmt: skip
    own, other = (np.any(np.all(c[:, lines], -1), -1) for c in cells)
    np.testing.assert_array_equal(other, total < 0)
    assert not own.any()
    # Whoever goes second is a stone behind when it is to move.
    running = np.asarray(obs["action_mask"]).any(-1)
    difference = np.asarray(obs["board"]).sum(2) @ [1, -1]
    np.testing.assert_array_equal(difference[running], -1.0 * np.tile(second, (5, 1))[running])


def test_games_against_a_weaker_player_are_won_in_the_view_of_the_player():
    mdp = tic_tac_toe.make("random")
    start, end, _, outcome = whole_games(mdp, tic_tac_toe.perfect_player, 300, 5)
    total = np.asarray(outcome.reward.sum(0))
    assert set(np.unique(total)) == {0.0, 1.0}
    assert total.mean() > 0.8
    won = total > 0
    first = ~np.any(np.asarray(start.other), (1, 2))
    stones = np.asarray(end.own).sum((1, 2)) - np.asarray(end.other).sum((1, 2))
    np.testing.assert_array_equal(stones[won], first[won])  # the last stone is the player's


def test_any_policy_may_be_the_opponent():
    def leftmost(key, state):
        del key
        mask = game.observe(None, state)["action_mask"]
        return jnp.argmax(mask, -1)

    game = connect_four.make()
    mdp = against(game, leftmost)
    assert mdp.spec == game.spec._replace(players=1, max_episode_steps=21)
    state = mdp.init(None, KEY, game.observe(None, game.init(None, KEY, batch=1)))
    rewards = []
    for move in (1, 1, 1, 5):  # the opponent fills column 0
        state, outcome = mdp.step(None, KEY, state, jnp.array([move]))
        rewards.append(float(outcome.reward[0]))
    assert rewards == [0.0, 0.0, 0.0, -1.0]
    assert float(outcome.discount[0]) == 0.0
    after, outcome = mdp.step(None, KEY, state, jnp.array([2]))
    jax.tree.map(np.testing.assert_array_equal, after, state)
    assert float(outcome.reward[0]) == float(outcome.discount[0]) == 0.0


@pytest.mark.parametrize(
    "id", ["TicTacToe", "TicTacToePerfect", "ConnectFour", "ConnectFourRandom"]
)
def test_tasks_of_one_and_of_two_players_have_the_same_spaces(id):
    mdp = envs.make(f"device/{id}")
    assert isinstance(mdp, MDP)
    name = "TicTacToe" if id.startswith("Tic") else "ConnectFour"
    game = made(name)[0].spec
    assert spaces.describe(mdp.spec.observation) == spaces.describe(game.observation)
    assert mdp.spec.action == game.action
    assert mdp.spec.players == (2 if id == name else 1)


def test_what_cannot_be_played_is_refused():
    with pytest.raises(
        ValueError, match=r"ConnectFour got 'perfect', expected .*'self', 'random'\]"
    ):
        connect_four.make("perfect")
    with pytest.raises(ValueError, match=r"'self', 'random', 'perfect'\]"):
        tic_tac_toe.make("human")
    game = made("TicTacToe")[0]
    with pytest.raises(ValueError, match=r"expected a dict of \['action_mask', 'board'\]"):
        game.init(None, KEY, jnp.zeros((1, 9, 2)))
    with pytest.raises(ValueError, match=r"got shape \(9, 2\), expected \('B', 9, 2\)"):
        game.init(None, KEY, {"board": jnp.zeros((9, 2)), "action_mask": jnp.ones((1, 9))})
    for make in (make_pets, make_dreamer):
        with pytest.raises(ValueError, match=r"TicTacToe has 2, .* train against an opponent"):
            make(game.spec)


@dataclasses.dataclass(frozen=True)
class StubbornConfig:
    """No settings."""


def make_stubborn(spec, config=StubbornConfig()):
    """Play legal moves only where the agent was built for two players."""

    def act(state, carry, obs, is_first, key, mode):
        illegal = spaces.invalid_actions(spec, obs)
        wrong = illegal if spec.players == 2 else ~illegal  # pyright: ignore
        return spaces.sample(spec.action, key, is_first.shape, wrong), carry, ()

    def update(state, batch, key):
        return state, {"model/loss": jnp.zeros(())}, None

    sampling = SampleSpec("latest", 16, 4, 4)
    return Agent(lambda key: jnp.zeros(()), lambda num_envs: (), act, update, sampling)


@pytest.mark.usefixtures("same_versions")
def test_evaluate_plays_against_others_with_the_agent_as_it_was_trained(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(agents.AGENTS, "stubborn", agents.Entry(StubbornConfig, make_stubborn))
    out = str(tmp_path / "run")
    train = ["--steps", "8", "--eval-episodes", "0", "--no-tensorboard", "--out", out]
    assert main(["train", "stubborn", "--env", "device/TicTacToe", *train]) == 0
    capsys.readouterr()
    assert main(["evaluate", out, "--env", "device/TicTacToeRandom", "--episodes", "60"]) == 0
    text = capsys.readouterr().out
    assert "stubborn on device/TicTacToeRandom after 8 steps" in text
    assert "min -1.0  max 1.0  (60 episodes)" in text  # illegal moves would have lost them all
    assert main(["evaluate", out, "--env", "device/ConnectFour"]) == 2
    error = capsys.readouterr().err
    assert "--env device/ConnectFour: its observation space" in error
    assert "differs from that of device/TicTacToe," in error
