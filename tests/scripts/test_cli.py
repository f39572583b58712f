"""The `mbrl` command: dispatch, flags, errors, exit codes."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tyro

from scripts import cli

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Inner:
    horizon: int = 15  # steps
    keep_elites: bool = True


@dataclasses.dataclass(frozen=True)
class Outer:
    """Train something."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    env: str = "Pendulum-v1"
    learning_rate: float = 1e-3  # Adam step size
    hidden: tuple[int, ...] = (200, 200)
    limit: int | None = None
    planner: Inner = Inner()


def test_flags_are_read_into_the_dataclass() -> None:
    argv = ["a", "b", "--env", "CartPole-v1", "--learning_rate", "0.01", "--hidden", "8", "9"]
    argv += ["--planner.horizon=7", "--planner.no-keep-elites", "--limit", "None"]
    config = cli.parse(Outer, argv, "mbrl train")
    expected = Outer(("a", "b"), "CartPole-v1", 0.01, (8, 9), None, Inner(7, False))
    assert config == expected


def test_defaults_of_a_preset() -> None:
    preset = Outer(env="Reacher-v5", planner=Inner(horizon=3))
    config = cli.parse(Outer, ["--limit", "4"], "mbrl train", default=preset)
    assert config == dataclasses.replace(preset, limit=4)


def test_flags_are_those_that_tyro_knows(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.parse(Outer, ["--help"], "mbrl train")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "Train something." in shown
    assert "Adam step size" in shown
    known = set(re.findall(r"--[a-z][a-z.-]*", shown)) - {"--help"}
    assert known == set(cli.flags(Outer))


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [
        ("--leaning-rate", "--learning-rate"),
        ("--leaning_rate=3", "--learning-rate"),
        ("--planner.horizn", "--planner.horizon"),
        ("--horizon", "--planner.horizon"),
    ],
)
def test_unknown_flag(flag: str, nearest: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.parse(Outer, ["--env", "x", flag, "3"], "mbrl train")
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    first, second, *listed = captured.err.splitlines()
    assert first.startswith(
        "error: mbrl train: unknown flag " + flag.split("=")[0].replace("_", "-")
    )
    assert first.endswith(f"did you mean {nearest}?")
    assert second == "valid flags:"
    assert set(" ".join(listed).split()) == set(cli.flags(Outer))


def test_unknown_flag_far_from_all_others(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.parse(Outer, ["--xyzzy"], "mbrl train")
    assert "did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--limit", "many"], ["--planner.horizon", "1.5"], ["--env"]])
def test_value_that_does_not_fit(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.parse(Outer, argv, "mbrl train")
    assert stop.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_unknown_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian", "pets"]) == 2
    error = capsys.readouterr().err
    assert "unknown job 'trian'; did you mean train?" in error
    assert all(f"  {job}" in error for job in cli.JOBS)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage" in capsys.readouterr().err
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {job}" in shown for job in cli.JOBS)
    assert cli.main(["--version"]) == 0
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert capsys.readouterr().out == f"modelrl {project['version']}\n"


def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def job(argv: list[str]) -> int:
        raise ValueError(f"horizon: got {argv[0]},\nexpected at least 1")

    monkeypatch.delenv("MBRL_TRACEBACK", raising=False)
    assert cli.run(job, ["0"]) == 2
    assert capsys.readouterr().err == "error: horizon: got 0, expected at least 1\n"
    monkeypatch.setenv("MBRL_TRACEBACK", "1")
    with pytest.raises(ValueError, match="horizon"):
        cli.run(job, ["0"])


def test_other_errors_keep_their_traceback() -> None:
    def job(argv: list[str]) -> int:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        cli.run(job, [])


def test_interrupt_and_exit_code() -> None:
    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    assert cli.run(interrupted, []) == 130
    assert cli.run(lambda argv: len(argv), ["a", "b", "c"]) == 3


def test_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m scripts.cli train pets --help | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: mbrl train pets")
    assert done.stderr == ""


def test_every_job_exists_and_every_script_runs_as_a_file(tmp_path: Path) -> None:
    for job in cli.JOBS:
        file = ROOT / "scripts" / f"{job}.py"
        assert file.is_file(), job
        assert "def main(argv: list[str]) -> int:" in file.read_text("utf-8"), job
    # From another folder, where only the file itself can find the checkout.
    for name in ("cli", "report"):
        done = subprocess.run(
            [sys.executable, str(ROOT / "scripts" / f"{name}.py"), "--help"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr


def test_command_line_needs_no_jax(tmp_path: Path) -> None:
    (tmp_path / "jax.py").write_text("raise ImportError('broken install')")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    code = "import sys; from scripts.cli import main; sys.exit(main(sys.argv[1:]))"

    def call(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, *argv],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )

    assert call("--version").returncode == 0
    doctor = call("doctor")
    assert doctor.returncode == 1
    assert "broken install" in doctor.stdout


COMPILE = """
import warnings
from scripts.cli import enable_compilation_cache
folder = enable_compilation_cache()
import jax
print(folder, jax.jit(lambda x: x * 3.0)(2.0))
warnings.warn("another warning")
"""


def test_compilation_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = {k: v for k, v in os.environ.items() if "CACHE" not in k}
    folder = tmp_path / "modelrl" / "jax"

    def compile_once() -> tuple[str, dict[str, int]]:
        done = subprocess.run(
            [sys.executable, "-c", COMPILE],
            cwd=ROOT,
            env={**env, "XDG_CACHE_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.stdout.split() == [str(folder), "6.0"], done.stderr
        assert done.stderr.count("UserWarning: another warning") == 1
        return done.stderr, {file.name: file.stat().st_size for file in folder.iterdir()}

    _, entries = compile_once()
    assert entries
    for name in entries:  # as a process leaves them that was killed while it wrote
        os.truncate(folder / name, 50)
    stderr, mended = compile_once()
    assert "persistent compilation cache" not in stderr
    assert mended.keys() == entries.keys()
    assert min(mended.values()) > 50
    # A home that cannot be written costs the cache, not the run.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert cli.enable_compilation_cache() is None


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked of glibc")
@pytest.mark.parametrize(("given", "seen"), [(None, "glibc.malloc.hugetlb=1"), ("", "")])
def test_the_command_asks_for_large_pages_unless_told(given: str | None, seen: str) -> None:
    script = "import os; from scripts import cli; cli.main(); print(os.environ['GLIBC_TUNABLES'])"
    env = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    env |= {} if given is None else {"GLIBC_TUNABLES": given}
    command = [sys.executable, "-c", script, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"modelrl {cli.version()}", seen]
