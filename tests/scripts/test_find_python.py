"""Which Python `make` takes, and what it says when there is none that fits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def stub(folder: Path, name: str, version: str, venv: bool = True) -> Path:
    """Write a program that answers like a Python of another version."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    numbers = tuple(int(part) for part in version.split("."))
    code = f"import sys; sys.version_info = {numbers}; "
    code += "" if venv else "sys.modules['ensurepip'] = None; "
    file.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}exec(sys.argv[1])" "$2"\n')
    file.chmod(0o755)
    return file


def find(path: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    # Only the stubs, and the tools that the script itself needs.
    tools = path / "tools"
    tools.mkdir(exist_ok=True)
    for tool in ("sh", "sort", "tail", "printf"):
        if not (tools / tool).exists():
            real = next(p for d in ("/bin", "/usr/bin") if (p := Path(d) / tool).exists())
            (tools / tool).symlink_to(real)
    return subprocess.run(
        ["/bin/sh", str(ROOT / ".ci" / "find-python"), *args],
        env={"PATH": f"{path}{os.pathsep}{tools}", "HOME": str(path / "home"), **env},
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_newest_and_oldest(tmp_path: Path) -> None:
    for minor in (10, 11, 12):
        stub(tmp_path, f"python3.{minor}", f"3.{minor}.4")
    stub(tmp_path, "python3", "3.10.4")
    stub(tmp_path, "python3.13", "3.13.1", venv=False)
    assert find(tmp_path).stdout.strip() == str(tmp_path / "python3.12")
    assert find(tmp_path, "oldest").stdout.strip() == str(tmp_path / "python3.11")


def test_pyenv_is_searched_when_asked(tmp_path: Path) -> None:
    stub(tmp_path, "python3", "3.11.7")
    versions = tmp_path / "home" / ".pyenv" / "versions"
    for version in ("3.12.11", "3.13.9", "3.13.10", "3.9.1"):
        stub(versions / version / "bin", "python", version)
    assert find(tmp_path).stdout.strip() == str(tmp_path / "python3")
    newest = find(tmp_path, "anywhere").stdout.strip()
    assert newest == str(versions / "3.13.10" / "bin" / "python")


def test_too_old(tmp_path: Path) -> None:
    stub(tmp_path, "python3", "3.9.18")
    done = find(tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        f"Python 3.11 or newer is needed, found 3.9.18 at {tmp_path}/python3; "
        "install it or run make PYTHON=/path/to/python3.12 demo\n"
    )


def test_chosen_python_is_checked(tmp_path: Path) -> None:
    stub(tmp_path, "python3.12", "3.12.1")
    old = stub(tmp_path, "mine", "3.8.2")
    good = stub(tmp_path, "yours", "3.11.0")
    assert find(tmp_path, PYTHON=str(good)).stdout.strip() == str(good)
    assert f"found 3.8.2 at {old}" in find(tmp_path, PYTHON=str(old)).stderr
    assert "PYTHON=nowhere does not run" in find(tmp_path, PYTHON="nowhere").stderr


@pytest.mark.parametrize("fallback", [True, False])
def test_without_venv(fallback: bool, tmp_path: Path) -> None:
    stub(tmp_path, "python3.13", "3.13.0", venv=False)
    if fallback:
        stub(tmp_path, "python3.11", "3.11.0")
        assert find(tmp_path).stdout.strip() == str(tmp_path / "python3.11")
    else:
        assert "apt install python3-venv" in find(tmp_path).stderr


def test_none_at_all(tmp_path: Path) -> None:
    done = find(tmp_path)
    assert done.returncode == 1
    assert "found none on PATH" in done.stderr
    assert done.stderr.count("\n") == 1
