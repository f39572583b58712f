"""Vector environments of every autoreset mode give the stream of `HostEnv`."""

from __future__ import annotations

import gymnasium as gym
import jax
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from envs.host import HostEnv
from envs.vector import from_vector_env
from tests.envs.fakes import Counter

E = 3


def counter(**change):
    return Counter(**{"limit": 6, "goal": 8.0, "count_episodes": False, **change})


def vector(mode, **change) -> SyncVectorEnv:
    return SyncVectorEnv([lambda: counter(**change)] * E, autoreset_mode=mode, copy=False)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_every_mode_gives_the_same_stream(mode, together):
    rng = np.random.default_rng(0)
    actions = rng.integers(0, 4, (60, 1 if together else E, 1)).astype(np.float32)
    actions = np.broadcast_to(actions, (60, E, 1))
    expected, got = HostEnv(counter, E), from_vector_env(vector(mode))
    rows = [(got.reset(0), expected.reset(0))]
    rows += [(got.step(a), expected.step(a)) for a in actions]
    for a, b in rows:  # after all steps: earlier arrays must not have been written again
        assert_same(a, b)
    last = np.array([b.is_last for _, b in rows])
    terminal = np.array([b.is_terminal for _, b in rows])
    assert (last.sum(0) > 8).all()
    assert (last & ~terminal).any()
    assert terminal.any()
    if not together:
        assert (last.any(1) & ~last.all(1)).any()


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_dict_observations(mode):
    space = gym.spaces.Dict(a=gym.spaces.Discrete(9, start=1), b=gym.spaces.Box(0, 9, (1,)))
    obs = {"a": 4, "b": np.array([7.0], np.float32)}
    faults = {(e, t): {"obs": obs} for e in range(20) for t in range(3)}
    venv = vector(mode, observation_space=space, faults=faults, limit=2)
    stream = from_vector_env(venv)
    stream.reset(0)
    for t in range(1, 8):
        now = stream.step(np.zeros((E, 1), np.float32))
        assert now.obs["a"].tolist() == [3] * E
        assert now.obs["b"].tolist() == [[7.0]] * E
        assert now.is_last.tolist() == [t % 3 == 2] * E


def test_native_vector_environment():
    venv = gym.make_vec("CartPole-v1", E, vectorization_mode="vector_entry_point")
    stream = from_vector_env(venv)
    assert stream.spec.max_episode_steps == 500
    now = stream.reset(5)
    starts = 0
    for _ in range(60):
        before, now = now, stream.step(np.zeros(E, np.int32))
        assert (now.is_first == before.is_last).all()
        assert (now.reward == np.where(now.is_first, 0.0, 1.0)).all()
        assert (np.abs(now.obs[now.is_first]) < 0.05).all()
        starts += now.is_first.sum()
    assert starts > 10


class Native(VectorEnv):
    """A vector environment that is not gymnasium's."""

    num_envs = 1
    single_observation_space = observation_space = gym.spaces.Discrete(2)
    single_action_space = action_space = gym.spaces.Discrete(2)

    def __init__(self, mode):
        self.metadata = {"autoreset_mode": mode}


def test_modes_that_cannot_be_adapted_say_how_to_rebuild():
    with pytest.raises(ValueError, match=r"Native resets in the same step.*AutoresetMode.NEXT_ST"):
        from_vector_env(Native(AutoresetMode.SAME_STEP))
    with pytest.raises(ValueError, match=r"must be an AutoresetMode, got None; .* Native"):
        from_vector_env(Native(None))
    wrapped = gym.wrappers.vector.RecordEpisodeStatistics(vector(AutoresetMode.SAME_STEP))
    with pytest.raises(ValueError, match="bare SyncVectorEnv"):
        from_vector_env(wrapped)
    with pytest.raises(ValueError, match=r"on_bad: expected 'raise' or 'clip', got 'drop'"):
        from_vector_env(vector(AutoresetMode.NEXT_STEP), "drop")  # pyright: ignore


@pytest.mark.fault
@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("t", [0, 1, 6])
def test_bad_observations_are_found_in_every_mode(mode, t):
    bad = {(0, t): {"obs": np.array([np.nan, 0, np.inf])}}
    zero = np.zeros((E, 1), np.float32)

    def run(on_bad):
        envs = [counter, lambda: counter(faults=bad), counter]
        stream = from_vector_env(SyncVectorEnv(envs, autoreset_mode=mode), on_bad)
        rows = [stream.reset(0), *(stream.step(zero) for _ in range(6))]
        return stream, rows

    with pytest.raises(
        ValueError, match=rf"VectorEnv, environment 1, step {t}: observation\[0\] is nan"
    ):
        run("raise")
    stream, rows = run("clip")
    assert stream.counters["bad_steps"] == 1
    assert rows[t].obs[1].tolist() == [0.0, 0.0, 1e6]


@pytest.mark.fault
def test_bad_rewards_and_actions():
    stream = from_vector_env(vector(AutoresetMode.NEXT_STEP, faults={(0, 1): {"reward": -np.inf}}))
    stream.reset(0)
    with pytest.raises(ValueError, match=r"action: expected float32 of shape \(3, 1\)"):
        stream.step(np.zeros((E, 2)))
    with pytest.raises(ValueError, match="environment 0, step 1: reward is -inf"):
        stream.step(np.zeros((E, 1)))
    clip = from_vector_env(
        vector(AutoresetMode.NEXT_STEP, faults={(0, 1): {"reward": -np.inf}}), "clip"
    )
    clip.reset(0)
    assert clip.step(np.zeros((E, 1))).reward.tolist() == [-1e6] * E


def test_restore_begins_new_episodes():
    stream = from_vector_env(gym.make_vec("Pendulum-v1", 2))
    start = stream.reset(0)
    stream.step(np.zeros((2, 1), np.float32))
    assert stream.state() == {}
    fresh = stream.restore({})
    assert fresh.is_first.all()
    assert not np.array_equal(fresh.obs, start.obs)
    with pytest.raises(ValueError, match="expected an empty mapping"):
        stream.restore({"seed": np.zeros(())})
    with pytest.raises(ValueError, match=r"call reset\(seed\) first"):
        from_vector_env(gym.make_vec("Pendulum-v1", 2)).step(np.zeros((2, 1)))
    stream.close()
