"""The record stream of `HostEnv`: what comes out, and that it can be resumed."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium as gym
import jax
import numpy as np
import pytest

from envs.host import HostEnv
from mbrl import spaces
from mbrl.training.evaluation import evaluate_host
from mbrl.training.host import run_host
from mbrl.training.learner import DriverConfig, seed_keys
from mbrl.types import Agent
from tests.envs.fakes import Counter, Levers
from tests.mbrl.toys import linear_agent


def full(value, num_envs=1):
    return np.full((num_envs, 1), value, np.float32)


def test_stream_of_an_episode_cut_by_its_time_limit():
    env = HostEnv(lambda: Counter(limit=3), id="Counter")
    rows = [env.reset(0), *(env.step(full(2.0)) for _ in range(5))]
    obs = np.concatenate([row.obs for row in rows])
    expected = [[0, 0, 0], [0, 1, 2], [0, 2, 4], [0, 3, 6], [1, 0, 0], [1, 1, 2]]
    np.testing.assert_array_equal(obs, expected)
    assert obs.dtype == np.float32
    np.testing.assert_array_equal([row.reward[0] for row in rows], [0, 1, 2, 3, 0, 1])
    np.testing.assert_array_equal([row.is_first[0] for row in rows], [1, 0, 0, 0, 1, 0])
    np.testing.assert_array_equal([row.is_last[0] for row in rows], [0, 0, 0, 1, 0, 0])
    assert not any(row.is_terminal[0] for row in rows)
    assert rows[0].reward.dtype == np.float32
    assert rows[0].is_first.dtype == rows[0].is_last.dtype == rows[0].is_terminal.dtype == bool


@pytest.mark.parametrize(("goal", "limit", "terminal"), [(4, 5, True), (4, 2, True), (5, 2, False)])
def test_termination_wins_over_truncation(goal, limit, terminal):
    env = HostEnv(lambda: Counter(limit=limit, goal=goal))
    env.reset(0)
    env.step(full(2.0))
    end = env.step(full(2.0))
    assert end.is_last[0]
    assert end.is_terminal[0] == terminal
    np.testing.assert_array_equal(end.obs, [[0, 2, 4]])


def test_environments_end_independently():
    env = HostEnv(lambda: Counter(limit=10, goal=4), num_envs=2)
    env.reset(0)
    action = np.array([[4.0], [1.0]], np.float32)
    end, after, later = env.step(action), env.step(action), env.step(action)
    assert end.is_last.tolist() == [True, False]
    assert after.is_first.tolist() == [True, False]
    assert after.reward.tolist() == [0.0, 2.0]
    assert later.obs.tolist() == [[1, 1, 4], [0, 3, 3]]


def test_emitted_arrays_are_never_written_again():
    env = HostEnv(lambda: gym.make("Pendulum-v1", max_episode_steps=4), num_envs=2)
    rows = [env.reset(0)]
    copies = [jax.tree.map(np.copy, rows[0])]
    for _ in range(12):
        rows.append(env.step(full(0.5, 2)))
        copies.append(jax.tree.map(np.copy, rows[-1]))
    for row, copy in zip(rows, copies, strict=True):
        jax.tree.map(np.testing.assert_array_equal, row, copy)


def test_every_episode_has_its_own_seed():
    built: list[Counter] = []

    def make():
        built.append(Counter(limit=1))
        return built[-1]

    def seeds(run_seed):
        built.clear()
        env = HostEnv(make, num_envs=2)
        env.reset(run_seed)
        for _ in range(10):
            env.step(full(0.0, 2))
        return [env.seeds for env in built]

    first, again, other = seeds(7), seeds(7), seeds(8)
    assert first == again
    flat = first[0] + first[1] + other[0] + other[1]
    assert len(flat) == len(set(flat)) == 24
    assert all(isinstance(seed, int) and 0 <= seed < 2**31 for seed in flat)


def test_start_states_differ_between_episodes_and_environments():
    env = HostEnv(lambda: gym.make("CartPole-v1"), num_envs=3)
    starts = [*env.reset(0).obs]
    for _ in range(60):
        row = env.step(np.zeros(3, np.int32))
        starts += [*row.obs[row.is_first]]
    assert len(starts) > 12
    assert len(np.unique(starts, axis=0)) == len(starts)


def test_reset_with_the_same_seed_repeats_the_stream():
    env = HostEnv(lambda: gym.make("CartPole-v1"), num_envs=2)
    runs = []
    for seed in (3, 3, 4):
        rows = [env.reset(seed), *(env.step(np.ones(2, np.int32)) for _ in range(25))]
        runs.append(np.stack([row.obs for row in rows]))
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


class Echo(gym.Env):
    """Remembers the action as it arrived."""

    def __init__(self, action_space):
        self.action_space, self.observation_space = action_space, gym.spaces.Discrete(2)
        self.got: Any = None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return 0, {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.got = action
        return 0, 0.0, False, False, {}


@pytest.mark.parametrize(
    ("space", "given", "expected"),
    [
        (gym.spaces.Discrete(3, start=5), np.int32(2), 7),
        (
            gym.spaces.Box(-0.4, 3.0, (2,), np.float32),
            np.array([-0.4, 3.0], np.float32),
            [-0.4, 3.0],
        ),
        (gym.spaces.Box(-0.7, 0.1, (1,), np.float64), np.array([0.1], np.float32), [0.1]),
        (
            gym.spaces.MultiDiscrete(np.array([[2, 3], [4, 5]])),
            np.array([1, 2, 3, 4], np.int32),
            [[1, 2], [3, 4]],
        ),
        (gym.spaces.MultiDiscrete([2, 3], start=[4, 5]), np.array([1, 2], np.int32), [5, 7]),
    ],
)
def test_actions_arrive_in_the_form_of_the_environment(space, given, expected):
    echo = Echo(space)
    env = HostEnv(lambda: echo)
    env.reset(0)
    env.step(np.asarray(given)[None])
    np.testing.assert_allclose(echo.got, expected, rtol=1e-6)
    if isinstance(space, gym.spaces.Discrete):
        assert type(echo.got) is int


@pytest.mark.parametrize("id", ["CartPole-v1", "Pendulum-v1", "InvertedPendulum-v5"])
def test_a_restored_stream_continues_bit_for_bit(id):
    if id.startswith("Inverted"):
        pytest.importorskip("mujoco")
    num_envs, rng = 2, np.random.default_rng(0)

    def make():
        return gym.make(id, max_episode_steps=30)

    env = HostEnv(make, num_envs)
    shape = env._actions.shape
    actions = [
        rng.integers(0, 2, shape).astype(np.int32)
        if id == "CartPole-v1"
        else rng.uniform(-1, 1, shape).astype(np.float32)
        for _ in range(120)
    ]
    stops = set(rng.choice(120, 12, replace=False).tolist())
    states, rows = {}, [env.reset(11)]
    for t, action in enumerate(actions):
        if t in stops or rows[-1].is_last.any():
            states[t] = (env.state(), dict(env.counters))
        rows.append(env.step(action))
    assert len({x.shape for state, _ in states.values() for x in [state["actions"]]}) == 1
    for t, (state, counters) in states.items():
        fresh = HostEnv(make, num_envs)
        stream = [fresh.restore(state), *(fresh.step(a) for a in actions[t : t + 35])]
        assert fresh.counters == counters
        for got, expected in zip(stream, rows[t:], strict=False):
            jax.tree.map(np.testing.assert_array_equal, got, expected)
        fresh.close()


def test_action_log_grows_when_episodes_have_no_limit(monkeypatch):
    monkeypatch.setattr("envs.host.FIRST_LOG_SIZE", 4)
    env = HostEnv(lambda: Counter(limit=1000))
    env.reset(0)
    for t in range(9):
        now = env.step(full(t % 3))
    assert env.state()["actions"].shape == (1, 16, 1)
    fresh = HostEnv(lambda: Counter(limit=1000))
    jax.tree.map(np.testing.assert_array_equal, fresh.restore(env.state()), now)


def test_an_episode_that_cannot_be_replayed_starts_anew():
    env = HostEnv(lambda: Counter(limit=9), num_envs=2)
    env.reset(0)
    env.step(full(1.0, 2))
    state = env.state()
    fresh = HostEnv(lambda: Counter(limit=9), num_envs=2)
    fresh.reset(0)  # Counter counts resets, so environments used before do not replay
    with pytest.warns(RuntimeWarning, match=r"environments \[0, 1\] did not replay bit for bit"):
        now = fresh.restore(state)
    assert now.is_first.all()
    assert fresh.counters == {"bad_steps": 0, "restarts": 2}
    assert fresh.step(full(1.0, 2)).obs[:, 1].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("seed"), "expected keys"),
        (lambda s: s.update(length=np.array([99])), r"state\['length'\]: \[99\] does not fit"),
        (lambda s: s.update(length=np.array([1, 2])), "another environment or num_envs"),
        (lambda s: s.update(actions=s["actions"].astype(np.int32)), "expected float32"),
        (lambda s: s.update(episode=np.array([-1])), "taken before reset"),
    ],
)
def test_a_foreign_state_is_refused(change, message):
    env = HostEnv(lambda: gym.make("Pendulum-v1", max_episode_steps=30))
    env.reset(0)
    state = env.state()
    change(state)
    with pytest.raises(ValueError, match=message):
        env.restore(state)


def test_render_and_close():
    built = [Counter(), Counter()]
    env = HostEnv(iter(built).__next__, num_envs=2)
    env.reset(0)
    env.step(full(0.0, 2))
    frame = env.render(1)
    assert frame is not None
    assert frame.tolist() == np.full((2, 2, 3), 1).tolist()
    env.close()
    assert built[0].closed
    assert built[1].closed
    assert HostEnv(lambda: gym.make("Pendulum-v1")).spec.max_episode_steps == 200


def test_render_without_a_render_mode_gives_nothing():
    env = HostEnv(lambda: Echo(gym.spaces.Discrete(2)))
    env._envs[0].render = lambda: None
    assert env.render() is None


def test_bad_constructions_are_refused():
    one = Counter()
    with pytest.raises(ValueError, match="must build a new environment at each call"):
        HostEnv(lambda: one, num_envs=2)
    with pytest.raises(ValueError, match="num_envs: expected at least 1, got 0"):
        HostEnv(Counter, num_envs=0)
    with pytest.raises(ValueError, match="on_bad: expected 'raise', 'drop' or 'clip', got 'skip'"):
        HostEnv(Counter, on_bad="skip")  # pyright: ignore
    with pytest.raises(ValueError, match="environments must agree, but action_space"):
        HostEnv(iter([Echo(gym.spaces.Discrete(i)) for i in (2, 3)]).__next__, num_envs=2)
    with pytest.raises(ValueError, match="seed: expected a non-negative"):
        HostEnv(Counter).reset(-1)
    with pytest.raises(ValueError, match=r"call reset\(seed\) first"):
        HostEnv(Counter).step(full(0.0))


def test_warnings_of_the_environment_pass_through():
    class Warns(Counter):
        def step(self, action):
            warnings.warn("mine", UserWarning, stacklevel=1)
            return super().step(action)

    env = HostEnv(Warns)
    env.reset(0)
    with pytest.warns(UserWarning, match="mine"):
        env.step(full(0.0))


def pulled(tool, seed=0):
    """Return an action for two environments of `Levers`, integers counted from 0."""
    rng = np.random.default_rng(seed)
    return {
        "tool": np.array([tool, 0], np.int32),
        "arm": rng.uniform(-2.0, 2.0, (2, 2)).astype(np.float32),
        "box": {"gears": np.array([[1, 2], [0, 1]], np.int32)},
    }


def test_dict_actions_reach_environments_and_are_replayed():
    env, other = (HostEnv(Levers, num_envs=2) for _ in range(2))
    env.reset(0)
    env.step(pulled(1))
    action = pulled(2, seed=1)
    now = env.step(action)
    np.testing.assert_array_equal(now.obs[:, [0, 3, 4, 5]], [[3, 1, 2, 2], [1, 0, 1, 2]])
    np.testing.assert_array_equal(now.obs[:, 1:3], action["arm"])
    np.testing.assert_array_equal(now.reward, [3.0, 1.0])
    # The log of actions is one array, from which they come back to the bit.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = other.restore(env.state())
    np.testing.assert_array_equal(again.obs, now.obs)
    with pytest.raises(ValueError, match=r"action: expected the keys \['arm', 'box', 'tool'\]"):
        env.step({"tool": action["tool"]})
    with pytest.raises(ValueError, match=r"action/tool: expected 0 <= a < 3, got 3 for environ"):
        env.step(pulled(3))
    with pytest.raises(ValueError, match=r"action: expected a dict, got ndarray"):
        env.step(np.zeros((2, 1), np.float32))


def test_an_agent_of_dict_actions_is_trained_and_evaluated_on_the_host():
    env = HostEnv(Levers, num_envs=2)
    spec = env.spec

    def uniform(hyper: Any) -> Agent:
        def act(state, carry, obs, is_first, key, mode):
            return spaces.sample(spec.action, key, is_first.shape), carry, {"latent": carry}

        return linear_agent(spec)._replace(act=act)

    *_, report = run_host(uniform, [env], DriverConfig(60, num_envs=2))
    record = jax.tree.map(lambda x: np.asarray(x)[0], report.learner.ring.record)
    assert record.action["box"]["gears"].shape == (2, 30, 2)
    # An action is recorded with the observation it was taken at, and seen in the next one.
    taken = ~record.is_last[:, :-1] & ~record.is_first[:, 1:]
    assert taken.sum() > 20 and len(np.unique(record.action["tool"])) == 3
    for seen, name in ((record.obs[:, 1:, 0] - 1, "tool"), (record.obs[:, 1:, 1:3], "arm")):
        np.testing.assert_array_equal(seen[taken], record.action[name][:, :-1][taken])
    args = report.learner.agent, [HostEnv(Levers, num_envs=2)], seed_keys((0,)), (0,), 4
    returns = evaluate_host(uniform, *args)
    assert returns.shape == (1, 4) and (returns >= 4.0).all() and (returns <= 12.0).all()
