"""Halts where a model knows nothing: where they are, what they cost, and that none is crossed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl import halting, spaces
from mbrl import mdp as mdps
from mbrl.halting import fit_halt
from mbrl.imagination import branches
from mbrl.types import MDP, EnvSpec, Outcome, Transition

KEY = jax.random.key(0)
SPEC = EnvSpec("line", spaces.box(-np.inf, np.inf, (1,)), spaces.box(-1.0, 1.0, (1,)))


def line(scale: float = 1.0, unsure: bool = True) -> MDP:
    """x' = x + a with reward x'; uncertainty |x'|, both in a unit of reward."""

    def init(params: Any, key: Any, obs: Any = None, batch: int = 1) -> Any:
        return obs[:, 0]

    def step(params: Any, key: Any, state: Any, action: Any) -> Any:
        after = state + action[:, 0]
        spread = scale * jnp.abs(after) if unsure else None
        return after, Outcome(scale * after, jnp.full(after.shape, 0.9), spread)

    return MDP(init, step, lambda params, state: state[:, None], SPEC)


def recorded(scale: float = 1.0, shift: float = 0.0) -> tuple[Transition, Any]:
    """Ten steps that arrive at 0.1 to 1.0, and two that do not count."""
    x = jnp.concatenate([jnp.arange(1, 11) / 10.0, jnp.array([99.0, jnp.nan])])[:, None]
    reward = scale * (x[:, 0] + shift)
    data = Transition(x, jnp.zeros((12, 1)), reward, x, jnp.zeros(12))
    return data, jnp.arange(12) < 10


def test_an_unknown_step_is_the_last_one_and_others_are_left_alone():
    mdp = mdps.halted(line(), 2.0, 7.0)
    state, action = jnp.array([1.0, 1.5, 2.5]), jnp.array([[1.0], [1.0], [-1.0]])
    after, outcome = mdp.step(None, KEY, state, action)
    np.testing.assert_allclose(after, [2.0, 2.5, 1.5])
    np.testing.assert_allclose(outcome.reward, [2.0, -7.0, 1.5])
    np.testing.assert_allclose(outcome.discount, [0.9, 0.0, 0.9])
    np.testing.assert_allclose(outcome.uncertainty, [2.0, 2.5, 1.5])
    unknown = jnp.array([jnp.nan, jnp.inf])
    for threshold, ends in ((2.0, [0.0, 0.0]), (jnp.inf, [0.9, 0.9])):
        outcome = mdps.halted(line(), threshold, 7.0).step(None, KEY, unknown, action[:2])[1]
        np.testing.assert_allclose(outcome.discount, ends)
    with pytest.raises(ValueError, match=r"halted: .*uncertainty=True"):
        mdps.halted(line(unsure=False), 2.0, 7.0).step(None, KEY, state, action)


def test_imagined_rollouts_do_not_cross_a_halt():
    mdp = mdps.halted(line(), 2.25, 7.0)
    mdp = mdp._replace(step=lambda *x: _surely(mdps.halted(line(), 2.25, 7.0).step(*x)))
    begin = jnp.array([[0.0], [1.0], [5.0]])
    run = jax.jit(lambda: branches(mdp, None, KEY, begin, lambda k, x: jnp.ones_like(x), 4, 4))
    data, counts = run()
    counts = np.asarray(counts).reshape(4, 3)
    # 0 gets to 3 with its third step, 1 with its second, 5 is unknown from the start.
    np.testing.assert_array_equal(counts.sum(0), [3, 2, 1])
    np.testing.assert_array_equal(counts[0], True)
    ends = np.asarray(data.is_terminal).reshape(4, 3)
    rewards = np.asarray(data.reward).reshape(4, 3)
    for branch, steps in enumerate((3, 2, 1)):
        assert ends[: steps - 1, branch].tolist() == [0.0] * (steps - 1)
        assert ends[steps - 1, branch] == 1.0
        assert rewards[steps - 1, branch] == -7.0


def _surely(found: Any) -> Any:
    """Let everything go on that does not halt."""
    state, outcome = found
    return state, outcome._replace(discount=jnp.ceil(outcome.discount))


@pytest.mark.parametrize(("quantile", "wanted"), [(1.0, 1.0), (0.5, 0.55), (0.0, np.inf)])
def test_the_threshold_is_a_quantile_of_what_was_recorded(quantile, wanted):
    halt = fit_halt(line(), None, KEY, *recorded(), quantile, 1.0, 1.0)
    np.testing.assert_allclose(halt.threshold, wanted, rtol=1e-5)
    traced = jax.jit(lambda q: fit_halt(line(), None, KEY, *recorded(), q, 1.0, 1.0))(quantile)
    np.testing.assert_allclose(traced.threshold, wanted, rtol=1e-5)


def test_of_many_records_some_are_asked_about_with_a_key_for_the_start_and_one_for_the_step(
    monkeypatch,
):
    monkeypatch.setattr(halting, "MAX_ROWS", 5)
    keys, mdp = [], line()

    def init(params: Any, key: Any, obs: Any, batch: int = 1) -> Any:
        keys.append(key)
        assert obs.shape == (5, 1)
        return mdp.init(params, key, obs)

    def step(params: Any, key: Any, *rest: Any) -> Any:
        keys.append(key)
        return mdp.step(params, key, *rest)

    halt = fit_halt(mdp._replace(init=init, step=step), None, KEY, *recorded(), 1.0, 1.0, 1.0)
    np.testing.assert_allclose(halt.threshold, 0.9, rtol=1e-5)  # of 0.1, 0.3, ... of ten
    assert len({tuple(jax.random.key_data(key).tolist()) for key in (*keys, KEY)}) == 3


def test_a_halt_costs_more_than_the_worst_that_was_recorded_or_an_end():
    # Rewards of -1.9 to -1.0: a standard deviation of 0.287.
    halt = fit_halt(line(), None, KEY, *recorded(shift=-2.0), 1.0, 2.0, 20.0)
    np.testing.assert_allclose(halt.penalty, 20.0 * (1.9 + 2.0 * 0.28723), rtol=1e-4)
    # Rewards of 0.1 to 1.0: an end, which is worth nothing, is worse than the worst of them.
    halt = fit_halt(line(), None, KEY, *recorded(), 1.0, 2.0, 20.0)
    np.testing.assert_allclose(halt.penalty, 20.0 * 2.0 * 0.28723, rtol=1e-4)


def test_another_unit_of_reward_changes_nothing_but_the_unit():
    one = fit_halt(line(), None, KEY, *recorded(shift=-2.0), 0.8, 1.5, 9.0)
    many = fit_halt(line(40.0), None, KEY, *recorded(40.0, -2.0), 0.8, 1.5, 9.0)
    np.testing.assert_allclose(many.threshold, 40.0 * one.threshold, rtol=1e-4)
    np.testing.assert_allclose(many.penalty, 40.0 * one.penalty, rtol=1e-4)


def test_without_data_nothing_halts():
    data, mask = recorded()
    halt = fit_halt(line(), None, KEY, data, mask & False, 0.9, 1.0, 5.0)
    assert float(halt.threshold) == np.inf
    assert np.isfinite(halt.penalty)
