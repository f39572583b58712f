"""The benchmark page says what the committed results say, missed targets included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts import benchmarks_page as page

ROW: dict[str, Any] = {
    "benchmark": "PETS",
    "task": "Pendulum-v1",
    "metric": "return",
    "value": -151.25,
    "target": ">= -180",
    "values": [-140.0, -151.25, -172.5],
    "seeds": 3,
    "steps": 2000,
    "command": "mbrl train pets --env Pendulum-v1",
    "versions": {"jax": "0.10.2", "gymnasium": "1.4.0"},
    "commit": "0123456789abcdef",
    "hardware": "2 CPU cores",
    "date": "2026-11-30",
    "note": "Greedy.",
}


def written(folder: Path, *rows: dict[str, Any], name: str = "a.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_committed_page_is_current() -> None:
    assert page.main(["--check"]) == 0


def test_a_row_and_its_command(tmp_path: Path) -> None:
    text = page.render(page.load(written(tmp_path, ROW)))
    cells = "| 1 | Pendulum-v1 | 2,000 | 3 | return | >= -180 | -151.2 (-172.5 to -140) "
    cells += "| met so far, 3 of 5 seeds |"
    assert "## PETS\n" in text
    assert cells in text
    assert "1. `mbrl train pets --env Pendulum-v1`" in text
    assert "2026-11-30, 0123456789ab, 2 CPU cores; gymnasium 1.4.0, jax 0.10.2. Greedy." in text
    assert "| agent |" not in text  # no row has one


def test_sections_in_order_of_appearance(tmp_path: Path) -> None:
    written(tmp_path, ROW | {"benchmark": "Speed"}, ROW, name="b.jsonl")
    written(tmp_path, ROW | {"benchmark": "First"}, ROW | {"benchmark": "Speed"}, name="a.jsonl")
    text = page.render(page.load(tmp_path))
    heads = [line for line in text.splitlines() if line.startswith("## ")]
    assert heads == ["## First", "## Speed", "## PETS"]
    assert text.count("| 1 | Pendulum-v1") == 4  # the rows of one run share its number
    assert text.count("1. `mbrl train") == 3


def test_rows_of_different_runs_have_numbers_of_their_own(tmp_path: Path) -> None:
    text = page.render(page.load(written(tmp_path, ROW, ROW, ROW | {"commit": "f" * 16})))
    assert text.count("| 1 | Pendulum-v1") == 2
    assert text.count("| 2 | Pendulum-v1") == 1
    assert "2. `mbrl train pets --env Pendulum-v1`  \n   2026-11-30, ffffffffffff" in text


@pytest.mark.parametrize(
    ("value", "target", "expected"),
    [
        (475.0, ">= 475", True),
        (474.9, ">= 475", False),
        (0.12, "<= 0.12", True),
        (0.13, "<=0.12", False),
        (-200.0, -180, False),
        (-150.0, "-180", True),
        (5.0, None, None),
        (float("nan"), ">= 1", False),
        (float("inf"), ">= 1", False),
    ],
)
def test_met(value: float, target: Any, expected: bool | None) -> None:
    assert page.met(value, target) is expected


@pytest.mark.parametrize(
    ("seeds", "verdict"),
    [({"seeds": 5, "values": [-151.25] * 5}, "met"), ({"seeds": None, "values": []}, "met")],
)
def test_a_target_is_met_by_all_seeds_or_without_any(
    seeds: dict[str, Any], verdict: str, tmp_path: Path
) -> None:
    text = page.render(page.load(written(tmp_path, ROW | seeds)))
    assert f"| {verdict} |" in text


def test_missed_targets_are_shown(tmp_path: Path) -> None:
    text = page.render(page.load(written(tmp_path, ROW | {"target": ">= -100"})))
    assert "| **missed** |" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": "high"}, "field 'value': got 'high', expected int or float"),
        ({"command": None}, "field 'command'"),
        ({"target": "about 3"}, "target: got 'about 3'"),
        ({"colour": "red"}, "unknown field 'colour'"),
        ({"seeds": 5}, "got 3 numbers for 5 seeds"),
        ({"value": -100.0}, "outside 'values'"),
    ],
)
def test_bad_result_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    written(tmp_path, ROW, ROW | change)
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: ") as error:
        page.load(tmp_path)
    assert message in str(error.value)


def test_check_fails_when_results_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--results", str(written(tmp_path, ROW)), "--page", str(tmp_path / "page.md")]
    assert page.main([*argv, "--check"]) == 1  # no page yet
    assert not (tmp_path / "page.md").exists()
    assert page.main(argv) == 0
    assert page.main([*argv, "--check"]) == 0
    written(tmp_path, ROW | {"value": -160.0})
    assert page.main([*argv, "--check"]) == 1
    assert "is out of date" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1,234"), (0.123456, "0.1235"), (-147.26, "-147.3"), (3, "3")]
)
def test_numbers(value: float, text: str) -> None:
    assert page.shown(value) == text
