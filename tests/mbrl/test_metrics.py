"""Metrics: one line per write, whatever fails; no step twice and none missing on resume."""

import json
import math
import resource
import struct
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl.training.metrics import MetricsWriter, read


def raw(directory: Path) -> list[dict[str, Any]]:
    """Parse strictly: standard JSON has no NaN."""

    def no_constant(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    text = (directory / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=no_constant) for line in text.splitlines()]


def events(directory: Path) -> list[Any]:
    """Read TensorBoard files record by record: length, checksum, payload, checksum."""
    from tensorboardX.proto import event_pb2

    kind: Any = event_pb2
    found = []
    for path in sorted((directory / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(kind.Event.FromString(data[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return found


def fill(directory: Path, steps: list[int], **options: Any) -> None:
    with MetricsWriter(directory, tensorboard=False, **options) as writer:
        for step in steps:
            writer.write(step, {"loss": step / 2})


def test_a_line_has_step_kind_seed_time_and_the_metrics(tmp_path):
    with MetricsWriter(tmp_path / "rün", tensorboard=False) as writer:
        writer.write(1, {"loss": jnp.float32(0.5), "n": 3, "done": True})
        assert len(raw(tmp_path / "rün")) == 1  # written at once, not when closed
        writer.write(2, {"return": np.array([1.0, 2.0])}, kind="eval", seed=4)
        writer.write(
            3, {"half": jnp.bfloat16(1.5), "one": jax.random.uniform(jax.random.key(0), (1,))}
        )
    first, second, third = raw(tmp_path / "rün")
    assert abs(first.pop("time") - second.pop("time")) < 60
    assert first == {
        "step": 1, "kind": "train", "seed": None, "loss": 0.5, "n": 3, "done": True
    }  # fmt: skip
    assert second == {"step": 2, "kind": "eval", "seed": 4, "return": [1.0, 2.0]}
    assert third["half"] == 1.5
    assert isinstance(third["one"], list)
    assert read(tmp_path / "rün") == raw(tmp_path / "rün")


def test_what_is_not_finite_is_null(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"a": float("nan"), "b": jnp.array([1.0, jnp.inf]), "c": -math.inf})
    assert {k: raw(tmp_path)[0][k] for k in "abc"} == {"a": None, "b": [1.0, None], "c": None}


def test_names_and_values_are_checked(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        with pytest.raises(ValueError, match="the name 'step' is reserved"):
            writer.write(1, {"step": 1.0})
        with pytest.raises(ValueError, match=r"'env' must be a number .* got str"):
            writer.write(1, {"env": "Pendulum"})
        with pytest.raises(ValueError, match="'x' must be a number"):
            writer.write(1, {"x": None})
    assert raw(tmp_path) == []


def test_a_resumed_run_has_each_step_once(tmp_path):
    fill(tmp_path, [1, 2, 3, 4, 5])
    fill(tmp_path, [4, 5, 6], resume_step=3)
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_a_run_that_starts_again_puts_the_old_lines_aside(tmp_path):
    fill(tmp_path, [1, 2, 3])
    fill(tmp_path, [1])
    assert [line["step"] for line in read(tmp_path)] == [1]
    assert len(read(tmp_path / "metrics.old.jsonl")) == 3


@pytest.mark.fault
def test_a_torn_last_line_is_removed_wherever_it_tears(tmp_path):
    fill(tmp_path, [1, 2])
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    last = len(whole.splitlines(keepends=True)[1])
    for cut in (1, 2, last // 2, last - 1):
        (tmp_path / "metrics.jsonl").write_bytes(whole[:-cut])
        assert [line["step"] for line in read(tmp_path)] == [1]
        fill(tmp_path, [2, 3], resume_step=9)
        assert [line["step"] for line in raw(tmp_path)] == [1, 2, 3]


@pytest.mark.fault
def test_a_damaged_line_is_named(tmp_path):
    fill(tmp_path, [1, 2, 3])
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(lines[0] + b'{"step": \xff\n' + lines[2])
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: expected a JSON object"):
        read(tmp_path)
    with pytest.warns(UserWarning, match="line 2 is damaged and removed"):
        fill(tmp_path, [4], resume_step=3)
    assert [line["step"] for line in raw(tmp_path)] == [1, 3, 4]


@pytest.mark.fault
def test_a_full_disk_loses_no_line_and_leaves_no_torn_one(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"loss": 1.0})
        size = (tmp_path / "metrics.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))  # room for half a line
        try:
            with pytest.warns(UserWarning, match="kept in memory and tried again"):
                writer.write(2, {"loss": 2.0})
            writer.write(3, {"loss": 3.0})  # warned once
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        writer.write(4, {"loss": 4.0})
        assert [line["step"] for line in raw(tmp_path)] == [1, 2, 3, 4]
    assert [line["loss"] for line in raw(tmp_path)] == [1.0, 2.0, 3.0, 4.0]


def test_tensorboard_gets_scalars_and_hides_what_a_resume_repeats(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(7, {"loss": 0.5, "returns": np.arange(3)}, seed=1)
    with MetricsWriter(tmp_path, resume_step=5) as writer:
        writer.write(6, {"loss": jnp.array([0.25])}, kind="eval")
    found = events(tmp_path)
    values = [(e.step, v.tag, v.simple_value) for e in found for v in e.summary.value]
    assert values == [(7, "train/seed_1/loss", 0.5), (6, "eval/loss", 0.25)]
    starts = [e.step for e in found if e.HasField("session_log")]
    assert starts == [0, 6]  # events of earlier files from this step on are hidden
    assert [e.file_version for e in found if e.file_version] == ["brain.Event:2"] * 2


@pytest.mark.fault
def test_a_tensorboard_that_cannot_start_is_one_warning(tmp_path):
    (tmp_path / "tensorboard").write_text("in the way")
    with pytest.warns(UserWarning, match=r"TensorBoard failed and is switched off"):
        writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert len(raw(tmp_path)) == 1


@pytest.mark.fault
def test_a_tensorboard_whose_disk_is_full_is_one_warning(tmp_path, monkeypatch):
    from tensorboardX.event_file_writer import EventsWriter

    writer = MetricsWriter(tmp_path)

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(EventsWriter, "write_event", full)
    with pytest.warns(UserWarning, match=r"TensorBoard failed .*No space left"):
        writer.write(0, {"loss": 1.0})
    for step in range(1, 30):  # no second warning, which would be an error here
        writer.write(step, {"loss": 1.0})
    writer.close()
    assert len(raw(tmp_path)) == 30


def fake_wandb(monkeypatch, fail: str = "") -> list[Any]:
    calls: list[Any] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            if fail == "log":
                raise ConnectionError("no network")
            calls.append((step, values))

        def finish(self) -> None:
            calls.append("finish")

    def init(**options: Any) -> Run:
        if fail == "init":
            raise ConnectionError("no network")
        calls.append(options)
        return Run()

    module = types.ModuleType("wandb")
    monkeypatch.setattr(module, "init", init, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_wandb_continues_the_page_of_the_run(tmp_path, monkeypatch):
    calls = fake_wandb(monkeypatch)
    for resume_step in (None, 1):
        with MetricsWriter(tmp_path, resume_step, tensorboard=False, wandb="project") as writer:
            writer.write(2, {"loss": 1.0})
    assert calls[1:3] == [(2, {"train/loss": 1.0}), "finish"]
    assert calls[0] == calls[3]
    assert calls[0]["project"] == "project"
    assert calls[0]["resume"] == "allow"
    assert len(calls[0]["id"]) == 16


@pytest.mark.fault
@pytest.mark.parametrize("fail", ["init", "log"])
def test_wandb_without_a_network_is_one_warning(fail, tmp_path, monkeypatch):
    fake_wandb(monkeypatch, fail)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with MetricsWriter(tmp_path, tensorboard=False, wandb="project") as writer:
            for step in range(3):
                writer.write(step, {"loss": 1.0})
    assert [str(w.message).split(":")[0] for w in caught] == [
        "W&B failed and is switched off (ConnectionError"
    ]
    assert [line["step"] for line in raw(tmp_path)] == [0, 1, 2]


@pytest.mark.parametrize("module", [None, types.ModuleType("wandb")])
def test_a_missing_wandb_names_the_install_command(module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", module)  # absent, or a mere folder of that name
    with pytest.raises(ValueError, match=r'pip install "modelrl\[wandb\]"'):
        MetricsWriter(tmp_path, wandb="project")
