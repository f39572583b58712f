"""PETS learns from any network, space and stream, and never from what is not finite."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from agents.pets import PETSConfig, make_pets
from mbrl import replay, spaces
from mbrl.models.termination import UNKNOWN
from mbrl.networks.core import from_haiku, from_nnx
from mbrl.planning import PlannerConfig
from mbrl.types import Agent, Batch, Box, Discrete, EnvSpec, Network, Record

ROWS = 40
TINY = PETSConfig(
    members=2, elites=2, hidden=(8,), batch_size=8, max_epochs=2, capacity=ROWS, holdout=0.2,
    planner=PlannerConfig(horizon=3, population=8, iterations=2, particles=2, elites=2),
)  # fmt: skip
PLANE = spaces.box(-np.inf, np.inf, (2,))
PUSH = EnvSpec("push", PLANE, spaces.box(-1.0, 3.0, (1,)), 10)


def batch_of(spec: EnvSpec, terminals: bool = False, obs: Any = None) -> Batch:
    """One environment, episodes of ten records: x' = x + a, reward = -|x'|."""
    rng = np.random.default_rng(0)
    t = np.arange(ROWS) % 10
    action = spaces.sample(spec.action, jax.random.key(0), (ROWS,))
    if obs is None:
        x = rng.normal(size=(ROWS, 2)).astype(np.float32)
        push = np.asarray(action, np.float32).reshape(ROWS, -1)[:, :1]
        for i in range(1, ROWS):
            x[i] = np.where(t[i] == 0, x[i], x[i - 1] + 0.1 * push[i - 1])
        obs = x
        reward = -np.abs(x[:, 0])
    else:
        reward = rng.normal(size=ROWS)
    last = t == 9
    record = Record(
        obs, action, reward.astype(np.float32) * (t > 0), t == 0, last, last & terminals
    )  # fmt: skip
    record = jax.tree.map(lambda x: jnp.asarray(x)[None], record)
    return Batch(record, jnp.asarray(~last & (np.arange(ROWS) < ROWS - 1))[None])


def trained(agent: Agent, batch: Batch) -> tuple[Any, Any, dict[str, float]]:
    before = agent.init(jax.random.key(1))
    after, metrics, feedback = jax.jit(agent.update)(before, batch, jax.random.key(2))
    assert feedback is None
    return before, after, {name: float(value) for name, value in metrics.items()}


@functools.cache
def pushed() -> tuple[Agent, Any]:
    agent = make_pets(PUSH, TINY)
    return agent, trained(agent, batch_of(PUSH))[1]


@functools.cache
def actor(mode: str) -> Any:
    agent, state = pushed()
    return jax.jit(lambda *x: agent.act(state, *x, mode)[:2])


def distance(one: Any, two: Any) -> float:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return max(float(jnp.max(jnp.abs(jnp.subtract(1.0 * a, 1.0 * b)))) for a, b in pairs)


class LinenNet(nn.Module):
    out: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.out)(nn.tanh(nn.Dense(8)(x)))


class NNXNet(nnx.Module):
    def __init__(self, size: int, out: int, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(size, 8, rngs=rngs)
        self.head = nnx.Linear(8, out, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.tanh(self.hidden(x)))


def linen(out: int) -> Network:
    module: Any = LinenNet(out)
    return Network(module.init, module.apply)


def haiku(out: int) -> Network:
    return from_haiku(lambda x: hk.Linear(out)(jnp.tanh(hk.Linear(8)(x))))


def nnx_network(out: int) -> Network:
    # The terminal head (one output) sees the observation only, the other one actions too.
    size = 2 if out == 1 else 3
    return from_nnx(lambda rngs: NNXNet(size, out, rngs))


def raw(out: int) -> Network:
    def init(key, x):
        return {"matrix": jax.random.normal(key, (x.shape[-1], out)), "shift": jnp.zeros(out)}

    return Network(init, lambda params, x: jnp.tanh(x) @ params["matrix"] + params["shift"])


@pytest.mark.parametrize("network", [linen, haiku, nnx_network, raw])
def test_trains_with_any_kind_of_network(network):
    agent = make_pets(PUSH, TINY, network=network)
    before, after, metrics = trained(agent, batch_of(PUSH))
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["model/skipped_updates"] == 0.0
    moved = [
        distance(one, two)
        for one, two in zip(
            jax.tree.leaves(before.model.weights.network),
            jax.tree.leaves(after.model.weights.network),
            strict=True,
        )
    ]
    assert min(moved) > 1e-4, "a part of the network does not learn"
    obs, first = jnp.zeros((1, 2)), jnp.ones(1, bool)
    action = agent.act(after, agent.begin(1), obs, first, jax.random.key(3), "greedy")[0]
    assert action.shape == (1, 1)
    assert -1.0 <= float(action[0, 0]) <= 3.0


def has_ends(termination):
    bounded = jax.tree.map(lambda x: bool((abs(x) < UNKNOWN).any()), termination.bounds)
    return bounded.low or bounded.high or bool(termination.unexplained)


def test_truncation_is_not_termination():
    agent, state = pushed()
    assert bool(batch_of(PUSH).record.is_last.any())
    assert not has_ends(state.model.termination)
    ended = trained(agent, batch_of(PUSH, terminals=True))[1]
    assert has_ends(ended.model.termination)


def test_final_and_missing_records_are_no_data():
    # 40 records in 4 episodes hold 36 transitions, the last one without a successor included.
    metrics = trained(pushed()[0], batch_of(PUSH))[2]
    assert metrics["model/transitions"] == 36.0


def poisoned(batch: Batch, row: int) -> Batch:
    reward = batch.record.reward.at[0, row].set(jnp.nan)
    return batch._replace(record=batch.record._replace(reward=reward))


def test_a_loss_that_is_not_finite_changes_no_weight_and_is_counted():
    agent, _ = pushed()
    # Row 5 is the successor of a transition in the middle of an episode.
    before, after, metrics = trained(agent, poisoned(batch_of(PUSH), 5))
    assert distance(before.model.weights, after.model.weights) == 0.0
    assert metrics["model/skipped_updates"] > 0
    assert metrics["model/skipped_in_a_row"] == metrics["model/skipped_updates"]
    assert distance(before.opt_state.inner, after.opt_state.inner) == 0.0
    good, metrics = jax.jit(agent.update)(after, batch_of(PUSH), jax.random.key(4))[:2]
    assert float(metrics["model/skipped_in_a_row"]) == 0.0
    assert float(metrics["model/skipped_updates"]) > 0
    assert distance(good.model.weights, after.model.weights) > 1e-4
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(good.model))


def test_a_bad_number_outside_of_all_transitions_does_no_harm():
    # The reward of a first record belongs to no transition.
    agent, state = pushed()
    same = trained(agent, poisoned(batch_of(PUSH), 10))[1]
    assert distance(same.model, state.model) == 0.0


def test_actions_stay_inside_asymmetric_bounds_and_use_both_ends():
    agent, _ = pushed()
    obs = jnp.asarray(np.random.default_rng(1).uniform(-3, 3, (64, 2)), jnp.float32)
    first = jnp.ones(64, bool)
    for mode, spread in (("random", 3.0), ("explore", 1.0), ("greedy", 1.0)):
        action, _ = actor(mode)(agent.begin(64), obs, first, jax.random.key(5))
        assert action.shape == (64, 1)
        assert float(action.min()) >= -1.0
        assert float(action.max()) <= 3.0
        assert float(action.max() - action.min()) > spread, mode


def test_an_episode_begins_without_the_plan_of_the_last_one():
    agent, _ = pushed()
    act, key = actor("explore"), jax.random.key(6)
    obs = jnp.array([[0.5, -0.5], [0.5, -0.5]])
    fresh = agent.begin(2)
    _, used = act(fresh, obs, jnp.zeros(2, bool), jax.random.key(7))
    assert distance(used, fresh) > 1e-3, "the planner keeps nothing: this test sees nothing"
    with_old, _ = act(used, obs, jnp.ones(2, bool), key)
    with_fresh, _ = act(fresh, obs, jnp.ones(2, bool), key)
    assert np.array_equal(with_old, with_fresh)
    warm, _ = act(used, obs, jnp.zeros(2, bool), key)
    assert not np.array_equal(warm, with_fresh)
    one, _ = act(used, obs, jnp.array([True, False]), key)
    assert np.array_equal(one[0], with_fresh[0])
    assert np.array_equal(one[1], warm[1])


def test_only_greedy_plans_keep_to_what_was_visited_where_the_other_side_has_ended_episodes():
    agent, state = pushed()
    ends_right = state.model.termination.bounds.high.at[0].set(50.0)
    visited = state.model.termination.visited
    ending = state.model.termination._replace(
        bounds=state.model.termination.bounds._replace(high=ends_right),
        visited=visited._replace(low=visited.low.at[0].set(5.0)),
    )
    one_sided = state._replace(model=state.model._replace(termination=ending))
    obs, first, key = jnp.array([[0.55, 0.0]]), jnp.ones(1, bool), jax.random.key(5)

    def act(state: Any, mode: Any) -> Any:
        return jax.jit(agent.act, static_argnums=5)(state, agent.begin(1), obs, first, key, mode)[0]

    assert np.array_equal(act(state, "greedy"), act(state, "explore"))
    assert np.array_equal(act(one_sided, "explore"), act(state, "explore"))
    assert not np.array_equal(act(one_sided, "greedy"), act(one_sided, "explore"))


VALUED = dataclasses.replace(
    TINY, value_rounds=2, planner=dataclasses.replace(TINY.planner, horizon=1, discount=0.9)
)


def test_a_value_is_learned_from_the_same_replay():
    before, after, metrics = trained(make_pets(PUSH, VALUED), batch_of(PUSH))
    assert metrics["value/skipped_updates"] == 0.0
    assert distance(before.value.weights, after.value.weights) > 1e-3
    worst = float(batch_of(PUSH).record.reward.min())
    assert worst / (1 - 0.9) < metrics["value/mean"] < 0.0
    other = trained(pushed()[0], batch_of(PUSH))[1]
    assert distance(other.model, after.model) == 0.0, "the model does not depend on the value"


def test_plans_end_where_the_least_of_the_learned_values_is_high():
    agent = make_pets(PUSH, VALUED, network=raw)
    state = trained(agent, batch_of(PUSH))[1]
    act = jax.jit(functools.partial(agent.act, mode="greedy"))

    def action(*slopes: float) -> float:
        """Act with members whose value is slope * tanh(first coordinate)."""
        slope = 1e4 * jnp.array(slopes)[:, None, None] * jnp.array([[1.0], [0.0]])
        learned = state._replace(value=state.value._replace(
            weights={"matrix": slope, "shift": jnp.zeros((2, 1))},
            low=jnp.full((), -1e6), high=jnp.full((), 1e6),
        ))  # fmt: skip
        obs, first = jnp.zeros((1, 2)), jnp.ones(1, bool)
        return float(act(learned, agent.begin(1), obs, first, jax.random.key(3))[0][0, 0])

    assert action(1.0, 1.0) > 1.0 > 0.0 > action(-1.0, -1.0)
    assert -0.5 < action(1.0, -1.0) < action(1.0, 1.0)


def undecided() -> dict[str, Any]:
    """Two members that move the first coordinate apart by as much as the action is large.

    The reward costs the action and is high where the first coordinate is: on average there is
    nothing to gain by acting.
    """
    matrix, shift = np.zeros((2, 3, 6), np.float32), np.zeros((2, 6), np.float32)
    for member, sign in enumerate((1.0, -1.0)):
        matrix[member, 2, 0], shift[member, 0] = sign, sign * np.tanh(1.0)
        matrix[member, :, 2] = [3.0, 0.0, -0.3]
    shift[:, 3:] = -50.0  # log-variances: no noise
    return {"matrix": jnp.asarray(matrix), "shift": jnp.asarray(shift)}


@pytest.mark.parametrize(
    ("explore", "active"), [("reward", False), ("disagreement", True), ("hallucinated", True)]
)
def test_what_is_explored_for_is_not_what_evaluation_plans_for(explore, active):
    search = dataclasses.replace(TINY.planner, population=48, iterations=3, elites=6)
    config = dataclasses.replace(TINY, explore=explore, optimism=2.0, planner=search)
    agent = make_pets(PUSH, config, network=raw)
    state = jax.jit(agent.init)(jax.random.key(1))
    weights = state.model.weights._replace(network=undecided())
    state = state._replace(model=state.model._replace(weights=weights))
    obs, first = jnp.zeros((1, 2)), jnp.ones(1, bool)

    @functools.partial(jax.jit, static_argnums=0)
    def act(mode: Any, key: Any) -> Any:
        return agent.act(state, agent.begin(1), obs, first, key, mode)[:2]

    action, carry = act("explore", jax.random.key(2))
    assert action.shape == (1, 1)
    assert -1.0 <= float(action[0, 0]) <= 3.0
    assert (float(action[0, 0]) > 1.5) == active
    assert jax.tree.structure(carry) == jax.tree.structure(agent.begin(1))
    assert float(act("greedy", jax.random.key(3))[0][0, 0]) < 0.5


def test_a_given_reward_is_asked_about_what_is_executed():
    def reward(obs: Any, action: Any, next_obs: Any) -> Any:
        assert action.shape[1:] == (1,), "the choice of a model is no action"
        return action[:, 0]

    config = dataclasses.replace(TINY, explore="hallucinated")
    agent = make_pets(PUSH, config, reward_fn=reward)
    state = jax.eval_shape(agent.init, jax.random.key(0))
    rest = agent.begin(1), jnp.zeros((1, 2)), jnp.ones(1, bool), jax.random.key(1)
    action = jax.eval_shape(functools.partial(agent.act, mode="explore"), state, *rest)[0]
    assert action.shape == (1, 1)


def test_a_given_reward_is_the_unit_of_penalties_the_cost_of_a_halt_and_what_values_sum():
    def reward(obs: Any, action: Any, next_obs: Any) -> Any:
        return 50.0 + 10.0 * action[:, 0] + next_obs[:, 0]

    config = dataclasses.replace(VALUED, halt=0.9, max_epochs=1, value_rounds=1)
    batch = batch_of(PUSH)  # whose rewards are of about -1
    _, state, _ = trained(make_pets(PUSH, config, reward_fn=reward), batch)
    data, valid = replay.transitions(batch)
    given = np.asarray(reward(data.obs, data.action, data.next_obs))[np.asarray(valid)]
    np.testing.assert_allclose(state.model.targets.mean[-1], given.mean(), rtol=1e-4)
    np.testing.assert_allclose(state.model.targets.std[-1], given.std(), rtol=1e-3)
    np.testing.assert_allclose(state.halt.penalty, 10.0 * given.std(), rtol=1e-3)
    # Nothing is known of values yet: returns weigh the next rewards by 0.9 * 0.3 per step.
    assert float(state.value.low) > 0.99 * given.min()
    assert float(state.value.units.mean) < given.max() / (1.0 - 0.27)


def test_members_may_be_samples_of_a_posterior_that_goes_on_learning():
    config = dataclasses.replace(TINY, posterior="variational", members=3, recalibrate=True)
    agent = make_pets(PUSH, config)
    before, after, metrics = trained(agent, batch_of(PUSH))
    assert all(np.isfinite(value) for value in metrics.values())
    assert np.all(after.model.scale != 1.0)
    assert distance(before.posterior, after.posterior) > 1e-4
    samples = after.model.weights.network["Dense_1"]["kernel"]
    assert samples.shape[0] == 3 and np.any(samples[0] != samples[1])
    bad = jax.jit(agent.update)(after, poisoned(batch_of(PUSH), 5), jax.random.key(4))[0]
    assert distance(bad.posterior, after.posterior) == 0.0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(bad.model.weights))


def test_dict_and_discrete_observations_with_discrete_actions():
    space = {"place": Discrete(4), "speed": spaces.box(-1.0, 1.0, (2,))}
    spec = EnvSpec("mixed", space, Discrete(3), 10)
    time = np.arange(ROWS)
    obs = {
        "place": (time // 8 % 4).astype(np.int32),
        "speed": np.stack([np.sin(time / 5), np.cos(time / 5)], 1).astype(np.float32),
    }
    agent = make_pets(spec, dataclasses.replace(TINY, targets=("absolute",)))
    before, after, metrics = trained(agent, batch_of(spec, obs=obs))
    assert np.isfinite(metrics["model/loss"])
    assert distance(before.model.weights, after.model.weights) > 1e-4
    now = jax.tree.map(lambda x: jnp.asarray(x[:16]), obs)
    act = jax.jit(functools.partial(agent.act, mode="greedy"))
    action = act(after, agent.begin(16), now, jnp.ones(16, bool), jax.random.key(8))[0]
    assert (action.shape, action.dtype) == ((16,), jnp.int32)
    assert set(np.asarray(action).tolist()) <= {0, 1, 2}


def test_elites_are_the_members_with_the_smallest_error():
    agent = make_pets(PUSH, dataclasses.replace(TINY, members=3, elites=1))
    batch = batch_of(PUSH)
    before = agent.init(jax.random.key(1))

    def spoil(leaf):  # members 0 and 1 start far from any answer, and two epochs are short
        return leaf.at[:2].add(30.0) if leaf.ndim > 1 else leaf

    network = jax.tree.map(spoil, before.model.weights.network)
    weights = before.model.weights._replace(network=network)
    before = before._replace(model=before.model._replace(weights=weights))
    after = jax.jit(agent.update)(before, batch, jax.random.key(2))[0]
    assert after.model.elites.tolist() == [2]


def test_no_member_is_held_back_by_the_gradient_of_another():
    agent = make_pets(PUSH, dataclasses.replace(TINY, clip_norm=1e-2))
    batch, key = batch_of(PUSH), jax.random.key(2)
    before = agent.init(jax.random.key(1))
    spoiled = jax.tree.map(lambda leaf: leaf.at[0].multiply(2.0), before.model.weights)
    worse = before._replace(model=before.model._replace(weights=spoiled))
    update = jax.jit(agent.update)
    one, other = (update(state, batch, key)[0].model.weights for state in (before, worse))
    assert distance(*(jax.tree.map(lambda leaf: leaf[0], w) for w in (one, other))) > 1e-3
    second = (jax.tree.map(lambda leaf: leaf[1], w) for w in (one, other))
    assert distance(*second) < 1e-6


def test_weight_decay_leaves_the_bounds_of_the_variance_alone():
    config = dataclasses.replace(TINY, weight_decay=30.0, learn_bounds=False)
    before, after, _ = trained(make_pets(PUSH, config), batch_of(PUSH))
    assert distance(before.model.weights.network, after.model.weights.network) > 1e-2
    for name in ("logvar_low", "logvar_high"):
        old, new = getattr(before.model.weights, name), getattr(after.model.weights, name)
        np.testing.assert_array_equal(new, old)


def test_observations_of_another_shape_are_refused_by_name():
    agent, state = pushed()
    for shape in ((2, 5), (2,), (2, 2, 2)):
        with pytest.raises(ValueError, match=r"obs"):
            agent.act(state, agent.begin(2), jnp.zeros(shape), jnp.ones(2, bool),
                      jax.random.key(0), "explore")  # fmt: skip


def test_refuses_images():
    image = Box((64, 64, 3), np.zeros((64, 64, 3)), np.full((64, 64, 3), 255), np.dtype(np.uint8))
    spec = PUSH._replace(observation={"camera": image, "speed": PLANE})
    with pytest.raises(ValueError, match=r"camera.*image of shape \(64, 64, 3\)"):
        make_pets(spec, TINY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"elites": 3}, "elites must not exceed members, got 3 > 2"),
        ({"elites": 0}, "elites must be at least 1, got 0"),
        ({"holdout": 1.0}, r"holdout must be in \[0, 1\), got 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"train_every": 0}, "train_every"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"explore": "novelty"}, "explore must be one of reward, .* got 'novelty'"),
        ({"optimism": -1.0}, "optimism"),
        ({"value_rounds": 4}, r"planner.discount must be below 1 .* got 1.0 with value_rounds=4"),
        ({"targets": ("delta", "angle", "delta")}, "each of the 2 dimensions"),
    ],
)
def test_refuses_impossible_settings(change, message):
    agent_of = functools.partial(make_pets, PUSH)
    with pytest.raises(ValueError, match=message):
        agent = agent_of(dataclasses.replace(TINY, **change))
        trained(agent, batch_of(PUSH))


def test_refuses_actions_without_bounds():
    with pytest.raises(ValueError, match="bound"):
        agent = make_pets(PUSH._replace(action=spaces.box(-np.inf, np.inf, (1,))), TINY)
        agent.begin(1)


def test_samples_the_whole_replay():
    spec = pushed()[0].sampling
    assert (spec.kind, spec.capacity) == ("all", ROWS)
    assert replay.holdout_mask((1, ROWS), TINY.holdout).sum() > 0


def test_plans_end_where_the_model_knows_less_than_it_did_of_the_data():
    agent = make_pets(PUSH, dataclasses.replace(TINY, halt=0.9))
    before, state, _ = trained(agent, batch_of(PUSH))
    assert float(before.halt.threshold) == np.inf
    assert 0.0 < float(state.halt.threshold) < np.inf
    assert float(state.halt.penalty) > 0.0
    obs, first = jnp.array([[0.5, 0.0]]), jnp.ones(1, bool)
    act = jax.jit(
        lambda state: agent.act(state, agent.begin(1), obs, first, jax.random.key(4), "explore")[0]
    )
    # Other weights lead elsewhere, unless all steps are unknown: then all plans are worth the same,
    # whatever the model says.
    weights = jax.tree.map(jnp.negative, state.model.weights)
    models = state.model, state.model._replace(weights=weights)
    for threshold, same in ((jnp.inf, False), (-1.0, True)):
        halt = state.halt._replace(threshold=jnp.asarray(threshold))
        one, other = (act(state._replace(model=model, halt=halt)) for model in models)
        assert (distance(one, other) == 0.0) == same
