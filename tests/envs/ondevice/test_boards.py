"""Catch and GridWorld against play by hand."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.ondevice import catch, gridworld

KEY = jax.random.key(0)


def test_catch_returns_of_optimal_and_idle_play():
    mdp = catch.make()
    columns = jnp.arange(5)
    start = catch.CatchState(jnp.zeros(5, int), columns, jnp.full(5, 2))
    step = jax.jit(mdp.step)
    for follow in (True, False):
        state, rewards = start, []
        for t in range(9):
            action = jnp.sign(state.column - state.paddle) + 1 if follow else jnp.ones(5, int)
            state, outcome = step(None, KEY, state, action)
            rewards.append(outcome.reward)
            np.testing.assert_array_equal(outcome.discount, float(t < 8))
        expected = np.ones(5) if follow else [-1, -1, 1, -1, -1]
        np.testing.assert_array_equal(np.sum(rewards, 0), expected)
        np.testing.assert_array_equal(rewards[:-1], 0.0)


def test_catch_board_drawn_by_hand():
    mdp = catch.make(3, 3)
    state = catch.CatchState(jnp.array([1]), jnp.array([2]), jnp.array([0]))
    board = mdp.observe(None, state)[0]
    np.testing.assert_array_equal(board, [[0, 0, 0], [0, 0, 1], [1, 0, 0]])
    state, outcome = mdp.step(None, KEY, state, jnp.array([0]))
    np.testing.assert_array_equal(mdp.observe(None, state)[0], [[0, 0, 0], [0, 0, 0], [1, 0, 1]])
    assert outcome.reward[0] == -1.0
    state, outcome = mdp.step(None, KEY, state, jnp.array([2]))
    np.testing.assert_array_equal(mdp.observe(None, state)[0], [[0, 0, 0], [0, 0, 0], [1, 0, 1]])
    assert outcome.reward[0] == outcome.discount[0] == 0.0


def test_catch_reads_every_running_board():
    mdp = catch.make()
    every = np.array(list(itertools.product(range(9), range(5), range(5))))
    state = catch.CatchState(*jnp.asarray(every.T))
    again = mdp.init(None, KEY, mdp.observe(None, state))
    np.testing.assert_array_equal(np.stack(again, -1), every)


def test_catch_ball_starts_in_every_column():
    state = catch.make().init(None, KEY, batch=200)
    assert set(np.array(state.column)) == set(range(5))
    assert set(np.array(state.row)) == {0}
    assert set(np.array(state.paddle)) == {2}


def test_gridworld_moves_and_walls():
    mdp = gridworld.make(3)
    state = gridworld.GridWorldState(jnp.array([0, 0, 1, 1, 1, 1]), jnp.array([0, 0, 1, 1, 1, 1]))
    new, _ = mdp.step(None, KEY, state, jnp.array([0, 2, 0, 1, 2, 3]))
    np.testing.assert_array_equal(new.row, [0, 0, 0, 2, 1, 1])
    np.testing.assert_array_equal(new.column, [0, 0, 1, 1, 0, 2])


def test_gridworld_value_iteration_gives_gamma_to_the_distance():
    size, gamma = 4, 0.9
    mdp = gridworld.make(size)
    step = jax.jit(mdp.step)
    cells = jnp.eye(size * size)
    value = np.zeros(size * size)
    table = []
    for a in range(4):
        state = mdp.init(None, KEY, cells)
        new, outcome = step(None, KEY, state, jnp.full(size * size, a))
        table.append((np.argmax(mdp.observe(None, new), -1), *map(np.asarray, outcome[:2])))
    for _ in range(20):
        value = np.max([r + gamma * d * value[n] for n, r, d in table], 0)
    row, column = np.divmod(np.arange(size * size), size)
    distance = (size - 1 - row) + (size - 1 - column)
    expected = np.where(distance > 0, gamma ** (distance - 1.0), 0.0)
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_gridworld_params_move_start_and_goal():
    mdp = gridworld.make(3)
    params = gridworld.GridWorldParams(jnp.array([2, 1]), jnp.array([1, 1]))
    state = mdp.init(params, KEY, batch=2)
    np.testing.assert_array_equal(np.argmax(mdp.observe(params, state), -1), [7, 7])
    _, outcome = mdp.step(params, KEY, state, jnp.array([0, 1]))
    np.testing.assert_array_equal(outcome.reward, [1.0, 0.0])
    np.testing.assert_array_equal(outcome.discount, [0.0, 1.0])


def test_boards_without_room_are_refused():
    with pytest.raises(ValueError, match="rows, columns: expected at least 2 x 1, got 1 x 5"):
        catch.make(1)
    with pytest.raises(ValueError, match="size: expected at least 2, got 1"):
        gridworld.make(1)
