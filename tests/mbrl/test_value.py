"""Values of replay: returns by brute force, a value worked out by hand, units that follow."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mbrl import replay, spaces
from mbrl.fitting import FitConfig, fit_members
from mbrl.models.value import Returns, ring_returns, value_model
from mbrl.planning import PlannerConfig, planner
from mbrl.types import MDP, Batch, Box, EnvSpec, Outcome, Record, SampleSpec

GAMMA = 0.9
LINE = Box((1,), np.full(1, -np.inf, np.float32), np.full(1, np.inf, np.float32))
SPEC = EnvSpec("line", LINE, spaces.box(-1.0, 1.0, (1,)), 100)
ALL = SampleSpec("all", 0, 0, 1)


def stream(rows: list[tuple[float, float, str]], capacity: int) -> Batch:
    """Write (observation, reward, flag) rows of one environment to a ring and read it whole.

    Flags: `f` first, `l` last because the episode was cut, `t` last because it ended.
    """

    def record(obs: float, reward: float, flag: str) -> Record:
        flags = flag == "f", flag in "lt" and flag != "", flag == "t"
        return Record(
            jnp.full((1, 1), obs), jnp.zeros((1, 1)), jnp.full(1, reward),
            *(jnp.full(1, f) for f in flags),
        )  # fmt: skip

    example = jax.tree.map(lambda x: x[0], record(0.0, 0.0, ""))
    ring = replay.init(example, 1, capacity)
    for row in rows:
        ring = replay.add(ring, record(*row))
    return replay.sample(ring, jax.random.key(0), ALL)


def brute_force(batch: Batch, value: np.ndarray, lambda_: float) -> np.ndarray:
    """Follow every row until its trail ends; rewards, then the value where it does."""
    record, valid = batch.record, np.asarray(batch.valid[0])
    size = valid.shape[0]
    out = np.full(size, np.nan)

    def follow(t: int) -> float:
        n = (t + 1) % size
        reward, terminal = float(record.reward[0, n]), bool(record.is_terminal[0, n])
        if terminal:
            return reward
        goes_on = valid[n] and n != 0  # the recursion stops at the last row of the ring
        beyond = (1 - lambda_) * value[n] + lambda_ * follow(n) if goes_on else value[n]
        return reward + GAMMA * beyond

    for t in np.flatnonzero(valid):
        out[t] = follow(int(t))
    return out


ROWS = [
    (0.0, 9.0, "f"), (1.0, 1.0, ""), (2.0, 2.0, ""), (3.0, 3.0, "t"),
    (4.0, 9.0, "f"), (5.0, 5.0, ""), (6.0, 6.0, "l"),
    (7.0, 9.0, "f"), (8.0, 8.0, ""), (9.0, 7.0, ""),
]  # fmt: skip


@pytest.mark.parametrize("capacity", [10, 12, 8], ids=["full", "with room", "overwritten"])
@pytest.mark.parametrize("lambda_", [0.0, 0.6, 1.0])
def test_returns_of_a_ring_end_where_episodes_do(capacity, lambda_):
    batch = stream(ROWS, capacity)
    value = np.random.default_rng(0).normal(size=capacity)
    got = ring_returns(batch, jnp.asarray(value, jnp.float32)[None], GAMMA, lambda_)[0]
    want = brute_force(batch, value, lambda_)
    valid = np.asarray(batch.valid[0])
    assert valid.sum() == {10: 7, 12: 7, 8: 5}[capacity]
    np.testing.assert_allclose(np.asarray(got)[valid], want[valid], rtol=1e-5)


def test_by_hand_termination_has_no_value_and_a_cut_has():
    batch = stream(ROWS, 10)
    got = ring_returns(batch, jnp.full((1, 10), 100.0), GAMMA, 1.0)[0]
    np.testing.assert_allclose(got[0], 1.0 + 0.9 * (2.0 + 0.9 * 3.0), rtol=1e-6)  # ended
    np.testing.assert_allclose(got[5], 6.0 + 0.9 * 100.0, rtol=1e-6)  # cut


def fitted(batch: Batch, rounds: int, lambda_: float = 0.0, scale: float = 1.0) -> Any:
    """Alternate returns and fits, as an agent does."""
    batch = batch._replace(record=batch.record._replace(reward=scale * batch.record.reward))
    model = value_model(SPEC, GAMMA, num_members=2, hidden=(32,), lambda_=lambda_)
    state = model.init(jax.random.key(0))
    optimizer = optax.adam(1e-2)
    opt_state = optimizer.init(state.weights)
    rows = batch.valid.reshape(-1)

    def iterate(carry: Any, key: Any) -> Any:
        state, opt_state = carry
        data = model.returns(state, batch)
        state = model.standardize(state, data, rows)
        fit = fit_members(
            lambda weights, rows: model.loss(weights, state, rows), None, optimizer,
            state.weights, opt_state, data, rows, jnp.zeros_like(rows), key,
            FitConfig(16, 5, bootstrap=False),
        )  # fmt: skip
        return (state._replace(weights=fit.weights), fit.opt_state), None

    keys = jax.random.split(jax.random.key(1), rounds)
    (state, _), _ = jax.jit(lambda s: jax.lax.scan(iterate, s, keys))((state, opt_state))
    return model, state


LOOP = [(float(t % 3), float(t % 3 == 0), "f" if t == 0 else "") for t in range(30)]
"""States 0, 1, 2 for ever, reward 1 on arriving at 0: an episode that is never over."""


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_iteration_finds_the_value_of_an_endless_loop(scale):
    model, state = fitted(stream(LOOP, 30), rounds=60, scale=scale)
    got = model.predict(state, jnp.array([[0.0], [1.0], [2.0]]))
    from_two = 1.0 / (1.0 - GAMMA**3)
    want = scale * from_two * np.array([GAMMA**2, GAMMA, 1.0])
    np.testing.assert_allclose(got, np.broadcast_to(want, (2, 3)), rtol=0.03)


def test_a_value_that_was_never_fitted_is_zero():
    model = value_model(SPEC, GAMMA)
    np.testing.assert_array_equal(model.predict(model.init(jax.random.key(0)), jnp.ones((3, 1))), 0)


def test_nothing_is_predicted_beyond_the_returns_that_were_seen():
    model, state = fitted(stream([(float(x), float(x), "") for x in range(-5, 6)], 12), rounds=20)
    far = model.predict(state, jnp.array([[-1e4], [1e4]]))
    assert float(state.low) < float(state.high)
    assert float(far.min()) >= float(state.low)
    assert float(far.max()) <= float(state.high)
    loose = state._replace(low=state.low - 1e9, high=state.high + 1e9)
    assert float(jnp.ptp(model.predict(loose, jnp.array([[-1e4], [1e4]])))) > 1e3, (
        "saturates anyway"
    )


def test_without_a_single_row_it_predicts_zero():
    model = value_model(SPEC, GAMMA)
    nothing = Returns(jnp.ones((4, 1)), jnp.full(4, jnp.nan))
    state = model.standardize(model.init(jax.random.key(0)), nothing, jnp.zeros(4, bool))
    np.testing.assert_array_equal(model.predict(state, jnp.ones((3, 1))), 0)


def test_the_loss_has_no_units():
    model = value_model(SPEC, GAMMA, num_members=2)
    state = model.init(jax.random.key(0))
    obs, mask = jnp.arange(8.0)[:, None], jnp.ones(8, bool)

    def loss(scale: float) -> Any:
        data = Returns(obs, scale * jnp.sin(obs[:, 0]))
        fresh = model.standardize(state, data, mask)
        both = jax.tree.map(lambda x: jnp.broadcast_to(x, (2, *x.shape)), data)
        return model.loss(fresh.weights, fresh, both)[0]

    np.testing.assert_allclose(loss(1.0), loss(500.0), rtol=1e-4)
    np.testing.assert_allclose(loss(1.0), 0.5, rtol=1e-4)  # predicts 0, variance 1


def test_a_short_plan_goes_where_the_value_is():
    # x' = x + a without reward: only the value beyond the horizon tells right from left.
    def init(params, key, obs=None, batch=1):
        return jnp.zeros((batch, 1)) if obs is None else obs

    def step(params, key, state, action):
        none = jnp.zeros(state.shape[0])
        return state + action, Outcome(none, none + 1.0, none)

    mdp = MDP(init, step, lambda params, state: state, SPEC)
    model, state = fitted(stream([(float(x), float(x), "") for x in range(-5, 6)], 12), rounds=20)
    config = PlannerConfig(method="cem", horizon=2, population=32, elites=4, particles=1)
    mpc = planner(mdp, config, value=lambda params, x: model.predict(params, x).min(0))
    action, _, _ = mpc.plan(state, jax.random.key(0), jnp.zeros((1, 1)), mpc.init(1))
    assert float(action[0, 0]) > 0.7
