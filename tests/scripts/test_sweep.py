"""A sweep runs what is missing, and one failure takes nothing else with it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from scripts import sweep
from scripts.sweep import Job, SweepConfig, expand, run_jobs, seeds

# Stands for `mbrl train`: notes that it ran; seed 1 fails once, the others leave a result.
FAKE = """
import json, pathlib, sys
flags = dict(zip(sys.argv[2::2], sys.argv[3::2]))
out = pathlib.Path(flags["--out"])
ran = out / "ran"
ran.write_text((ran.read_text() if ran.exists() else "") + "x")
if flags["--seed"] == "1" and ran.read_text() == "x":
    sys.exit("boom")
result = {"seeds": {flags["--seed"]: {"return_mean": 12.5}}}
(out / "evaluation.json").write_text(json.dumps(result))
"""
COMMAND = (sys.executable, "-I", "-S", "-c", FAKE)


def times_run(jobs: list[Job]) -> list[int]:
    files = [job.out / "ran" for job in jobs]
    return [len(file.read_text()) if file.exists() else 0 for file in files]


def test_the_grid_is_expanded_to_commands() -> None:
    settings = ("planner.horizon=15,25", "learn_bounds=false", "hidden=64 64,32", "steps=100")
    jobs = expand(SweepConfig("pets", "A,device/B", "0..2", settings, "there"))
    assert len(jobs) == 2 * 3 * 2 * 2 == len({job.out for job in jobs})
    assert {job.out.parent for job in jobs} == {Path("there")}
    name = "there/pets-device-B-planner.horizon=15-learn-bounds=false-hidden=64-64-steps=100-2"
    wanted = (
        "pets --env device/B --seed 2 --planner.horizon 15 --no-learn-bounds --hidden 64 64 "
        f"--steps 100 --out {name}"
    )
    assert wanted in [shlex.join(job.arguments) for job in jobs]


def test_one_setting_is_changed_at_a_time() -> None:
    changes = ("unroll=1,3", "consistency=2.0,4.0")
    jobs = expand(SweepConfig("muzero", "A", "0", ("steps=100",), "there", vary=changes))
    assert [job.out.name for job in jobs] == [
        "muzero-A-steps=100-0",
        "muzero-A-steps=100-unroll=1-0",
        "muzero-A-steps=100-unroll=3-0",
        "muzero-A-steps=100-consistency=2.0-0",
        "muzero-A-steps=100-consistency=4.0-0",
    ]
    assert "--consistency 4.0 --out" in shlex.join(jobs[-1].arguments)
    with pytest.raises(ValueError, match="--vary: 'unroll' is given by --set as well"):
        expand(SweepConfig("muzero", set=("unroll=2",), vary=("unroll=1",)))
    with pytest.raises(ValueError, match="--vary: got 'unroll'"):
        expand(SweepConfig("muzero", vary=("unroll",)))


def test_flags_of_booleans_that_are_nested() -> None:
    assert sweep.as_flags("planner.keep", "False") == ["--planner.no-keep"]
    assert sweep.as_flags("planner.keep", "true") == ["--planner.keep"]


@pytest.mark.parametrize(("text", "numbers"), [("3..3", [3]), ("0..2", [0, 1, 2]), ("5,1", [5, 1])])
def test_seeds(text: str, numbers: list[int]) -> None:
    assert seeds(SweepConfig(seeds=text)) == numbers


@pytest.mark.parametrize("text", ["", "2..1", "a", "1,1", "0...2"])
def test_seeds_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="--seeds"):
        seeds(SweepConfig(seeds=text))


@pytest.mark.parametrize("settings", [("a",), ("a=",), ("a=1,",), ("a=1", "a=2"), ("seed=3",)])
def test_settings_that_are_not_understood(settings: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="--set"):
        expand(SweepConfig(set=settings))


@pytest.mark.fault
def test_a_failed_run_stops_no_other_and_only_it_runs_again(tmp_path: Path) -> None:
    jobs = expand(SweepConfig("pets", "A", "0..3", (), str(tmp_path)))
    (jobs[3].out).mkdir()
    (jobs[3].out / "evaluation.json").write_text('{"seeds": {"3": {"return_mean": 1.0}}}')

    codes = run_jobs(jobs, 2, COMMAND)
    assert codes == {jobs[0].out: 0, jobs[1].out: 1, jobs[2].out: 0}
    assert times_run(jobs) == [1, 1, 1, 0]
    shown = sweep.table(jobs, codes)
    assert "3 of 4 runs are finished" in shown
    assert "failed with exit code 1" in shown
    assert "boom" in (jobs[1].out / "output.log").read_text()

    codes = run_jobs(jobs, 2, COMMAND)
    assert codes == {jobs[1].out: 0}
    assert times_run(jobs) == [1, 2, 1, 0]
    assert "4 of 4 runs are finished" in sweep.table(jobs, codes)


def test_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "TRAIN", COMMAND)
    argv = ["--envs", "A", "--seeds", "0..1", "--out", str(tmp_path), "--set", "steps=10"]
    assert sweep.main(argv) == 1
    assert sweep.main(argv) == 0


def test_a_stop_starts_nothing_more_and_ends_what_runs(tmp_path: Path) -> None:
    jobs = expand(SweepConfig("pets", "A", "0..2", (), str(tmp_path)))
    asleep = (sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)")
    asked = iter([False] * 6)
    codes = run_jobs(jobs, 1, asleep, lambda: next(asked, True))
    assert codes == {jobs[0].out: -15}
    assert "0 of 3 runs are finished" in sweep.table(jobs, codes)


def test_a_dry_run_prints_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--envs", "A", "--seeds", "0..1", "--out", str(tmp_path), "--set", "steps=7"]
    argv += ["--set", "planner.horizon=9", "--dry-run"]
    folder = tmp_path / "pets-A-steps=7-planner.horizon=9-0"
    folder.mkdir()
    (folder / "evaluation.json").write_text("{}")
    assert sweep.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("mbrl train pets --env A --seed 1 --steps 7 --planner.horizon 9")
    assert not (tmp_path / "pets-A-steps=7-planner.horizon=9-1").exists()


def test_what_train_would_refuse_is_refused_before_the_first_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--agent: got 'pest'"):
        sweep.main(["--agent", "pest", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        sweep.main(["--set", "planner.horizn=3", "--out", str(tmp_path)])
    assert not any(tmp_path.iterdir())
