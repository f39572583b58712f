"""Tree search finds what brute force finds, and keeps to the rules, the units and the density."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mctx
import numpy as np
import pytest
from scipy import stats

from envs.ondevice import cartpole
from mbrl import spaces
from mbrl.mdp import rollout
from mbrl.models.probabilistic import probabilistic_ensemble
from mbrl.models.rssm import RSSMConfig, rssm
from mbrl.planning import PlannerConfig, SearchConfig, planner, search, uniform_predictor
from mbrl.planning.candidates import propose
from mbrl.types import MDP, Array, Discrete, EnvSpec, MultiDiscrete, Outcome, Predictor
from tests.mbrl.plain import random_weights

KEY = jax.random.key(0)
METHODS = ["gumbel", "puct"]
NOTHING = spaces.box(-np.inf, np.inf, (1,))


def simple_mdp(action: Any, step: Any) -> MDP:
    """Make an MDP whose start states are given and whose steps have no noise."""
    spec = EnvSpec("simple", NOTHING, action)
    return MDP(
        lambda params, key, obs=None, batch=1: obs,
        lambda params, key, state, action: step(params, state, action),
        lambda params, state: jax.tree.leaves(state)[0][:, None],
        spec,
    )


# A tree of 3 actions and 4 steps with a table of rewards [row, node, action].

ROWS, ACTIONS, DEPTH, GAMMA = 16, 3, 4, 0.9
NODES = sum(ACTIONS**i for i in range(DEPTH))


class Place(NamedTuple):
    row: Array
    node: Array


def climb(rewards: Any, state: Place, action: Any) -> Any:
    reward = rewards[state.row, jnp.minimum(state.node, NODES - 1), action]
    node = ACTIONS * state.node + 1 + action
    alive = (node < NODES).astype(jnp.float32)
    return Place(state.row, node), Outcome(reward, alive, jnp.zeros_like(reward))


def best_returns(rewards: Any, node: int = 0) -> Any:
    """Return [A] of each action at a node, by trying everything; NaN counts as -inf."""
    ahead = [
        max(best_returns(rewards, child)) if (child := ACTIONS * node + 1 + a) < NODES else 0.0
        for a in range(ACTIONS)
    ]
    return np.nan_to_num(rewards[node], nan=-np.inf) + GAMMA * np.array(ahead)


REWARDS = np.random.default_rng(0).uniform(size=(ROWS, NODES, ACTIONS))
TRACES: list[str] = []


@functools.cache
def climber(method: Any) -> Any:
    mdp = simple_mdp(Discrete(ACTIONS), climb)
    config = SearchConfig(
        method, simulations=400, discount=GAMMA, max_depth=DEPTH, maxvisit_init=5.0, pb_c_init=2.5
    )
    find = search(mdp, uniform_predictor(mdp.spec), config)

    def run(rewards: Any, key: Any, noise: Any, temperature: Any) -> Any:
        TRACES.append(method)
        state = Place(jnp.arange(ROWS), jnp.zeros(ROWS, jnp.int32))
        return find(rewards, key, state, noise=noise, temperature=temperature)

    return jax.jit(run)


def climb_from(method: str, rewards: Any = REWARDS, seed: int = 0, noise: Any = 0.0,
               temperature: Any = 1.0) -> Any:  # fmt: skip
    noise = np.broadcast_to(np.float32(noise), ROWS)
    return climber(method)(np.float32(rewards), jax.random.key(seed), noise, temperature)


@pytest.mark.parametrize("method", METHODS)
def test_chooses_as_an_exhaustive_search_does(method):
    returns = np.stack([best_returns(table) for table in REWARDS])
    ranked = np.sort(returns, 1)
    clear = ranked[:, -1] - ranked[:, -2] > 0.07
    found = climb_from(method)
    assert clear.sum() >= 12
    np.testing.assert_array_equal(found.action[clear], returns.argmax(1)[clear])
    chosen = returns[np.arange(ROWS), found.action]
    assert np.all(ranked[:, -1] - chosen < 0.07)
    # Means over simulations, hence between those of random plans and of the best.
    assert np.all(found.value < ranked[:, -1]) and np.all(found.value > REWARDS.mean((1, 2)))
    assert np.all(found.qvalues <= returns + 1e-5)


def test_a_model_without_faults_is_searched_as_mctx_does():
    def expand(rewards: Any, key: Any, action: Any, state: Any) -> Any:
        state, outcome = climb(rewards, state, action)
        make: Any = mctx.RecurrentFnOutput
        step = make(
            reward=outcome.reward, discount=GAMMA * outcome.discount, value=jnp.zeros(ROWS),
            prior_logits=jnp.zeros((ROWS, ACTIONS)),
        )  # fmt: skip
        return step, state

    @jax.jit
    def run(rewards: Any) -> Any:
        make: Any = mctx.RootFnOutput
        place = Place(jnp.arange(ROWS), jnp.zeros(ROWS, jnp.int32))
        root = make(
            prior_logits=jnp.zeros((ROWS, ACTIONS)), value=jnp.zeros(ROWS), embedding=place
        )  # fmt: skip
        transform: Any = functools.partial(
            mctx.qtransform_completed_by_mix_value, maxvisit_init=5.0
        )
        out = mctx.gumbel_muzero_policy(
            rewards, KEY, root, expand, 400, max_depth=DEPTH, qtransform=transform, gumbel_scale=0.0
        )
        summary = out.search_tree.summary()
        return out.action, out.action_weights, summary.value, summary.qvalues

    found = climb_from("gumbel")
    ours = found.action, found.weights, found.value, found.qvalues
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        ours, run(jnp.float32(REWARDS)),
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_through_a_broken_step_is_given_up_and_spoils_no_other(method):
    def lost(broken: float) -> Any:
        rewards = REWARDS.copy()
        for row in range(ROWS):
            node = 0
            for _ in range(2):  # break what the best plan does at its third step
                node = ACTIONS * node + 1 + int(best_returns(rewards[row], node).argmax())
            rewards[row, node, best_returns(rewards[row], node).argmax()] = broken
        returns = np.stack([best_returns(table) for table in rewards])
        found = climb_from(method, rewards)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found))
        return np.mean(returns.max(1) - returns[np.arange(ROWS), found.action])

    # A large number in its place is averaged into all that leads there.
    assert lost(np.nan) < 0.05 < lost(-100.0)


@pytest.mark.parametrize("method", METHODS)
def test_noise_is_what_depends_on_the_key_and_its_value_is_not_compiled_in(method):
    one, two = (climb_from(method, seed=seed) for seed in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    TRACES.clear()
    loud = [climb_from(method, seed=s, noise=1.0, temperature=0.5 + s) for s in range(2)]
    assert np.any(loud[0].action != loud[1].action)
    # Rows of one batch may differ: here the even ones explore.
    mixed = [climb_from(method, seed=s, noise=1 - np.arange(ROWS) % 2) for s in range(2)]
    for found in mixed:
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[1::2], y[1::2]), found, one)
    assert np.any(mixed[0].qvalues[::2] != mixed[1].qvalues[::2])
    assert TRACES == []


# Bandits: what an action brings is read from tables [row, action].

ARMS = 8


class Tables(NamedTuple):
    """Of the root: logits [R, A] and value [R]; of each action [R, A] what it leads to."""

    logits: Any
    root: Any
    reward: Any
    survival: Any
    value: Any


def tables(rows: int, seed: int = 0) -> Tables:
    rng = np.random.default_rng(seed)
    logits, reward = rng.normal(size=(2, rows, ARMS)) * [[[1.5]], [[3.0]]]
    ones = np.ones((rows, ARMS))
    prior = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return Tables(logits, (prior * reward).sum(1), reward, ones, 0.0 * ones)


class Pull(NamedTuple):
    row: Array
    arm: Array


def pull(params: Any, state: Pull, action: Any) -> Any:
    at = (state.row, action)
    reward, survival = params.reward[at], params.survival[at]
    return Pull(state.row, action), Outcome(reward, survival, 0.0 * reward)


def tell(params: Any, state: Pull) -> Any:
    after = params.value[state.row, jnp.maximum(state.arm, 0)]
    value = jnp.where(state.arm < 0, params.root[state.row], after)
    return params.logits[state.row], value


@functools.cache
def gambler(method: Any, simulations: int, rows: int) -> Any:
    def run(gamma: Any, params: Any, key: Any, invalid: Any, noise: Any, temperature: Any) -> Any:
        config = SearchConfig(
            method, simulations=simulations, discount=gamma, max_depth=1, max_considered=99
        )
        find = search(simple_mdp(Discrete(ARMS), pull), Predictor(tell), config)
        state = Pull(jnp.arange(rows), jnp.full(rows, -1))
        return find(params, key, state, invalid, noise, temperature)

    return jax.jit(run)


def gamble(params: Tables, method: str = "gumbel", simulations: int = 0, gamma: float = 1.0,
           seed: int = 0, noise: float = 0.0, invalid: Any = None,
           temperature: float = 1.0) -> Any:  # fmt: skip
    rows = len(params.root)
    invalid = np.zeros((rows, ARMS), bool) if invalid is None else invalid
    params = jax.tree.map(jnp.float32, params)
    # Gumbel tries every action whatever the prior, PUCT needs more simulations to.
    run = gambler(method, simulations or {"gumbel": 16, "puct": 150}[method], rows)
    return run(gamma, params, jax.random.key(seed), invalid, noise, temperature)


def softmax(logits: Any) -> Any:
    return np.asarray(jax.nn.softmax(jnp.asarray(logits)))


MANY = 256


def test_the_policy_is_improved_for_every_prior_when_every_action_was_tried():
    params = tables(MANY)
    found = gamble(params)
    np.testing.assert_allclose(found.qvalues, params.reward, rtol=1e-5)
    before = (softmax(params.logits) * params.reward).sum(1)
    after = (np.asarray(found.weights) * params.reward).sum(1)
    assert np.all(after >= before) and np.mean(after - before) > 1.0
    np.testing.assert_array_equal(found.prior_logits, np.float32(params.logits))
    np.testing.assert_allclose(np.sum(found.weights, 1), 1.0, rtol=1e-5)


def test_the_policy_is_improved_on_average_by_half_as_many_simulations_as_actions():
    # The promise of Gumbel MuZero, with a root value that is that of the prior.
    params = tables(MANY)
    found = [gamble(params, simulations=4, seed=seed, noise=1.0) for seed in range(8)]
    before = (softmax(params.logits) * params.reward).sum(1)
    rows = np.arange(MANY)
    acted = np.mean([params.reward[rows, f.action] for f in found], 0)
    learned = np.mean([(np.asarray(f.weights) * params.reward).sum(1) for f in found], 0)
    assert np.mean(acted - before) > 0.5 and np.mean(learned - before) > 0.5
    assert np.mean(learned >= before) > 0.9
    untried = np.asarray(found[0].qvalues) == np.asarray(found[0].value)[:, None]
    assert np.all(untried.sum(1) >= ARMS - 4)


def test_a_step_that_ends_the_episode_ends_the_value_and_survival_is_a_discount():
    params = tables(MANY)
    survival = np.random.default_rng(1).choice([0.0, 0.5, 1.0], (MANY, ARMS))
    params = params._replace(survival=survival, value=50.0 + params.logits)
    params.value[0, 0], params.survival[0, 0] = np.nan, 0.0  # beyond the end: nobody's business
    for gamma in (1.0, 0.9):
        found = gamble(params, gamma=gamma)
        want = params.reward + gamma * survival * np.nan_to_num(params.value)
        np.testing.assert_allclose(found.qvalues, want, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_a_number_neither_wins_nor_hides_the_difference_of_others(method):
    params = tables(MANY)
    params.logits[:], params.root[:] = 0.0, 0.0
    params.reward[:, 2:] = np.linspace(0.0, 1e-3, 6)  # close to each other, the last is best
    params.reward[:, :2] = 0.0
    clean = gamble(params, method)
    broken = jax.tree.map(np.copy, params)
    odd = np.arange(MANY) % 2 == 1
    broken.reward[odd, 0] = np.resize([np.nan, np.inf, -np.inf, 1e38], odd.sum())
    broken.value[odd, 1] = np.nan
    if method == "gumbel":
        broken.logits[odd, :2] = 4.0  # the prior wants them
        broken.root[odd] = -9.0  # hence what is given to them lies far from the others
    found = gamble(broken, method)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found))
    np.testing.assert_array_equal(found.action, ARMS - 1)
    weights = np.asarray(found.weights)[odd]
    assert np.all(weights[:, :2] == 0.0)
    # By what they are preferred to each other is relative to what the others bring.
    assert np.all(weights[:, -1] > 1.5 * weights[:, 2:-1].max(1))
    # Other rows see nothing of it.
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[~odd], y[~odd]), found, clean)
    lost = params._replace(reward=np.full_like(params.reward, np.nan), root=params.root + np.nan)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gamble(lost, method)))


@pytest.mark.parametrize("method", METHODS)
def test_masks_hold_at_the_root_for_every_key(method):
    params = tables(MANY)
    params.reward[:, :3] = 100.0  # tempting, as is the prior
    params.logits[:, :3] = 9.0
    invalid = np.zeros((MANY, ARMS), bool)
    invalid[:, :2] = True
    params.logits[:, 2] = -np.inf
    params.logits[0] = -np.inf  # nothing is allowed
    found = gamble(params, method, invalid=invalid, noise=1.0)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found))
    assert np.all(found.action[1:] >= 3)
    assert np.all(found.weights[1:, :3] == 0.0)
    assert np.all(found.value[1:] < 20.0)
    assert len(np.unique(found.action)) >= 4


def test_the_temperature_is_that_of_the_choice_among_visits():
    params = tables(MANY)
    cold, warm, hot = (gamble(params, "puct", noise=1.0, temperature=t) for t in (0.0, 1.0, 1e3))
    weights = np.asarray(warm.weights)
    for found in (cold, hot):
        np.testing.assert_array_equal(found.weights, weights)  # the same trees
    rows = np.arange(MANY)
    np.testing.assert_array_equal(weights[rows, cold.action], weights.max(1))
    expected = [(weights**2).sum(1).mean(), (1.0 / (weights > 0.0).sum(1)).mean()]
    acted = [weights[rows, warm.action].mean(), np.mean(hot.action == cold.action)]
    np.testing.assert_allclose(acted, expected, atol=0.06)
    assert np.all(weights[rows, hot.action] > 0.0)
    assert expected[1] < acted[0] - 0.1
    # Without noise ties are broken alike for all keys.
    even = params._replace(
        logits=0 * params.logits, reward=0 * params.reward, root=0 * params.root
    )  # fmt: skip
    one, two = (gamble(even, "puct", seed=seed) for seed in range(2))
    assert np.all((one.weights == np.max(one.weights, 1, keepdims=True)).sum(1) > 1)
    np.testing.assert_array_equal(one.action, two.action)


# Rules inside the tree: a ring of 4 places where one action is against the rules.


def move(params: Any, state: Any, action: Any) -> Any:
    reward = jnp.where((state + action) % 4 == 0, 100.0, jnp.where(action == 2, 1.0, 0.0))
    return (state + action + 1) % 4, Outcome(reward, jnp.ones_like(reward), 0.0 * reward)


def rule(params: Any, state: Any) -> Any:
    return (state[:, None] + jnp.arange(4)) % 4 != 0


@pytest.mark.parametrize(
    ("method", "how"), [("gumbel", "legal"), ("puct", "legal"), ("gumbel", "logits")]
)
def test_rules_hold_inside_the_tree(method, how):
    mdp = simple_mdp(Discrete(4), move)
    predictor, legal = uniform_predictor(mdp.spec), rule
    if how == "logits":
        legal = None
        predictor = Predictor(
            lambda params, state: (jnp.log(rule(params, state) * 1.0), jnp.zeros(state.shape))
        )
    config = SearchConfig(method, simulations=24, discount=1.0, max_depth=6)
    state = jnp.arange(64) % 4
    found = jax.jit(search(mdp, predictor, config, legal))(None, KEY, state)
    assert np.all((state + found.action) % 4 != 0)
    assert np.all(found.value <= 6.0)  # a single step against the rules would bring 100 / 25
    assert np.all(np.isfinite(found.weights)) and np.mean(found.value) > 0.5


# Nim: take one or two stones, whoever takes the last wins.


def take(params: Any, state: Any, action: Any) -> Any:
    left = state - 1 - action
    won = (left == 0).astype(jnp.float32)
    return left, Outcome(won, 1.0 - won, 0.0 * won)


def test_two_players_play_nim_as_it_must_be_played():
    mdp = simple_mdp(Discrete(2), take)
    config = SearchConfig(simulations=32, discount=1.0, two_player=True)
    find = search(mdp, uniform_predictor(mdp.spec), config,
                  legal=lambda params, state: jnp.arange(2) < state[:, None])  # fmt: skip
    found = jax.jit(find)(None, KEY, jnp.array([1, 2, 4, 5, 3]), noise=0.0)
    np.testing.assert_array_equal(found.action[:4], [0, 1, 0, 1])  # leave a multiple of three
    best = np.max(np.where(found.prior_logits > -1.0, found.qvalues, -np.inf), 1)
    assert np.all(best[:4] > 0.5) and best[4] < -0.5  # with three stones all is lost


# Box actions: one step with the reward -scale * |action - target|^2, in units of its own.

LOW, HIGH = np.array([-2.0, 0.0]), np.array([6.0, 1.0])
AREA = spaces.box(LOW, HIGH)


class Aim(NamedTuple):
    """Policy [4] in half-ranges (means, log-deviations), target [2] in units of the task."""

    policy: Any
    target: Any
    scale: Any


def shoot(params: Aim, state: Any, action: Any) -> Any:
    miss = (action - params.target) / (HIGH - LOW)
    reward = -params.scale * jnp.sum(miss**2, -1)
    return state, Outcome(reward, jnp.ones_like(reward), 0.0 * reward)


@functools.cache
def shooter() -> Any:
    def policy(params: Aim, state: Any) -> Any:
        return jnp.broadcast_to(params.policy, (state.shape[0], 4)), jnp.zeros(state.shape)

    config = SearchConfig(simulations=32, max_depth=1, candidates=16)
    find = search(simple_mdp(AREA, shoot), Predictor(policy), config)

    def run(policy: Any, target: Any, scale: Any, key: Any) -> Any:
        return find(Aim(policy, target, scale), key, jnp.zeros(1024), noise=0.0)

    return jax.jit(run)


def test_the_optimum_inside_a_box_is_found():
    target = np.array([4.0, 0.35])
    found = shooter()(jnp.zeros(4), target, 1.0, KEY)
    assert found.candidates.shape == (1024, 16, 2)
    assert np.all(found.candidates >= LOW) and np.all(found.candidates <= HIGH)
    miss = np.linalg.norm((found.action - target) / (HIGH - LOW), axis=-1)
    every = np.linalg.norm((found.candidates - target) / (HIGH - LOW), axis=-1)
    # As near as the nearest of 16, up to what the prior is worth.
    assert np.mean(miss) < 0.25 and np.mean(miss - every.min(1)) < 0.02
    assert np.mean(every) > 0.5
    sides = (np.asarray(found.candidates) - LOW) / (HIGH - LOW)
    assert np.mean((sides == 0.0) | (sides == 1.0)) > 0.4  # the bounds are tried


def test_without_a_preference_the_policy_stays_that_of_the_prior():
    # Half of the candidates come from a normal three times as wide: without the correction the
    # variance would be (1 + 9) / 2 = 5 times as large, and more would lie on the bound.
    mean, std = np.array([0.2, 0.8]), np.array([0.1, 0.4])
    policy = np.concatenate([mean, np.log(std)])
    found = shooter()(policy, np.zeros(2), 0.0, jax.random.key(3))
    weights, unit = np.asarray(found.weights), 2.0 * (found.candidates - LOW) / (HIGH - LOW) - 1.0
    unit = np.asarray(unit)
    np.testing.assert_allclose(np.einsum("bk,bka->a", weights, unit)[0] / 1024, 0.2, atol=0.01)
    var = np.einsum("bk,bk->", weights, (unit[:, :, 0] - 0.2) ** 2) / 1024
    np.testing.assert_allclose(var, 0.01, rtol=0.15)
    assert np.mean((unit[:, :, 0] - 0.2) ** 2) > 0.045
    bound = np.einsum("bk,bk->", weights, unit[:, :, 1] >= 1.0) / 1024
    np.testing.assert_allclose(bound, stats.norm.sf(0.5), atol=0.02)
    np.testing.assert_allclose(weights, softmax(found.prior_logits), rtol=1e-4, atol=1e-6)


def test_candidates_of_the_policy_alone_are_all_as_likely():
    draw = jax.jit(propose, static_argnums=2)
    policy = np.array([[[0.3, -0.1]]])  # the mean alone
    actions, logits = jax.tree.map(np.asarray, draw(KEY, policy, 4001, 0.2, 1.0))
    np.testing.assert_allclose(logits, 0.0, atol=1e-5)
    np.testing.assert_allclose(actions[0].mean(0), [0.3, -0.1], atol=0.02)
    np.testing.assert_allclose(actions[0].std(0), 0.2, atol=0.02)
    actions = np.asarray(draw(KEY, policy, 4001, 0.1, 3.0)[0])
    np.testing.assert_allclose(actions[0, :2001].std(0), 0.1, atol=0.01)
    np.testing.assert_allclose(actions[0, 2001:].std(0), 0.3, atol=0.03)
    odd = np.array([[[np.nan, np.inf], [np.nan, -np.inf]]])
    actions, logits = draw(KEY, odd, 5, 0.1, 3.0)
    assert np.all(np.isfinite(actions)) and np.all(np.isfinite(logits))


# What mctx is told.


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Collect what Gumbel MuZero is called with."""
    calls, policy = [], mctx.gumbel_muzero_policy

    def spy(**kwargs: Any) -> Any:
        calls.append(kwargs)
        return policy(**kwargs)

    monkeypatch.setattr(mctx, "gumbel_muzero_policy", spy)
    return calls


@pytest.mark.parametrize(
    ("simulations", "considered", "want"), [(4, 16, 4), (32, 16, 8), (32, 3, 3)]
)
def test_no_more_actions_are_considered_than_there_are_or_can_be_tried(
    told, simulations, considered, want
):
    config = SearchConfig(simulations=simulations, max_considered=considered)
    find = search(simple_mdp(Discrete(ARMS), pull), Predictor(tell), config)
    state = Pull(jnp.arange(2), jnp.full(2, -1))
    jax.eval_shape(find, jax.tree.map(jnp.float32, tables(2)), KEY, state)
    assert [call["max_num_considered_actions"] for call in told] == [want]


def test_the_planner_hands_its_settings_on(told):
    config = PlannerConfig("search", horizon=6, population=50, elites=20)
    mpc = planner(simple_mdp(AREA, shoot), config)
    params = Aim(None, jnp.zeros(2), jnp.zeros(()))
    jax.eval_shape(mpc.plan, params, KEY, jnp.zeros(3), mpc.init(3))
    (call,) = told
    assert (call["num_simulations"], call["max_depth"]) == (50, 6)
    assert call["root"].prior_logits.shape == (3, 20)
    assert call["max_num_considered_actions"] == 20  # all of them, whatever their prior


def dice(params: Any, key: Any, state: Any, action: Any) -> Any:
    reward = jax.random.normal(key, state.shape)
    return state, Outcome(reward, jnp.ones_like(reward), 0.0 * reward)


@pytest.mark.parametrize("method", METHODS)
def test_every_simulation_and_every_key_draws_its_own_noise_of_the_model(method):
    mdp = simple_mdp(Discrete(1), pull)._replace(step=dice)
    config = SearchConfig(method, simulations=15, max_depth=1)
    find = jax.jit(search(mdp, uniform_predictor(mdp.spec), config))
    one, two = (find(None, jax.random.key(s), jnp.zeros(4096), None, 0.0).value for s in (0, 1))
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.1
    # The mean of the root's value, which is 0, and of 15 standard normals.
    np.testing.assert_allclose([np.mean(one), np.std(one)], [0.0, np.sqrt(15) / 16], atol=0.02)


# Models of all kinds, through the planner.


def test_a_simulated_pole_stays_up():
    mdp = cartpole.make()

    def upright(params: Any, state: Any) -> Any:
        return 20.0 * (1.0 - (state.angle / 0.2) ** 2) - (state.position / 1.2) ** 2

    config = PlannerConfig("search", horizon=20, population=8)
    mpc = planner(mdp, config, value=upright)

    def act(key: Any, state: Any, t: Any) -> Any:
        return mpc.plan(None, key, state, mpc.init(4))[0]

    @jax.jit
    def run(key: Any) -> Any:
        start = mdp.init(None, key, batch=4)
        return rollout(mdp, None, key, start, act, 250, lambda obs, action, out: out.discount)[1]

    assert np.all(run(KEY) == 1.0)


def ensemble() -> Any:
    spec = EnvSpec("small", spaces.box(-np.inf, np.inf, (3,)), AREA)
    model = probabilistic_ensemble(spec, 3, (8,))
    return model.mdp("ts1"), model.init(KEY), jnp.ones((5, 3))


def latent() -> Any:
    spec = EnvSpec("small", spaces.box(-np.inf, np.inf, (3,)), Discrete(3))
    model = rssm(
        spec, RSSMConfig(deter=16, hidden=8, units=8, depth=2, stoch=3, classes=4, blocks=2)
    )
    state = jax.eval_shape(model.init, KEY)
    weights = random_weights(state.weights, 1)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
    return model.mdp, zeros._replace(weights=weights), jnp.ones((5, 3))


@pytest.mark.parametrize("model", [ensemble, latent])
def test_an_untrained_model_is_searched(model):
    mdp, params, obs = model()
    config = PlannerConfig("search", horizon=3, population=12, elites=4)
    mpc = planner(mdp, config)

    @jax.jit
    def run(key: Any) -> Any:
        return mpc.plan(params, key, mdp.init(params, key, obs), mpc.init(5))

    action, _, info = run(KEY)
    assert info["value"].shape == (5,) and np.all(np.isfinite(info["value"]))
    assert np.any(info["value"] != 0.0)
    space = mdp.spec.action
    if isinstance(space, Discrete):
        assert action.dtype == jnp.int32 and action.shape == (5,)
        assert np.all((action >= 0) & (action < 3))
    else:
        assert action.shape == (5, 2) and np.all((action >= LOW) & (action <= HIGH))


def test_the_planner_evaluates_what_it_announces_no_deeper_than_the_horizon():
    seen = []

    def step(params: Any, state: Any, action: Any) -> Any:
        jax.debug.callback(lambda s: seen.append(np.asarray(s)), state)
        zero = jnp.zeros(state.shape)
        return state + 1, Outcome(zero, zero + 1.0, zero)

    config = PlannerConfig("search", horizon=2, population=7, particles=5, iterations=3)
    mpc = planner(simple_mdp(Discrete(2), step), config, value=lambda p, s: 3.0 * s)
    plan = jax.jit(mpc.plan)
    _, _, info = plan(None, KEY, jnp.zeros(1), mpc.init(1))
    jax.effects_barrier()
    assert len(seen) == config.evaluations() == 7
    assert np.max(seen) == 1.0  # from the root at 0 to the last step at 1
    assert 0.0 < info["value"][0] < 6.0  # leaves are worth 3 or 6, the root 0
    # All actions are alike, and no noise prefers one.
    actions = [plan(None, jax.random.key(s), jnp.zeros(1), mpc.init(1))[0] for s in range(5)]
    assert len(np.unique(actions)) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "uct"}, "search.method: got 'uct', expected one of gumbel, puct"),
        ({"simulations": 0}, "search.simulations must be at least 1, got 0; .* such as 32"),
        ({"max_considered": 0}, "search.max_considered must be at least 1"),
        ({"candidates": 1.5}, "search.candidates must be at least 1, got 1.5"),
        ({"max_depth": -1}, "search.max_depth must be at least 0, got -1"),
        ({"discount": 1.1}, r"search.discount must be in \[0, 1\], got 1.1; the default is 0.997"),
        ({"dirichlet_fraction": -0.1}, "search.dirichlet_fraction"),
        ({"dirichlet_alpha": 0.0}, "search.dirichlet_alpha"),
        ({"value_scale": 0.0}, "search.value_scale"),
        ({"maxvisit_init": -1.0}, "search.maxvisit_init"),
        ({"pb_c_init": float("nan")}, "search.pb_c_init"),
        ({"pb_c_base": 0.0}, "search.pb_c_base"),
        ({"std": 0.0}, "search.std"),
        ({"flatten": 0.5}, r"search.flatten must be in \[1, inf\), got 0.5; the default is 3"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        SearchConfig(**settings)


def test_what_cannot_be_searched_is_refused():
    box, discrete = simple_mdp(AREA, shoot), simple_mdp(Discrete(ARMS), pull)
    none = Predictor(lambda params, state: (jnp.zeros((2, 3)), jnp.zeros(2)))
    with pytest.raises(ValueError, match="simple: search needs Box or Discrete"):
        search(simple_mdp(MultiDiscrete((2, 2)), pull), none, SearchConfig())
    with pytest.raises(ValueError, match="bounds must be finite"):
        search(simple_mdp(NOTHING, shoot), none, SearchConfig())
    with pytest.raises(ValueError, match="legal: got a rule"):
        search(box, none, SearchConfig(), legal=rule)
    with pytest.raises(ValueError, match="invalid: got a mask"):
        search(box, none, SearchConfig())(None, KEY, jnp.zeros(2), jnp.zeros((2, 16), bool))
    with pytest.raises(ValueError, match=r"got logits \(2, 3\).* expected \(2, 8\) and \(2,\)"):
        search(discrete, none, SearchConfig())(None, KEY, jnp.zeros(2))
    with pytest.raises(ValueError, match=r"expected \(2, 2\) or \(2, 4\)"):
        search(box, none, SearchConfig())(None, KEY, jnp.zeros(2))
    with pytest.raises(ValueError, match="planner.population: got 5 simulations for 8 actions"):
        planner(discrete, PlannerConfig("search", population=5))
    for plans in (0, 2):
        with pytest.raises(ValueError, match=f"prior_plans: got {plans} and a policy prior"):
            config = PlannerConfig("search", prior_plans=plans)
            planner(discrete, config, prior=lambda params, key, state: jnp.zeros(1))
    with pytest.raises(ValueError, match="prior_plans: got 2 and no policy prior"):
        planner(discrete, PlannerConfig("search", prior_plans=2))
