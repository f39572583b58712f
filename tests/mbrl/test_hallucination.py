"""Hallucinated control: what the further actions choose, and how far they reach."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl import spaces
from mbrl.models.hallucination import executed_action
from mbrl.models.probabilistic import probabilistic_ensemble
from mbrl.planning import PlannerConfig, planner
from mbrl.types import Discrete, EnvSpec

SPEC = EnvSpec("plane", spaces.box(-np.inf, np.inf, (2,)), spaces.box(-1.0, 3.0, (1,)))
KEY = jax.random.key(0)


def silent(num_members: int = 3):
    """Return members that disagree and call nothing noise."""
    model = probabilistic_ensemble(SPEC, num_members, (8,), num_elites=2)
    state = jax.jit(model.init)(KEY)
    low = jnp.full_like(state.weights.logvar_low, -60.0)
    return model, state._replace(weights=state.weights._replace(logvar_low=low, logvar_high=low))


def test_a_choice_moves_each_dimension_by_its_own_deviation_and_the_reward_is_the_best():
    model, state = silent()
    obs, action = jnp.array([[0.3, -0.6]]), jnp.array([[2.0]])
    out = model.predict(state, obs, action)
    center, spread = out.mean[:2].mean(0)[0], np.asarray(out.mean.std(0)[0])  # elites, all members
    assert spread.min() > 1e-3
    step = jax.jit(model.hallucinated(2.0).step)
    for choice in ([0.0, 0.0], [1.0, -0.5], [-1.0, 1.0]):
        chosen = jnp.concatenate([action, jnp.array([choice])], 1)
        after, outcome = step(state, KEY, obs, chosen)
        want = obs[0] + center[:2] + 2.0 * np.array(choice) * spread[:2]
        np.testing.assert_allclose(after[0], want, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(outcome.reward[0], center[2] + 2.0 * spread[2], rtol=1e-4)


def test_uncertainty_is_reported_as_asked():
    model, state = silent()
    obs, action = jnp.array([[0.3, -0.6]]), jnp.array([[2.0, 0.0, 0.0]])
    asked = "pairwise", "raw", False
    hoped = jax.jit(model.hallucinated(1.0, *asked).step)(state, KEY, obs, action)[1]
    plain = jax.jit(model.mdp("mean", True, *asked).step)(state, KEY, obs, action[:, :1])[1]
    np.testing.assert_allclose(hoped.uncertainty, plain.uncertainty, rtol=1e-5)


def test_a_planner_is_at_least_as_hopeful_as_without_and_acts_within_bounds():
    model, state = silent()
    config = PlannerConfig("cem", 4, population=64, iterations=3, particles=1, elites=8)
    values = []
    for mdp in (model.mdp("mean", uncertainty=False), model.hallucinated(1.0)):
        mpc = planner(mdp, config)
        start = mdp.init(state, KEY, jnp.zeros((2, 2)))
        action, _, info = jax.jit(mpc.plan)(state, KEY, start, mpc.init(2))
        values.append(info["value"])
    assert np.all(values[1] > values[0] + 0.1)
    assert action.shape == (2, 3)
    executed = executed_action(SPEC.action, action)
    np.testing.assert_array_equal(executed, action[:, :1])
    assert np.all((executed >= -1.0) & (executed <= 3.0))


def test_other_actions_are_refused():
    for action in (Discrete(3), spaces.box(-np.inf, np.inf, (1,))):
        model = probabilistic_ensemble(SPEC._replace(action=action), 2, (4,))
        with pytest.raises(ValueError, match="action space of plane"):
            model.hallucinated(1.0)
