"""`mbrl doctor` finds the combinations of packages that are known to break."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import doctor

GOOD = {"jax": "0.10.2", "jaxlib": "0.10.2", "numpy": "2.4.6", "mujoco": "4.0.0", "flax": "0.12.8"}


def problems(python: tuple[int, int] = (3, 11), **packages: str) -> list[doctor.Finding]:
    named = {name.replace("_", "-"): value for name, value in packages.items()}
    return doctor.clashes({**GOOD, **named}, python)


def test_a_good_environment_is_silent() -> None:
    assert problems() == []


@pytest.mark.parametrize(
    ("packages", "fix"),
    [
        ({"dm_control": "1.0.50"}, "pip install 'mujoco<4'"),
        ({"mbrl": "0.2.0"}, "pip uninstall mbrl, or one environment for each"),
        ({"jaxlib": "0.11.2"}, "pip install 'jaxlib==0.10.2'"),
        ({"jax_cuda13_plugin": "0.9.0"}, "pip install 'jax[cuda13]==0.10.2'"),
        ({"gymnax": "1.0.1", "jax": "0.12.0.1", "jaxlib": "0.12.0"}, "pip install 'jax<0.12'"),
    ],
)
def test_clash_and_fix(packages: dict[str, str], fix: str) -> None:
    (finding,) = problems(**packages)
    assert finding.clash
    assert finding.fix == fix
    assert all(version in finding.problem for version in list(packages.values())[:1])


@pytest.mark.parametrize(
    "packages",
    [
        {"dm_control": "1.0.50", "mujoco": "3.17.0"},
        {"gymnax": "1.0.1"},
        {"jaxlib": "0.10.1"},
        {"jax_cuda13_plugin": "0.10.2"},
    ],
)
def test_what_goes_together(packages: dict[str, str]) -> None:
    assert problems(**packages) == []


def test_notes_are_no_clashes() -> None:
    found = problems(brax="0.14.2", gym="0.26.2")
    assert [finding.clash for finding in found] == [False, False]


def test_old_python() -> None:
    (finding,) = problems(python=(3, 10))
    assert finding.clash


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("4.0.0", (4, 0, 0)),
        ("0.12.0.1", (0, 12, 0, 1)),
        ("2.13.0+cpu", (2, 13, 0)),
        ("1.0rc1", (1,)),
    ],
)
def test_release(text: str, numbers: tuple[int, ...]) -> None:
    assert doctor.release(text) == numbers


def test_report_of_this_process(capsys: pytest.CaptureFixture[str]) -> None:
    code = doctor.main(["--json"])
    report = json.loads(capsys.readouterr().out)
    assert code == int(any(finding["clash"] for finding in report["findings"]))
    assert report["packages"]["jax"]
    assert report["devices"]["devices"]
    assert set(report) >= {"python", "platform", "gl", "compilation_cache", "modelrl"}


def test_exit_code_and_fix_are_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "installed", lambda names: {**GOOD, "dm-control": "1.0.50"})
    monkeypatch.setattr(doctor, "unmet_requirements", list)
    assert doctor.main([]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "clash dm_control 1.0.50 does not run on mujoco 4.0.0" in shown
    assert "fix: pip install 'mujoco<4'" in shown


def test_package_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    assert doctor._shadowed() == []
    (tmp_path / "mbrl").mkdir()
    (tmp_path / "mbrl" / "__init__.py").write_text("")
    for name in [n for n in sys.modules if n == "mbrl" or n.startswith("mbrl.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    (finding,) = doctor._shadowed()
    assert finding.clash
    assert str(tmp_path / "mbrl") in finding.problem
