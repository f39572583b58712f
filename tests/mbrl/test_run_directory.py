"""The folder of a run: one process at a time, same settings, clean stops."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mbrl.training import run_directory
from mbrl.training.run_directory import (
    Lock,
    StopSignal,
    check_config,
    read_config,
    versions,
    write_config,
    write_json,
)

ROOT = Path(__file__).resolve().parents[2]


def lock_file(directory: Path, **changes: Any) -> Path:
    """Write the lock of a process as it would have left it."""
    with Lock(directory):
        holder = json.loads((directory / "run.lock").read_text())
    (directory / "run.lock").write_text(json.dumps({**holder, **changes}))
    return directory / "run.lock"


def run_threads(work: Callable[[], None], number: int) -> None:
    threads = [threading.Thread(target=work) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_lock_says_who_holds_it_and_goes_with_its_holder(tmp_path):
    directory = tmp_path / "new rün"
    with Lock(directory):
        holder = json.loads((directory / "run.lock").read_text())
        assert (holder["pid"], holder["host"]) == (os.getpid(), socket.gethostname())
        assert sorted(path.name for path in directory.iterdir()) == ["run.lock"]
    assert list(directory.iterdir()) == []
    with pytest.raises(KeyError), Lock(directory):
        raise KeyError
    assert list(directory.iterdir()) == []


@pytest.mark.fault
def test_a_second_process_is_refused_while_the_first_lives_and_takes_over_when_killed(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from mbrl.training.run_directory import Lock\n"
        "with Lock(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with (
            pytest.raises(ValueError, match=f"process {other.pid} on host {socket.gethostname()}"),
            Lock(tmp_path),
        ):
            pass
        assert (tmp_path / "run.lock").exists()
        other.kill()
    with pytest.warns(UserWarning, match=f"process {other.pid} is gone"), Lock(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault
def test_a_lock_of_a_reused_process_id_is_stale(tmp_path, dead_pid):
    parent = os.getppid()
    for changes in ({"pid": parent}, {"pid": dead_pid}):  # `started` is that of this process
        lock_file(tmp_path, **changes)
        with pytest.warns(UserWarning, match=f"process {changes['pid']} is gone"), Lock(tmp_path):
            pass
    # Without the start time a living process is believed.
    lock_file(tmp_path, pid=parent, started=None)
    with pytest.raises(ValueError, match=f"process {parent}"), Lock(tmp_path):
        pass


@pytest.mark.fault
def test_a_lock_of_another_host_is_never_taken(tmp_path, dead_pid):
    path = lock_file(tmp_path, host="elsewhere", pid=dead_pid)
    with pytest.raises(ValueError, match=r"on host elsewhere since .*or delete .*run\.lock"):
        Lock(tmp_path).__enter__()
    assert path.exists()
    path.write_text("garbage")
    with pytest.raises(ValueError, match=r"run\.lock is no lock of ours"):
        Lock(tmp_path).__enter__()


@pytest.mark.fault
def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path, dead_pid):
    for _ in range(30):
        lock_file(tmp_path, pid=dead_pid)
        start, hold, results = (
            threading.Barrier(6, timeout=20),
            threading.Barrier(6, timeout=20),
            [],
        )

        def contend(start=start, hold=hold, results=results) -> None:
            start.wait()
            try:
                with Lock(tmp_path):
                    results.append("held")
                    hold.wait()
            except ValueError:
                results.append("refused")
                hold.wait()

        with pytest.warns(UserWarning, match="is gone"):
            run_threads(contend, 6)
        assert sorted(results) == ["held"] + ["refused"] * 5
        assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_links_has_locks_too(tmp_path, monkeypatch):
    def no_links(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with Lock(tmp_path):
        with pytest.raises(ValueError, match=f"process {os.getpid()}"):
            Lock(tmp_path).__enter__()
        assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_was_taken_over_is_not_removed(tmp_path):
    with Lock(tmp_path):
        (tmp_path / "run.lock").write_text("of somebody else")
    assert (tmp_path / "run.lock").read_text() == "of somebody else"


def test_config_returns_as_written(tmp_path):
    config = {"agent": {"lr": 0.1, "layers": [64, 64]}, "größe": None, "env": "Pendulum-v1"}
    assert read_config(tmp_path) is None
    write_config(tmp_path / "run", config)
    assert read_config(tmp_path / "run") == config
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json"]
    (tmp_path / "run" / "config.json").write_text('{"agent":')
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        read_config(tmp_path / "run")


@pytest.mark.fault
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_json(tmp_path / "x.json", {"a": 1})
    for bad in ({"a": float("nan")}, {"a": np.float32(1)}):
        with pytest.raises(ValueError, match=r"x\.json: expected what JSON can hold"):
            write_json(tmp_path / "x.json", bad)

    def full(_: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "x.json", {"a": 2})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


SAVED = {"env": "Pendulum-v1", "steps": 1000, "agent": {"lr": 1e-3, "sizes": [64, 64]}, "log": {}}


def test_equal_settings_pass_whatever_their_spelling():
    check_config(SAVED, json.loads(json.dumps(SAVED)), set(), False)
    check_config(SAVED, {**SAVED, "steps": 1000.0}, set(), False)
    check_config(SAVED, {**SAVED, "agent": {"lr": 0.001, "sizes": (64, 64)}}, set(), False)
    check_config({}, {}, set(), False)


def test_every_differing_field_is_listed():
    now = {
        **SAVED, "env": "Hopper-v5", "agent": {"lr": 2e-3, "sizes": [64]}, "new": {"x": True}
    }  # fmt: skip
    with pytest.raises(ValueError, match="other settings") as error:
        check_config(SAVED, now, {"steps"}, True)
    assert str(error.value).splitlines()[1:] == [
        "  agent.lr: 0.001 -> 0.002",
        "  agent.sizes: [64, 64] -> [64]",
        "  env: Pendulum-v1 -> Hopper-v5",
        "  new.x: (absent) -> True",
        "resume with the saved settings, or start in a new directory",
    ]
    with pytest.raises(ValueError, match=r"flag: 1 -> True"):
        check_config({"flag": 1}, {"flag": True}, set(), True)
    with pytest.raises(ValueError, match=r"a: 1 -> \(absent\)\n  b: \(absent\) -> 1"):
        check_config({"a": 1}, {"b": 1}, set(), True)
    with pytest.raises(ValueError, match=r"agent: \(absent\) -> 3"):
        check_config(SAVED, {**SAVED, "agent": 3}, set(), True)


def test_harmless_fields_need_the_flag():
    now = {**SAVED, "steps": 2000, "log": {"every": 10}}
    harmless = {"steps", "log"}
    check_config(SAVED, now, harmless, True)
    with pytest.raises(ValueError, match=r"steps: 1000 -> 2000\n.*add --override-config"):
        check_config(SAVED, {**SAVED, "steps": 2000}, harmless, False)
    with pytest.raises(
        ValueError, match=r"(?s)env: .*steps: .*--override-config allows only steps"
    ):
        check_config(SAVED, {**SAVED, "steps": 2000, "env": "x"}, harmless, False)
    with pytest.raises(ValueError, match=r"(?s)env: Pend") as error:
        check_config(SAVED, {**SAVED, "steps": 2000, "env": "x"}, harmless, True)
    assert "steps" not in str(error.value)
    with pytest.raises(ValueError, match="logger"):  # not below `log`
        check_config(SAVED, {**SAVED, "logger": 1}, harmless, True)


def test_versions_name_what_is_installed():
    found = versions()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["jax"] == jax.__version__
    assert found["numpy"] == np.__version__
    assert found["cpu"]
    assert all(isinstance(value, str) for value in found.values())


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_the_library_not_of_a_project_around_it(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=n", "-c", "user.email=e", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.strip()

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "first")
    (tmp_path / "library.py").touch()
    monkeypatch.setattr(run_directory, "__file__", str(tmp_path / "library.py"))
    assert "commit" not in versions()
    git("add", "library.py")
    assert versions()["commit"] == git("rev-parse", "HEAD")


def test_versions_do_without_git_and_packages(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(run_directory, "_PACKAGES", ("numpy", "no-such-package"))
    found = versions()
    assert "commit" not in found
    assert found["numpy"] == np.__version__
    assert "no-such-package" not in found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_a_request(number):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.signal == number
        os.kill(os.getpid(), signal.SIGTERM)  # said twice, asked once
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_second_ctrl_c_interrupts_at_once():
    before = signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_outside_the_main_thread_it_does_nothing():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work() -> None:
        with StopSignal() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGINT) == before))

    run_threads(work, 1)
    assert seen == [(False, True)]
