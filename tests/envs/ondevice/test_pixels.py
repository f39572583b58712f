"""Boards as images: the games that they show, the pixels that show them."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.ondevice import catch, gridworld, images, pixel_catch, pixel_gridworld
from mbrl.mdp import episodic, timestep
from mbrl.types import Box

KEY = jax.random.key(0)
MAKERS = [pixel_catch.make, pixel_gridworld.make]
each_maker = pytest.mark.parametrize("make", MAKERS, ids=["catch", "gridworld"])


@each_maker
def test_images_are_small_and_of_bytes(make):
    space = make().spec.observation
    assert isinstance(space, Box)
    assert (space.shape, space.dtype) == ((16, 16, 3), np.uint8)
    assert (space.low.min(), space.high.max()) == (0, 255)
    assert make(4, 3).spec.observation.shape == (12, 12, 3)
    mdp = make(4, 3)
    image = mdp.observe(None, mdp.init(None, KEY, batch=2))
    assert (image.shape, image.dtype) == ((2, 12, 12, 3), np.uint8)
    assert set(np.unique(image)) == {images.DIM, images.BRIGHT}


def test_catch_drawn_by_hand():
    mdp = pixel_catch.make(3, 2)
    state = catch.CatchState(jnp.array([1, 2]), jnp.array([2, 1]), jnp.array([0, 1]))
    image = np.asarray(mdp.observe(None, state)) == images.BRIGHT
    ball, paddle = np.zeros((2, 6, 6), bool), np.zeros((2, 6, 6), bool)
    ball[0, 2:4, 4:6] = paddle[0, 4:6, 0:2] = True
    ball[1, 4:6, 2:4] = paddle[1, 4:6, 2:4] = True  # caught: both colours in one cell
    np.testing.assert_array_equal(image[..., 0], ball)
    np.testing.assert_array_equal(image[..., 1], paddle)
    np.testing.assert_array_equal(image[..., 2], False)


def test_gridworld_draws_the_goal_of_its_parameters():
    mdp = pixel_gridworld.make(3, 1)
    params = gridworld.GridWorldParams(jnp.array([2, 0]), jnp.array([1, 2]))
    image = np.asarray(mdp.observe(params, mdp.init(params, KEY, batch=2))) == images.BRIGHT
    agent, goal = np.zeros((3, 3), bool), np.zeros((3, 3), bool)
    agent[2, 0] = goal[1, 2] = True
    for row in image:
        np.testing.assert_array_equal(row, np.stack([agent, goal, agent & False], -1))
    default = mdp.observe(None, mdp.init(None, KEY))[0] == images.BRIGHT
    assert default[0, 0, 0] and default[2, 2, 1] and default.sum() == 2


def test_catch_reads_every_board_also_those_that_are_over():
    mdp = pixel_catch.make()
    every = np.array(list(itertools.product(range(8), repeat=3)), np.int32)
    state = catch.CatchState(*jnp.asarray(every.T))
    again = jax.jit(lambda image: mdp.init(None, KEY, image))(mdp.observe(None, state))
    np.testing.assert_array_equal(np.stack(again, -1), every)


def test_gridworld_reads_every_cell():
    mdp = pixel_gridworld.make()
    every = np.array(list(itertools.product(range(8), repeat=2)), np.int32)
    state = gridworld.GridWorldState(*jnp.asarray(every.T))
    again = jax.jit(lambda image: mdp.init(None, KEY, image))(mdp.observe(None, state))
    np.testing.assert_array_equal(np.stack(again, -1), every)


def test_the_best_of_all_plans_catches_every_ball_and_the_worst_none():
    mdp = pixel_catch.make(5)
    columns = jnp.arange(5)
    start = mdp.observe(None, catch.CatchState(0 * columns, columns, 0 * columns + 2))
    plans = jnp.array(list(itertools.product(range(3), repeat=4)))

    def play(plan):
        def step(state, action):
            state, outcome = mdp.step(None, KEY, state, jnp.full(5, action))
            return state, (outcome.reward, outcome.discount)

        return jax.lax.scan(step, mdp.init(None, KEY, start), plan)[1]

    reward, discount = jax.jit(jax.vmap(play))(plans)
    np.testing.assert_array_equal(reward.sum(1).max(0), 1.0)
    np.testing.assert_array_equal(reward.sum(1).min(0), -1.0)
    np.testing.assert_array_equal(discount[:, :-1], 1.0)
    np.testing.assert_array_equal(discount[:, -1], 0.0)


def test_gridworld_value_iteration_over_images_gives_gamma_to_the_distance():
    size, gamma = 4, 0.9
    mdp = pixel_gridworld.make(size)
    row, column = np.divmod(np.arange(size * size), size)
    cells = mdp.observe(None, gridworld.GridWorldState(jnp.asarray(row), jnp.asarray(column)))
    names = {image.tobytes(): i for i, image in enumerate(np.asarray(cells))}
    assert len(names) == size * size
    step, table = jax.jit(mdp.step), []
    for a in range(4):
        state = mdp.init(None, KEY, cells)
        new, outcome = step(None, KEY, state, jnp.full(size * size, a))
        after = [names[image.tobytes()] for image in np.asarray(mdp.observe(None, new))]
        table.append((after, *map(np.asarray, outcome[:2])))
    value = np.zeros(size * size)
    for _ in range(20):
        value = np.max([r + gamma * d * value[n] for n, r, d in table], 0)
    distance = (size - 1 - row) + (size - 1 - column)
    expected = np.where(distance > 0, gamma ** (distance - 1.0), 0.0)
    np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "plain"),
    [
        (pixel_catch.make, lambda: catch.make(8, 8)),
        (pixel_gridworld.make, lambda: gridworld.make(8)),
    ],
    ids=["catch", "gridworld"],
)
def test_streams_of_episodes_are_those_of_the_plain_board(make, plain):
    streams = []
    for mdp in (make(), plain()):
        stream = episodic(mdp, 12)

        def step(state, key, stream=stream, mdp=mdp):
            action = jax.random.randint(key, (4,), 0, mdp.spec.action.num)
            state, _ = stream.step(None, key, state, action)
            return state, (state.inner, timestep(stream, None, state))

        start = stream.init(None, KEY, batch=4)
        streams.append(
            jax.jit(lambda s, k, step=step: jax.lax.scan(step, s, k)[1])(
                start, jax.random.split(KEY, 40)
            )
        )
    (inner, seen), (plain_inner, expected) = streams
    jax.tree.map(np.testing.assert_array_equal, inner, plain_inner)
    jax.tree.map(np.testing.assert_array_equal, seen[1:], expected[1:])
    assert seen.obs.dtype == np.uint8
    assert seen.is_last.sum() >= 4 * 3


def test_images_without_room_are_refused():
    for make in MAKERS:
        with pytest.raises(ValueError, match="size: expected at least 2 cells per side, got 1"):
            make(1)
        with pytest.raises(ValueError, match="cell: expected at least 1 pixel per side, got 0"):
            make(4, 0)
