"""Value-equivalent models: targets by brute force, gradients by numbers, scales and shapes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl import spaces
from mbrl.losses.value_equivalent import (
    bootstrap_rows,
    cosine_error,
    scale_gradient,
    unroll_targets,
    unroll_weights,
)
from mbrl.models import value_equivalent as ve
from mbrl.planning import PlannerConfig, planner
from mbrl.two_hot import signed_hyperbolic, signed_parabolic
from mbrl.types import Discrete, EnvSpec, Record

GAMMA, K, N = 0.9, 3, 2
T = K + N + 1


def record(flags: str, reward: Any = None) -> Record:
    """Records of a stream: `.` inside, `f` first, `t` terminal, `c` cut by a time limit."""
    size = len(flags)
    reward = jnp.arange(1.0, size + 1) if reward is None else jnp.asarray(reward)
    is_first = jnp.array([f == "f" for f in flags])
    return Record(
        jnp.zeros((size, 2)), jnp.zeros(size, jnp.int32), jnp.where(is_first, 0.0, reward),
        is_first, jnp.array([f in "tc" for f in flags]), jnp.array([f == "t" for f in flags]),
    )  # fmt: skip


def targets(flags: str, value: Any = None, valid: Any = None, **options: Any) -> Any:
    size = len(flags)
    value = 100.0 + 10.0 * jnp.arange(size) if value is None else value
    valid = jnp.ones(size, bool) if valid is None else jnp.asarray(valid)
    return unroll_targets(record(flags), valid, value, unroll=K, n=N, gamma=GAMMA, **options)


def test_inside_an_episode_every_value_sees_all_its_rewards():
    # Position K sees the rewards of records K + 1 .. K + N, not those of the unroll alone.
    out = targets("......")
    value = 100.0 + 10.0 * np.arange(T)
    want = [(k + 2) + GAMMA * (k + 3) + GAMMA**2 * value[k + N] for k in range(K + 1)]
    np.testing.assert_allclose(out.value, want, rtol=1e-6)
    np.testing.assert_allclose(out.reward, [1.0, 2.0, 3.0, 4.0])
    np.testing.assert_array_equal(out.has_value, 1.0)
    np.testing.assert_array_equal(out.has_reward, [0.0, 1.0, 1.0, 1.0])
    np.testing.assert_array_equal(out.has_policy, 1.0)


@pytest.mark.parametrize("flags", ["......", "..cf..", ".cf.cf", "..f...", "....tf", ".....c"])
@pytest.mark.parametrize("n", [1, 2])
def test_only_the_values_that_returns_end_in_are_read(flags, n):
    value = 100.0 + 10.0 * jnp.arange(T)
    rows = bootstrap_rows(record(flags), n, unroll=K)
    assert rows.shape == (K + 1,)
    spoiled = jnp.full(T, 7e5).at[rows].set(value[rows])
    full, part = targets(flags, value, at_most=n), targets(flags, spoiled, at_most=n)
    np.testing.assert_array_equal(full.value * full.has_value, part.value * part.has_value)
    shifted = targets(flags, value.at[rows].add(5.0), at_most=n)
    moved = (shifted.value != full.value) & (full.has_value > 0)
    ends = np.array([f == "t" for f in flags])[np.asarray(rows)]
    absorbed = (full.has_value > 0) & (full.has_policy == 0)
    np.testing.assert_array_equal(moved, (full.has_value > 0) & ~ends & ~absorbed)


def test_old_returns_may_be_shorter():
    value = 100.0 + 10.0 * np.arange(T)
    out = targets("......", at_most=1)
    np.testing.assert_allclose(
        out.value, [(k + 2) + GAMMA * value[k + 1] for k in range(K + 1)], rtol=1e-6
    )


def test_returns_end_before_an_action_that_was_not_the_policys_own():
    value = 100.0 + 10.0 * np.arange(T)
    explored = jnp.array([False, False, True, False, False, False])
    out = targets("......", explored=explored)
    np.testing.assert_allclose(out.value[0], 2.0 + GAMMA * 3.0 + GAMMA**2 * value[2])
    np.testing.assert_allclose(out.value[1], 3.0 + GAMMA * value[2])  # and not the reward behind
    np.testing.assert_array_equal(out.has_value, [1.0, 1.0, 0.0, 1.0])
    np.testing.assert_array_equal(out.has_policy, 1.0)
    np.testing.assert_array_equal(out.has_reward, [0.0, 1.0, 1.0, 1.0])
    np.testing.assert_array_equal(
        bootstrap_rows(record("......"), N, explored, unroll=K), [2, 2, 4, 5]
    )
    # The reward of an end is known whatever led to it, and so is what follows: nothing.
    end = targets("..tf..", explored=jnp.array([False, True, False, False, False, False]))
    np.testing.assert_allclose(end.value[0], 2.0 + GAMMA * value[1])
    np.testing.assert_array_equal(end.has_value, [1.0, 0.0, 1.0, 1.0])


def test_a_negative_discount_alternates_between_players():
    # The mover wins at record 2: good for who moved at 1, bad for who moved at 0.
    win = record("..tf..", [0.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    out = unroll_targets(win, jnp.ones(T, bool), jnp.zeros(T), unroll=K, n=N, gamma=-1.0)
    np.testing.assert_allclose(out.value, [-1.0, 1.0, 0.0, 0.0])
    np.testing.assert_array_equal(out.has_value, 1.0)


def test_a_terminal_state_is_absorbing():
    out = targets(".tf...")
    np.testing.assert_allclose(out.value, [2.0, 0.0, 0.0, 0.0])  # the reward of the end, then 0
    np.testing.assert_allclose(out.reward[1:], [2.0, 0.0, 0.0])
    np.testing.assert_array_equal(out.has_value, 1.0)
    np.testing.assert_array_equal(out.has_reward, [0.0, 1.0, 1.0, 1.0])
    np.testing.assert_array_equal(out.has_policy, [1.0, 0.0, 0.0, 0.0])


def test_beyond_a_truncation_nothing_is_asked_for():
    out = targets(".cf...")
    np.testing.assert_allclose(out.value[0], 2.0 + GAMMA * 110.0)  # bootstraps at the cut
    np.testing.assert_array_equal(out.has_value, [1.0, 0.0, 0.0, 0.0])
    np.testing.assert_array_equal(out.has_reward, [0.0, 1.0, 0.0, 0.0])
    np.testing.assert_array_equal(out.has_policy, [1.0, 0.0, 0.0, 0.0])


def test_an_episode_that_was_cut_off_by_a_fault_is_no_end():
    out = targets("..f...")  # no last record: record 2 simply is of another episode
    np.testing.assert_array_equal(out.has_value, [1.0, 1.0, 0.0, 0.0])
    np.testing.assert_array_equal(out.has_policy, [1.0, 1.0, 0.0, 0.0])
    np.testing.assert_array_equal(out.has_reward, [0.0, 1.0, 0.0, 0.0])


def test_the_next_episode_gives_nothing_even_if_it_ends():
    out = targets("cft...")
    np.testing.assert_array_equal(out.has_value, 0.0)
    np.testing.assert_array_equal(out.has_reward, 0.0)
    np.testing.assert_array_equal(out.has_policy, 0.0)
    start = targets("tf....")
    np.testing.assert_array_equal(start.has_value, 1.0)
    np.testing.assert_allclose(start.value, 0.0)
    np.testing.assert_allclose(start.reward, 0.0 * start.reward + jnp.array([1.0, 0, 0, 0]))


def test_rows_without_data_give_nothing():
    out = targets("......", valid=[True, True, False, False, False, False])
    np.testing.assert_array_equal(out.has_policy, [1.0, 1.0, 0.0, 0.0])
    np.testing.assert_array_equal(out.has_value, [1.0, 1.0, 0.0, 0.0])


def test_sequences_too_short_for_their_returns_are_refused():
    with pytest.raises(ValueError, match=r"got 5 records, expected at least unroll \+ n \+ 1 = 6"):
        targets(".....")


def test_the_unroll_weighs_as_much_as_its_start():
    np.testing.assert_allclose(unroll_weights(5), [1.0, 0.2, 0.2, 0.2, 0.2, 0.2])


@pytest.mark.parametrize("x", [0.0, 1e-4, -3e-2, 0.5, -7.0, 300.0, -1e5])
def test_contraction_is_inverted_to_single_precision(x):
    y = signed_hyperbolic(jnp.float32(x))
    exact = np.sign(x) * (np.sqrt(abs(x) + 1) - 1) + 1e-3 * x
    np.testing.assert_allclose(y, exact, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(signed_parabolic(y), x, rtol=1e-5, atol=1e-9)


def test_numbers_survive_their_bins():
    scale = ve.scalar(50.0, 2)
    x = jnp.array([0.0, 0.3, -4.2, 50.0, -50.0])
    logits = jnp.log(ve.two_hot(signed_hyperbolic(x), scale.bins) + 1e-12)
    np.testing.assert_allclose(scale.mean(logits), x, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(scale.clips(jnp.array([49.9, 50.0, 50.1, -60.0])), [0, 0, 1, 1])
    entropy = -jnp.sum(jnp.exp(logits) * jnp.maximum(logits, -50.0), -1)
    np.testing.assert_allclose(scale.nll(logits, x), entropy, atol=1e-4)


def test_scaled_gradients_change_no_value():
    value, slope = jax.value_and_grad(lambda x: scale_gradient(x, 0.25) ** 2)(3.0)
    assert (float(value), float(slope)) == (9.0, 1.5)


def test_similarity_moves_the_prediction_only():
    a, b = jnp.array([1.0, 2.0]), jnp.array([2.0, 4.0])
    np.testing.assert_allclose(cosine_error(a, b), 0.0, atol=1e-6)
    np.testing.assert_allclose(cosine_error(a, -b), 2.0, atol=1e-6)
    grads = jax.grad(lambda a, b: cosine_error(a, b).sum(), (0, 1))(a, jnp.array([1.0, 0.0]))
    assert float(jnp.abs(grads[0]).max()) > 0.1
    np.testing.assert_array_equal(grads[1], 0.0)


SPEC = EnvSpec("dots", spaces.box(-np.inf, np.inf, (3,)), Discrete(2), 10)
SMALL = ve.ValueEquivalentConfig(latent=6, hidden=8, depth=2, members=2, max_value=20.0)


def built(spec: EnvSpec = SPEC, config: Any = SMALL, *discount: float) -> tuple[Any, Any]:
    """Build a model whose heads have left zero."""
    model = ve.value_equivalent(spec, config, *discount)
    state = model.init(jax.random.key(0))
    leaves, tree = jax.tree.flatten(state.weights)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return model, state._replace(weights=jax.tree.unflatten(tree, noisy))


def test_latents_fill_the_unit_interval():
    model, state = built()
    obs = jax.random.normal(jax.random.key(2), (4, 3))
    out = model.unroll(state, obs, jnp.zeros((K, 4), jnp.int32))
    np.testing.assert_allclose(out.latent.min(-1), 0.0, atol=1e-6)
    np.testing.assert_allclose(out.latent.max(-1), 1.0, atol=1e-6)
    flat = ve.unit_range(jnp.ones((2, 5)))
    assert np.isfinite(np.asarray(flat)).all()


def test_imagination_is_the_unroll():
    model, state = built(SPEC, SMALL, 0.5)
    obs = jax.random.normal(jax.random.key(2), (4, 3))
    action = jnp.array([[0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1]], jnp.int32)
    out = model.unroll(state, obs, action)
    latent = model.mdp.init(state, jax.random.key(0), obs)
    np.testing.assert_allclose(latent, out.latent[0], atol=1e-6)
    for k in range(K):
        latent, outcome = model.mdp.step(state, jax.random.key(0), latent, action[k])
        np.testing.assert_allclose(latent, out.latent[k + 1], atol=1e-5)
        reward = model.reward.mean(out.reward[k + 1])
        np.testing.assert_allclose(outcome.reward, reward.mean(0), rtol=1e-4, atol=1e-6)
        value = model.value.mean(out.value[k + 1])
        np.testing.assert_allclose(
            outcome.uncertainty,
            np.sqrt(reward.var(0) + 0.5**2 * value.var(0)),
            rtol=1e-3, atol=1e-6,
        )  # fmt: skip
        logits, predicted = model.predictor.predict(state, latent)
        np.testing.assert_allclose(logits, out.policy[k + 1], atol=1e-5)
        np.testing.assert_allclose(predicted, value.mean(0), rtol=1e-4, atol=1e-5)


def test_the_gradient_into_the_dynamics_is_halved_per_step():
    model, state = built()
    obs = jax.random.normal(jax.random.key(2), (1, 3))
    action = jnp.zeros((2, 1), jnp.int32)

    def last_value(shift: Any) -> Any:
        # The encoder's last bias moves the first latent, which the rest hangs on.
        weights = {**state.weights, "latent": jax.tree.map(lambda x: x, state.weights["latent"])}
        bias = weights["latent"]["Dense_1"]["bias"]
        weights["latent"]["Dense_1"] = {**weights["latent"]["Dense_1"], "bias": bias + shift}
        out = model.unroll(state._replace(weights=weights), obs, action)
        return model.value.mean(out.value[2]).mean()

    direction = jnp.linspace(-1.0, 1.0, SMALL.latent)
    slope = jnp.vdot(jax.grad(last_value)(jnp.zeros(SMALL.latent)), direction)
    h = 1e-2
    numeric = (last_value(h * direction) - last_value(-h * direction)) / (2 * h)
    assert abs(float(numeric)) > 1e-3
    np.testing.assert_allclose(slope / numeric, 0.25, rtol=0.05)


def test_every_weight_learns():
    model, state = built()
    obs = jax.random.normal(jax.random.key(2), (4, 3))

    def loss(weights: Any) -> Any:
        s = state._replace(weights=weights)
        out = model.unroll(s, obs, jnp.ones((K, 4), jnp.int32))
        heads = model.value.nll(out.value, jnp.ones((K + 1, 1, 4))).sum()
        heads += model.reward.nll(out.reward, jnp.ones((K + 1, 1, 4))).sum()
        return (
            heads
            + out.policy[..., 0].sum()
            + cosine_error(out.projection, obs @ jnp.ones((3, 6))).sum()
        )

    grads = jax.grad(loss)(state.weights)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert float(jnp.abs(leaf).max()) > 0.0, jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    "action", [Discrete(2), spaces.box(-1.0, 3.0, (2,))], ids=["discrete", "box"]
)
def test_planners_run_on_it(action):
    model, state = built(SPEC._replace(action=action))
    config = PlannerConfig(horizon=2, population=8, iterations=2, particles=1, elites=2)
    mpc = planner(model.mdp, config, value=lambda s, x: model.predictor.predict(s, x)[1])
    latent = model.mdp.init(state, jax.random.key(0), jnp.ones((3, 3)))
    chosen, _, info = jax.jit(mpc.plan)(state, jax.random.key(1), latent, mpc.init(3))
    assert chosen.shape == (3, *spaces.zeros(action).shape)
    assert np.isfinite(np.asarray(info["value"])).all()


def test_images_and_boxes():
    image = spaces.box(0, 255, (8, 8, 2), np.uint8)
    spec = EnvSpec("arm", {"camera": image, "speed": SPEC.observation}, spaces.box(-1.0, 3.0, (2,)))
    model, state = built(spec)
    obs = {"camera": jnp.full((2, 8, 8, 2), 9, jnp.uint8), "speed": jnp.ones((2, 3))}
    latent = model.mdp.init(state, jax.random.key(0), obs)
    policy, value = model.predictor.predict(state, latent)
    assert (latent.shape, policy.shape, value.shape) == ((2, 6), (2, 4), (2,))
    mean, logstd = jnp.split(policy, 2, -1)
    assert float(jnp.abs(mean).max()) < 1.0
    assert float(logstd.max()) <= 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent": 0}, "latent must be at least 1, got 0"),
        ({"members": 0}, "members must be at least 1"),
        ({"max_value": -1.0}, r"max_value must be in \[0, inf\)"),
        ({"max_reward": -1.0}, "max_reward must be in"),
    ],
)
def test_refuses_impossible_sizes(change, message):
    with pytest.raises(ValueError, match=message):
        ve.ValueEquivalentConfig(**change)


def test_the_range_of_values_follows_from_the_discount_where_there_is_one():
    config = ve.ValueEquivalentConfig(latent=4, hidden=4, max_reward=2.0)
    value = ve.value_equivalent(SPEC, config, 0.9).value
    np.testing.assert_array_equal(value.clips(jnp.array([19.9, -20.0, 20.1])), [0, 0, 1])
    for endless in (1.0, jnp.asarray(0.9)):
        with pytest.raises(ValueError, match="max_value: got 0 with discount="):
            ve.value_equivalent(SPEC, config, endless)
