"""A training process that is killed, or asked to stop, loses nothing: F1 and F2."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.commands import FLAGS, digest, saves

pytestmark = [pytest.mark.fault, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
KILLS = 5


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of compiled programs: only the first start is slow."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """Return an uninterrupted run, and how long a warm one takes."""
    folder = tmp_path_factory.mktemp("whole")
    finish(folder / "cold", cache)
    start = time.monotonic()
    finish(folder / "warm", cache)
    # The premise of every other test here.
    assert digest(folder / "cold") == digest(folder / "warm")
    return folder / "warm", time.monotonic() - start


def begin(out: Path, cache: Path) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "GIT_DIR": str(cache / "none"),  # the commit may change while the tests run
    }
    command = [sys.executable, "-m", "scripts.cli", "train", "pets", "--out", str(out), *FLAGS]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip


def finish(out: Path, cache: Path) -> str:
    process = begin(out, cache)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return errors


def wait_for_save(out: Path, process: subprocess.Popen[str]) -> None:
    while not saves(out):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


def test_f1_killed_at_any_instant_ends_bit_for_bit(whole, cache, tmp_path):
    reference, seconds = whole
    rng = random.Random(0)
    out = tmp_path / "run"
    killed = 0
    for _ in range(KILLS):
        process = begin(out, cache)
        try:
            process.wait(timeout=rng.uniform(0.3, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            killed += 1
        process.communicate()
        if process.returncode == 0:
            break
    assert killed >= 2
    finish(out, cache)
    assert digest(out) == digest(reference)
    assert (out / "config.json").read_bytes() == (reference / "config.json").read_bytes()
    assert not list(out.rglob(".tmp-*"))


def test_f1_killed_between_the_first_and_the_last_save(whole, cache, tmp_path):
    out = tmp_path / "run"
    process = begin(out, cache)
    wait_for_save(out, process)
    process.kill()  # perhaps inside of the next save
    process.communicate()
    assert re.search(r"lock is taken over", finish(out, cache))
    assert digest(out) == digest(whole[0])


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_f2_asked_to_stop(name, whole, cache, tmp_path):
    out = tmp_path / "run"
    process = begin(out, cache)
    wait_for_save(out, process)
    process.send_signal(getattr(signal, name))
    errors = process.communicate(timeout=600)[1]
    if process.returncode != 0:  # it may have been done by then
        assert process.returncode == 75, errors
        assert f"resume with: mbrl train pets --out {out}" in errors
    finish(out, cache)
    assert digest(out) == digest(whole[0])


def test_f2_a_second_interrupt_leaves_the_last_save_whole(whole, cache, tmp_path):
    out = tmp_path / "run"
    process = begin(out, cache)
    wait_for_save(out, process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=600)[1]
    assert process.returncode in (0, 75, 130), errors
    assert not (out / "run.lock").exists()
    assert "damaged" not in finish(out, cache)
    assert digest(out) == digest(whole[0])
