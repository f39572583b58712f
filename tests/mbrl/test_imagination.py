"""Imagined trajectories: who acts when, what is discounted how often, and what has a gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl import spaces
from mbrl.imagination import Dream, branches, imagine, imagined_targets, rollout_length
from mbrl.losses.policy_gradient import reinforce_loss
from mbrl.mdp import penalized
from mbrl.policies import Policy
from mbrl.types import MDP, Discrete, EnvSpec, Outcome
from tests.mbrl import plain

KEY = jax.random.key(0)
H, M = 4, 5
CHOICE = Discrete(3)
PUSH = spaces.box(-1.0, 3.0, (1,))


def adder(action_space: Any = CHOICE) -> MDP:
    """x' = x + params a; reward 100 x + 10 a + x'; survival 0.5 to 0.9 by the new state."""
    spec = EnvSpec("adder", spaces.box(-np.inf, np.inf, (1,)), action_space)

    def total(action: Any) -> Any:
        leaves = jax.tree.leaves(action)
        return sum(x.reshape(x.shape[0], -1).sum(-1).astype(jnp.float32) for x in leaves)

    def init(params, key, obs=None, batch=1):
        return {"x": jnp.zeros(batch), "time": jnp.zeros(batch, jnp.int32)}

    def step(params, key, state, action):
        x = state["x"] + params * total(action)
        reward = 100.0 * state["x"] + 10.0 * total(action) + x
        survival = jnp.where(x > 3.0, 0.5, 0.9)
        outcome = Outcome(reward, survival, jnp.full_like(x, 0.25))
        return {"x": x, "time": state["time"] + 1}, outcome

    return MDP(init, step, lambda params, state: state["x"][:, None], spec)


def starts() -> Any:
    return {"x": jnp.arange(M, dtype=jnp.float32), "time": jnp.zeros(M, jnp.int32)}


def by_time(key: Any, state: Any) -> Any:
    """Act 1, 2, 0, 1, ...: the state at which an action is taken decides it."""
    del key
    return jax.nn.one_hot((state["time"] + 1) % 3, 3)


def test_a_dream_has_exactly_its_horizon_and_every_action_belongs_to_its_state() -> None:
    @jax.jit
    def run(mdp_params: Any) -> Dream:
        return imagine(adder(), mdp_params, KEY, starts(), by_time, H, 0.99)

    dream = run(1.0)
    taken = np.array([1, 2, 0, 1])
    x = np.arange(M) + np.concatenate([[0], taken.cumsum()])[:, None]
    np.testing.assert_array_equal(dream.state["x"], x[:-1])
    np.testing.assert_array_equal(dream.final["x"], x[-1])
    np.testing.assert_array_equal(dream.final["time"], np.full(M, H))
    np.testing.assert_array_equal(dream.action, np.eye(3)[taken][:, None].repeat(M, 1))
    np.testing.assert_allclose(dream.reward, 100 * x[:-1] + 10 * taken[:, None] + x[1:])
    np.testing.assert_allclose(dream.discount, 0.99 * np.where(x[1:] > 3, 0.5, 0.9), rtol=1e-6)


def test_combinators_change_what_is_imagined() -> None:
    run = jax.jit(lambda c: imagine(penalized(adder(), c), 1.0, KEY, starts(), by_time, H, 1.0))
    bold, cautious = run(0.0), run(2.0)
    np.testing.assert_allclose(bold.reward - cautious.reward, np.full((H, M), 0.5))
    np.testing.assert_array_equal(bold.state["x"], cautious.state["x"])


def test_every_step_of_every_row_draws_for_itself() -> None:
    def act(key: Any, state: Any) -> Any:
        return Policy(PUSH, jnp.zeros((state["x"].shape[0], 2))).sample(key)

    run = jax.jit(lambda k: imagine(adder(PUSH), 1.0, k, starts(), act, H, 1.0))
    one, two = run(KEY), run(jax.random.key(1))
    assert len(np.unique(one.action)) == H * M
    assert not np.isin(one.action, two.action).any()
    # Encoded actions are those of the policy, also beyond the bounds, where the model does not go.
    assert np.abs(one.action).max() > 1.0
    taken = 1.0 + 2.0 * np.clip(one.action[:-1, :, 0], -1.0, 1.0)
    np.testing.assert_allclose(np.diff(one.state["x"], axis=0), taken, rtol=1e-4, atol=1e-4)
    assert np.abs(one.action).max() > 1.0


def test_actions_of_a_dict_are_imagined_too() -> None:
    space = {"tool": CHOICE, "arm": PUSH}

    def act(key: Any, state: Any) -> Any:
        del key
        rows = state["x"].shape[0]
        return jnp.concatenate([jnp.full((rows, 1), 0.5), by_time(None, state)], -1)

    dream = jax.jit(lambda p: imagine(adder(space), p, KEY, starts(), act, 2, 1.0))(1.0)
    np.testing.assert_allclose(dream.action[0, 0], [0.5, 0.0, 1.0, 0.0])
    # 0.5 is the action 2 of the arm; the tool adds 1, then 2.
    np.testing.assert_allclose(dream.final["x"], np.arange(M) + 3.0 + 4.0)


def test_no_gradient_leaves_a_dream() -> None:
    def everything(params: Any) -> Any:
        def act(key: Any, state: Any) -> Any:
            return Policy(PUSH, jnp.stack([params * state["x"], params + state["x"]], -1)).sample(
                key
            )

        state = jax.tree.map(lambda x: params * x, starts())
        state["time"] = starts()["time"]
        dream = imagine(adder(PUSH), params, KEY, state, act, H, params)
        leaves = [x for x in jax.tree.leaves(dream) if x.dtype == jnp.float32]
        return sum(jnp.sum(jnp.square(x)) for x in leaves)

    value, slope = jax.jit(jax.value_and_grad(everything))(0.9)
    assert value > 1.0
    assert slope == 0.0


def random_dream(seed: int = 0) -> tuple[Dream, Any, Any]:
    rng = np.random.default_rng(seed)
    reward, discount = rng.normal(size=(H, M)), rng.uniform(0.5, 1.0, (H, M))
    discount[1, 2] = 0.0
    empty: Any = None
    values, root = rng.normal(size=(H + 1, M)), rng.uniform(0.2, 1.0, M)
    dream = Dream(empty, empty, empty, jnp.float32(reward), jnp.float32(discount))
    return dream, values, root


@pytest.mark.parametrize("lam", [0.0, 0.6, 0.95, 1.0])
def test_targets_are_weighted_sums_of_n_step_returns(lam: float) -> None:
    dream, values, root = random_dream()
    reward, discount = plain.as_float64((dream.reward, dream.discount))
    returns, weight = np.zeros((H, M)), np.zeros((H, M))
    for m in range(M):
        for t in range(H):
            weight[t, m] = root[m] * np.prod(discount[:t, m])
            for n in range(1, H - t + 1):
                share = (1 - lam) * lam ** (n - 1) if n < H - t else lam ** (n - 1)
                rewards = sum(np.prod(discount[t:k, m]) * reward[k, m] for k in range(t, t + n))
                beyond = np.prod(discount[t : t + n, m]) * values[t + n, m]
                returns[t, m] += share * (rewards + beyond)
    got = jax.jit(imagined_targets)(dream, jnp.float32(values), jnp.float32(root), lam)
    np.testing.assert_allclose(got.returns, returns, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.advantage, returns - values[:-1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.weight, weight, rtol=1e-5)
    # The first action counts as much as the start state is alive; a death counts after it.
    np.testing.assert_allclose(got.weight[0], root, rtol=1e-6)
    assert got.weight[1, 2] > 0.0 and not got.weight[2:, 2].any()


def test_nothing_is_learned_from_where_an_episode_has_ended() -> None:
    dream, values, root = random_dream()
    got = jax.jit(imagined_targets)(dream, jnp.float32(values), jnp.float32(0.0 * root), 0.9)
    assert not np.any(got.weight)


def test_no_gradient_leaves_the_targets() -> None:
    dream, values, root = random_dream()

    def total(values: Any, root: Any, lam: Any) -> Any:
        return sum(map(jnp.sum, imagined_targets(dream, values, root, lam)))

    slopes = jax.jit(jax.grad(total, (0, 1, 2)))(jnp.float32(values), jnp.float32(root), 0.9)
    assert not any(np.any(slope) for slope in slopes)


@pytest.mark.parametrize("space", [CHOICE, PUSH], ids=["discrete", "box"])
def test_an_actor_learns_by_likelihood_ratios_and_not_through_its_samples(space: Any) -> None:
    rows, coef = 200, 0.1
    outputs = jnp.array([0.3, -0.8, 0.1])[: 3 if space == CHOICE else 2]
    rng = np.random.default_rng(0)
    advantage, weight = rng.normal(size=(1, rows)), rng.uniform(size=(1, rows))

    def loss(outputs: Any) -> Any:
        def law(*lead: int) -> Policy:
            return Policy(space, jnp.broadcast_to(outputs, (*lead, outputs.shape[0])))

        start = {"x": jnp.zeros(rows), "time": jnp.zeros(rows, jnp.int32)}
        dream = imagine(
            adder(space), 1.0, KEY, start, lambda key, state: law(rows).sample(key), 1, 1.0
        )
        log_prob, entropy = law(1, rows).log_prob(dream.action), law(1, rows).entropy()
        args = jnp.float32(advantage), entropy, coef
        return reinforce_loss(log_prob, *args, jnp.float32(weight)), dream.action[0]

    (value, action), got = jax.jit(jax.value_and_grad(loss, has_aux=True))(outputs)
    # The actions are fixed numbers: differences of the logarithm of the density at them.
    action = np.asarray(action, np.float64)

    def by_hand(o: Any) -> Any:
        if space == CHOICE:
            probs = np.exp(o - o.max()) / np.exp(o - o.max()).sum()
            probs = 0.99 * probs + 0.01 / 3
            log_prob, entropy = action @ np.log(probs), -(probs * np.log(probs)).sum()
        else:
            mean, std = np.tanh(o[0]), 0.1 + 0.9 / (1 + np.exp(-o[1] - 2.0))
            log_prob = -0.5 * ((action[:, 0] - mean) / std) ** 2 - np.log(std * np.sqrt(2 * np.pi))
            entropy = np.log(std) + 0.5 * np.log(2 * np.pi * np.e)
        return -(weight[0] * (log_prob * advantage[0] + coef * entropy)).mean()

    base = np.asarray(outputs, np.float64)
    np.testing.assert_allclose(value, by_hand(base), rtol=1e-4)
    slopes = [
        (by_hand(base + 1e-5 * e) - by_hand(base - 1e-5 * e)) / 2e-5 for e in np.eye(len(base))
    ]
    np.testing.assert_allclose(got, slopes, rtol=1e-3, atol=1e-5)
    assert np.abs(slopes).min() > 1e-3


def walk() -> MDP:
    """x' = x + a, reward x; over where 4 is reached, and no number beyond 100."""
    spec = EnvSpec("walk", spaces.box(-np.inf, np.inf, (1,)), PUSH)

    def init(params: Any, key: Any, obs: Any = None, batch: int = 1) -> Any:
        return obs

    def step(params: Any, key: Any, state: Any, action: Any) -> Any:
        after = state + action
        after = jnp.where(after > 100.0, jnp.nan, after)
        discount = jnp.where(after[:, 0] == 4.0, 0.0, 1.0)
        return after, Outcome(state[:, 0], discount, None)

    return MDP(init, step, lambda params, state: state, spec)


@pytest.mark.parametrize("length", [1, 2, 4])
def test_branches_end_with_their_length_with_a_predicted_end_and_with_the_numbers(length) -> None:
    begin = jnp.array([[0.0], [2.0], [3.0], [99.0]])

    @jax.jit
    def run(length: Any) -> Any:
        return branches(
            walk(), None, KEY, begin, lambda key, obs: jnp.ones_like(obs), length, longest=4
        )

    data, counts = run(jnp.asarray(length))
    shaped = jax.tree.map(lambda x: np.asarray(x).reshape(4, 4, *x.shape[1:]), (data, counts))
    data, counts = shaped
    # 0 meets 4 with its fourth step, 2 with its second, 3 with its first, 99 has one good step.
    left = {0: 4, 1: 2, 2: 1, 3: 1}
    for branch, steps in left.items():
        wanted = min(steps, length)
        assert counts[:, branch].tolist() == [t < wanted for t in range(4)]
        for t in range(wanted):
            at = float(begin[branch, 0]) + t
            assert data.obs[t, branch, 0] == data.reward[t, branch] == at
            assert data.next_obs[t, branch, 0] == at + 1.0
            assert data.is_terminal[t, branch] == float(at + 1.0 == 4.0)


def test_an_end_that_is_likely_ends_as_many_branches() -> None:
    begin = {"x": jnp.zeros((4000, 1))}
    mdp = walk()

    def step(params: Any, key: Any, state: Any, action: Any) -> Any:
        after, outcome = mdp.step(params, key, state, action)
        return after, outcome._replace(discount=jnp.full(4000, 0.75))

    data, counts = branches(
        mdp._replace(step=step), None, KEY, begin["x"], lambda key, obs: 0.0 * obs, 3, 3
    )
    shares = np.asarray(counts).reshape(3, 4000).mean(1)
    np.testing.assert_allclose(shares, [1.0, 0.75, 0.5625], atol=0.03)
    np.testing.assert_allclose(data.is_terminal, 0.25)


@pytest.mark.parametrize(
    ("step", "length"),
    [(0, 1), (20_000, 1), (25_714, 1), (25_715, 2), (60_000, 8), (99_999, 14), (100_000, 15),
     (1_000_000, 15)],
)  # fmt: skip
def test_rollouts_grow_along_a_line_in_whole_steps(step, length) -> None:
    # 14 steps over 80,000: one more every 5,714.3.
    assert int(rollout_length(jnp.asarray(step), (20_000, 100_000), (1, 15))) == length


def test_rollouts_may_shrink_and_jump() -> None:
    assert [int(rollout_length(jnp.asarray(s), (10, 30), (5, 1))) for s in (0, 19, 20, 30)] == [
        5, 4, 3, 1,
    ]  # fmt: skip
    assert [int(rollout_length(jnp.asarray(s), (10, 10), (1, 3))) for s in (9, 10, 11)] == [1, 1, 3]
