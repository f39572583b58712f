"""PETS plans with the reward that it is told to: its own head, a model of its own, a function."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agents.pets import PETSConfig, make_pets
from mbrl import spaces
from mbrl.planning import PlannerConfig
from mbrl.training.device import run_device
from mbrl.training.learner import DriverConfig
from mbrl.types import MDP, Array, EnvSpec, Outcome

TINY = PlannerConfig(horizon=3, population=12, iterations=2, particles=2, elites=4)
COMPARED = ("model/predicted_return", "model/realized_return", "model/exploitation")
SPEC = EnvSpec("point", spaces.box(-2.0, 2.0, (1,)), spaces.box(-1.0, 1.0, (1,)), 30)


def point() -> MDP:
    """Pushed along a line; the reward is the new position, and the end is sticky."""

    def init(params: Any, key: Any, obs: Any = None, batch: int = 1) -> Array:
        return 0.1 * jax.random.normal(key, (batch, 1)) if obs is None else obs

    def step(params: Any, key: Any, state: Array, action: Array) -> tuple[Array, Outcome]:
        state = jnp.clip(state + 0.2 * action, -2.0, 2.0)
        ones = jnp.ones(state.shape[0])
        return state, Outcome(state[:, 0], ones, 0.0 * ones)

    return MDP(init, step, lambda params, state: state, SPEC)


def config(reward: Any = "head", penalty: float = 0.0) -> PETSConfig:
    return PETSConfig(
        members=2, elites=2, hidden=(16,), reward=reward, max_epochs=40, random_steps=120,
        train_every=25, capacity=200, batch_size=32, learning_rate=3e-3, penalty=penalty,
        planner=TINY,
    )  # fmt: skip


def leftwards(obs: Array, action: Array, next_obs: Array) -> Array:
    return -next_obs[:, 0]


@pytest.mark.parametrize("source", ["gaussian", "two_hot", "given"])
def test_trains_in_one_program_over_seeds_and_follows_its_reward(source: str) -> None:
    # The penalty reads every part of the outcome: none of them may be lost or NaN.
    settings = config("head" if source == "given" else source, penalty=0.1)
    reward_fn = leftwards if source == "given" else None

    def factory(hyper: Any) -> Any:
        return make_pets(SPEC, settings, reward_fn=reward_fn)

    run = run_device(factory, point(), DriverConfig(120, seeds=(0, 1)))
    for report in run:
        for name, value in report.metrics.items():
            if name not in COMPARED:  # unknown until there is a model
                assert np.all(np.isfinite(value)), name
    learned = report.learner.agent
    for leaf in jax.tree.leaves(learned):
        assert np.all(np.isfinite(leaf))
    names = {name.split("/")[0] for name in report.metrics}
    own = source in ("gaussian", "two_hot")
    assert names == {"model", "termination"} | ({"reward"} if own else set())
    assert (learned.reward is not None) == own
    if source == "gaussian":  # 0 nats is what no knowledge of a standardized reward scores
        assert np.all(report.metrics["reward/holdout_error"] < -0.1)
        # Each seed has standardized with its own data.
        assert learned.reward.scale[0] != learned.reward.scale[1]

    agent = factory({})
    first = jax.tree.map(lambda x: x[0], learned)
    obs, is_first = jnp.array([[0.0], [0.3]]), jnp.ones(2, bool)
    carry = agent.begin(2)
    action, _, _ = agent.act(first, carry, obs, is_first, jax.random.key(0), "greedy")
    wanted = -1.0 if source == "given" else 1.0  # the environment pays for going right
    assert np.all(wanted * np.asarray(action) > 0.0)


def test_a_given_and_a_learned_reward_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"reward_fn: .*reward='gaussian'; leave one of them out"):
        make_pets(SPEC, config("gaussian"), reward_fn=leftwards)
