"""Policies over any action space: densities by hand, samples that are actions."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl import spaces
from mbrl.policies import UNIMIX, Policy, num_outputs
from mbrl.types import Discrete, MultiDiscrete, Space
from tests.mbrl import plain

PUSH = spaces.box([-1.0, 0.0], [3.0, 0.5])
# Sorted by name: arm, gear, tool.
MIXED: Space = {"tool": Discrete(3), "gear": MultiDiscrete((2, 4)), "arm": PUSH}
SPACES = [(Discrete(3), 3), (MultiDiscrete((2, 4)), 6), (PUSH, 4), (MIXED, 13)]
KINDS = ["discrete", "multi", "box", "dict"]


def outputs_of(number: int, rows: int = 5) -> Any:
    return np.random.default_rng(number).normal(size=(rows, number)).astype(np.float32)


def sizes_of(leaf: Any) -> tuple[int, ...]:
    return leaf.nums if isinstance(leaf, MultiDiscrete) else (leaf.num,)


def parts(space: Any, outputs: Any) -> list[Any]:
    """Read the distributions again: ('box', mean, std) or ('one', probs), in float64."""
    outputs, found = np.asarray(outputs, np.float64), []
    for _, leaf in spaces.leaves(space):
        if leaf == PUSH:
            mean, raw, outputs = np.split(outputs, [2, 4], -1)
            found.append(("box", np.tanh(mean), 0.1 + 0.9 * plain.sigmoid(raw + 2.0)))
            continue
        for num in sizes_of(leaf):
            mine, outputs = np.split(outputs, [num], -1)
            found.append(("one", plain.unimix(mine, 0.01), None))
    assert outputs.shape[-1] == 0
    return found


@pytest.mark.parametrize(("space", "number"), SPACES, ids=KINDS)
def test_density_entropy_and_mode_by_hand(space: Any, number: int) -> None:
    assert num_outputs(space) == number
    outputs = outputs_of(number)
    actions = spaces.encode_action(space, spaces.sample(space, jax.random.key(1), (5,)))

    @jax.jit
    def read(outputs: Any, actions: Any) -> Any:
        law = Policy(space, outputs)
        return law.log_prob(actions), law.entropy(), law.mode()

    log_prob, entropy, mode, start = np.zeros(5), np.zeros(5), [], 0
    for kind, one, std in parts(space, outputs):
        x = np.asarray(actions[:, start : start + one.shape[-1]], np.float64)
        start += one.shape[-1]
        if kind == "box":
            z = ((x - one) / std) ** 2 + 2 * np.log(std) + math.log(2 * math.pi)
            log_prob += -0.5 * z.sum(-1)
            entropy += (0.5 * (1 + math.log(2 * math.pi)) + np.log(std)).sum(-1)
            mode.append(one)
        else:
            log_prob += np.log((one * x).sum(-1))
            entropy -= (one * np.log(one)).sum(-1)
            mode.append(np.eye(one.shape[-1])[one.argmax(-1)])
    got = read(outputs, actions)
    for x, expected in zip(got, (log_prob, entropy, np.concatenate(mode, -1)), strict=True):
        assert x.shape == expected.shape
        np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-5)


def test_a_batch_of_any_rank_is_a_batch() -> None:
    outputs = outputs_of(13, 6)

    @jax.jit
    def read(outputs: Any) -> Any:
        law = Policy(MIXED, outputs)
        return law.mode(), law.entropy(), law.log_prob(law.mode())

    flat, folded = read(outputs), read(outputs.reshape(2, 3, 13))
    for one, two in zip(flat, folded, strict=True):
        assert two.shape[:2] == (2, 3)
        np.testing.assert_allclose(one, two.reshape(one.shape), rtol=1e-6)


@pytest.mark.parametrize(("space", "number"), SPACES, ids=KINDS)
def test_samples_have_the_distribution(space: Any, number: int) -> None:
    rows = 20_000
    outputs = np.repeat(outputs_of(number, 1), rows, 0)
    draw = jax.jit(lambda key, x: Policy(space, x).sample(key))
    x = np.asarray(draw(jax.random.key(0), outputs))
    assert x.shape == (rows, spaces.flat_size(space))
    start, columns = 0, []
    for kind, one, std in parts(space, outputs[:1]):
        part = x[:, start : start + one.shape[-1]]
        start += one.shape[-1]
        if kind == "box":
            np.testing.assert_allclose(part.mean(0), one[0], atol=4 * std.max() / rows**0.5)
            np.testing.assert_allclose(part.std(0), std[0], rtol=0.03)
            columns += list(part.T)
        else:
            assert set(np.unique(part)) <= {0.0, 1.0}
            assert (part.sum(-1) == 1.0).all()
            np.testing.assert_allclose(part.mean(0), one[0], atol=2 / rows**0.5)
            columns.append(part.argmax(-1))
    # The parts are drawn independently, not with one key.
    correlations = np.corrcoef(np.array(columns)) if len(columns) > 1 else np.eye(1)
    assert np.abs(correlations - np.eye(len(columns))).max() < 0.04


@pytest.mark.parametrize(("space", "number"), SPACES, ids=KINDS)
def test_samples_decode_to_actions_of_the_space(space: Any, number: int) -> None:
    @jax.jit
    def draw(key: Any, outputs: Any) -> Any:
        encoded = jnp.clip(Policy(space, outputs).sample(key), -1.0, 1.0)
        action = spaces.decode_action(space, encoded)
        return encoded, action, spaces.encode_action(space, action)

    encoded, action, again = draw(jax.random.key(2), 3.0 * outputs_of(number, 200))
    np.testing.assert_allclose(encoded, again, atol=1e-6)
    found = zip(spaces.leaves(space), jax.tree.leaves(action), strict=True)
    for (_, leaf), x in found:
        if leaf == PUSH:
            assert (PUSH.low - 1e-6 <= x).all() and (x <= PUSH.high + 1e-6).all()
            assert x[:, 0].max() > 2.9 and x[:, 0].min() < -0.9
        else:
            assert x.dtype == jnp.int32
            assert (x >= 0).all() and (x.reshape(200, -1) < np.array(sizes_of(leaf))).all()


def test_no_discrete_policy_is_certain() -> None:
    law = Policy(Discrete(4), jnp.array([50.0, 0.0, 0.0, 0.0]))
    worst = jax.jit(law.log_prob)(jnp.array([0.0, 0.0, 0.0, 1.0]))
    np.testing.assert_allclose(worst, np.log(UNIMIX / 4), rtol=1e-5)


def test_deviations_stay_between_their_bounds() -> None:
    space = spaces.box(-1.0, 1.0, (1,))
    entropies = []
    for raw in (-50.0, 0.0, 50.0):
        law = Policy(space, jnp.array([0.0, raw]))
        entropies.append(float(law.entropy()) - 0.5 * math.log(2 * math.pi * math.e))
    middle = 0.1 + 0.9 * plain.sigmoid(2.0)
    np.testing.assert_allclose(np.exp(entropies), [0.1, middle, 1.0], rtol=1e-4)
