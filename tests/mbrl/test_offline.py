"""Recorded data: written, read back, refused when it cannot be right, and learned from."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl import replay, spaces
from mbrl.training.learner import DriverConfig, learner_update, start_learners
from mbrl.training.offline import run_offline
from mbrl.training.recorded import in_order, read_records, write_records
from mbrl.types import Discrete, EnvSpec, MultiDiscrete, Record
from tests.mbrl.toys import counter_mdp, linear_agent

SPEC = EnvSpec(
    "task",
    {"image": spaces.box(0, 255, (2, 3, 1), np.uint8), "inner": {"x": spaces.box(-9, 9, (2,))}},
    {"dial": MultiDiscrete((3, 4)), "key": Discrete(5), "push": spaces.box(-2.0, 1.0, (1,))},
    10,
)


def records(streams: int = 2, length: int = 9, every: int = 4, spec: EnvSpec = SPEC) -> Record:
    """Make streams of episodes of `every` records, of which every second one terminates."""
    rng = np.random.default_rng(0)

    def fill(space: Any) -> Any:
        match space:
            case Discrete():
                return rng.integers(space.num, size=(streams, length), dtype=np.int32)
            case MultiDiscrete():
                return rng.integers(space.nums, size=(streams, length, 2), dtype=np.int32)
            case dict():
                return {name: fill(sub) for name, sub in space.items()}
        low, high = np.maximum(space.low, -9.0), np.minimum(space.high, 255.0)
        return rng.uniform(low, high, (streams, length, *space.shape)).astype(space.dtype)

    t = np.broadcast_to(np.arange(length), (streams, length))
    first, last = t % every == 0, t % every == every - 1
    reward: Any = rng.normal(size=(streams, length)).astype(np.float32)
    terminal = last & (t // every % 2 == 1)
    flags: Any = (first, last, terminal)
    return Record(fill(spec.observation), fill(spec.action), reward, *flags, extras=())


def test_what_is_written_is_read(tmp_path):
    file, record = tmp_path / "data.npz", records()
    write_records(file, record._replace(extras={"latent": np.ones((2, 9))}))
    assert [p.name for p in tmp_path.iterdir()] == ["data.npz"]
    back = read_records(file, SPEC)
    assert jax.tree.structure(back) == jax.tree.structure(record)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(record), jax.tree.leaves(back), strict=True
    ):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(a, b)


def test_numbers_of_a_wider_kind_are_taken_over(tmp_path):
    record = records()
    flags = {name: getattr(record, name) for name in ("is_first", "is_last", "is_terminal")}
    wide: Any = record._replace(reward=np.asarray(record.reward, np.float64))
    wide = wide._replace(action={**record.action, "key": record.action["key"].astype(np.int64)})
    write_records(tmp_path / "data.npz", wide)
    back = read_records(tmp_path / "data.npz", SPEC)
    assert back.reward.dtype == np.float32
    assert back.action["key"].dtype == np.int32
    np.testing.assert_array_equal(back.reward, record.reward)
    assert all(np.array_equal(getattr(back, name), flag) for name, flag in flags.items())


def spoil(name: str, change: Any) -> Any:
    """Return a change of the arrays of a file."""

    def apply(arrays: dict[str, np.ndarray]) -> None:
        arrays[name] = change(arrays[name].copy())

    return apply


def put(where: Any, value: Any) -> Any:
    def change(array: np.ndarray) -> np.ndarray:
        array[where] = value
        return array

    return change


BAD = {
    "a missing array": (lambda arrays: arrays.pop("action/push"), ["action/push", "missing"]),
    "an unknown array": (lambda a: a.update(rewards=a["reward"]), ["rewards", "unknown"]),
    "a shape": (spoil("obs/inner/x", lambda x: x[..., :1]), ["obs/inner/x", "(2, 9, 1)"]),
    "a length": (spoil("is_last", lambda x: x[:, :-1]), ["is_last", "(2, 8)", "(2, 9)"]),
    "one stream without its axis": (spoil("reward", lambda x: x[0]), ["reward", "[E, T]"]),
    "fractions for integers": (
        spoil("action/key", lambda x: x.astype(np.float32)), ["action/key", "float32", "int32"],
    ),
    "floats for pixels": (
        spoil("obs/image", lambda x: x.astype(np.float32)), ["obs/image", "float32", "uint8"],
    ),
    "texts": (spoil("reward", lambda x: x.astype(str)), ["reward", "float32"]),
    "pickled objects": (spoil("reward", lambda x: x.astype(object)), ["plain arrays"]),
    "NaN": (spoil("obs/inner/x", put((1, 3, 0), np.nan)), ["obs/inner/x[1, 3, 0]", "nan"]),
    "an infinite reward": (spoil("reward", put((0, 2), np.inf)), ["reward[0, 2]", "inf"]),
    "a number too large": (spoil("reward", put((0, 2), 1e300)), ["reward[0, 2]", "float32"]),
    "no streams": (lambda a: a.update({k: x[:0] for k, x in a.items()}), ["(0, 9)", "E >= 1"]),
    "no transition": (
        lambda a: a.update(
            is_first=np.ones((2, 9), bool), is_last=np.ones((2, 9), bool)
        ),
        ["no transition"],
    ),
    "an action too large": (spoil("action/push", put((0, 1), 1.5)), ["action/push[0, 1, 0]"]),
    "an action too small": (spoil("action/push", put((0, 1), -2.5)), ["action/push[0, 1, 0]"]),
    "no such choice": (spoil("action/key", put((1, 8), 5)), ["action/key[1, 8]", "5"]),
    "a negative choice": (spoil("action/key", put((1, 8), -1)), ["action/key[1, 8]", "-1"]),
    "no such setting": (spoil("action/dial", put((0, 0, 0), 3)), ["action/dial[0, 0, 0]"]),
    "no final observation": (
        spoil("is_last", put((1, 3), False)), ["stream 1, record 4", "final observation"],
    ),
    "no first observation": (
        spoil("is_first", put((0, 4), False)), ["stream 0, record 4", "reset"],
    ),
    "an end that is none": (
        spoil("is_terminal", put((0, 2), True)), ["stream 0, record 2", "is_last"],
    ),
}  # fmt: skip


@pytest.mark.fault
@pytest.mark.parametrize("name", BAD)
def test_data_that_cannot_be_right_are_refused(name, tmp_path):
    file = tmp_path / "data.npz"
    write_records(file, records())
    with np.load(file) as saved:
        arrays = dict(saved)
    change, words = BAD[name]
    arrays["reward"] = arrays["reward"].astype(np.float64)
    change(arrays)
    np.savez(file, **arrays)
    with pytest.raises(ValueError, match=r"data\.npz") as error:
        read_records(file, SPEC)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.fault
@pytest.mark.parametrize("content", [None, b"", b"obs,action", "truncated", "flipped"])
def test_a_file_that_is_none_is_refused(content, tmp_path):
    file = tmp_path / "data.npz"
    if isinstance(content, str):
        write_records(file, records(length=400))
        whole = bytearray(file.read_bytes())
        whole[len(whole) // 3] ^= 0xFF
        file.write_bytes(whole[: len(whole) // 2] if content == "truncated" else whole)
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.npz: (expected recorded data|damaged)"):
        read_records(file, SPEC)


@pytest.mark.fault
def test_no_damage_is_read_as_other_numbers(tmp_path):
    file, record = tmp_path / "data.npz", records(length=60)
    write_records(file, record)
    whole = file.read_bytes()
    rng, refused, untouched = np.random.default_rng(0), 0, 0
    for _ in range(150):
        spoiled = bytearray(whole)
        spoiled[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        file.write_bytes(spoiled[: rng.integers(len(whole))] if rng.random() < 0.2 else spoiled)
        try:
            back = read_records(file, SPEC)
        except ValueError as error:
            refused += "data.npz: " in str(error)
        else:  # in a part of the file that nothing depends on
            jax.tree.map(np.testing.assert_array_equal, back, record)
            untouched += 1
    assert refused + untouched == 150
    assert refused > 100


@pytest.mark.fault
def test_data_larger_than_memory_are_refused_before_they_are_read(tmp_path, monkeypatch):
    write_records(tmp_path / "data.npz", records())
    monkeypatch.setattr("mbrl.memory.host_memory", lambda: 100)
    monkeypatch.setattr("mbrl.memory.device_memory", lambda: None)
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("was read"))
    with pytest.raises(ValueError, match=r"data\.npz needs .* of memory"):
        read_records(tmp_path / "data.npz", SPEC)


@pytest.mark.parametrize("written", [3, 5, 8, 11])
def test_a_ring_is_read_in_the_order_of_time(written):
    example = jax.tree.map(lambda x: x[0, 0], records())
    ring = replay.init(example, 2, 10)
    for t in range(written):
        now = jax.tree.map(lambda x: x[:, 0], records(length=12))
        ring = replay.add(ring, now._replace(reward=jnp.array([t, 100.0 + t])))
    kept = np.arange(max(0, written - 5), written)
    np.testing.assert_array_equal(in_order(ring).reward, [kept, 100 + kept])


TASK = counter_mdp().spec


def agents(hyper: Any) -> Any:
    return linear_agent(TASK, hyper)


def last(reports: Any) -> Any:
    return collections.deque(reports, maxlen=1).pop()


def data(length: int = 40) -> Record:
    return records(length=length, spec=TASK)


def test_offline_training_is_one_update_per_step_on_the_records():
    config = DriverConfig(7, seeds=(3,), interval=3)
    record = data()
    reports = [
        (r.step, np.asarray(r.learner.agent["w"]), r.metrics["loss"].shape, r.episodes.done.size)
        for r in run_offline(agents, TASK, record, config)
    ]
    assert [r[0] for r in reports] == [3, 6, 7]
    assert all(r[2:] == ((1,), 0) for r in reports)

    agent = agents({})
    learner = jax.tree.map(lambda x: x[0], start_learners(agents, TASK, config, {}, (2, 40)))
    ring = learner.ring
    stored = record._replace(extras=ring.record.extras)
    learner = learner._replace(ring=ring._replace(record=stored, size=jnp.asarray(40)))
    for _ in range(7):
        learner, _ = jax.jit(lambda learner: learner_update(agent, learner))(learner)
    np.testing.assert_allclose(reports[-1][1][0], learner.agent["w"], rtol=1e-5)
    assert not np.allclose(reports[0][1], reports[-1][1])


def test_offline_training_resumes_bit_for_bit():
    config = DriverConfig(8, seeds=(1, 4), interval=2)
    whole = last(run_offline(agents, TASK, data(), config))
    asked = iter([False, False, True])
    half = last(run_offline(agents, TASK, data(), config, should_stop=lambda: next(asked)))
    assert half.step == 4
    snapshot = jax.tree.map(jnp.copy, half.snapshot())
    rest = last(run_offline(agents, TASK, data(), config, snapshot=snapshot))
    assert rest.step == whole.step == 8
    np.testing.assert_array_equal(rest.learner.agent["w"], whole.learner.agent["w"])
    assert not np.array_equal(whole.learner.agent["w"][0], whole.learner.agent["w"][1])


def test_each_seed_may_have_a_setting_of_its_own():
    config = DriverConfig(4, seeds=(1, 1))
    rates = {"learning_rate": jnp.array([0.01, 0.2])}
    both = last(run_offline(agents, TASK, data(), config, rates)).learner.agent["w"]
    one = last(run_offline(lambda _: linear_agent(TASK, {"learning_rate": 0.2}), TASK, data(),
                           DriverConfig(4, seeds=(1,)))).learner.agent["w"]  # fmt: skip
    np.testing.assert_allclose(both[1], one[0], rtol=1e-5)
    assert not np.allclose(both[0], both[1])


def test_what_cannot_learn_from_records_is_refused():
    def newest(hyper: Any) -> Any:
        agent = agents(hyper)
        return agent._replace(sampling=agent.sampling._replace(kind="latest"))

    with pytest.raises(ValueError, match="own policy"):
        next(run_offline(newest, TASK, data(), DriverConfig(1)))
    with pytest.raises(ValueError, match="streams of 2 records, expected at least .* 3"):
        next(run_offline(agents, TASK, data(2), DriverConfig(1)))
    with pytest.raises(ValueError, match="steps must be at least 1"):
        next(run_offline(agents, TASK, data(), DriverConfig(0)))


def test_a_path_may_have_any_name(tmp_path: Path):
    write_records(tmp_path / "data", records())
    assert (tmp_path / "data").is_file()
