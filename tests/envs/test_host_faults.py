"""Environments that misbehave: nothing wrong may leave `HostEnv`, and everything is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from envs.codec import ActionCodec, ObservationCodec
from envs.host import HostEnv
from tests.envs.fakes import Counter

pytestmark = pytest.mark.fault

BOUNDED = spaces.Box(-2.0, np.array([1.0, 50.0, 50.0], np.float32), (3,))
NAN, INF = float("nan"), float("inf")


def stream(faults: dict[Any, Any], on_bad: Any = "raise", steps: int = 6, space: Any = None):
    """Run two environments; the second one has the faults."""
    envs = iter([Counter(3, 100.0, space), Counter(3, 100.0, space, faults)])
    env = HostEnv(envs.__next__, 2, on_bad, id="Faulty")
    rows = [env.reset(0)]
    rows += [env.step(np.ones((2, 1), np.float32)) for _ in range(steps)]
    return env, rows


FAULTS = [
    ((0, 2), {"obs": np.array([0, NAN, 0])}, r"step 2: observation\[1\] is nan"),
    ((0, 3), {"obs": np.array([0, 0, INF])}, r"step 3: observation\[2\] is inf"),  # final
    ((1, 0), {"obs": np.array([-INF, 0, 0])}, r"step 4: observation\[0\] is -inf"),  # reset
    ((0, 0), {"obs": np.array([0, 1e39, 0])}, r"step 0: observation\[1\] is 1e\+39"),
    ((0, 1), {"reward": NAN}, "step 1: reward is nan"),
    ((0, 3), {"reward": -INF}, "step 3: reward is -inf"),
    ((0, 3), {"reward": 1e300}, r"step 3: reward is 1e\+300"),
]
each_fault = pytest.mark.parametrize(("when", "what", "message"), FAULTS)


@each_fault
def test_raise_names_environment_step_key_and_value(when, what, message):
    with pytest.raises(ValueError, match=f"^Faulty, environment 1, {message}, expected a finite"):
        stream({when: what})


@each_fault
def test_clip_replaces_and_counts(when, what, message):
    env, rows = stream({when: what}, "clip")
    assert env.counters["bad_steps"] == 1
    clean, expected = stream({}, "clip")
    assert clean.counters["bad_steps"] == 0
    step = when[1] + 4 * when[0]
    for t, (row, good) in enumerate(zip(rows, expected, strict=True)):
        assert np.isfinite(row.obs).all()
        assert np.isfinite(row.reward).all()
        assert row.is_last.tolist() == good.is_last.tolist()
        if t != step:
            np.testing.assert_array_equal(row.obs, good.obs)
    value = what.get("reward", 0.0)
    if "reward" in what:
        assert rows[step].reward[1] == (0.0 if np.isnan(value) else np.copysign(1e6, value))
    else:
        bad = np.nan_to_num(what["obs"], posinf=1e6, neginf=-1e6)
        np.testing.assert_array_equal(rows[step].obs[1], np.where(bad > 1e6, 1e6, bad))


@each_fault
def test_drop_begins_a_new_episode(when, what, message):
    env, rows = stream({when: what}, "drop")
    assert env.counters["bad_steps"] == 1
    step = when[1] + 4 * when[0]
    bad = rows[step]
    assert bad.is_first[1]
    assert not bad.is_last[1]
    assert bad.reward[1] == 0.0
    np.testing.assert_array_equal(bad.obs[1], [when[0] + 1, 0, 0])
    follower = rows[step + 1]
    assert not follower.is_first[1]
    np.testing.assert_array_equal(follower.obs[1], [when[0] + 1, 1, 1])
    assert all(np.isfinite(row.obs).all() and np.isfinite(row.reward).all() for row in rows)
    np.testing.assert_array_equal([row.obs[0, 1] for row in rows], [0, 1, 2, 3, 0, 1, 2])


def test_drop_gives_up_when_every_reset_is_bad():
    faults = {(episode, 0): {"obs": np.full(3, NAN)} for episode in range(100)}
    with pytest.raises(ValueError, match=r"10 resets in a row gave bad observations; last: obs"):
        stream(faults, "drop")


def test_a_stream_with_dropped_steps_is_restored():
    faults = {(0, 2): {"obs": np.full(3, NAN)}}

    def make():
        return Counter(5, 100.0, None, faults, count_episodes=False)

    env = HostEnv(make, on_bad="drop")
    env.reset(0)
    for _ in range(3):
        now = env.step(np.ones((1, 1), np.float32))
    assert env.counters["bad_steps"] == 1
    fresh = HostEnv(lambda: Counter(5, count_episodes=False), on_bad="drop")
    np.testing.assert_array_equal(fresh.restore(env.state()).obs, now.obs)
    assert fresh.counters == {"bad_steps": 1, "restarts": 0}


def test_out_of_bounds_is_an_error_beyond_rounding():
    inside = {(0, 1): {"obs": np.array([1.00005, 0, -2.0001])}}
    stream(inside, space=BOUNDED)
    outside = {(0, 1): {"obs": np.array([1.001, 0, 0])}}
    with pytest.raises(ValueError, match=r"step 1: observation\[0\] is 1.001, .* -2.0 to 1.0"):
        stream(outside, space=BOUNDED)
    env, rows = stream(outside, "clip", space=BOUNDED)
    assert env.counters["bad_steps"] == 1
    np.testing.assert_array_equal(rows[1].obs[1], [1.0, 0, 0])


def test_clip_takes_infinities_to_the_bounds():
    faults = {(0, 1): {"obs": np.array([INF, INF, -INF])}}
    _, rows = stream(faults, "clip", space=BOUNDED)
    np.testing.assert_array_equal(rows[1].obs[1], [1.0, 50.0, -2.0])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"obs": np.zeros(4)}, r"observation: expected shape \(3,\), got \(4,\)"),
        ({"obs": np.zeros((3, 1))}, r"observation: expected shape \(3,\), got \(3, 1\)"),
        ({"obs": np.array(["a"] * 3)}, "observation: expected a dtype that casts to float32"),
        ({"obs": np.zeros(3, complex)}, "got complex128"),
        ({"obs": None}, r"observation: expected shape \(3,\), got \(\)"),
        ({"obs": [[1, 2], [3]]}, "observation: cannot be made an array"),
        ({"obs": {"a": np.zeros(3)}}, "observation: expected shape"),
        ({"reward": np.zeros(2)}, r"reward: expected a number, got float64 of shape \(2,\)"),
        ({"reward": None}, "reward: expected a number, got object"),
    ],
)
@pytest.mark.parametrize("on_bad", ["raise", "drop", "clip"])
def test_wrong_structure_is_an_error_under_every_policy(what, message, on_bad):
    with pytest.raises(ValueError, match=rf"^Faulty, environment 1, step 1: .*{message}"):
        stream({(0, 1): what}, on_bad)
    if "obs" in what:
        with pytest.raises(ValueError, match=rf"^Faulty, environment 1, step 0: .*{message}"):
            stream({(0, 0): what}, on_bad)


NESTED = spaces.Dict(
    image=spaces.Box(0, 255, (2, 2, 1), np.uint8),
    inner=spaces.Dict(color=spaces.Discrete(3, start=1), bits=spaces.MultiBinary(2)),
    pair=spaces.Tuple(
        (
            spaces.MultiDiscrete(np.array([[2, 3]]), start=np.array([[5, 6]])),
            spaces.Box(0, 9, (), np.int64),
        )
    ),
)


def nested(**change):
    value = {
        "image": np.full((2, 2, 1), 200, np.uint8),
        "inner": {"color": np.int64(3), "bits": np.array([1, 0], np.int8)},
        "pair": (np.array([[6, 8]]), np.array(4)),
    }
    return {**value, **change}


def test_nested_observations_become_arrays():
    assert NESTED.contains(nested())
    env = HostEnv(lambda: Counter(3, 100.0, NESTED, {(0, 0): {"obs": nested()}}))
    obs = env.reset(0).obs
    assert obs["image"].dtype == np.uint8
    assert obs["image"].shape == (1, 2, 2, 1)
    assert obs["inner"]["color"].tolist() == [2]
    assert obs["inner"]["bits"].tolist() == [[1, 0]]
    assert obs["pair"]["0"].tolist() == [[1, 2]]
    assert obs["pair"]["1"].tolist() == [4]
    assert {str(x.dtype) for x in (obs["inner"]["color"], *obs["pair"].values())} == {"int32"}


@pytest.mark.parametrize(
    ("obs", "message"),
    [
        ({"image": 0}, r"observation: expected the keys .* \(missing \['inner', 'pair'\], unexp"),
        (nested(more=1), r"missing \[\], unexpected \['more'\]"),
        (nested(inner=3), "observation/inner: expected a dict, got int"),
        (nested(pair=(1,)), "observation/pair: expected a tuple of 2 entries, got 1 entries"),
        (nested(image=np.zeros((2, 2), np.uint8)), r"observation/image: expected shape \(2, 2, 1"),
        (nested(image=np.zeros((2, 2, 1))), "observation/image: .* uint8, got float64"),
        (nested(image=np.full((2, 2, 1), 300)), r"observation/image: expected values in \[0, 255"),
        (
            nested(inner={"color": 4, "bits": np.zeros(2, int)}),
            "observation/inner/color is 4, expected a value of the space, 1 to 3",
        ),
        (
            nested(inner={"color": 0, "bits": np.zeros(2, int)}),
            "observation/inner/color is 0, expected a value of the space, 1 to 3",
        ),
        (nested(inner={"color": 1.0, "bits": np.zeros(2, int)}), "observation/inner/color: exp"),
        (
            nested(inner={"color": [1], "bits": np.zeros(2, int)}),
            r"color: expected shape \(\), got",
        ),
        (
            nested(inner={"color": 1, "bits": np.array([0, 2])}),
            r"observation/inner/bits\[1\] is 2, .* 0 to 1",
        ),
        (nested(pair=(np.array([[7, 6]]), 0)), r"observation/pair/0\[0, 0\] is 7, .* 5 to 6"),
        (nested(pair=(np.array([[5, 6]]), 10)), "observation/pair/1 is 10, .* 0.0 to 9.0"),
    ],
)
def test_faults_of_nested_observations_are_named(obs, message):
    env = HostEnv(lambda: Counter(3, 100.0, NESTED, {(0, 0): {"obs": obs}}))
    with pytest.raises(ValueError, match=message):
        env.reset(0)


def test_categories_are_never_clipped():
    env = HostEnv(lambda: Counter(3, 9.0, spaces.Discrete(3), {(0, 0): {"obs": 3}}), on_bad="clip")
    with pytest.raises(ValueError, match="observation is 3, expected a value of the space, 0 to 2"):
        env.reset(0)


@pytest.mark.parametrize(
    ("space", "action", "message"),
    [
        (
            spaces.Discrete(2),
            np.zeros(3, np.int32),
            r"int32 of shape \(2,\).*got int32 of shape \(3",
        ),
        (spaces.Discrete(2), np.zeros(2, np.float32), "got float32 of shape"),
        (spaces.Discrete(2), np.array([0, 2]), "expected 0 <= a < 2, got 2 for environment 1"),
        (spaces.Discrete(2), np.array([-1, 0]), "got -1 for environment 0"),
        (spaces.Box(-1, 1, (3,)), np.zeros((2, 4)), r"float32 of shape \(2, 3\)"),
        (spaces.Box(-1, 1, (3,)), np.zeros((2, 3), int), "got int64"),
        (spaces.Box(-1, 1, (1,)), np.array([[0], [NAN]]), r"finite numbers, got \[nan\] for"),
        (
            spaces.MultiDiscrete([2, 3]),
            np.array([[0, 0], [1, 3]]),
            r"got \[1 3\] for environment 1",
        ),
    ],
)
def test_bad_actions_are_refused(space, action, message):
    with pytest.raises(ValueError, match=f"^action: .*{message}"):
        ActionCodec(space, 2).check(action)


class Broken(Counter):
    def __init__(self, result: Any, start: Any = None) -> None:
        super().__init__()
        self.result, self.start = result, start

    def reset(self, *, seed=None, options=None):
        fresh = super().reset(seed=seed)
        return fresh if self.start is None else self.start

    def step(self, action):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def test_environments_with_the_old_interface_are_named():
    env = HostEnv(lambda: Broken((np.zeros(3), 0.0, False, {})), id="Old")
    env.reset(0)
    with pytest.raises(ValueError, match=r"Old, environment 0, step 1: step: expected .* got 4"):
        env.step(np.zeros((1, 1), np.float32))
    with pytest.raises(ValueError, match=r"reset: expected \(observation, info\), got ndarray"):
        HostEnv(lambda: Broken(None, start=np.zeros(3))).reset(0)


def test_errors_of_the_environment_say_where():
    env = HostEnv(lambda: Broken(RuntimeError("motor on fire")), id="Hot")
    env.reset(0)
    with pytest.raises(RuntimeError, match="motor on fire") as caught:
        env.step(np.zeros((1, 1), np.float32))
    assert caught.value.__notes__ == ["Hot, environment 0, step 1"]


def test_float64_values_pass_where_float32_can_hold_them():
    codec = ObservationCodec(spaces.Box(-np.inf, np.inf, (2,), np.float64))
    assert codec.faults([np.array([[3.4e38, -3.4e38]])]) == []
    assert len(codec.faults([np.array([[3.5e38, 0.0]])])) == 1
    out = codec.finish([np.array([[0.1, 1e-9]])])
    assert out.dtype == np.float32
