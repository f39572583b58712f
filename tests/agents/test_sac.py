"""SAC learns from replay of any stream, knows ends from cuts, and changes only what it should."""

from __future__ import annotations

import collections
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agents.preferences import PreferencesConfig, with_preferences
from agents.sac import LearnerConfig, SACConfig, make_learner, make_sac, target_entropy
from mbrl import replay, spaces
from mbrl.normalization import empty, fit
from mbrl.training import checkpoint
from mbrl.training.device import run_device
from mbrl.training.host import run_host
from mbrl.training.learner import DriverConfig, Report
from mbrl.training.offline import run_offline
from mbrl.types import MDP, Box, Discrete, EnvSpec, MultiDiscrete, Outcome, Transition
from tests.mbrl.toys import StreamEnv

TINY = SACConfig(
    hidden=(16,), learning_rate=1e-2, batch_size=32, random_steps=50, capacity=400, discount=0.5,
    temperature=0.1, target_rate=0.1, target_entropy=-2.0, discrete_entropy=0.1, train_ratio=2.0,
)  # fmt: skip
LINE = spaces.box(-np.inf, np.inf, (2,))
KEY = jax.random.key(3)
TASKS = {
    "reach": EnvSpec("reach", LINE, spaces.box(-1.0, 3.0, (2,)), 5),
    "push": EnvSpec("push", LINE, Discrete(3), 5),
    "both": EnvSpec(
        "both",
        {"place": Discrete(2), "speed": LINE},
        {"a": spaces.box(-1.0, 3.0, (1,)), "b": spaces.box(-1.0, 3.0, (1,))},
        5,
    ),
}


def task(spec: EnvSpec) -> MDP:
    """Walk at random whatever is done; 1 less where actions are away from 2."""

    def init(params: Any, key: Any, obs: Any = None, batch: int = 1) -> Any:
        return jax.random.normal(key, (batch, 2))

    def step(params: Any, key: Any, state: Any, action: Any) -> Any:
        parts = [1.0 * x.reshape(state.shape[0], -1) for x in jax.tree.leaves(action)]
        miss = jnp.square(jnp.concatenate(parts, -1) - 2.0).mean(-1)
        moved = state + 0.3 * jax.random.normal(key, state.shape)
        return moved, Outcome(1.0 - miss, jnp.ones(state.shape[0]), None)

    def observe(params: Any, state: Any) -> Any:
        if spec.id != "both":
            return state
        return {"place": (state[:, 0] > 0).astype(jnp.int32), "speed": state}

    return MDP(init, step, observe, spec)


def factory_of(mdp: MDP, config: SACConfig = TINY, **options: Any) -> Any:
    return lambda hyper: make_sac(mdp.spec, dataclasses.replace(config, **hyper), **options)


def last(reports: Any) -> Report:
    return collections.deque(reports, maxlen=1).pop()


@functools.cache
def trained(name: str = "reach", steps: int = 300) -> Report:
    mdp = task(TASKS[name])
    return last(run_device(factory_of(mdp), mdp, DriverConfig(steps, 2, interval=100)))


def state_of(report: Report) -> Any:
    return jax.tree.map(lambda x: x[0], report.learner.agent)


def obs_of(name: str, rows: int = 6) -> Any:
    mdp = task(TASKS[name])
    return mdp.observe(None, mdp.init(None, KEY, None, rows))


@functools.cache
def actor(name: str, mode: Any) -> Any:
    agent = make_sac(TASKS[name], TINY)
    return jax.jit(lambda state, obs, key: agent.act(
        state, (), obs, jnp.ones(jax.tree.leaves(obs)[0].shape[0], bool), key, mode
    )[0])  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_actions_go_where_the_reward_is(name):
    report = trained(name, 600 if name == "both" else 300)  # two parts share the reward there
    assert all(np.isfinite(value).all() for value in report.metrics.values())
    act = actor(name, "greedy")
    obs = obs_of(name)
    found = jax.tree.leaves(act(state_of(report), obs, KEY))
    for action in found:
        assert abs(action.mean() - 2.0) < 0.4
    again = jax.tree.leaves(act(state_of(report), obs, jax.random.key(9)))
    for one, two in zip(found, again, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("name", TASKS)
def test_exploring_and_random_actions_stay_within_their_bounds_and_differ(name):
    state = state_of(trained(name))
    for mode in ("explore", "random"):
        act = actor(name, mode)
        draws = [jax.tree.leaves(act(state, obs_of(name, 64), jax.random.key(k))) for k in (0, 1)]
        for one, two in zip(*draws, strict=True):
            assert (np.asarray(one) != np.asarray(two)).any()
            assert one.min() >= -1.0
            assert one.max() <= 3.0


@functools.cache
def learner_of(config: SACConfig = TINY) -> Any:
    """Return a state at the start, and a compiled update of it."""
    learner = make_learner(TASKS["reach"], config)
    return jax.jit(learner.init)(KEY), jax.jit(learner.learn)


def transitions(rows: int = 16) -> Transition:
    keys = jax.random.split(KEY, 4)
    obs, after = (jax.random.normal(key, (rows, 2)) for key in keys[:2])
    action = spaces.sample(TASKS["reach"].action, keys[2], (rows,))
    ended = jax.random.bernoulli(keys[3], 0.3, (rows,))
    return Transition(obs, action, action.sum(-1), after, ended)


@pytest.mark.parametrize(("ends", "value"), [(True, 1.0), (False, 2.0)])
def test_what_goes_on_is_worth_more_than_what_ends(ends, value):
    # The reward is 1 and the discount a half: 2 for ever, 1 where every step is the last.
    state, learn = learner_of(dataclasses.replace(TINY, temperature=1e-4, tune_temperature=False))
    rows = 256  # actions everywhere: there is nothing to extrapolate to
    data = transitions(rows)._replace(reward=jnp.ones(rows), is_terminal=jnp.full(rows, ends))
    for k in range(150):
        state, metrics = learn(state, data, jnp.ones(rows), jax.random.key(k))
    np.testing.assert_allclose(metrics["value/mean"], value, atol=0.2)


def test_one_update_moves_targets_by_their_share_and_everything_else_once():
    before, learn = learner_of()
    after, metrics = learn(before, transitions(), jnp.ones(16), KEY)
    for old, new, target in zip(
        jax.tree.leaves(before.target), jax.tree.leaves(after.weights.critics),
        jax.tree.leaves(after.target), strict=True,
    ):  # fmt: skip
        np.testing.assert_allclose(target, 0.9 * old + 0.1 * new, rtol=1e-5, atol=1e-7)
    assert float(metrics["policy/entropy"]) > -2.0
    # There is more entropy than wanted: it is worth less from now on.
    np.testing.assert_allclose(
        after.weights.log_temperature, before.weights.log_temperature - 1e-2, rtol=1e-4
    )
    _, fixed = learner_of(dataclasses.replace(TINY, temperature=1e-4, tune_temperature=False))
    kept, _ = fixed(before, transitions(), jnp.ones(16), KEY)
    assert float(kept.weights.log_temperature) == float(before.weights.log_temperature)


def test_what_one_part_learns_from_is_a_constant_for_the_others():
    state, learn = learner_of()
    nothing, _ = learn(state, transitions(), jnp.zeros(16), KEY)
    jax.tree.map(np.testing.assert_array_equal, nothing.weights, state.weights)
    moved, _ = learn(state, transitions(), jnp.ones(16), KEY)
    other = transitions()._replace(reward=jnp.full(16, 50.0))
    more, _ = learn(state, other, jnp.ones(16), KEY)
    # Rewards are the business of critics: their gradients differ, those of the actor do not.
    first, second = (x.opt_state.inner[0].mu for x in (moved, more))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-8),
        first.actor, second.actor,
    )  # fmt: skip
    assert float(jnp.abs(jax.tree.leaves(first.actor)[0]).max()) > 0.0
    gaps = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), first.critics, second.critics)
    assert min(jax.tree.leaves(gaps)) > 0.1


def test_rows_without_weight_do_not_count():
    (state, learn), weight = learner_of(), 1.0 * (jnp.arange(16) < 10)
    clean = transitions()
    spoiled = clean._replace(reward=jnp.where(weight > 0, clean.reward, 1e6))
    one, two = (learn(state, x, weight, KEY) for x in (clean, spoiled))
    jax.tree.map(np.testing.assert_array_equal, one[0].weights, two[0].weights)
    assert float(learn(state, spoiled, jnp.ones(16), KEY)[1]["value/loss"]) > 1e6
    assert float(one[1]["value/loss"]) < 1e3


def test_a_loss_that_is_not_finite_changes_no_weight_and_is_counted():
    state, learn = learner_of()
    broken = transitions()._replace(reward=jnp.full(16, jnp.nan))
    after, _ = learn(state, broken, jnp.ones(16), KEY)
    jax.tree.map(np.testing.assert_array_equal, after.weights, state.weights)
    assert (int(after.opt_state.skipped), int(after.opt_state.consecutive)) == (1, 1)


@functools.cache
def update_of(**options: Any) -> Any:
    """Return a compiled update, a state, and a batch that the trained run would draw."""
    agent = make_sac(TASKS["reach"], dataclasses.replace(TINY, normalize_obs=True), **options)
    learner = jax.tree.map(lambda x: x[0], trained().learner)
    batch = replay.sample(learner.ring, KEY, agent.sampling)
    return jax.jit(agent.update), learner.agent, batch


def test_pairs_across_episodes_are_never_learned_from_nor_counted():
    update, state, batch = update_of()
    seen, valid = replay.transitions(batch)
    assert 0 < int(valid.sum()) < valid.size
    record = batch.record
    spoiled = record._replace(
        reward=jnp.where(record.is_first, 1e6, record.reward),
        action=jnp.where(record.is_last[..., None], 3.0, record.action),
    )
    clean, dirty = (update(state, batch._replace(record=x), KEY)[0] for x in (record, spoiled))
    jax.tree.map(np.testing.assert_array_equal, clean.weights, dirty.weights)
    assert float(clean.obs.count - state.obs.count) == int(valid.sum())
    fresh = update(state._replace(obs=empty((2,))), batch, KEY)[0]
    wanted = fit(seen.obs, valid)
    np.testing.assert_allclose(fresh.obs.mean, wanted.mean, rtol=1e-4, atol=1e-5)


def test_observations_are_standardized_unless_asked_otherwise():
    plain = make_sac(TASKS["reach"], dataclasses.replace(TINY, normalize_obs=False))
    update, state, batch = update_of()
    fresh = state._replace(obs=empty((2,)))
    assert float(jax.jit(plain.update)(fresh, batch, KEY)[0].obs.count) == 0.0
    assert float(update(fresh, batch, KEY)[0].obs.count) > 0.0


def test_a_few_of_many_critics_are_the_target():
    state, learn = learner_of(dataclasses.replace(TINY, critics=5, subset=2, layer_norm=True))
    names = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(state.target)]
    assert any("LayerNorm" in name for name in names)
    assert all(leaf.shape[0] == 5 for leaf in jax.tree.leaves(state.target))
    # Only two of them stand out, and are the target when both are drawn: once in ten draws.
    high = jax.tree.map(lambda x: x, state.target)
    high["Dense_1"]["bias"] = jnp.array([[100.0], [0.0], [100.0], [0.0], [0.0]])
    found = [
        float(learn(state._replace(target=high), transitions(), jnp.ones(16), jax.random.key(k))[1][
            "value/target"
        ])
        for k in range(60)
    ]  # fmt: skip
    share = np.mean(np.array(found) > 20.0)
    assert 0.01 < share < 0.3


def test_a_known_reward_replaces_the_recorded_one():
    def given(obs: Any, action: Any, next_obs: Any) -> Any:
        return next_obs[..., 0] - obs[..., 0] + action.sum(-1)

    update, state, batch = update_of(reward_fn=given)
    record = batch.record
    wanted = given(record.obs[:, :, 0], record.action[:, :, 0], record.obs[:, :, 1])
    relabelled = record._replace(reward=record.reward.at[:, :, 1].set(wanted))
    plain = update_of()[0]
    one = update(state, batch, KEY)[0]
    two = plain(state, batch._replace(record=relabelled), KEY)[0]
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
        one.weights, two.weights,
    )  # fmt: skip
    other = plain(state, batch, KEY)[1]["value/target"]
    assert abs(float(update(state, batch, KEY)[1]["value/target"] - other)) > 0.1


@pytest.mark.slow
def test_what_is_preferred_is_learned_instead_of_the_reward():
    mdp = task(TASKS["reach"])
    asked = PreferencesConfig(
        labels=40, sessions=4, ask_every=60, segment=3, pool=2, members=2, hidden=(8,), updates=20,
        batch_size=16,
    )  # fmt: skip
    config = dataclasses.replace(TINY, train_ratio=0.1)

    def factory(hyper: Any) -> Any:
        return with_preferences(make_sac(mdp.spec, config), mdp.spec, asked)

    report = last(run_device(factory, mdp, DriverConfig(600, 2, interval=100)))
    assert float(report.metrics["preferences/labels"][0]) == 40.0
    assert float(report.metrics["preferences/correlation"][0]) > 0.5


@pytest.mark.slow
def test_both_drivers_end_with_the_same_learner():
    mdp, config = task(TASKS["reach"]), DriverConfig(60, 2, interval=20)
    device = last(run_device(factory_of(mdp), mdp, config)).learner
    host = last(run_host(factory_of(mdp), [StreamEnv(mdp, 2)], config)).learner
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        device.agent, host.agent,
    )  # fmt: skip


@pytest.mark.slow
def test_seeds_share_a_program_and_settings_may_differ():
    mdp = task(TASKS["push"])
    hyper = {"learning_rate": jnp.array([1e-2, 1e-4]), "target_entropy": jnp.array([-1.0, -2.0]),
             "discrete_entropy": jnp.array([0.3, 0.6])}  # fmt: skip
    both = last(run_device(factory_of(mdp), mdp, DriverConfig(60, 2, (5, 5)), hyper)).learner
    alone = last(
        run_device(
            factory_of(mdp), mdp, DriverConfig(60, 2, (5,)), {k: v[1:] for k, v in hyper.items()}
        )
    ).learner
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[1], b[0], rtol=1e-3, atol=1e-4),
        both.agent.weights, alone.agent.weights,
    )  # fmt: skip
    assert not np.allclose(*both.agent.weights.log_temperature)


def test_a_run_that_is_cut_ends_bit_for_bit(tmp_path):
    mdp = task(TASKS["reach"])

    def run(steps: int, snapshot: Any = None) -> Any:
        config = DriverConfig(steps, 2, interval=20)
        return last(run_device(factory_of(mdp), mdp, config, snapshot=snapshot)).snapshot()

    half = run(50)
    checkpoint.save(tmp_path, 50, half, {})
    restored: Any = checkpoint.restore(tmp_path, half)
    assert checkpoint.digest(run(100, restored.tree)) == checkpoint.digest(run(100))


def test_records_alone_are_enough():
    mdp = task(TASKS["reach"])
    ring = last(run_device(factory_of(mdp), mdp, DriverConfig(200, 2))).learner.ring
    record = jax.tree.map(lambda x: np.asarray(x)[0], ring.record)
    config = DriverConfig(200, interval=100)
    report = last(run_offline(factory_of(mdp), mdp.spec, record, config))
    action = actor("reach", "greedy")(state_of(report), obs_of("reach"), KEY)
    assert abs(action.mean() - 2.0) < 0.4


def test_entropy_is_counted_per_dimension_or_as_a_share():
    config = LearnerConfig(target_entropy=-0.5, discrete_entropy=0.25)
    assert target_entropy(TASKS["reach"], config) == -1.0
    np.testing.assert_allclose(target_entropy(TASKS["push"], config), 0.25 * np.log(3))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"subset": 3}, "subset must not exceed critics, got 3 > 2"),
        ({"critics": 0}, "critics must be at least 1, got 0"),
        ({"discount": 1.1}, "discount must be in"),
        ({"target_rate": 0.0}, "target_rate must be in"),
        ({"temperature": 0.0}, "temperature must be in"),
        ({"target_entropy": 1.0}, "target_entropy must be in"),
        ({"discrete_entropy": 2.0}, "discrete_entropy must be in"),
        ({"random_steps": 0}, "random_steps must be at least 1"),
    ],
)
def test_impossible_settings_are_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        SACConfig(**change)


IMAGE = Box((8, 8, 3), np.zeros((8, 8, 3)), np.full((8, 8, 3), 255.0), np.dtype(np.uint8))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"players": 2}, "SAC"),
        (
            {"action": MultiDiscrete((2, 3))},
            "action space of reach: SAC expected .*mbrl train ppo",
        ),
        ({"action": {"a": Discrete(2), "b": LINE}}, "action b: bounds must be finite"),
        ({"action": {"a": Discrete(2)}}, "action space of reach: SAC expected"),
        ({"observation": {"eye": IMAGE}}, "observation eye: SAC expected vectors.*image.*dreamer"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        make_sac(TASKS["reach"]._replace(**change), TINY)


def test_a_share_of_updates_that_is_no_whole_number_is_refused():
    with pytest.raises(ValueError, match="train_ratio: got 1.5"):
        make_sac(TASKS["reach"], dataclasses.replace(TINY, train_ratio=1.5))
