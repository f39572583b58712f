"""MuZero learns from any space, searches without noise when it is judged, and skips NaN."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agents.muzero import MuZeroConfig, make_muzero
from agents.reanalysis import targets_of
from mbrl import replay, spaces
from mbrl.losses.value_equivalent import unroll_targets
from mbrl.models.value_equivalent import ValueEquivalentConfig, value_equivalent
from mbrl.training.learner import example_record, init_learner, learner_step, learner_update
from mbrl.types import Agent, Discrete, EnvSpec, MultiDiscrete, TimeStep

TINY = MuZeroConfig(
    simulations=4, candidates=3, unroll=2, td_steps=3, batch_size=4,
    model=ValueEquivalentConfig(latent=8, hidden=8, depth=2, max_value=20.0),
    train_ratio=1.0, random_steps=16, capacity=64, target_rate=0.25, weight_decay=0.0,
)  # fmt: skip
LINE = spaces.box(-np.inf, np.inf, (2,))
PUSH = EnvSpec("push", LINE, Discrete(3), 10)
REACH = EnvSpec("reach", LINE, spaces.box(-1.0, 3.0, (2,)), 10)
MIXED = EnvSpec(
    "mixed",
    {"camera": spaces.box(0, 255, (6, 6, 1), np.uint8), "place": Discrete(4), "speed": LINE},
    Discrete(2),
    10,
)
SPECS = [PUSH, REACH, MIXED]
KEY = jax.random.key(2)


def stream(spec: EnvSpec, t: int) -> TimeStep:
    """Two environments whose episodes of eight records end by themselves, with reward 1."""
    rng = np.random.default_rng(t)
    obs: Any = jnp.asarray(rng.normal(size=(2, 2)), jnp.float32)
    if spec is MIXED:
        obs = {
            "camera": jnp.asarray(rng.integers(0, 255, (2, 6, 6, 1)), jnp.uint8),
            "place": jnp.asarray(rng.integers(0, 4, 2), jnp.int32),
            "speed": obs,
        }
    flag = jnp.zeros(2, bool)
    last = flag | (t % 8 == 7)
    return TimeStep(obs, jnp.where(last, 1.0, 0.0), flag | (t % 8 == 0), last, last)


@functools.cache
def learner(spec_index: int) -> tuple[Agent, Any, Any]:
    """Act for 24 steps in two environments and update once: before, after and metrics."""
    spec = SPECS[spec_index]
    agent = make_muzero(spec, TINY)
    state = init_learner(agent, spec, 2, jax.random.key(0))
    step = jax.jit(functools.partial(learner_step, agent), static_argnames="mode")
    for t in range(24):
        state, action, _ = step(state, stream(spec, t), mode="random" if t < 8 else "explore")
    assert action.shape[0] == 2
    after, metrics = jax.jit(functools.partial(learner_update, agent))(state)
    return agent, (state, after), {k: float(v) for k, v in metrics.items()}


def distance(one: Any, two: Any) -> float:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return max(float(jnp.max(jnp.abs(jnp.subtract(1.0 * a, 1.0 * b)))) for a, b in pairs)


@pytest.mark.parametrize("spec", range(3), ids=["vector", "box", "dict"])
def test_learns_from_any_space(spec):
    _, (before, after), metrics = learner(spec)
    assert all(np.isfinite(v) for v in metrics.values()), metrics
    assert metrics["model/skipped_updates"] == 0.0
    assert "model/exploitation" in metrics
    moved = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()),
        before.agent.model.weights, after.agent.model.weights,
    )  # fmt: skip
    largest = {name: max(jax.tree.leaves(part)) for name, part in moved.items()}
    for name in ("projector", "guess"):  # without consistency
        assert largest.pop(name) < 1e-6
    if spec != 1:  # the first searches say what a uniform policy says already
        assert largest.pop("policy") < 1e-6
    assert min(largest.values()) > 1e-6, largest
    assert float(after.agent.model.moments.count) > 0


@pytest.mark.parametrize("spec", [0, 1], ids=["vector", "box"])
def test_what_the_search_found_is_remembered(spec):
    agent, (before, _), _ = learner(spec)
    extras = before.ring.record.extras
    count = 3
    assert extras["weights"].shape[-1] == count
    np.testing.assert_allclose(extras["weights"][:, :24].sum(-1), 1.0, atol=1e-5)
    if spec == 1:
        assert extras["candidates"].shape[-2:] == (TINY.candidates, 2)
        assert float(jnp.abs(extras["candidates"]).max()) <= 1.0
    example = example_record(agent, SPECS[spec], 2)
    assert replay.nbytes(example, 2, 64) > 0


def test_the_judged_agent_has_no_noise_and_the_exploring_one_has():
    agent, (_, after), _ = learner(0)
    act = jax.jit(agent.act, static_argnames="mode")
    obs, first = jax.random.normal(jax.random.key(3), (32, 2)), jnp.ones(32, bool)
    keys = [jax.random.key(i) for i in range(4)]
    greedy = [np.asarray(act(after.agent, (), obs, first, k, mode="greedy")[0]) for k in keys]
    for other in greedy[1:]:
        np.testing.assert_array_equal(greedy[0], other)
    noisy = [np.asarray(act(after.agent, (), obs, first, k, mode="explore")[0]) for k in keys]
    assert any((noisy[0] != other).any() for other in noisy[1:])


def test_actions_stay_inside_asymmetric_bounds():
    agent, (_, after), _ = learner(1)
    obs, first = jnp.zeros((64, 2)), jnp.ones(64, bool)
    for mode in ("random", "explore", "greedy"):
        action = agent.act(after.agent, (), obs, first, jax.random.key(5), mode)[0]
        assert action.shape == (64, 2)
        assert float(action.min()) >= -1.0
        assert float(action.max()) <= 3.0
        assert mode == "greedy" or float(jnp.ptp(action)) > 1.0


def test_the_target_network_follows_and_acts_when_the_agent_is_judged():
    agent, (before, _), _ = learner(0)
    start = before.agent
    after, _, _ = jax.jit(agent.update)(start, batch_of(before), KEY)
    want = jax.tree.map(
        lambda old, new: 0.75 * old + 0.25 * new, start.target.weights, after.model.weights
    )
    assert distance(want, after.target.weights) < 1e-6
    assert distance(after.model.weights, after.target.weights) > 1e-5
    act = jax.jit(agent.act, static_argnames="mode")
    obs, first = jax.random.normal(jax.random.key(3), (8, 2)), jnp.ones(8, bool)
    broken = jax.tree.map(lambda x: x * jnp.nan, after.target.weights)
    state = after._replace(target=after.target._replace(weights=broken))
    for mode, same in (("explore", True), ("greedy", False)):
        one, two = (act(s, (), obs, first, KEY, mode=mode)[2] for s in (after, state))
        assert bool(jnp.array_equal(one["weights"], two["weights"])) == same


def batch_of(state: Any) -> Any:
    return replay.sample(state.ring, jax.random.key(1), make_muzero(PUSH, TINY).sampling)


def test_nothing_is_learned_from_what_is_not_finite():
    agent, (before, _), _ = learner(0)
    batch = batch_of(before)
    bad = batch._replace(
        record=batch.record._replace(obs=batch.record.obs.at[0, 0, 1].set(jnp.nan))
    )
    state, metrics, _ = jax.jit(agent.update)(before.agent, bad, jax.random.key(2))
    assert float(metrics["model/skipped_in_a_row"]) == 1.0
    assert distance(state.model, before.agent.model) == 0.0
    assert distance(state.target, before.agent.target) == 0.0
    assert int(state.updates) == int(before.agent.updates)


def test_reanalysis_forgets_what_was_stored():
    _, (before, _), _ = learner(0)
    batch = batch_of(before)
    lie = jnp.zeros_like(batch.record.extras["weights"]).at[..., 0].set(1.0)
    extras = batch.record.extras | {"weights": lie}
    lied = batch._replace(record=batch.record._replace(extras=extras))

    def learned(share: float) -> tuple[Any, Any]:
        agent = make_muzero(PUSH, dataclasses.replace(TINY, reanalyse=share))
        update = jax.jit(agent.update)
        return tuple(
            update(before.agent, b, jax.random.key(2))[0].model.weights for b in (batch, lied)
        )

    assert distance(*learned(0.0)) > 1e-4
    assert distance(*learned(0.5)) > 1e-4, "half of the rows are as they were stored"
    assert distance(*learned(1.0)) == 0.0


@functools.cache
def scheduled() -> tuple[Any, Any, Any]:
    """All that changes with the number of updates: agent, jitted update, learner before it."""
    config = dataclasses.replace(
        TINY, priority=0.5, correction=0.0, anneal=10, td_age=2, bootstrap="search", epsilon=0.25
    )
    agent = make_muzero(PUSH, config)
    state = init_learner(agent, PUSH, 2, jax.random.key(0))
    step = jax.jit(functools.partial(learner_step, agent), static_argnames="mode")
    for t in range(24):
        state, _, _ = step(state, stream(PUSH, t), mode="random" if t < 8 else "explore")
    return agent, jax.jit(agent.update), state


def lively(agent: Agent, before: Any) -> Any:
    """A batch with a reward in every record and nothing but the policy's own actions."""
    batch = replay.sample(before.ring, jax.random.key(1), agent.sampling)
    extras = {**batch.record.extras, "explored": jnp.zeros(batch.valid.shape, bool)}
    reward = jax.random.uniform(jax.random.key(6), batch.valid.shape)
    return batch._replace(record=batch.record._replace(reward=reward, extras=extras))


def test_priorities_are_refreshed_and_new_records_come_first():
    agent, update, before = scheduled()
    assert agent.sampling.priority == "priority"
    np.testing.assert_array_equal(before.ring.record.extras["priority"][:, :24], 1.0)
    batch = lively(agent, before)
    state, _, feedback = update(before.agent, batch, KEY)
    found = feedback["priority"]
    assert found.shape == (1, TINY.batch_size, 1)
    assert float(found.min()) >= 1e-3**0.5 - 1e-6
    assert float(jnp.ptp(found)) > 0.0
    # What the value was off by, under the weights that the batch met (they predict 0).
    record, valid = (jax.tree.map(lambda x: x[0], x) for x in (batch.record, batch.valid))
    compute = functools.partial(unroll_targets, unroll=2, n=3, gamma=TINY.discount)
    extras = record.extras
    want = jax.vmap(compute)(record, valid, extras["value"], None, extras["explored"])
    error = jnp.abs(want.value[:, 0]) * want.has_value[:, 0]
    np.testing.assert_allclose(found[0, :, 0], (error + 1e-3) ** 0.5, rtol=1e-4)
    np.testing.assert_allclose(state.priority, found.max())
    extras = agent.act(state, (), jnp.zeros((2, 2)), jnp.ones(2, bool), KEY, "explore")[2]
    np.testing.assert_allclose(extras["priority"], state.priority)


def test_likely_sequences_count_for_less_and_in_full_at_the_end_of_the_schedule():
    agent, update, before = scheduled()
    batch = lively(agent, before)
    likely = batch._replace(odds=jnp.array([[100.0, 1.0, 1.0, 1.0]]))
    late = before.agent._replace(updates=jnp.asarray(10))

    def moved(state: Any) -> float:
        one, two = (update(state, b, KEY)[0].model.weights for b in (batch, likely))
        return distance(one, two)

    assert moved(before.agent) == 0.0
    assert moved(late) > 1e-5


def test_nothing_is_refreshed_by_a_skipped_update():
    agent, update, before = scheduled()
    batch = lively(agent, before)
    bad = batch._replace(
        record=batch.record._replace(obs=batch.record.obs.at[0, 0, 1].set(jnp.nan))
    )
    state, _, feedback = update(before.agent, bad, KEY)
    np.testing.assert_array_equal(feedback["priority"][..., 0], 1.0)
    assert float(state.priority) == 1.0


def test_the_step_size_falls_with_the_schedule():
    agent, update, before = scheduled()
    batch = lively(agent, before)
    state, sizes = before.agent, []
    for _ in range(14):
        old = state.model.weights["value"]
        state = update(state, batch, KEY)[0]
        sizes.append(distance(old, state.model.weights["value"]))
    # Adam's steps have one size to begin with, and a tenth of it at the end.
    np.testing.assert_allclose(sizes[0], TINY.learning_rate, rtol=0.05)
    assert max(sizes[11:]) < 0.15 * sizes[0]


def test_targets_of_old_records_are_shorter():
    agent, update, before = scheduled()
    np.testing.assert_array_equal(before.ring.record.extras["born"][:, :24], 0)
    batch = lively(agent, before)
    own = batch.record.extras
    # A lie about the value right behind the first record is read by short returns alone.
    extras = {**own, "value": own["value"].at[:, :, 1].set(15.0)}
    lied = batch._replace(record=batch.record._replace(extras=extras))

    def moved(updates: int) -> float:
        state = before.agent._replace(updates=jnp.asarray(updates))
        one, two = (update(state, b, KEY)[0].model.weights["value"] for b in (batch, lied))
        return distance(one, two)

    assert moved(3) == 0.0, "two rewards, as the records are 3 // 2 = 1 step too old"
    assert moved(4) > 1e-6
    assert moved(400) > 1e-6


def test_old_records_take_what_the_search_finds_now():
    agent, _, before = scheduled()
    batch = lively(agent, before)
    record, valid = (jax.tree.map(lambda x: x[0], x) for x in (batch.record, batch.valid))
    stored = jax.random.normal(jax.random.key(7), valid.shape)
    record = record._replace(extras={**record.extras, "value": stored})
    config = dataclasses.replace(TINY, td_age=2, bootstrap="search", reanalyse=0.5)
    model = value_equivalent(PUSH, TINY.model, TINY.discount)

    def targets(updates: int) -> Any:
        now = before.agent.target, jnp.asarray(updates)
        return jax.tree.map(np.asarray, targets_of(PUSH, config, model, *now, record, valid))

    new, late, old = (targets(updates) for updates in (0, 5, 6))
    acts, size = old.has_policy > 0, TINY.unroll + 1
    np.testing.assert_array_equal(new.has_value, late.has_value)  # one reward is left
    found = np.asarray(record.extras["value"])[:, :size]
    np.testing.assert_array_equal(old.value[:2][acts[:2]], found[:2][acts[:2]])
    np.testing.assert_array_equal(old.has_value[:2], np.maximum(new.has_value, acts)[:2])
    np.testing.assert_array_equal(old.has_value[2:], new.has_value[2:] * ~acts[2:])
    ended = (new.has_value > 0) & ~acts
    assert ended.any()
    np.testing.assert_array_equal(old.value[ended], 0.0)
    for name in ("reward", "has_reward", "has_policy"):
        np.testing.assert_array_equal(getattr(old, name), getattr(new, name))


def test_two_players_have_opposite_returns():
    agent, _, before = scheduled()
    batch = lively(agent, before)
    record, valid = (jax.tree.map(lambda x: x[0], x) for x in (batch.record, batch.valid))
    config = dataclasses.replace(TINY, bootstrap="search")
    model = value_equivalent(PUSH, TINY.model, TINY.discount)
    now = before.agent.target, jnp.asarray(0)
    found = targets_of(PUSH._replace(players=2), config, model, *now, record, valid)
    compute = functools.partial(unroll_targets, unroll=2, n=3, gamma=-TINY.discount)
    own = record.extras
    want = jax.vmap(compute)(record, valid, own["value"], None, own["explored"])
    np.testing.assert_allclose(found.value, want.value, rtol=1e-5)
    alone = targets_of(PUSH, config, model, *now, record, valid)
    assert float(jnp.abs(alone.value - found.value).max()) > 0.1


def test_some_actions_are_uniform_and_marked():
    agent, _, before = scheduled()
    obs, first = jax.random.normal(jax.random.key(3), (400, 2)), jnp.ones(400, bool)
    act = jax.jit(agent.act, static_argnames="mode")
    share = {}
    for mode in ("random", "explore", "greedy"):
        extras = act(before.agent, (), obs, first, KEY, mode=mode)[2]
        share[mode] = float(extras["explored"].mean())
    assert share["random"] == 1.0
    assert share["greedy"] == 0.0
    assert 0.17 < share["explore"] < 0.33


MASKED = EnvSpec(
    "masked", {"action_mask": spaces.box(0.0, 1.0, (3,)), "place": LINE}, Discrete(3), 10
)


@pytest.mark.parametrize("mode", ["random", "explore", "greedy"])
def test_illegal_actions_are_never_taken(mode):
    agent = make_muzero(MASKED, TINY)
    state = agent.init(KEY)
    mask = jax.random.bernoulli(jax.random.key(1), 0.5, (64, 3)).at[:, 1].set(True)
    mask = mask.at[0].set(False)  # the end of an episode, where nothing may be done
    obs = {"action_mask": 1.0 * mask, "place": jax.random.normal(jax.random.key(2), (64, 2))}
    action, _, extras = agent.act(state, (), obs, jnp.ones(64, bool), jax.random.key(3), mode)
    assert bool(mask[jnp.arange(1, 64), action[1:]].all())
    np.testing.assert_array_equal(jnp.where(mask, 0.0, extras["weights"])[1:], 0.0)
    np.testing.assert_allclose(extras["weights"].sum(-1), 1.0, rtol=1e-5)
    assert len(np.unique(np.asarray(action[1:]))) > 1


def test_a_mask_must_fit_the_actions():
    with pytest.raises(ValueError, match="action_mask of masked: got .* expected one number per"):
        agent = make_muzero(MASKED._replace(action=Discrete(4)), TINY)
        obs = spaces.zeros(MASKED.observation, (2,))
        agent.act(agent.init(KEY), (), obs, jnp.ones(2, bool), KEY, "explore")


def test_a_value_beyond_the_bins_is_reported():
    short = dataclasses.replace(TINY.model, max_value=0.1, max_reward=0.5)
    agent = make_muzero(PUSH, dataclasses.replace(TINY, model=short))
    _, (before, _), _ = learner(0)
    state = agent.init(jax.random.key(0))
    _, metrics, _ = jax.jit(agent.update)(state, batch_of(before), jax.random.key(2))
    assert 0.0 < float(metrics["model/clipped_targets"]) < 1.0
    assert learner(0)[2]["model/clipped_targets"] == 0.0


def test_consistency_trains_the_projection():
    agent = make_muzero(PUSH, dataclasses.replace(TINY, consistency=2.0))
    _, (before, _), _ = learner(0)
    state = agent.init(jax.random.key(0))
    after, metrics, _ = jax.jit(agent.update)(state, batch_of(before), jax.random.key(2))
    assert 0.0 < float(metrics["model/consistency_loss"]) < 4.0
    for name in ("projector", "guess"):
        assert distance(state.model.weights[name], after.model.weights[name]) > 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unroll": 0}, "unroll must be at least 1, got 0"),
        ({"reanalyse": 1.5}, r"reanalyse must be in \[0, 1\], got 1.5"),
        ({"penalty": 1.0}, "model.members: got 1 with penalty=1.0"),
        (
            {"discount": 1.0, "model": ValueEquivalentConfig()},
            "max_value: got 0 with discount=1",
        ),
        ({"td_age": -1}, "td_age must be at least 0, got -1"),
        ({"priority": -0.5}, "priority must be in"),
        ({"train_ratio": 0.3}, "train_ratio: got 0.3"),
        ({"random_steps": 3}, "the length of a sequence, 6"),
    ],
)
def test_refuses_impossible_settings(change, message):
    with pytest.raises(ValueError, match=message):
        make_muzero(PUSH, dataclasses.replace(TINY, **change))


def test_refuses_actions_that_it_cannot_search():
    with pytest.raises(ValueError, match="action space of push: MuZero searches Box or Discrete"):
        make_muzero(PUSH._replace(action=MultiDiscrete((2, 3))), TINY)
