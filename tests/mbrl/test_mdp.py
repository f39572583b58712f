"""Combinators and rollouts, on decision processes small enough to check by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl import mdp as mdps
from mbrl import spaces
from mbrl.types import MDP, Array, Discrete, EnvSpec, Outcome


def counter(start: float = 0.0, end: float = 3.0, uncertainty: float | None = 0.5) -> MDP:
    """Add the action to a number; reward = the new number; terminal at `end` and beyond."""
    spec = EnvSpec("counter", spaces.box(-np.inf, np.inf, (1,)), Discrete(2))

    def init(params: Any, key: Any, obs: Any = None, batch: int = 1) -> Array:
        if obs is not None:
            return obs[:, 0]
        return start + jax.random.uniform(key, (batch,)) * 1e-3

    def step(params: Any, key: Any, state: Array, action: Array) -> tuple[Array, Outcome]:
        state = state + action
        spread = None if uncertainty is None else jnp.full(state.shape, uncertainty)
        return state, Outcome(state, 1.0 - (state >= end), spread)

    return MDP(init, step, lambda params, state: state[:, None], spec)


KEY = jax.random.key(0)
STATE = jnp.array([0.0, 1.0])
ONE = jnp.array([1, 1])


def test_rollout_is_the_loop_over_step():
    def policy(key, state, t):
        return (t % 2) * jnp.ones(2, jnp.int32)

    final, trajectory = mdps.rollout(counter(), None, KEY, STATE, policy, 4)
    np.testing.assert_allclose(final, [2.0, 3.0])
    np.testing.assert_allclose(trajectory.obs[:, 0, 0], [0, 0, 1, 1])
    np.testing.assert_allclose(trajectory.outcome.reward[:, 0], [0, 1, 1, 2])
    np.testing.assert_allclose(trajectory.outcome.discount[:, 1], [1, 1, 1, 0])


def test_penalized_and_optimistic_are_opposite_and_linear():
    base = counter().step(None, KEY, STATE, ONE)[1].reward
    for coef in (0.0, 1.0, 4.0):
        down = mdps.penalized(counter(), coef).step(None, KEY, STATE, ONE)[1].reward
        up = mdps.optimistic(counter(), coef).step(None, KEY, STATE, ONE)[1].reward
        np.testing.assert_allclose(down, base - 0.5 * coef)
        np.testing.assert_allclose(up, base + 0.5 * coef)


def test_penalty_without_uncertainty_is_refused_not_ignored():
    with pytest.raises(ValueError, match="reports no uncertainty.*uncertainty=True"):
        mdps.penalized(counter(uncertainty=None), 1.0).step(None, KEY, STATE, ONE)


def test_penalties_add_up_and_the_uncertainty_stays_what_it_is():
    base = counter().step(None, KEY, STATE, ONE)[1]
    once = mdps.penalized(counter(), 1.5).step(None, KEY, STATE, ONE)[1]
    nested = mdps.penalized(mdps.penalized(counter(), 1.0), 0.5).step(None, KEY, STATE, ONE)[1]
    for outcome in (once, nested):
        np.testing.assert_allclose(outcome.reward, base.reward - 1.5 * 0.5)
        np.testing.assert_allclose(outcome.uncertainty, base.uncertainty)


def test_another_reward_takes_the_penalty_with_it_so_that_none_counts_twice():
    def reward(params, obs, action, next_obs):
        return next_obs[:, 0], jnp.full(2, 1.2)

    params, spread = mdps.SplitParams(None, None), 1.3
    for inner in (counter(), mdps.penalized(counter(), 2.0)):
        outer = mdps.penalized(mdps.with_reward(inner, reward), 3.0)
        outcome = outer.step(params, KEY, STATE, ONE)[1]
        np.testing.assert_allclose(outcome.reward, np.array([1.0, 2.0]) - 3.0 * spread)
        np.testing.assert_allclose(outcome.uncertainty, spread)


def test_certainty_about_model_and_reward_has_a_finite_slope():
    def reward(params, obs, action, next_obs):
        return next_obs[:, 0], 0.0 * action

    def uncertainty(action):
        mdp = mdps.with_reward(counter(uncertainty=0.0), reward)
        return mdp.step(mdps.SplitParams(None, None), KEY, STATE, action)[1].uncertainty.sum()

    np.testing.assert_array_equal(jax.grad(uncertainty)(jnp.ones(2)), 0.0)


def test_the_intrinsic_reward_is_the_uncertainty_alone():
    outcome = mdps.with_intrinsic_reward(counter()).step(None, KEY, STATE, ONE)[1]
    np.testing.assert_allclose(outcome.reward, 0.5)
    with pytest.raises(ValueError, match="with_intrinsic_reward.*reports no uncertainty"):
        mdps.with_intrinsic_reward(counter(uncertainty=None)).step(None, KEY, STATE, ONE)


def test_penalty_coefficient_may_be_traced_and_vmapped():
    def reward(coef):
        return mdps.penalized(counter(), coef).step(None, KEY, STATE, ONE)[1].reward

    np.testing.assert_allclose(jax.vmap(reward)(jnp.array([0.0, 2.0]))[:, 0], [1.0, 0.0])


def test_with_reward_sees_both_observations_and_adds_uncertainty_in_quadrature():
    def reward(params, obs, action, next_obs):
        assert params == "reward params"
        return next_obs[:, 0] - 10 * obs[:, 0], jnp.full(2, 1.2)

    mdp = mdps.with_reward(counter(), reward)
    params = mdps.SplitParams(None, "reward params")
    _, outcome = mdp.step(params, KEY, STATE, ONE)
    np.testing.assert_allclose(outcome.reward, [1.0, -8.0])
    np.testing.assert_allclose(outcome.uncertainty, 1.3)
    state = mdp.init(params, KEY, STATE[:, None])
    np.testing.assert_allclose(mdp.observe(params, state), [[0.0], [1.0]])


def test_with_termination_and_discounted_compose():
    mdp = mdps.with_termination(counter(), lambda obs, action, next_obs: next_obs[:, 0] > 1.5)
    np.testing.assert_allclose(mdp.step(None, KEY, STATE, ONE)[1].discount, [1.0, 0.0])
    mdp = mdps.discounted(mdp, 0.9)
    np.testing.assert_allclose(mdp.step(None, KEY, STATE, ONE)[1].discount, [0.9, 0.0], rtol=1e-6)


def stream(mdp: MDP, actions: list[int], batch: int = 1) -> list[Any]:
    state = mdp.init(None, jax.random.key(1), None, batch)
    steps = [mdps.timestep(mdp, None, state)]
    for i, action in enumerate(actions):
        state, _ = mdp.step(None, jax.random.key(i), state, jnp.full(batch, action))
        steps.append(mdps.timestep(mdp, None, state))
    return [jax.tree.map(lambda x: np.asarray(x)[0], s) for s in steps]


def test_episodic_stream_equals_a_hand_written_log():
    log = stream(mdps.episodic(counter(), 4), [1, 1, 1, 1, 0, 0, 0, 0, 1])
    flags = [(int(s.is_first), int(s.is_last), int(s.is_terminal)) for s in log]
    # terminates at 3; the next action is ignored; then four zeros are truncated at 4 steps
    assert flags == [
        (1, 0, 0), (0, 0, 0), (0, 0, 0), (0, 1, 1), (1, 0, 0),
        (0, 0, 0), (0, 0, 0), (0, 0, 0), (0, 1, 0), (1, 0, 0),
    ]  # fmt: skip
    np.testing.assert_allclose([s.reward for s in log], [0, 1, 2, 3, 0, 0, 0, 0, 0, 0], atol=2e-3)
    np.testing.assert_allclose(log[3].obs, [3.0], atol=2e-3)  # the last observation survives
    np.testing.assert_allclose(log[4].obs, [0.0], atol=2e-3)  # and so does the first


def test_episodic_draws_a_fresh_start_every_time():
    log = stream(mdps.episodic(counter(), 1), [0] * 8)
    starts = {float(s.obs[0]) for s in log if s.is_first}
    assert len(starts) == 5


def test_episodic_without_limit_never_truncates():
    log = stream(mdps.episodic(counter(end=1e9), None), [0] * 12)
    assert not any(s.is_last for s in log)


def test_predicted_survival_is_drawn():
    mdp = mdps.discounted(counter(end=1e9), 0.75)
    mdp = mdps.episodic(mdp, None)
    state = mdp.init(None, KEY, None, 4000)
    state, _ = mdp.step(None, jax.random.key(5), state, jnp.zeros(4000, jnp.int32))
    assert abs(float(state.is_terminal.mean()) - 0.25) < 0.03


def test_with_resets_draws_recorded_observations():
    mdp = mdps.with_resets(counter(), np.array([[5.0], [7.0]]))
    state = mdp.init(None, KEY, None, 200)
    assert set(np.unique(state)) == {5.0, 7.0}
    np.testing.assert_allclose(mdp.init(None, KEY, jnp.array([[1.0]])), [1.0])
