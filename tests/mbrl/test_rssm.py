"""The latent world model: what its latents may depend on, its distributions, its MDP."""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from envs.functional import mdp_to_env, mdp_to_func_env
from mbrl import normalization, spaces
from mbrl.mdp import SplitParams, optimistic, penalized, with_resets, with_reward
from mbrl.models.reward import reward_model
from mbrl.models.rssm import RSSM, Latent, RSSMConfig, RSSMState, rssm, rssm_size
from mbrl.models.rssm_networks import stochastic
from mbrl.normalization import Moments
from mbrl.types import Discrete, EnvSpec, MultiDiscrete
from tests.mbrl import plain
from tests.mbrl.sequences import edited, random_records

KEY = jax.random.key(0)
TINY = RSSMConfig(deter=16, hidden=8, units=8, depth=2, stoch=3, classes=4, blocks=2)
GAUSSIAN = dataclasses.replace(TINY, classes=0, members=2)
PUSH = EnvSpec(
    "push", spaces.box(-np.inf, np.inf, (3,)), spaces.box([-1.0, 0.0], [3.0, 0.5], dtype="f4")
)
SEEN = EnvSpec(
    "seen",
    {
        "camera": spaces.box(0, 255, (5, 4, 1), np.uint8),
        "place": Discrete(3),
        "speed": spaces.box(-np.inf, np.inf, (2,)),
    },
    MultiDiscrete((2, 3)),
    max_episode_steps=20,
)
B, T = 3, 6
"""Sequences, and records that are learned from; one more comes before them."""


class Case(NamedTuple):
    model: RSSM
    state: RSSMState
    record: Any
    loss: Any


def statistics_of(state: Any, spread: float) -> Any:
    """Make the moments such that inputs are shifted and scaled by something."""
    size = state.statistics.observations.mean.shape[0]
    mean, var = np.linspace(-0.5, 0.5, size), np.full(size, spread**2)
    rewards = Moments(jnp.float32(0.3), jnp.float32(4.0), jnp.float32(9.0))
    return state.statistics._replace(
        observations=Moments(jnp.float32(mean), jnp.float32(var), jnp.float32(9.0)),
        rewards=rewards,
    )


@functools.cache
def case(kind: str) -> Case:
    """Build 'push' (vectors, Box actions, Gaussian latents, members) or 'seen' (categories)."""
    # The choice among categories must not hang on the noise, which is drawn in other
    # shapes when acting: see `sharp`.
    spec, config = {
        "push": (PUSH, GAUSSIAN), "seen": (SEEN, dataclasses.replace(TINY, unimix=0.0))
    }[kind]  # fmt: skip
    model = rssm(spec, config)
    shapes = jax.eval_shape(model.init, KEY)
    state = RSSMState(plain.random_weights(shapes.weights, 1), statistics_of(shapes, 1.5))
    packed = jax.eval_shape(lambda: model.pack(model.begin(1)))
    record = random_records(spec, packed, (B, T + 1))
    return Case(model, state, record, jax.jit(model.loss))


def latents(kind: str, record: Any) -> Latent:
    it = case(kind)
    return jax.tree.map(
        np.asarray, it.loss(it.state, KEY, record, np.ones((B, T + 1), bool))[1].latent
    )


def same(one: Any, two: Any) -> Any:
    """Tell for every sequence and record, [B, T], whether nothing differs at all."""
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return np.logical_and.reduce([(a == b).all(-1) for a, b in leaves])


# Record t is the entry t - 1 of what is found.


def test_a_latent_depends_on_the_action_before_it_and_on_none_later() -> None:
    base = case("push").record
    before = latents("push", base)
    for t in range(T + 1):
        after = latents("push", edited(base, (slice(None), t), "action"))
        kept = same(before, after)
        assert kept[:, :t].all(), "an action changed a latent that it does not lead to"
        assert not kept[:, t:].any(), "an action was not noticed by the record it led to"


def test_a_latent_depends_on_its_own_observation_through_the_sample_alone() -> None:
    base = case("push").record
    before = latents("push", base)
    for t in range(1, T + 1):
        after = latents("push", edited(base, (slice(None), t), "obs"))
        assert same(before, after)[:, : t - 1].all()
        assert same(before.deter, after.deter)[:, t - 1].all()
        assert not same(before.stoch, after.stoch)[:, t - 1].any()
        assert not same(before.deter, after.deter)[:, t:].any()
    # The first record serves for its latent and its action, which its observation made.
    assert same(before, latents("push", edited(base, (slice(None), 0), "obs"))).all()
    assert not same(before, latents("push", edited(base, (slice(None), 0), "extras"))).any()
    # Rewards and ends are no input at all.
    others = edited(base, (slice(None), slice(None)), "reward", "is_last", "is_terminal")
    assert same(before, latents("push", others)).all()


@pytest.mark.parametrize("border", [1, 4])
def test_nothing_crosses_the_border_of_an_episode(border: int) -> None:
    base = case("push").record
    first = edited(base, (0, border), "is_first")
    before = latents("push", first)
    assert same(before, latents("push", base))[1:].all(), "another sequence was reset"
    assert not same(before, latents("push", base))[0, border - 1 :].any()
    for field in ("action", "obs", "extras"):
        for t in range(border):
            after = latents("push", edited(first, (0, t), field))
            assert same(before, after)[0, border - 1 :].all(), (field, t)


def test_the_first_latent_of_an_episode_is_that_of_a_fresh_start() -> None:
    it = case("push")
    start = jax.jit(lambda obs: it.model.mdp.init(it.state, KEY, obs))
    found = latents("push", edited(it.record, (slice(None), 3), "is_first"))
    np.testing.assert_allclose(
        found.deter[:, 2], start(it.record.obs[:, 3]).deter, rtol=1e-5, atol=1e-6
    )
    fresh = jax.jit(lambda: it.model.begin(2))()
    assert not any(np.any(x) for x in fresh)


def test_without_memory_a_latent_knows_its_own_record_and_one_step_before() -> None:
    it = case("push")
    model = rssm(PUSH, dataclasses.replace(GAUSSIAN, memory=False))
    valid: Any = np.ones((B, T + 1), bool)
    loss = jax.jit(jax.value_and_grad(
        lambda weights, record: model.loss(it.state._replace(weights=weights), KEY, record, valid),
        has_aux=True,
    ))  # fmt: skip

    def alone(record: Any) -> Latent:
        return loss(it.state.weights, record)[0][1].latent

    before, t = alone(it.record), 3
    for field in ("obs", "action"):
        after = alone(edited(it.record, (slice(None), t), field))
        kept = jax.tree.map(lambda a, b: (a == b).all(-1), before, after)
        # The entry t - 1 is the record t: the action there is seen by the dynamics of the next.
        moved = {"obs": [t - 1], "action": []}[field]
        assert not kept.stoch[:, moved].any()
        assert np.delete(kept.stoch, moved, 1).all(), field
        assert not kept.deter[:, t].any() and np.delete(kept.deter, t, 1).all(), field
    # Acting and imagining follow the same rule, whatever recurrent state they are given.
    step = jax.jit(lambda latent, action: model.mdp.step(it.state, KEY, latent, action)[0].deter)
    encode = jax.jit(lambda latent, obs, action: model.encode(
        it.state, KEY, latent, obs, action, jnp.zeros(B, bool)
    ))  # fmt: skip
    last = jax.tree.map(lambda x: x[:, t - 1], before)._replace(deter=jnp.full((B, 16), 9.0))
    action = it.record.action[:, t]
    encoded = spaces.encode_action(PUSH.action, action)
    acted = encode(last, it.record.obs[:, t + 1], encoded)
    for found in (step(last, action), acted.deter):
        np.testing.assert_allclose(found, before.deter[:, t], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(
        acted.stoch, encode(model.begin(B), it.record.obs[:, t + 1], -encoded).stoch
    )
    # The reward learns what the action does; nothing else than what reads memory stays untaught.
    untaught = {
        jax.tree_util.keystr(path)
        for path, slope in jax.tree.leaves_with_path(loss(it.state.weights, it.record)[1])
        if not np.any(slope)
    }
    readers = re.compile(r"\['(recurrent|state_in|from_deter)'\]")
    assert untaught and all(map(readers.search, untaught)), untaught


def sharp(state: RSSMState) -> RSSMState:
    """Make the posterior nearly certain, so that no noise can change its sample."""
    weights = jax.tree.map(lambda x: x, state.weights)
    weights["posterior"]["out"]["kernel"] = 1e4 * weights["posterior"]["out"]["kernel"]
    return state._replace(weights=weights)


def test_acting_and_training_see_the_same_latents() -> None:
    it = case("seen")
    model, state = it.model, sharp(it.state)
    record = edited(it.record, (1, 3), "is_first")
    loss, learned = it.loss(state, KEY, record, np.ones((B, T + 1), bool))
    assert np.isfinite(loss)
    encode = jax.jit(model.encode)
    latent = model.unpack(jax.tree.map(lambda x: x[:, 0], record.extras))
    action = spaces.encode_action(SEEN.action, record.action)
    for t in range(1, T + 1):
        obs = jax.tree.map(lambda x: x[:, t], record.obs)
        args = latent, obs, action[:, t - 1], record.is_first[:, t]
        latent = encode(state, jax.random.key(t), *args)
        np.testing.assert_array_equal(latent.stoch, learned.latent.stoch[:, t - 1])
        np.testing.assert_allclose(
            latent.deter, learned.latent.deter[:, t - 1], rtol=1e-4, atol=1e-5
        )
    # The codes depend on what was seen, on the image alone too.
    dark = edited(record, (slice(None), T), "obs").obs["camera"]
    other = record._replace(obs={**record.obs, "camera": dark})
    after = it.loss(state, KEY, other, np.ones((B, T + 1), bool))[1].latent
    assert not same(after.stoch, learned.latent.stoch)[:, -1].all()


def metrics(it: Case, state: RSSMState, record: Any) -> Any:
    found = it.loss(state, KEY, record, np.ones((B, T + 1), bool))[1].metrics
    return {name: float(x) for name, x in found.items()}


def test_the_survival_head_is_taught_the_discount_and_the_ends_that_are_no_time_limits() -> None:
    it = case("push")
    logit, discount = 1.3, TINY.discount
    weights = jax.tree.map(lambda x: x, it.state.weights)
    weights["survival"]["Dense_1"] = {"kernel": jnp.zeros((8, 1)), "bias": jnp.full(1, logit)}
    state = it.state._replace(weights=weights)
    # The end of the first row is no end of what is learned; that of the last one is.
    rows, times = [0, 1, 2, 2], [0, 2, 4, T]
    record = edited(it.record, (rows, times), "is_terminal", "is_last")
    record = edited(record, (1, 5), "is_last")
    alive = discount * (1.0 - record.is_terminal[:, 1:])
    assert (alive == 0.0).sum() == 3
    expected = (np.log1p(np.exp(logit)) - alive * logit).mean()
    np.testing.assert_allclose(metrics(it, state, record)["model/survival"], expected, rtol=1e-5)
    # Whoever imagines gets survival alone: the discount is taken out again, once.
    read = jax.jit(lambda state: it.model.survival(state, it.model.begin(1)))
    np.testing.assert_allclose(read(state), plain.sigmoid(logit) / discount, rtol=1e-5)
    weights["survival"]["Dense_1"]["bias"] = jnp.full(1, 20.0)
    np.testing.assert_array_equal(read(state), 1.0)


def test_rewards_count_from_the_second_record_on() -> None:
    it = case("push")
    before = metrics(it, it.state, it.record)["model/reward"]
    for t in range(T + 1):
        record = edited(it.record, (slice(None), t), "reward")
        after = metrics(it, it.state, record)["model/reward"]
        assert (after != before) == (t > 0)


def test_members_predict_the_next_record_of_the_same_episode() -> None:
    it = case("push")
    before = metrics(it, it.state, it.record)["model/ensemble"]
    # Two sequences are cut everywhere: what is left is the third's.
    cut = edited(it.record, (slice(0, 2), slice(None)), "is_first")
    third = metrics(it, it.state, cut)["model/ensemble"]
    assert 0.0 < third < before
    ended = edited(it.record, (slice(0, 2), slice(None)), "is_last")
    np.testing.assert_allclose(metrics(it, it.state, ended)["model/ensemble"], third, rtol=1e-5)
    # The last action leads beyond the sequence, the first one to a latent that is given.
    for t, seen in ((T, False), (T - 1, True)):
        record = edited(cut, (2, t), "action")
        assert (metrics(it, it.state, record)["model/ensemble"] != third) == seen


@functools.cache
def with_invalid_rows() -> Any:
    """Losses of sequences whose end holds no data, with two kinds of garbage there."""
    it = case("push")
    valid = np.ones((B, T + 1), bool)
    valid[1, 4:] = False
    found = []
    for fields in ((), ("obs", "action", "reward", "is_terminal")):
        record = edited(it.record, (1, slice(4, None)), *fields)
        found.append(it.loss(it.state, KEY, record, valid)[1].metrics)
    return found


def test_invalid_rows_cost_nothing() -> None:
    one, two = with_invalid_rows()
    for name in ("reconstruction", "reward", "survival", "dynamics", "representation"):
        assert one[f"model/{name}"] == two[f"model/{name}"], name


def test_members_do_not_predict_invalid_rows() -> None:
    one, two = with_invalid_rows()
    assert one["model/ensemble"] == two["model/ensemble"]


@functools.cache
def stepped() -> Any:
    it = case("push")

    @jax.jit
    def run(state: RSSMState, latent: Latent, action: Any) -> Any:
        model = it.model
        after, outcome = model.mdp.step(state, KEY, latent, action)
        read = model.reward(state, after), model.survival(state, after)
        shy = penalized(model.mdp, 3.0).step(state, KEY, latent, action)[1]
        bold = optimistic(model.mdp, 3.0).step(state, KEY, latent, action)[1]
        return after, outcome, read, shy, bold

    found = latents("push", it.record)
    return run, Latent(found.deter[:, 2], found.stoch[:, 2]), it.record.action[:, 2]


def test_a_step_arrives_with_its_reward_and_its_survival() -> None:
    run, latent, action = stepped()
    after, outcome, (reward, survival), _, _ = run(case("push").state, latent, action)
    np.testing.assert_allclose(outcome.reward, reward, rtol=1e-5)
    np.testing.assert_allclose(outcome.discount, survival, rtol=1e-5)
    assert (0 < survival).all() and (survival <= 1).all() and np.ptp(survival) > 0
    other = run(case("push").state, latent, action + 0.1)[0]
    assert not same(after.deter, other.deter).any()


def test_disagreement_is_in_units_of_reward_and_moves_imagined_rewards() -> None:
    run, latent, action = stepped()
    it = case("push")
    state = it.state
    _, outcome, _, shy, bold = run(state, latent, action)
    assert (outcome.uncertainty > 1e-3).all()
    np.testing.assert_allclose(shy.reward, outcome.reward - 3 * outcome.uncertainty, rtol=1e-4)
    np.testing.assert_allclose(bold.reward, outcome.reward + 3 * outcome.uncertainty, rtol=1e-4)
    rewards = state.statistics.rewards._replace(var=jnp.float32(400.0))
    richer = state._replace(statistics=state.statistics._replace(rewards=rewards))
    ratio = run(richer, latent, action)[1].uncertainty / outcome.uncertainty
    np.testing.assert_allclose(ratio, 10.0, rtol=1e-4)
    one = jax.tree.map(lambda x: jnp.stack([x[0], x[0]]), state.weights["ensemble"])
    agreed = state._replace(weights={**state.weights, "ensemble": one})
    np.testing.assert_array_equal(run(agreed, latent, action)[1].uncertainty, 0.0)

    @jax.jit
    @jax.grad
    def slope(action: Any) -> Any:
        outcome: Any = it.model.mdp.step(agreed, KEY, latent, action)[1]
        return outcome.uncertainty.sum()

    assert np.isfinite(slope(action)).all(), "planners would differentiate a square root at 0"
    # Predicted rewards are in units of their deviation, 2, and are not lost among the latents.
    last = one["Dense_2"]
    bias = last["bias"].at[:, -1].add(jnp.array([-1.0, 1.0]))
    apart = {**one, "Dense_2": {**last, "bias": bias}}
    state = state._replace(weights={**state.weights, "ensemble": apart})
    np.testing.assert_allclose(run(state, latent, action)[1].uncertainty, 2.0, rtol=1e-5)


def test_a_learned_reward_replaces_that_of_the_model() -> None:
    it = case("push")
    judge = reward_model(PUSH, 2, (8,))
    reward = judge.init(KEY)
    mdp = with_reward(it.model.mdp, judge)
    params = SplitParams(it.state, reward)
    latent, action = it.model.begin(B), it.record.action[:, 2]

    @jax.jit
    def run() -> Any:
        after, outcome = mdp.step(params, KEY, latent, action)
        seen = (it.model.decode(it.state, x) for x in (latent, after))
        own = it.model.mdp.step(it.state, KEY, latent, action)[1]
        obs, next_obs = seen
        return outcome, own, judge(reward, obs, action, next_obs)

    outcome, own, (mean, spread) = run()
    np.testing.assert_allclose(outcome.reward, mean, rtol=1e-4, atol=1e-6)
    assert not np.isclose(outcome.reward, own.reward).any()
    both = np.hypot(own.uncertainty, spread)
    np.testing.assert_allclose(outcome.uncertainty, both, rtol=1e-4)


def test_a_model_without_members_says_that_it_has_no_uncertainty() -> None:
    it = case("seen")
    action = jnp.zeros((1, 2), jnp.int32)
    step = functools.partial(jax.eval_shape, it.model.mdp.step)
    assert step(it.state, KEY, it.model.begin(1), action)[1].uncertainty is None
    with pytest.raises(ValueError, match="no uncertainty"):
        jax.eval_shape(penalized(it.model.mdp, 1.0).step, it.state, KEY, it.model.begin(1), action)


def checked(env: Any) -> set[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env, skip_render_check=True)
    return {re.sub(r"\x1b\[\d+m", "", str(w.message)) for w in caught}


def test_the_model_is_a_gymnasium_environment() -> None:
    it = case("seen")
    with pytest.raises(ValueError, match=r"no start states.*pass obs.*with_resets"):
        it.model.mdp.init(it.state, KEY)
    starts = jax.tree.map(lambda x: x[:, 0], it.record.obs)
    mdp = with_resets(it.model.mdp, starts)
    env = mdp_to_env(mdp, it.state)
    complaints = checked(env)
    assert all("infinity" in text for text in complaints), complaints
    obs, _ = env.reset(seed=3)
    lengths = []
    for _ in range(3):
        done, length = False, 0
        while not done:
            obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            assert env.observation_space.contains(obs)
            assert np.isfinite(float(reward))
            done, length = terminated or truncated, length + 1
        lengths.append(length)
        env.reset()
    assert max(lengths) <= 20
    functional = mdp_to_func_env(mdp, it.state)
    state = jax.eval_shape(functional.initial, KEY)
    seen = jax.eval_shape(functional.observation, state, KEY)
    assert seen["camera"].shape == (5, 4, 1) and seen["camera"].dtype == np.uint8


def test_statistics_are_those_of_the_rows_that_hold_data() -> None:
    it = case("seen")
    valid = np.ones((B, T + 1), bool)
    valid[2, 3:] = False
    empty = jax.tree.map(jnp.zeros_like, it.state.statistics)
    found = jax.jit(it.model.standardize)(empty, it.record, valid)
    rows = it.record.obs["speed"][valid]
    np.testing.assert_allclose(found.observations.mean[-2:], rows.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.observations.var[-2:], rows.var(0), rtol=1e-4)
    np.testing.assert_allclose(found.rewards.std, it.record.reward[valid].std(), rtol=1e-4)
    assert float(found.rewards.count) == valid.sum()
    raw = rssm(SEEN, dataclasses.replace(TINY, normalize=False))
    kept = jax.jit(raw.standardize)(empty, it.record, valid)
    assert float(kept.observations.count) == 0.0
    np.testing.assert_allclose(kept.rewards.std, found.rewards.std)


def law_of(kind: str) -> Any:
    return stochastic(TINY if kind == "categories" else dataclasses.replace(TINY, classes=0))


def test_samples_are_one_hot_have_the_frequencies_and_the_gradient_of_the_probabilities() -> None:
    law, rows = law_of("categories"), 20_000
    rng = np.random.default_rng(0)
    outputs, weight = 2 * rng.normal(size=12), rng.normal(size=12)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(outputs: Any) -> Any:
        rows_of = jnp.broadcast_to(outputs, (rows, 12))
        x = law.sample(law.distribution(rows_of), law.noise(KEY, (rows,)))
        return jnp.mean(x @ weight), x

    (_, x), slope = run(jnp.float32(outputs))
    assert x.shape == (rows, law.size) == (rows, 12)
    assert set(np.unique(x)) == {0.0, 1.0}
    folded = np.asarray(x).reshape(rows, 3, 4)
    assert (folded.sum(-1) == 1).all()
    probs = plain.unimix(outputs.reshape(3, 4), 0.01)
    np.testing.assert_allclose(folded.mean(0), probs, atol=2 / rows**0.5)
    joint = np.einsum("bi,bj->ij", folded[:, 0], folded[:, 1]) / rows
    np.testing.assert_allclose(joint, np.outer(probs[0], probs[1]), atol=2 / rows**0.5)

    def mean(outputs: Any) -> Any:
        return (plain.unimix(outputs.reshape(3, 4), 0.01).reshape(-1) * weight).sum()

    steps = 1e-6 * np.eye(12)
    expected = [(mean(outputs + e) - mean(outputs - e)) / 2e-6 for e in steps]
    np.testing.assert_allclose(slope, expected, rtol=1e-3, atol=1e-5)


def test_every_category_keeps_its_share_of_the_uniform_distribution() -> None:
    law = law_of("categories")
    probs = jax.jit(lambda x: law.distribution(x).probs)(jnp.tile(jnp.array([90.0, 0, 0, 0]), 3))
    np.testing.assert_allclose(probs, np.tile([0.9925, 0.0025, 0.0025, 0.0025], (3, 1)), rtol=1e-4)
    # One uniform number at the very end of its range still picks a category.
    ends = jnp.array([[0.0] * 3, [1.0 - 2.0**-24] * 3])
    x = jax.jit(lambda u: law.sample(law.distribution(jnp.zeros((2, 12))), u))(ends)
    np.testing.assert_array_equal(x.reshape(2, 3, 4).argmax(-1), [[0] * 3, [3] * 3])


def test_gaussian_latents_have_their_moments() -> None:
    law, rows = law_of("gaussian"), 20_000
    outputs = np.array([0.5, -1.0, 2.0, -9.0, 0.0, 1.0])

    @jax.jit
    def run(outputs: Any) -> Any:
        x = law.distribution(jnp.broadcast_to(outputs, (rows, 6)))
        return law.sample(x, law.noise(KEY, (rows,)))

    x = np.asarray(run(jnp.float32(outputs)))
    std = plain.softplus(outputs[3:]) + 0.1
    np.testing.assert_allclose(x.mean(0), outputs[:3], atol=0.03)
    np.testing.assert_allclose(x.std(0), std, rtol=0.03)
    assert law.pack(jnp.float32(x)).dtype == jnp.float32


def test_latents_come_back_from_replay_as_they_were() -> None:
    for kind in ("seen", "push"):
        it = case(kind)
        found = latents(kind, it.record)
        stored = jax.jit(it.model.pack)(found)
        assert stored["stoch"].dtype == (jnp.uint8 if kind == "seen" else jnp.float32)
        back = jax.jit(it.model.unpack)(stored)
        for one, two in zip(back, found, strict=True):
            np.testing.assert_array_equal(one, two)


def test_every_layer_begins_at_the_scale_of_its_fan_in() -> None:
    config = RSSMConfig(deter=128, hidden=48, units=56, stoch=8, classes=8, blocks=4, members=2)
    spec = EnvSpec("wide", spaces.box(-np.inf, np.inf, (40,)), Discrete(30))
    weights = jax.jit(rssm(spec, config).init)(jax.random.key(0, impl="rbg")).weights
    posterior = weights["posterior"]
    # The posterior is one layer over tokens and state: both parts share its fan-in.
    special = {
        "['posterior']['from_tokens']": 56 + 128, "['posterior']['from_deter']": 56 + 128,
        "['core']['recurrent']": 128 + 4 * 3 * 48, "['core']['shared']": 128 + 4 * 3 * 48,
        "['core']['gates']": 128,
    }  # fmt: skip
    assert posterior["from_tokens"].shape == (56, 48)
    leaf: Any
    for path, leaf in jax.tree.leaves_with_path(weights):
        name, std = jax.tree_util.keystr(path), float(np.sqrt(np.mean(np.square(leaf))))
        if "scale" in name:
            assert (np.asarray(leaf) == 1.0).all(), name
        elif "bias" in name or name == "['reward']['Dense_1']['kernel']":
            assert not np.any(leaf), name
        else:
            fan_in = special[name] if name in special else leaf.shape[-2]
            assert abs(std * fan_in**0.5 - 1.0) < 4.0 / leaf.size**0.5, (name, leaf.shape)


def test_the_first_predicted_reward_is_exactly_zero() -> None:
    it = case("push")
    weights = dict(it.state.weights)
    weights["reward"] = {
        **weights["reward"], "Dense_1": {"kernel": jnp.zeros((8, 255)), "bias": jnp.zeros(255)}
    }  # fmt: skip
    latent = latents("push", it.record)
    read = jax.jit(it.model.reward)(it.state._replace(weights=weights), latent)
    assert read.shape == (B, T) and not np.any(read)


def test_published_sizes() -> None:
    for size, deter in {"1m": 512, "12m": 2048, "25m": 3072, "50m": 4096, "100m": 6144}.items():
        config: Any = rssm_size(size, members=3)  # pyright: ignore
        assert (config.deter, config.hidden, config.units) == (deter, deter // 8, deter // 8)
        assert (config.depth, config.classes) == (deter // 128, deter // 128)
        assert (config.stoch, config.blocks, config.members) == (32, 8, 3)
        assert (config.unimix, config.free_nats) == (0.01, 1.0)
    assert rssm_size("200m") == RSSMConfig(8192, 1024, 1024, 64, 32, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"deter": 15}, r"deter: got 15, expected a multiple of blocks = 2"),
        ({"classes": 1}, r"classes: got 1, expected 2 to 256, or 0"),
        ({"span": -1}, r"span, stoch: got -1 and 3"),
        ({"stoch": -2}, r"span, stoch: got 0 and -2"),
        ({"classes": 300}, r"classes: got 300"),
        ({"dtype": "float16"}, r"dtype: got 'float16', expected one of"),
    ],
)
def test_refuses_impossible_sizes(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rssm(PUSH, dataclasses.replace(TINY, **change))


def test_refuses_what_it_cannot_act_in_and_sizes_it_does_not_know() -> None:
    endless = PUSH._replace(action={"arm": spaces.box(-np.inf, 1.0, (2,)), "tool": Discrete(2)})
    with pytest.raises(ValueError, match=r"action arm: bounds must be finite.*wrap"):
        rssm(endless, TINY)
    with pytest.raises(ValueError, match=r"size: got 'huge', expected one of \['1m', '12m'"):
        rssm_size("huge")  # pyright: ignore


def test_a_state_with_a_long_memory_is_read_at_unit_scale() -> None:
    spec = EnvSpec("few", spaces.box(-np.inf, np.inf, (3,)), Discrete(2))
    rng = np.random.default_rng(0)
    latent = Latent(jnp.asarray(0.1 * rng.normal(size=(5, 16))), jnp.ones((5, 12)))
    for span, scale in ((0, 0.1), (8, 1.0)):
        model = rssm(spec, dataclasses.replace(TINY, span=span))
        seen = np.asarray(model.feature(latent))
        np.testing.assert_array_equal(seen[:, 16:], 1.0)
        size = np.sqrt(np.square(seen[:, :16]).mean(-1))
        np.testing.assert_allclose(size, scale, rtol=0.5 if span == 0 else 0.02)
        np.testing.assert_allclose(seen[:, :16] / size[:, None], _unit(latent.deter), rtol=1e-5)
        # Rewards are read from it, and one as small gives the same.
        state = jax.jit(model.init)(KEY)
        weights = plain.random_weights(jax.eval_shape(lambda: state.weights), 3)
        state = state._replace(weights=weights)
        rewards = [model.reward(state, Latent(k * latent.deter, latent.stoch)) for k in (1, 3)]
        assert np.allclose(*rewards, rtol=0.05, atol=1e-3) == bool(span)
    assert not np.any(model.feature(model.begin(2))), "nothing is known at first"


def _unit(x: Any) -> Any:
    return np.asarray(x / np.sqrt(np.square(x).mean(-1, keepdims=True)))


def test_no_data_normalizes_nothing() -> None:
    shapes = jax.eval_shape(case("seen").model.init, KEY)
    assert shapes.statistics.observations.mean.shape == (3 + 2,)
    moments = normalization.empty((2,))
    assert np.array_equal(moments.std, np.ones(2))
