"""Dreamer as an agent: sizes, acting, learning in both drivers, feedback, refusals."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agents.dreamer import DreamerConfig, DreamerState, make_dreamer
from agents.dreamer_loss import LatentConfig, total_loss
from mbrl import optim, replay, spaces
from mbrl.networks.core import num_params
from mbrl.planning import PlannerConfig
from mbrl.replay import Ring
from mbrl.training.device import run_device, start_state
from mbrl.training.host import run_host
from mbrl.training.learner import (
    DriverConfig,
    Learner,
    learner_update,
    over_seeds,
    updates_per_step,
)
from mbrl.types import Agent, Batch, Discrete, EnvSpec
from tests.agents.tiny import ARM, RICH, SIMPLE, TINY, tiny_dreamer, tiny_parts
from tests.mbrl import plain
from tests.mbrl.sequences import random_records, random_space
from tests.mbrl.toys import StreamEnv, counter_mdp, linear_agent

KEY = jax.random.key(0)
VECTOR = spaces.box(-np.inf, np.inf, (4,))
IMAGE = spaces.box(0, 255, (64, 64, 3), np.uint8)


@pytest.mark.parametrize(
    ("size", "obs", "number"),
    [
        ("1m", VECTOR, 637_381),
        ("12m", VECTOR, 9_724_165),
        ("25m", VECTOR, 21_762_181),
        ("50m", VECTOR, 38_584_325),
        ("100m", VECTOR, 86_580_997),
        ("200m", VECTOR, 153_714_181),
        ("1m", IMAGE, 685_940),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_sizes_have_the_published_number_of_parameters(size: Any, obs: Any, number: int) -> None:
    agent = make_dreamer(EnvSpec("count", obs, Discrete(2)), DreamerConfig(size=size))
    state = jax.eval_shape(agent.init, KEY)
    # World model, policy and value; the slow critic is a copy.
    assert num_params(state.weights) == number
    assert num_params(state.slow_value) == num_params(state.weights.value)


def test_number_kind_and_span_of_the_latents_are_those_asked_for() -> None:
    published = make_dreamer(SIMPLE, DreamerConfig()).begin(1).latent
    assert (published.deter.shape, published.stoch.shape) == ((1, 512), (1, 32 * 4))
    few = DreamerConfig(latent=LatentConfig(variables=2, classes=8, span=64))
    agent = make_dreamer(SIMPLE, few)
    assert agent.begin(1).latent.stoch.shape == (1, 16)
    bias: Any = jax.jit(agent.init)(KEY).weights.model["core"]["gates_bias"]
    assert np.all(bias[2] <= 1.0) and np.min(bias[2]) < -2.0
    gaussian = make_dreamer(SIMPLE, DreamerConfig(latent=LatentConfig("gaussian", 3)))
    assert gaussian.begin(1).latent.stoch.shape == (1, 3)


def test_squared_gradients_are_remembered_for_as_long_as_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, laprop = [], optim.laprop

    def seen(*args: Any, beta2: float, **rest: Any) -> Any:
        asked.append(beta2)
        return laprop(*args, beta2=beta2, **rest)

    monkeypatch.setattr(optim, "laprop", seen)
    for config in (DreamerConfig(), DreamerConfig(beta2=0.95)):
        make_dreamer(SIMPLE, config)
    assert asked == [0.999, 0.95]


def test_imagination_has_the_published_horizon() -> None:
    # From a state to its return there are 15 actions, not 15 states.
    assert DreamerConfig().horizon == 15


def state_of(agent: Agent, gain: float = 1.5) -> DreamerState:
    """Return a state with weights that are nowhere zero, without compiling anything."""
    shapes = jax.eval_shape(agent.init, KEY)
    rest = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return rest._replace(
        weights=plain.random_weights(shapes.weights, 1, gain),
        slow_value=plain.random_weights(shapes.slow_value, 2, gain),
    )


ROWS = 32


@functools.cache
def acting() -> Any:
    """Return `run(state, carry, obs, is_first, key) -> {mode: (action, carry, extras)}`."""
    agent = tiny_dreamer(RICH)
    parts = tiny_parts(RICH)

    @jax.jit
    def run(state: Any, carry: Any, obs: Any, is_first: Any, key: Any) -> Any:
        modes: tuple[Any, ...] = ("random", "explore", "greedy")
        found = {m: agent.act(state, carry, obs, is_first, key, m) for m in modes}
        # Evaluation sees the likeliest latent.
        first = carry.latent, obs, carry.action, is_first
        latent = parts.model.encode(state.world, None, *first)
        law = parts.policy(state.weights.policy, latent)
        best = spaces.decode_action(RICH.action, jnp.clip(law.mode(), -1.0, 1.0))
        encoded = {m: spaces.encode_action(RICH.action, found[m][0]) for m in modes}
        packed = {m: parts.model.pack(found[m][1].latent) for m in modes}
        return found, best, encoded, packed

    return agent, state_of(agent, 3.0), run


def observed(seed: int = 0) -> Any:
    return random_space(RICH.observation, (ROWS,), np.random.default_rng(seed))


def equal(one: Any, two: Any) -> bool:
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return all(np.array_equal(a, b) for a, b in leaves)


def test_every_mode_acts_within_the_space_and_stores_its_latent() -> None:
    agent, state, run = acting()
    found, best, encoded, packed = run(
        state, agent.begin(ROWS), observed(), np.ones(ROWS, bool), KEY
    )
    for mode, (action, carry, extras) in found.items():
        arm = np.asarray(action["arm"])
        assert (ARM.low - 1e-6 <= arm).all() and (arm <= ARM.high + 1e-6).all(), mode
        assert arm.shape == (ROWS, 2) and arm.dtype == np.float32
        assert (action["gear"] >= 0).all() and (np.asarray(action["gear"]) < [2, 3]).all()
        assert set(np.unique(action["tool"])) <= {0, 1} and action["tool"].dtype == jnp.int32
        # What the next step is told of this action is what the environment was given.
        np.testing.assert_allclose(carry.action, encoded[mode], atol=1e-6)
        assert equal(extras, packed[mode])
        assert np.any(extras["deter"]) and extras["stoch"].dtype == jnp.uint8
    arm = np.asarray(found["random"][0]["arm"])
    assert arm[:, 0].min() < -0.5 and arm[:, 0].max() > 2.5
    # The latents are those of the filter whatever is done with them.
    assert equal(found["random"][2], found["explore"][2])
    assert not equal(found["random"][2], found["greedy"][2])
    assert equal(found["greedy"][0], best), "greedy is not the mode at the latent"
    assert not equal(found["explore"][0], best)


def test_evaluation_draws_nothing() -> None:
    agent, state, run = acting()
    args = state, agent.begin(ROWS), observed(), np.ones(ROWS, bool)
    one, two = (run(*args, jax.random.key(seed))[0] for seed in (0, 1))
    assert equal(one["greedy"], two["greedy"])
    assert not equal(one["explore"][0], two["explore"][0])
    assert not equal(one["explore"][1].latent.stoch, two["explore"][1].latent.stoch)


def test_the_policy_looks_at_the_observation() -> None:
    agent, state, run = acting()
    first = np.ones(ROWS, bool)
    one = run(state, agent.begin(ROWS), observed(0), first, KEY)[0]["greedy"]
    two = run(state, agent.begin(ROWS), observed(1), first, KEY)[0]["greedy"]
    # The same noise, other observations.
    assert np.array_equal(one[1].latent.deter, two[1].latent.deter)
    assert not np.array_equal(one[1].latent.stoch, two[1].latent.stoch)
    assert np.abs(one[0]["arm"] - two[0]["arm"]).max() > 0.1


def test_an_episode_begins_without_the_last_one() -> None:
    agent, state, run = acting()
    obs, first = observed(), np.zeros(ROWS, bool)
    used = run(state, agent.begin(ROWS), observed(2), ~first, KEY)[0]["explore"][1]
    assert np.any(used.action) and np.any(used.latent.deter)
    fresh = run(state, agent.begin(ROWS), obs, ~first, KEY)[0]["explore"]
    again = run(state, used, obs, ~first, KEY)[0]["explore"]
    assert equal(fresh, again)
    warm = run(state, used, obs, first, KEY)[0]["explore"]
    assert not np.isclose(warm[1].latent.deter, fresh[1].latent.deter).all(1).any()
    some = np.arange(ROWS) % 2 == 0
    mixed = run(state, used, obs, some, KEY)[0]["explore"]
    expected = np.where(some[:, None], fresh[1].latent.deter, warm[1].latent.deter)
    np.testing.assert_array_equal(mixed[1].latent.deter, expected)
    # The action before counts by itself, too.
    other = used._replace(action=-used.action)
    assert (
        not np.isclose(
            run(state, other, obs, first, KEY)[0]["explore"][1].latent.deter, warm[1].latent.deter
        )
        .all(1)
        .any()
    )


# One learner for both drivers, with a ring that is already full: acting and learning.

COUNTER = counter_mdp()
ENVS, WARMUP = 2, 10
CONFIG = dataclasses.replace(
    TINY, random_steps=WARMUP * ENVS, train_ratio=0.5, capacity=40 * ENVS, learning_rate=1e-3,
    free_nats=0.0,
)  # fmt: skip
STEPS = 3


def factory(hyper: Any) -> Agent:
    return tiny_dreamer(COUNTER.spec, dataclasses.replace(CONFIG, **hyper))


def driver(*seeds: int) -> DriverConfig:
    return DriverConfig((WARMUP + STEPS) * ENVS, ENVS, seeds)


@functools.cache
def started() -> Any:
    """Make the learners of two seeds as they might be after the warm-up."""
    config = driver(0, 5)
    state = start_state(factory, COUNTER, config, {})
    old = jax.eval_shape(lambda x: x, state.learner.ring.record)
    latent = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[2:], x.dtype), old.extras)
    rows = old.reward.shape[-1]
    record = random_records(COUNTER.spec, latent, (2, ENVS, rows))
    t = np.broadcast_to(np.arange(rows) % 8, (2, ENVS, rows))
    record = record._replace(is_first=t == 0, is_last=t == 7, is_terminal=(t == 7) & (t[:, :1] > 0))
    head, size = (jnp.full(2, x, jnp.int32) for x in (3, rows))
    ring = Ring(jax.tree.map(jnp.asarray, record), head, size)
    return state._replace(learner=state.learner._replace(ring=ring))


def copied(tree: Any) -> Any:
    """Copy a pytree that a program would take the memory of."""
    return jax.tree.map(jnp.copy, tree)


def first_seed(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[:1], tree)


@functools.cache
def on_device() -> Learner:
    snapshot = {"state": copied(started()), "step": WARMUP}
    (report,) = run_device(factory, COUNTER, driver(0, 5), snapshot=snapshot)
    assert report.step == (WARMUP + STEPS) * ENVS
    assert all(np.isfinite(x).all() for x in report.metrics.values())
    assert not report.metrics["model/skipped_updates"].any()
    assert "model/exploitation" in report.metrics
    return report.learner


@functools.cache
def on_host() -> Learner:
    env = StreamEnv(COUNTER, ENVS)
    env.reset(0)
    learner = first_seed(copied(started().learner))
    snapshot = {"learner": learner, "step": WARMUP, "envs": [env.state()]}
    (report,) = run_host(factory, [env], driver(0), snapshot=snapshot)
    return report.learner


def test_the_learner_is_that_of_a_fresh_start() -> None:
    state = started().learner.agent
    # Percentiles start at zero, without a correction; so does every predicted return.
    assert not np.any(state.scale.low) and not np.any(state.scale.high)
    assert np.array_equal(state.scale.value, np.ones(2))
    for a, b in zip(
        jax.tree.leaves(state.slow_value), jax.tree.leaves(state.weights.value), strict=True
    ):
        assert np.array_equal(a, b)
    assert not np.any(state.weights.value["Dense_3"]["kernel"])
    assert not np.any(state.weights.model["reward"]["Dense_1"]["kernel"])
    policy = np.asarray(state.weights.policy["Dense_3"]["kernel"])
    assert 0.5 < policy.std() * 8**0.5 / 0.01 < 1.5
    assert not equal(*(jax.tree.map(lambda x, i=i: x[i], state.weights) for i in (0, 1)))


def test_both_drivers_end_with_the_same_learner_and_seeds_do_not_meet() -> None:
    device, host = first_seed(on_device()), on_host()
    for (path, a), b in zip(jax.tree.leaves_with_path(device), jax.tree.leaves(host), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        name = jax.tree_util.keystr(path)
        if jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3, err_msg=name)
        else:
            np.testing.assert_array_equal(a, b, err_msg=name)
    weights = on_device().agent.weights
    assert not equal(*(jax.tree.map(lambda x, i=i: x[i], weights) for i in (0, 1)))


def test_every_parameter_moves_within_a_few_updates() -> None:
    before, after = started().learner.agent, on_device().agent
    pairs = zip(
        jax.tree.leaves_with_path(before.weights), jax.tree.leaves(after.weights), strict=True
    )
    for (path, old), new in pairs:
        for seed in (0, 1):
            moved = float(jnp.abs(new[seed] - old[seed]).max())
            # Behind the heads that begin at zero, from the second update on.
            assert moved > 1e-5, (jax.tree_util.keystr(path), seed)
    # A return scale that has just begun to follow: three hundredths of the way at most.
    assert np.all(np.abs(after.scale.high) < 1.0)
    assert np.any(after.scale.high != 0.0)
    kernel = [np.asarray(x["Dense_3"]["kernel"]) for x in (after.slow_value, after.weights.value)]
    assert 0.0 < np.abs(kernel[0]).max() < 0.1 * np.abs(kernel[1]).max()


@functools.cache
def learn() -> Any:
    def learn(learner: Learner, hyper: Any) -> Any:
        return learner_update(factory(hyper), learner)

    return jax.jit(over_seeds(learn, 1), donate_argnums=0)


def test_refreshed_latents_go_back_to_where_their_records_are() -> None:
    before = first_seed(copied(started().learner))
    after, _ = learn()(copied(before), {})
    sample_key = jax.random.split(before.key[0], 3)[0]
    one = jax.tree.map(lambda x: x[0], before.ring)
    index = np.asarray(replay.sample(one, sample_key, factory({}).sampling).index)[0]
    rows = one.record.reward.shape[1]
    fresh = np.zeros((ENVS, rows), bool)
    for env, row in index:
        # The latent before a sequence stays as it was; those of its T records are new.
        fresh[env, (row + 1 + np.arange(CONFIG.length)) % rows] = True
    assert fresh.any() and not fresh.all()
    old, new = (np.asarray(x.ring.record.extras["deter"][0]) for x in (before, after))
    np.testing.assert_array_equal((old != new).any(-1), fresh)
    codes = [np.asarray(x.ring.record.extras["stoch"][0]) for x in (before, after)]
    np.testing.assert_array_equal(codes[0][~fresh], codes[1][~fresh])
    assert codes[1].dtype == np.uint8 and (codes[1] < 4).all()
    assert (codes[0] != codes[1]).any()
    kept = [jax.tree.leaves(x.ring.record._replace(extras=())) for x in (before, after)]
    assert equal(*kept)


def test_the_slow_critic_follows_the_new_critic() -> None:
    before = first_seed(copied(started().learner))
    after, _ = learn()(copied(before), {})
    rate = CONFIG.slow_rate
    for slow, new, old in zip(
        *(jax.tree.leaves(x) for x in (
            after.agent.slow_value, after.agent.weights.value, before.agent.slow_value
        )), strict=True,
    ):  # fmt: skip
        np.testing.assert_allclose(slow, (1 - rate) * old + rate * new, rtol=1e-5, atol=1e-7)


@functools.cache
def poisoned() -> Any:
    """Learn from records without one finite observation: the learner before and after."""
    before = first_seed(copied(started().learner))
    record = before.ring.record
    broken = before.ring._replace(record=record._replace(obs=jnp.full_like(record.obs, jnp.nan)))
    after, metrics = learn()(copied(before._replace(ring=broken)), {})
    return before, after, metrics


def test_an_update_that_is_not_finite_changes_no_weight_and_is_counted() -> None:
    before, after, metrics = poisoned()
    assert float(metrics["model/skipped_updates"][0]) == 1.0
    assert equal(after.agent.weights, before.agent.weights)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.agent.slow_value))


@pytest.mark.parametrize("name", ["statistics", "scale", "latents"])
def test_an_update_that_is_not_finite_leaves_nothing_behind(name: str) -> None:
    _, after, _ = poisoned()
    # What it leaves behind would make every later update one that is not finite.
    left = after.ring.record.extras["deter"] if name == "latents" else getattr(after.agent, name)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(left))


def shapes_of(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def test_several_updates_per_call_with_traced_settings_refresh_several_batches() -> None:
    base = dataclasses.replace(TINY, train_ratio=3.0, members=2, latent=LatentConfig("gaussian"))
    sampling = tiny_dreamer(RICH, base).sampling
    assert (sampling.every, sampling.updates, sampling.length) == (1, 3, 6)
    stored = {"deter": np.zeros((1, 16), np.float32), "stoch": np.zeros((1, 3), np.float32)}
    record = random_records(RICH, stored, (3, 2, 6))
    valid: Any = np.ones((3, 2, 6), bool)
    names = ("discount", "lambda_", "entropy", "replay_value", "slow_rate", "free_nats",
             "learning_rate", "beta2", "clip", "penalty")  # fmt: skip
    hyper = {name: jnp.float32(getattr(base, name) + 0.1) for name in names}

    def run(hyper: Any) -> Any:
        agent = tiny_dreamer(RICH, dataclasses.replace(base, **hyper))
        state = state_of(agent)
        return state, agent.update(state, Batch(record, valid, None), KEY)

    before, (after, metrics, feedback) = jax.eval_shape(run, hyper)
    assert shapes_of(after) == shapes_of(before)
    assert all(x.shape == () for x in metrics.values())
    assert shapes_of(feedback) == shapes_of(record.extras)


@pytest.mark.parametrize(("ratio", "num_envs"), [(0.25, 1), (0.25, 8), (0.5, 2), (2.0, 4)])
def test_the_train_ratio_holds_for_any_number_of_environments(ratio: float, num_envs: int) -> None:
    sampling = replay.minibatches(ratio, 2, 3, 400, 16)

    def counting(hyper: Any) -> Agent:
        agent = linear_agent(COUNTER.spec, hyper)

        def update(state: Any, batch: Batch, key: Any) -> Any:
            return {**state, "updates": state["updates"] + batch.valid.shape[0]}, {}, None

        return agent._replace(update=update, sampling=sampling)

    config = DriverConfig(16 + 64, num_envs)
    *_, report = run_host(counting, [StreamEnv(COUNTER, num_envs)], config)
    # One call at the end of the warm-up, then one per cycle.
    call = max(1, round(ratio * max(num_envs, sampling.every)))
    assert int(report.learner.agent["updates"][0]) == round(64 * ratio) + call
    assert updates_per_step(counting({}), num_envs) == ratio


@pytest.mark.parametrize("method", ["cem", "mppi"])
def test_a_planner_acts_on_the_latent_model(method: Any) -> None:
    config = dataclasses.replace(
        TINY, actor="planner",
        planner=PlannerConfig(method=method, horizon=3, population=8, iterations=2, particles=2,
                              elites=3),
    )  # fmt: skip
    agent = tiny_dreamer(SIMPLE, config)
    state = state_of(agent)

    @jax.jit
    def act(state: Any, carry: Any, obs: Any, is_first: Any, key: Any) -> Any:
        return agent.act(state, carry, obs, is_first, key, "explore")

    obs = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    first = np.array([True, True, False])
    action, carry, extras = act(state, agent.begin(3), obs, first, KEY)
    assert action.shape == (3,) and action.dtype == jnp.int32
    assert (action >= 0).all() and (action < 3).all()
    assert not equal(carry.plan, agent.begin(3).plan), "nothing of the plan is kept"
    np.testing.assert_array_equal(carry.action, np.eye(3)[action])
    assert extras["deter"].shape == (3, 16)
    fresh = act(state, agent.begin(3), obs, ~first | first, KEY)
    again = act(state, carry, obs, ~first | first, KEY)
    assert equal(fresh, again)


def test_a_known_reward_replaces_the_learned_one_in_imagination() -> None:
    def reward(obs: Any, action: Any, next_obs: Any) -> Any:
        return 7.0 * next_obs[:, 0] + action

    parts = tiny_parts(SIMPLE, TINY, reward)
    shapes = jax.eval_shape(parts.model.init, KEY)
    world = shapes._replace(
        weights=plain.random_weights(shapes.weights, 1),
        statistics=jax.tree.map(lambda x: jnp.zeros(x.shape), shapes.statistics),
    )

    @jax.jit
    def run(world: Any, action: Any) -> Any:
        latent = parts.model.begin(4)
        after, outcome = parts.mdp.step(parts.params(world), KEY, latent, action)
        return outcome.reward, parts.model.decode(world, after)

    action = np.array([0, 1, 2, 0])
    got, seen = run(world, action)
    np.testing.assert_allclose(got, 7.0 * seen[:, 0] + action, rtol=1e-5)


def batch_of(agent: Agent, spec: EnvSpec, state: DreamerState) -> Any:
    """Return a batch [1, B, T + 1, ...] with the border of an episode, all of it valid."""
    stored = jax.eval_shape(lambda: agent.act(
        state, agent.begin(1), spaces.zeros(spec.observation, (1,)), jnp.ones(1, bool), KEY,
        "random",
    )[2])  # fmt: skip
    record = random_records(spec, stored, (1, 2, TINY.length + 1))
    first = np.zeros(record.reward.shape, bool)
    first[0, 0, 2] = True
    return Batch(record._replace(is_first=first), jnp.asarray(np.ones(first.shape, bool)), None)


def test_nothing_but_a_known_reward_is_learned_from_also_in_half_precision() -> None:
    def reward(obs: Any, action: Any, next_obs: Any) -> Any:
        return next_obs[:, 0] - obs[:, 1] + action

    config = dataclasses.replace(TINY, dtype="bfloat16")
    agent = tiny_dreamer(SIMPLE, config, reward)
    state = state_of(agent)
    batch = batch_of(agent, SIMPLE, state)
    record = batch.record
    other = batch._replace(record=record._replace(reward=record.reward + 3.0))
    update = jax.jit(agent.update)
    one, metrics, _ = update(state, batch, KEY)
    assert equal(one, update(state, other, KEY)[0])
    # Products are rounded to 8 bits, parameters are not.
    assert all(np.isfinite(x) for x in metrics.values())
    assert float(metrics["model/skipped_updates"]) == 0.0
    for old, new in zip(jax.tree.leaves(state.weights), jax.tree.leaves(one.weights), strict=True):
        assert new.dtype == jnp.float32 and np.isfinite(new).all() and not np.array_equal(old, new)
    # The reward of the first record is not known: it counts nowhere.
    obs, action = record.obs[0], record.action[0]
    known = obs[:, 1:, 0] - obs[:, :-1, 1] + action[:, :-1]
    known = np.where(record.is_first[0][:, 1:], 0.0, known)
    np.testing.assert_allclose(one.statistics.rewards.mean, known.mean(), rtol=1e-5)
    assert float(one.statistics.rewards.count) == known.size


def test_a_planner_leaves_actor_and_critic_alone() -> None:
    config = dataclasses.replace(TINY, actor="planner")
    parts, agent = tiny_parts(SIMPLE, config), tiny_dreamer(SIMPLE, config)
    state = state_of(agent)
    record = jax.tree.map(lambda x: x[0], batch_of(agent, SIMPLE, state).record)
    valid: Any = np.ones((2, TINY.length + 1), bool)

    @jax.jit
    def run(weights: Any) -> Any:
        loss = functools.partial(total_loss, parts, config)
        return jax.grad(loss, has_aux=True)(weights, state, record, valid, KEY)

    slopes, found = run(state.weights)
    # A critic that learns from the same latents would shape the model.
    assert not any(np.any(x) for x in jax.tree.leaves((slopes.policy, slopes.value)))
    assert all(np.any(x) for x in jax.tree.leaves(slopes.model))
    assert not any(name.startswith(("actor", "critic")) for name in found.metrics)


SCALAR = SIMPLE._replace(action=spaces.box(-np.inf, 1.0, (1,)))


@pytest.mark.parametrize(
    ("spec", "change", "message"),
    [
        (SCALAR, {}, r"action simple: bounds must be finite"),
        (SIMPLE, {"size": "3m"}, r"size: got '3m', expected one of"),
        (SIMPLE, {"train_ratio": 0.3}, r"train_ratio: got 0.3.*whole number"),
        (SIMPLE, {"train_ratio": 0.0}, r"train_ratio: got 0"),
        (SIMPLE, {"train_ratio": 1.5}, r"train_ratio: got 1.5"),
        (SIMPLE, {"random_steps": 64}, r"start: got 64.*65.*raise --random-steps"),
        (SIMPLE, {"clip": 0.0}, r"clip: expected a number above 0"),
        (SIMPLE, {"warmup": -1}, r"warmup: expected a number of updates"),
    ],
)
def test_refuses_what_cannot_be(spec: EnvSpec, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_dreamer(spec, dataclasses.replace(DreamerConfig(), **change))


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"dtype": "float16"}, "dtype"),
        ({"latent": LatentConfig("gausian")}, r"latent.kind"),
        ({"latent": LatentConfig("gaussian", classes=4)}, r"latent.classes"),
        ({"actor": "polcy"}, "actor"),
        ({"horizon": 0}, "horizon"),
        ({"length": 1}, "length"),
        ({"batch_size": 0}, "batch_size"),
        ({"penalty": 1.0, "members": 0}, "members"),
        ({"penalty": 1.0, "members": 1}, "members"),
        ({"members": -1}, "members"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refuses_settings_that_would_mean_something_else(change: Any, argument: str) -> None:
    with pytest.raises(ValueError, match=argument):
        make_dreamer(SIMPLE, dataclasses.replace(DreamerConfig(), **change))
