"""Reward models recover known rewards, their noise, and know where they know nothing."""

from __future__ import annotations

import functools
import itertools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mbrl import mdp as mdps
from mbrl import spaces
from mbrl.fitting import FitConfig, fit_members
from mbrl.models.probabilistic import probabilistic_ensemble
from mbrl.models.reward import RewardModel, RewardState, given_reward, relabeled, reward_model
from mbrl.planning import PlannerConfig, planner
from mbrl.types import Array, Discrete, EnvSpec, Network, Transition
from tests.mbrl.sequences import random_records

SPEC = EnvSpec("toy", spaces.box(-np.inf, np.inf, (2,)), spaces.box(-2.0, 2.0, (1,)))
NOISE = 0.5


def known_reward(obs: Any, action: Any, next_obs: Any) -> Any:
    return 20.0 + 3.0 * np.sin(2 * obs[..., 0]) - action[..., 0] ** 2 + next_obs[..., 1]


def transitions(num: int, seed: int = 0) -> Transition:
    rng = np.random.default_rng(seed)
    obs = rng.uniform(-1.0, 1.0, (num, 2)).astype(np.float32)
    action = rng.uniform(-2.0, 2.0, (num, 1)).astype(np.float32)
    next_obs = (obs + rng.uniform(-0.5, 0.5, (num, 2))).astype(np.float32)
    reward = known_reward(obs, action, next_obs).astype(np.float32)
    fields = (obs, action, reward, next_obs, np.zeros(num, bool))
    return Transition(*(jnp.asarray(x) for x in fields))


def fit(model: RewardModel, data: Transition, epochs: int = 40, seed: int = 0) -> RewardState:
    num = data.reward.shape[0]
    optimizer = optax.adam(3e-3)
    config = FitConfig(batch_size=64, max_epochs=epochs, patience=10)
    held = jnp.arange(num) % 10 == 0

    @jax.jit
    def train(key: Array) -> RewardState:
        init_key, fit_key = jax.random.split(key)
        state = model.standardize(model.init(init_key), data, jnp.ones(num, bool))
        result = fit_members(
            lambda weights, rows: model.loss(weights, state, rows),
            lambda weights, rows, mask: model.error(weights, state, rows, mask),
            optimizer, state.weights, optimizer.init(state.weights),
            data, ~held, held, fit_key, config,
        )  # fmt: skip
        return state._replace(weights=result.weights)

    return train(jax.random.key(seed))


def per_member(data: Any, num_members: int) -> Any:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (num_members, *x.shape)), data)


@functools.cache
def fitted() -> tuple[RewardModel, RewardState]:
    model = reward_model(SPEC, 3, (32, 32))
    data = transitions(1500)
    noise = NOISE * np.random.default_rng(1).normal(size=1500).astype(np.float32)
    return model, fit(model, data._replace(reward=data.reward + noise))


def test_recovers_the_reward_and_its_noise() -> None:
    model, state = fitted()
    test = transitions(400, seed=7)
    estimate = model.predict(state, test.obs, test.action, test.next_obs)
    error = np.asarray(estimate.mean - test.reward)
    assert np.sqrt(np.mean(error**2)) < 0.5 * NOISE  # it sees through the noise
    assert abs(np.median(estimate.aleatoric) / NOISE - 1.0) < 0.2
    assert np.median(estimate.epistemic) < 0.5 * NOISE


def test_epistemic_uncertainty_grows_off_the_data() -> None:
    model, state = fitted()
    obs, action = jnp.array([[0.0, 0.0], [6.0, -6.0]]), jnp.zeros((2, 1))
    estimate = model.predict(state, obs, action, obs)
    assert estimate.epistemic[1] > 5 * estimate.epistemic[0] > 0
    data = cast(Any, Transition)(obs, action, None, obs, None)
    scores = model.score(state.weights, state, per_member(data, 3))
    np.testing.assert_allclose(estimate.mean, scores.mean(0), rtol=1e-6)
    np.testing.assert_allclose(estimate.epistemic, scores.std(0), rtol=1e-4)


# --- two-hot ----------------------------------------------------------------------------


def rare(num: int, seed: int) -> Transition:
    """Reward 1000 at the goal (6 %), -5 in a corner (16 %), 0 elsewhere."""
    data = transitions(num, seed)
    x, y = np.asarray(data.obs).T
    reward = np.where((x < -0.2) & (y < -0.2), -5.0, 0.0)
    reward = np.where((np.abs(x - 0.5) < 0.25) & (np.abs(y - 0.5) < 0.25), 1000.0, reward)
    return data._replace(reward=jnp.asarray(reward, jnp.float32))


def test_two_hot_beats_the_gaussian_on_a_sparse_heavy_tailed_reward() -> None:
    test = rare(1000, 5)
    error = {}
    for kind in ("gaussian", "two_hot"):
        model = reward_model(SPEC, 2, (48, 48), kind)
        state = fit(model, rare(1500, 0))
        mean = model.predict(state, test.obs, test.action, test.next_obs).mean
        relative = jnp.abs(mean - test.reward) / (1.0 + jnp.abs(test.reward))
        error[kind] = [float(jnp.median(relative[test.reward == r])) for r in (0, 1000, -5)]
    zero, goal, corner = error["two_hot"]
    assert zero < 0.1 * error["gaussian"][0] and corner < 0.1 * error["gaussian"][2], error
    assert goal < 1.1 * error["gaussian"][1] and goal < 0.5, error
    assert np.mean(error["two_hot"]) < 0.1 * np.mean(error["gaussian"]), error


def constant(size: int) -> Network:
    """A member whose output is its parameter, whatever it sees."""
    return Network(
        lambda key, x: jnp.zeros(size), lambda p, x: jnp.broadcast_to(p, (x.shape[0], size))
    )


def paid(*reward: float) -> Transition:
    num = len(reward)
    zeros = jnp.zeros((num, 2))
    fields = zeros, jnp.zeros((num, 1)), jnp.array(reward), zeros, jnp.zeros(num, bool)
    return Transition(*fields)


def predicted(model: RewardModel, state: RewardState) -> Any:
    one = jnp.zeros((1, 2))
    return model.predict(state, one, jnp.zeros((1, 1)), one)


def test_a_two_hot_mixture_has_the_mean_and_spread_of_its_rewards() -> None:
    model = reward_model(SPEC, 2, kind="two_hot", network=constant, num_bins=31)
    data = paid(0.0, 0.0, 1000.0, -5.0)
    state = model.standardize(model.init(jax.random.key(0)), data, jnp.ones(4, bool))
    assert predicted(model, state).mean == 0.0  # equal probabilities
    # Bins 15 and 30 are exactly 0 and the largest magnitude in the data.
    logits = jnp.full((2, 31), -jnp.inf).at[:, 15].set(jnp.log(0.9)).at[:, 30].set(jnp.log(0.1))
    estimate = predicted(model, state._replace(weights=logits))
    np.testing.assert_allclose(estimate.mean, 100.0, rtol=1e-4)
    np.testing.assert_allclose(estimate.aleatoric, 300.0, rtol=1e-4)
    assert estimate.epistemic == 0.0
    # Members that disagree: 100 and 500, so that the mean is 300 +- 200.
    other = logits[1].at[jnp.array([15, 30])].set(jnp.log(0.5))
    estimate = predicted(model, state._replace(weights=logits.at[1].set(other)))
    np.testing.assert_allclose(estimate.mean, 300.0, rtol=1e-4)
    np.testing.assert_allclose(estimate.epistemic, 200.0, rtol=1e-4)
    np.testing.assert_allclose(estimate.aleatoric, np.sqrt((300**2 + 500**2) / 2), rtol=1e-4)


def test_two_hot_before_the_first_reward_predicts_none_and_stays_finite() -> None:
    model = reward_model(SPEC, 2, (4,), "two_hot")
    data = paid(0.0, 0.0, 5.0)._replace(reward=jnp.array([0.0, 0.0, jnp.nan]))
    mask = jnp.array([True, True, False])
    state = model.standardize(model.init(jax.random.key(0)), data, mask)
    assert state.scale == 1.0
    batch = per_member(jax.tree.map(lambda x: x[:2], data), 2)
    grads = jax.grad(lambda w: model.loss(w, state, batch)[0].sum())(state.weights)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    assert predicted(model, state).mean == 0.0


# --- losses -----------------------------------------------------------------------------


def test_held_out_errors_and_losses_by_hand() -> None:
    data = paid(1.0, 3.0, 99.0)
    mask = jnp.array([True, True, False])  # mean 2, standard deviation 1
    model = reward_model(SPEC, 2, network=constant)
    state = model.standardize(model.init(jax.random.key(0)), data, mask)
    np.testing.assert_allclose([state.offset, state.scale], [2.0, 1.0])
    weights = jnp.array([[0.0, 0.0], [1.0, 0.0]])  # means in reward units: 2 and 3
    got = model.error(weights, state, data, mask.astype(jnp.float32))
    np.testing.assert_allclose(got, [0.0, 0.5 * np.log((2**2 + 0) / 2)], atol=1e-6)
    # Means have the gradient of half a squared error, at any variance: here -(3 - 2) / 1.
    batch = per_member(jax.tree.map(lambda x: x[1:2], data), 2)
    weights = jnp.array([[0.0, 0.0], [0.0, 3.0]])
    grads = jax.grad(lambda w: model.loss(w, state, batch)[0].sum())(weights)
    np.testing.assert_allclose(grads[:, 0], -1.0, rtol=1e-5)

    model = reward_model(SPEC, 2, kind="two_hot", network=constant, num_bins=31)
    data = paid(0.0, 8.0)
    state = model.standardize(model.init(jax.random.key(0)), data, jnp.ones(2, bool))
    got = model.error(state.weights, state, data, jnp.ones(2))
    np.testing.assert_allclose(got, np.log(np.log(31.0)), rtol=1e-4)
    sure = jnp.zeros((2, 31)).at[:, 15].set(50.0)
    got = model.error(sure, state, data, jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(got, np.log(1e-6), rtol=1e-2)


@pytest.mark.parametrize("kind", ["gaussian", "two_hot"])
def test_one_members_gradient_never_reaches_another(kind: Any) -> None:
    model = reward_model(SPEC, 3, (4,), kind, num_bins=5)
    state = stirred(model)
    batch = per_member(transitions(8), 3)
    losses, _ = model.loss(state.weights, state, batch)
    assert losses.shape == (3,)
    for leaf in jax.tree.leaves(jax.grad(lambda w: model.loss(w, state, batch)[0][1])(state[0])):
        assert np.any(leaf[1] != 0)
        assert np.all(leaf[0] == 0) and np.all(leaf[2] == 0)


def stirred(model: RewardModel) -> RewardState:
    """A state whose every weight is random: two-hot heads start at zero."""
    state = model.init(jax.random.key(0))
    leaves, tree = jax.tree.flatten(state.weights)
    rng = np.random.default_rng(3)
    leaves = [x + 0.5 * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
    return state._replace(weights=jax.tree.unflatten(tree, leaves))


@pytest.mark.parametrize("kind", ["gaussian", "two_hot"])
def test_predictions_do_not_depend_on_units(kind: Any) -> None:
    model = reward_model(SPEC, 2, (8,), kind)
    data = transitions(50)
    shift = 30.0 if kind == "gaussian" else 0.0  # two-hot bins know where 0 is

    def estimate(data: Transition) -> Any:
        state = model.standardize(stirred(model), data, jnp.ones(50, bool))
        return model.predict(state, data.obs, data.action, data.next_obs)

    plain = estimate(data)
    scaled = estimate(
        Transition(100 * data.obs + 7, data.action, 1000 * data.reward + shift,
                   100 * data.next_obs + 7, data.is_terminal)
    )  # fmt: skip
    np.testing.assert_allclose(scaled.mean, 1000 * plain.mean + shift, rtol=2e-3)
    np.testing.assert_allclose(scaled.aleatoric, 1000 * plain.aleatoric, rtol=2e-3)
    np.testing.assert_allclose(scaled.epistemic, 1000 * plain.epistemic, rtol=2e-2)


def test_scores_segments_without_targets_and_in_units_of_each_member() -> None:
    model = reward_model(SPEC, 2, (8,))
    data = transitions(12)
    blind = cast(Transition, data._replace(reward=None, is_terminal=None))
    start = stirred(model)
    state = model.standardize(start, blind, jnp.ones(12, bool))
    assert state.scale == 1.0 and np.any(state.inputs.mean != 0)  # units are left alone
    rows = model.score(state.weights, state, per_member(blind, 2))
    segments = jax.tree.map(lambda x: x.reshape(2, 3, 2, *x.shape[1:]), blind)
    score = functools.partial(model.score, state=state, batch=per_member(segments, 2))
    np.testing.assert_allclose(score(state.weights), rows.reshape(2, 2, 3, 2), rtol=1e-5)
    own = state._replace(offset=jnp.array([[1.0], [2.0]]), scale=jnp.array([[3.0], [4.0]]))
    got = model.score(state.weights, own, per_member(segments, 2))
    want = rows * np.array([[3.0], [4.0]]) + np.array([[1.0], [2.0]])
    np.testing.assert_allclose(got, want.reshape(2, 2, 3, 2), rtol=1e-5)
    grads = jax.grad(lambda w: score(w).sum())(state.weights)
    assert np.any(jax.tree.leaves(grads)[1] != 0)


# --- as the reward of an MDP ------------------------------------------------------------


def test_planning_through_a_model_with_a_learned_reward() -> None:
    model, reward = fitted()
    dynamics = probabilistic_ensemble(SPEC, 2, (4,))
    data = transitions(20)
    state = dynamics.standardize(dynamics.init(jax.random.key(1)), data, jnp.ones(20, bool))
    alone = dynamics.mdp("mean", own_reward=False)
    mdp = mdps.with_reward(alone, model)
    params = mdps.SplitParams(state, reward)
    key, coef = jax.random.key(2), 2.0
    flat, outcome = jax.jit(mdp.step)(params, key, data.obs, data.action)
    estimate = model.predict(reward, data.obs, data.action, flat)
    np.testing.assert_allclose(outcome.reward, estimate.mean, rtol=1e-4)
    # The parts are independent: their variances add, and the penalty takes each of them once.
    own = alone.step(state, key, data.obs, data.action)[1].uncertainty
    assert own is not None
    # The head of the ensemble for a reward that nobody is after is not one of them.
    head = state.weights.network["Dense_1"]["kernel"].at[1, :, 2].add(100.0)
    loud = state._replace(weights=state.weights._replace(
        network=state.weights.network | {
            "Dense_1": state.weights.network["Dense_1"] | {"kernel": head}
        }
    ))  # fmt: skip
    louder = alone.step(loud, key, data.obs, data.action)[1].uncertainty
    np.testing.assert_allclose(louder, own, rtol=1e-5)
    spread = np.sqrt(np.square(own) + np.square(estimate.epistemic))
    cautious = mdps.penalized(mdp, coef).step(params, key, data.obs, data.action)[1]
    np.testing.assert_allclose(outcome.reward - cautious.reward, coef * spread, rtol=1e-2)


def test_a_given_reward_replaces_those_of_sequences() -> None:
    spec = EnvSpec("pair", SPEC.observation, {"arm": SPEC.action, "tool": Discrete(3)})
    record = random_records(spec, (), (2, 5))
    record.is_first[:] = [[0, 0, 0, 1, 0], [1, 0, 0, 0, 0]]

    def reward(obs: Any, action: Any, next_obs: Any) -> Any:
        return 10.0 * obs[:, 0] + action["arm"][:, 0] + action["tool"] - next_obs[:, 1]

    found = relabeled(record, reward)
    expected = np.zeros((2, 5))
    for b, t in itertools.product(range(2), range(1, 5)):
        if not record.is_first[b, t]:
            parts = (x[b, t - 1] for x in (record.action["arm"], record.action["tool"]))
            expected[b, t] = 10.0 * record.obs[b, t - 1, 0] - record.obs[b, t, 1]
            expected[b, t] += sum(float(np.ravel(x)[0]) for x in parts)
    np.testing.assert_allclose(found.reward, expected, rtol=1e-5, atol=1e-6)
    assert found.obs is record.obs and found.action is record.action


def test_plans_for_the_highest_given_reward() -> None:
    dynamics = probabilistic_ensemble(SPEC, 2, (4,))
    given = given_reward(lambda obs, action, next_obs: -((action[:, 0] - 1.2) ** 2))
    mdp = mdps.with_reward(dynamics.mdp(), given)
    params = mdps.SplitParams(dynamics.init(jax.random.key(0)), None)
    config = PlannerConfig("shooting", horizon=1, population=400, particles=1, elites=1)
    mpc = planner(mdp, config)
    start = mdp.init(params, jax.random.key(1), jnp.zeros((2, 2)))
    action, _, _ = jax.jit(mpc.plan)(params, jax.random.key(2), start, mpc.init(2))
    np.testing.assert_allclose(action, 1.2, atol=0.05)


def test_slopes_are_finite_where_members_agree_and_nothing_is_noisy() -> None:
    model = reward_model(SPEC, 1, (4,), "two_hot", num_bins=5)
    state = model.init(jax.random.key(0))
    sure = jax.tree.map(lambda x: x, state.weights)
    sure["Dense_1"]["bias"] = jnp.array([[0.0, 0.0, 200.0, 0.0, 0.0]])

    def total(action: Array) -> Array:
        obs = jnp.zeros((1, 2))
        return sum(x.sum() for x in model.predict(state._replace(weights=sure), obs, action, obs))

    assert np.all(np.isfinite(jax.grad(total)(jnp.zeros((1, 1)))))


# --- bad input --------------------------------------------------------------------------


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"kind: got 'given', expected .*given_reward\(fn\)"):
        reward_model(SPEC, kind=cast(Any, "given"))
    with pytest.raises(ValueError, match="num_bins: got 64, expected an odd number"):
        reward_model(SPEC, kind="two_hot", num_bins=64)
    column = given_reward(lambda obs, action, next_obs: obs[:, :1])
    with pytest.raises(ValueError, match=r"got shape \(3, 1\), expected \(3,\)"):
        column(None, jnp.zeros((3, 2)), jnp.zeros((3, 1)), jnp.zeros((3, 2)))
