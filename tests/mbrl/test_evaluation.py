"""Evaluation returns what a policy earns, each episode counted once."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import envs
from mbrl.training.evaluation import (
    evaluate_device,
    evaluate_host,
    evaluate_in_model,
    statistics,
)
from mbrl.training.learner import seed_keys
from mbrl.types import MDP, Agent, Outcome, SampleSpec, TimeStep
from tests.mbrl.toys import counter_mdp


def policy(act: Any) -> Any:
    """Build a factory of agents that act by `act(obs, carry, mode)` and learn nothing.

    The carry counts the steps of the episode, if evaluation starts it afresh.
    """

    def agent(hyper):
        def step(state, carry, obs, is_first, key, mode):
            carry = jnp.where(is_first, 0, carry + 1)
            return act(obs, carry, mode, state), carry, ()

        return Agent(
            lambda key: jnp.zeros(()),
            lambda num_envs: jnp.full(num_envs, 1000),
            step,
            lambda state, batch, key: (state, {}, None),
            SampleSpec("all", 10, 1, 1),
        )

    return agent


class Script:
    """A host environment whose episodes have given lengths; reward 1 per step.

    Environment `e` plays `lengths[e]` in turn, over and over. Episode `i` pays `i * 100` more
    at its end. The sum of the actions is added to the return.
    """

    def __init__(self, lengths: list[list[int]]) -> None:
        self.lengths, self.num_envs = lengths, len(lengths)
        self.spec = counter_mdp().spec

    def reset(self, seed: int) -> TimeStep:
        self.seed = seed
        self.episode = [-1] * self.num_envs
        self.over = [True] * self.num_envs
        return self.step(np.zeros((self.num_envs, 1)))

    def step(self, action: np.ndarray) -> TimeStep:
        rows = []
        for e, plan in enumerate(self.lengths):
            if self.over[e]:
                self.episode[e] += 1
                self.t = getattr(self, "t", [0] * self.num_envs)
                self.t[e] = 0
                self.over[e] = False
                rows.append((0.0, True, False))
            else:
                self.t[e] += 1
                self.over[e] = self.t[e] == plan[self.episode[e] % len(plan)]
                bonus = 100.0 * self.episode[e] if self.over[e] else 0.0
                rows.append((1.0 + bonus + float(action[e, 0]), False, self.over[e]))
        reward, first, last = (np.array(x) for x in zip(*rows, strict=True))
        obs = np.stack([self.t, self.episode], 1).astype(np.float32)
        return TimeStep(obs, reward.astype(np.float32), first, last, last)

    def state(self) -> Any:
        return {}

    def restore(self, state: Any) -> Any:
        raise AssertionError("evaluation restores nothing")


def idle(obs: Any, carry: Any, mode: str, state: Any) -> Any:
    return jnp.zeros((carry.shape[0], 1))


def play(lengths: list[list[int]], episodes: int, act: Any = idle, **options: Any) -> list[float]:
    keys = seed_keys((0,))
    returns = evaluate_host(
        policy(act), jnp.zeros(1), [Script(lengths)], keys, (0,), episodes, **options
    )
    assert returns.shape == (1, episodes)
    return returns[0].tolist()


def test_statistics_by_hand():
    mean, std, iqm = statistics([4.0, 1.0, 3.0, 100.0])
    assert (mean, iqm) == (27.0, 3.5)
    assert std == pytest.approx(np.sqrt((23**2 + 26**2 + 24**2 + 73**2) / 4))
    # Five values: a quarter of 5 is 1.25, so 2 and 4 count for three quarters.
    expected = (0.75 * 2 + 3 + 0.75 * 4) / 2.5
    assert statistics([1.0, 2.0, 3.0, 4.0, 50.0]).iqm == pytest.approx(expected)
    assert statistics([1.0, 2.0, 4.0, 50.0, 3.0]).iqm == pytest.approx(expected)
    assert statistics([[1.0, 2.0], [5.0, 9.0]]).iqm == 3.5
    assert statistics([7.0]) == (7.0, 0.0, 7.0)
    assert statistics([1.0, 2.0]).iqm == 1.5


def test_statistics_of_many_equal_the_mean_of_the_middle():
    x = np.random.default_rng(0).normal(size=400)
    assert statistics(x).iqm == pytest.approx(np.sort(x)[100:300].mean())


def test_statistics_of_nothing_are_refused():
    with pytest.raises(ValueError, match="at least one episode, got none"):
        statistics([])


def chase(obs: Any, carry: Any, mode: str, state: Any) -> Any:
    """Catch by moving the paddle under the ball."""
    cells = obs.reshape(obs.shape[0], *obs.shape[-2:])
    paddle = jnp.argmax(cells[:, -1], -1)
    ball = jnp.argmax(jnp.max(cells[:, :-1], 1), -1)
    return jnp.sign(ball - paddle).astype(jnp.int32) + 1


def test_device_evaluation_of_catch():
    mdp: Any = envs.make("device/Catch")

    def act(obs, carry, mode, state):
        return chase(obs, carry, mode, state) * (mode == "greedy") * state.astype(jnp.int32)

    # The agent of seed 0 catches every ball, that of seed 1 waits in the left corner.
    returns = evaluate_device(policy(act), jnp.array([1.0, 0.0]), mdp, seed_keys((0, 1)), 12)
    assert returns.shape == (2, 12)
    assert np.all(returns[0] == 1.0)
    assert set(returns[1].tolist()) == {-1.0, 1.0}
    assert returns[1].mean() < 0.0


def test_device_evaluation_counts_one_episode_of_each():
    # Short episodes begin again while long ones still run: only the first one counts.
    mdp = counter_mdp(limit=9, goal=3.0)

    def act(obs, carry, mode, state):
        return jnp.stack([jnp.ones(carry.shape[0]) * (carry < state)], 1)

    for pushes, length in ((0.0, 9.0), (2.0, 9.0), (3.0, 3.0)):
        states = jnp.full(1, pushes)
        returns = evaluate_device(policy(act), states, mdp, seed_keys((0,)), 4)
        assert returns.tolist() == [[length] * 4]


def test_device_evaluation_needs_an_end():
    with pytest.raises(ValueError, match="needs spec.max_episode_steps, got None"):
        evaluate_device(policy(idle), jnp.zeros(1), counter_mdp(None), seed_keys((0,)), 2)


def test_each_seed_is_played_by_its_own_agent():
    mdp = counter_mdp(limit=20, goal=3.0)

    def act(obs, carry, mode, state):
        return jnp.ones((carry.shape[0], 1)) * state

    returns = evaluate_device(policy(act), jnp.array([0.0, 1.0]), mdp, seed_keys((0, 1)), 3)
    assert returns.tolist() == [[20.0] * 3, [3.0] * 3]


def test_host_evaluation_of_scripted_episodes():
    # One round of three environments, then one more for the fourth episode.
    assert play([[3], [5], [2]], 3) == [3.0, 5.0, 2.0]
    assert play([[3], [5], [2]], 4) == [3.0, 5.0, 2.0, 103.0]


def test_short_episodes_are_not_counted_more_often():
    # While environment 1 plays one episode of 30 steps, environment 0 plays ten of 2.
    returns = play([[2], [30]], 4)
    assert returns == [2.0, 30.0, 102.0, 130.0]


def test_episode_without_an_end_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mbrl.training.evaluation.MAX_EPISODE_STEPS", 7)
    assert play([[6]], 1) == [6.0]
    with pytest.raises(ValueError, match=r"env \S+: an episode has not ended after 7 steps"):
        play([[8]], 1)


def test_host_evaluation_is_greedy_and_starts_each_episode_afresh():
    def act(obs, carry, mode, state):
        assert mode == "greedy"
        # The carry must be the number of the step in its episode: nothing else is paid.
        return (carry == obs[:, 0]).astype(jnp.float32)[:, None] * (obs[:, :1] < 100)

    assert play([[4], [3, 6]], 4, act) == [8.0, 6.0, 108.0, 112.0]


def test_every_time_step_is_shown():
    seen: list[TimeStep] = []
    assert play([[2], [3]], 2, on_step=seen.append) == [2.0, 3.0]
    assert [step.reward.shape for step in seen] == [(1, 2)] * 4
    assert [bool(step.is_first[0, 0]) for step in seen] == [True, False, False, True]


def test_host_evaluation_of_several_seeds_uses_their_reset_seeds():
    scripts = [Script([[2]]), Script([[5]])]
    returns = evaluate_host(policy(idle), jnp.zeros(2), scripts, seed_keys((7, 9)), (7, 9), 2)
    assert returns.tolist() == [[2.0, 102.0], [5.0, 105.0]]
    assert [script.seed for script in scripts] == [7, 9]


def test_gymnasium_episodes_end_with_their_true_return():
    # Pushing a cart-pole one way drops the pole; the reward is 1 per step.
    def act(obs, carry, mode, state):
        return jnp.ones(carry.shape[0], jnp.int32)

    host: Any = envs.make("CartPole-v1", 3)
    returns = evaluate_host(policy(act), jnp.zeros(1), [host], seed_keys((0,)), (0,), 5)
    again = evaluate_host(policy(act), jnp.zeros(1), [host], seed_keys((0,)), (0,), 5)
    assert np.array_equal(returns, again)
    assert np.all((returns >= 8) & (returns <= 11))
    lengths = []
    for e, count in ((0, 2), (1, 2), (2, 1)):
        alone: Any = envs.make("CartPole-v1", 3)
        now, steps, done = alone.reset(0), 0, []
        while len(done) < count:
            now = alone.step(np.ones(3, np.int32))
            steps = 0 if now.is_first[e] else steps + 1
            done += [steps] if now.is_last[e] else []
        lengths.append(done)
    assert returns[0].tolist() == [lengths[0][0], lengths[1][0], lengths[2][0], *(
        lengths[e][1] for e in (0, 1)
    )]  # fmt: skip


def test_every_member_predicts_the_return_of_the_same_episodes():
    """Three members pay differently; an episode ends at 3, or after five steps."""
    spec = counter_mdp(5).spec

    def init(params: Any, key: Any, obs: Any = None, batch: int = 1) -> Any:
        assert obs is not None
        return obs

    def step(params: Any, key: Any, state: Any, action: Any) -> Any:
        member = jnp.arange(len(state)) * 3 // len(state)
        after = state.at[:, 0].add(action[:, 0])
        alive = (after[:, 0] < 3.0).astype(jnp.float32)
        return after, Outcome(params[member] * after[:, 0], alive, None)

    model = MDP(init, step, lambda params, state: state, spec)
    starts, pay = jnp.array([[0.0, 0.0], [2.0, 0.0]]), jnp.array([1.0, 2.0, -1.0])

    def act(obs: Any, carry: Any, mode: Any, state: Any) -> Any:
        assert mode == "greedy"
        return jnp.broadcast_to(state, (obs.shape[0], 1))

    # One agent moves by 1, until 3; the other stays, until time is up.
    found = evaluate_in_model(
        policy(act), jnp.array([1.0, 0.0]), model, pay, seed_keys((0, 1)), starts, 3
    )
    assert found.shape == (2, 3, 2)
    np.testing.assert_allclose(found[0], pay[:, None] * np.array([1.0 + 2.0 + 3.0, 3.0]))
    np.testing.assert_allclose(found[1], pay[:, None] * np.array([0.0, 10.0]))
