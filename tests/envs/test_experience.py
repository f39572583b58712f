"""Data sets of Minari: what is written is read, and what cannot be read is said in a line."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import numpy as np
import pytest

from envs import experience
from envs.experience import read_experience, read_minari, write_minari
from mbrl import spaces
from mbrl.types import EnvSpec
from tests.mbrl.test_offline import SPEC, records

PLAIN = EnvSpec("Pendulum-v1", spaces.box(-8, 8, (3,)), spaces.box(-2.0, 2.0, (1,)), 200)


@pytest.fixture
def minari(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "sets"))
    pytest.importorskip("h5py")
    return pytest.importorskip("minari")


def recorded(*args: Any, **options: Any) -> Any:
    """Make records as an environment does: no reward arrives with the first of an episode."""
    record = records(*args, **options)
    return record._replace(reward=record.reward * ~record.is_first)


@pytest.mark.parametrize("spec", [SPEC, PLAIN])
def test_episodes_are_read_as_they_were_written(minari, spec):
    record = recorded(spec=spec)  # streams of 4, 4 and 1 records: the last holds no transition
    assert write_minari("task/small-v0", record, spec, None, "sac", "a test") == 4
    back: Any = read_experience("minari:task/small-v0", spec)
    whole: Any = jax.tree.map(lambda x: x[:, :8].reshape(1, 16, *x.shape[2:]), record)
    acted = ~whole.is_last  # the action at the last observation is not taken, and not kept
    for one, other in zip(jax.tree.leaves(back.action), jax.tree.leaves(whole.action), strict=True):
        np.testing.assert_array_equal(one[acted], other[acted])
    jax.tree.map(np.testing.assert_array_equal, back._replace(action=()), whole._replace(action=()))
    assert jax.tree.map(lambda x: x.dtype, back) == jax.tree.map(lambda x: x.dtype, whole)
    assert (back.is_last.sum(), back.is_terminal.sum()) == (4, 2)


def test_an_episode_that_is_still_running_is_cut_and_not_ended(minari):
    record = recorded(1, 7, spec=PLAIN)
    write_minari("cut-v0", record, PLAIN, None, "sac", "a test")
    dataset = minari.load_dataset("cut-v0")
    assert [e.truncations.tolist() for e in dataset] == [[False, False, True], [False, True]]
    assert not any(e.terminations.any() for e in dataset)
    back = read_minari("cut-v0", PLAIN)
    np.testing.assert_array_equal(back.obs, record.obs)
    np.testing.assert_array_equal(back.is_last[0], [0, 0, 0, 1, 0, 0, 1])
    assert not np.any(back.is_terminal)


def test_the_environment_can_be_made_from_what_was_written(minari):
    write_minari("p-v0", recorded(spec=PLAIN), PLAIN, "Pendulum-v1", "sac", "a test")
    env = minari.load_dataset("p-v0").recover_environment()
    assert env.spec.id == "Pendulum-v1"
    assert minari.load_dataset("p-v0").action_space == env.action_space


@pytest.mark.fault
def test_what_cannot_be_written_is_refused_and_takes_no_name(minari, monkeypatch):
    record = recorded(spec=PLAIN)
    with pytest.raises(ValueError, match=r"got 'a b', expected a name such as"):
        write_minari("a b", record, PLAIN, None, "sac", "a test")

    def full(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(minari.dataset._storages.hdf5_storage.HDF5Storage, "update_episodes", full)
        with pytest.raises(OSError, match="disk full"):
            write_minari("a-v0", record, PLAIN, None, "sac", "a test")
    write_minari("a-v0", record, PLAIN, None, "sac", "a test")
    with pytest.raises(ValueError, match="a-v0 is there already"):
        write_minari("a-v0", record, PLAIN, None, "sac", "a test")
    with pytest.raises(ValueError, match="no transition"):
        write_minari("b-v0", records(1, 1, spec=PLAIN), PLAIN, None, "sac", "a test")


@pytest.mark.fault
def test_what_cannot_be_read_is_said_with_its_name(minari, monkeypatch):
    write_minari("a-v0", records(spec=PLAIN), PLAIN, None, "sac", "a test")

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(minari, "download_dataset", offline)
    with pytest.raises(ValueError, match=r"D4RL/x-v2: not on .* a-v0\), .*no route to host"):
        read_minari("D4RL/x-v2", PLAIN)
    wide = PLAIN._replace(observation=spaces.box(-8, 8, (4,)))
    with pytest.raises(ValueError, match=r"minari:a-v0: obs: got shape .* 3\), expected .* 4\)"):
        read_minari("a-v0", wide)
    file = minari.storage.datasets_root_dir.get_dataset_path("a-v0") / "data" / "main_data.hdf5"
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not this"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="minari:a-v0: (damaged|cannot be read|got no)"):
            read_minari("a-v0", PLAIN)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"terminations": [True, False, False]}, "none but the last"),
        ({"truncations": [False]}, "expected one per step"),
        ({"observations": np.zeros((3, 3))}, r"episode 0: observation.*\(4, 3\), got \(3, 3\)"),
        ({"actions": np.zeros((3, 2))}, r"expected shape \(3, 1\), got \(3, 2\)"),
        ({"rewards": [0.0, np.nan, 0.0]}, r"reward\[0, 2\] is nan"),
        ({"actions": np.full((3, 1), 9.0)}, "bounds of the action space"),
    ],
)
def test_episodes_that_cannot_be_right_are_refused(change, words, minari):
    import gymnasium as gym

    fields = {
        "observations": np.zeros((4, 3)), "actions": np.zeros((3, 1)), "rewards": np.zeros(3),
        "terminations": [False] * 3, "truncations": [False, False, True],
    }  # fmt: skip
    buffer = minari.data_collector.EpisodeBuffer(**(fields | change))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a description is missing
        minari.create_dataset_from_buffers(
            "bad-v0", [buffer], observation_space=gym.spaces.Box(-8, 8, (3,), np.float64),
            action_space=gym.spaces.Box(-2, 2, (1,), np.float64),
        )  # fmt: skip
    with pytest.raises(ValueError, match=words) as error:
        read_minari("bad-v0", PLAIN)
    assert "minari:bad-v0" in str(error.value)


@pytest.mark.fault
def test_without_minari_the_extra_is_named(monkeypatch):
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(experience.importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r"modelrl\[offline\]"):
        read_experience("minari:a-v0", PLAIN)
