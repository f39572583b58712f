"""Squashed policies against integrals, and the losses of actor, critics and temperature by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl import replay, spaces
from mbrl.losses.soft_actor_critic import (
    critic_loss,
    critic_target,
    soft_value,
    temperature_loss,
)
from mbrl.networks.critics import critics
from mbrl.optim import polyak
from mbrl.policies import Choices, SoftPolicy, num_outputs
from mbrl.types import Discrete, Record, SampleSpec

KEY = jax.random.key(0)
ARM = spaces.box([-1.0, 0.0], [3.0, 0.5])
BOTH = {"arm": ARM, "leg": spaces.box(-2.0, 2.0, (1,))}


def law_of(outputs: Any) -> tuple[np.ndarray, np.ndarray]:
    """Read means and deviations before squashing again, in float64."""
    loc, raw = np.split(np.asarray(outputs, np.float64), 2, -1)
    return loc, np.exp(-5.0 + 3.5 * (np.tanh(raw) + 1.0))


@pytest.mark.parametrize("space", [ARM, BOTH], ids=["box", "dict"])
def test_the_density_of_a_squashed_action_counts_how_the_squashing_stretches(space):
    outputs = 0.3 * jax.random.normal(KEY, (6, num_outputs(space)))
    choices = SoftPolicy(space, outputs).choices(jax.random.key(1))
    action = np.asarray(choices.action[:, 0], np.float64)
    assert action.shape == (6, num_outputs(space) // 2)
    loc, std = law_of(outputs)
    z = (np.arctanh(action) - loc) / std
    log_prob = -0.5 * z**2 - np.log(std) - 0.5 * np.log(2 * np.pi) - np.log(1 - action**2)
    np.testing.assert_allclose(choices.log_prob[:, 0], log_prob.sum(-1), rtol=1e-3, atol=1e-3)


def test_the_entropy_of_draws_is_that_of_the_integral():
    outputs = jnp.array([0.4, -0.5])
    loc, std = law_of(outputs)
    grid = np.linspace(-1.0, 1.0, 200_002)[1:-1]
    z = (np.arctanh(grid) - loc) / std
    density = np.exp(-0.5 * z**2) / (std * np.sqrt(2 * np.pi) * (1 - grid**2))
    width = grid[1] - grid[0]
    assert abs(density.sum() * width - 1.0) < 1e-3
    entropy = -np.sum(density * np.log(density + 1e-300)) * width
    space = spaces.box(-1.0, 1.0, (1,))
    law = SoftPolicy(space, jnp.broadcast_to(outputs, (20_000, 2)))
    np.testing.assert_allclose(law.choices(KEY).entropy().mean(), entropy, atol=0.02)


def test_saturated_actions_have_finite_densities_and_gradients():
    space = spaces.box(-1.0, 1.0, (1,))

    def worth(outputs: Any) -> Any:
        choices = SoftPolicy(space, outputs).choices(KEY)
        return choices.log_prob.sum() + choices.action.sum()

    for loc in (-30.0, 30.0):
        value, grad = jax.value_and_grad(worth)(jnp.array([[loc, 0.0]]))
        assert np.isfinite(value) and np.isfinite(grad).all()
        # Far out, the log-density grows by two per unit of the mean.
        np.testing.assert_allclose(grad[0, 0], 2.0 * np.sign(loc), atol=1e-3)


def test_all_choices_of_a_discrete_policy_are_considered():
    logits = jnp.array([[0.0, 1.0, -2.0]])
    choices = SoftPolicy(Discrete(3), logits).choices(KEY)
    probs = np.exp(np.float64(logits[0])) / np.exp(np.float64(logits[0])).sum()
    np.testing.assert_array_equal(choices.action[0], np.eye(3))
    np.testing.assert_allclose(choices.entropy()[0], -np.sum(probs * np.log(probs)), rtol=1e-5)
    worth = jnp.array([[1.0, 2.0, 5.0]])
    np.testing.assert_allclose(choices.expect(worth)[0], probs @ [1.0, 2.0, 5.0], rtol=1e-5)
    assert SoftPolicy(Discrete(3), logits).mode().tolist() == [[0.0, 1.0, 0.0]]
    drawn = SoftPolicy(Discrete(3), jnp.broadcast_to(logits, (4000, 3))).sample(KEY)
    np.testing.assert_allclose(drawn.mean(0), probs, atol=0.03)


def test_soft_values_take_the_least_critic_of_every_action():
    q = jnp.array([[[1.0], [5.0], [3.0]], [[2.0], [4.0], [-1.0]]])  # [N=2, B=3, S=1]
    choices = Choices(jnp.zeros((3, 1, 1)), jnp.array([[-1.0], [0.0], [2.0]]), jnp.ones((3, 1)))
    np.testing.assert_allclose(soft_value(q, choices, 0.5), [1.5, 4.0, -2.0])
    np.testing.assert_allclose(soft_value(q, choices, 0.5, False), [2.0, 4.5, 0.0])
    # Of several actions each has its own least critic.
    chance = jnp.array([[0.25, 0.75]])
    several = Choices(jnp.zeros((1, 2, 2)), jnp.log(chance), chance)
    q = jnp.array([[[4.0, 0.0]], [[0.0, 8.0]]])
    wanted = 0.25 * (0.0 - np.log(0.25)) + 0.75 * (0.0 - np.log(0.75))
    np.testing.assert_allclose(soft_value(q, several, 1.0), [wanted], rtol=1e-6)


def test_an_end_is_worth_its_reward_and_a_cut_what_follows():
    # Two episodes of three records: the first ends by itself, the second is cut.
    flag = np.array([[True, False, False] * 2])
    last = np.array([[False, False, True] * 2])
    terminal = np.array([[False, False, True, False, False, False]])
    reward = np.array([[0.0, 1.0, 2.0, 0.0, 3.0, 4.0]], np.float32)
    record: Any = Record(np.arange(6.0)[None, :, None], np.zeros((1, 6)), reward, flag, last,
                         terminal)  # fmt: skip
    ring = replay.init(jax.tree.map(lambda x: x[0, 0], record), 1, 6)
    for t in range(6):
        ring = replay.add(ring, jax.tree.map(lambda x: x[:, t], record))
    data, valid = replay.transitions(replay.sample(ring, KEY, SampleSpec("all", 6, 1, 1)))
    value = 10.0 * data.next_obs[:, 0]
    target = critic_target(data.reward, data.is_terminal, value, 0.5)
    rows = np.asarray(valid)
    assert rows.tolist() == [True, True, False, True, True, False]
    np.testing.assert_allclose(target[rows], [1.0 + 5.0, 2.0, 3.0 + 20.0, 4.0 + 25.0])
    # A chance of an end counts for as much.
    np.testing.assert_allclose(critic_target(jnp.ones(1), jnp.array([0.25]), jnp.ones(1), 0.8), 1.6)


def test_critics_have_errors_and_gradients_of_their_own():
    target, weight = jnp.array([1.0, 2.0, 9.0]), jnp.array([1.0, 1.0, 0.0])
    q = jnp.array([[1.0, 0.0, 0.0], [3.0, 2.0, 0.0]])
    loss, grad = jax.value_and_grad(critic_loss)(q, target, weight)
    np.testing.assert_allclose(loss, 0.5 * (4.0 + 4.0) / 2.0)
    np.testing.assert_allclose(grad, [[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]])

    def through(value: Any) -> Any:
        return critic_loss(q, critic_target(weight, weight, value, 0.9), weight)

    np.testing.assert_array_equal(jax.grad(through)(jnp.ones(3)), np.zeros(3))


@pytest.mark.parametrize(("entropy", "sign"), [(-3.0, 1.0), (0.5, -1.0)])
def test_the_temperature_rises_where_there_is_too_little_entropy(entropy, sign):
    step = -jax.grad(temperature_loss)(jnp.zeros(()), jnp.asarray(entropy), -1.0)
    assert np.sign(step) == sign
    assert float(jax.grad(temperature_loss, 1)(jnp.ones(()), jnp.asarray(entropy), -1.0)) == 0.0


@pytest.mark.parametrize("space", [ARM, BOTH, Discrete(3)], ids=["box", "dict", "discrete"])
def test_the_value_of_an_action_is_the_same_considered_or_taken(space):
    net = critics(space, 4, (8,), 3)
    params, x = net.init(KEY), jax.random.normal(KEY, (5, 4))
    outputs = jax.random.normal(jax.random.key(1), (5, num_outputs(space)))
    choices = SoftPolicy(space, outputs).choices(KEY)
    considered = net.considered(params, x, choices.action)
    assert considered.shape == (3, 5, choices.log_prob.shape[-1])
    for s in range(considered.shape[-1]):
        taken = net.taken(params, x, choices.action[:, s])
        np.testing.assert_allclose(taken, considered[..., s], rtol=1e-5, atol=1e-6)
    assert float(jnp.std(considered, 0).min()) > 0.0  # critics do not start alike
    some = jax.tree.map(lambda leaf: leaf[jnp.array([2, 0])], params)
    two = net.considered(some, x, choices.action)
    np.testing.assert_allclose(two, considered[jnp.array([2, 0])], rtol=1e-5, atol=1e-6)


def test_targets_follow_by_their_share():
    old, new = {"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([3.0, 2.0])}
    np.testing.assert_allclose(polyak(old, new, 0.25)["w"], [1.5, -1.0])
