"""Suites leave result lines that the benchmark page accepts."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from scripts import benchmarks_page, suites


def report(tests: int, failures: int = 0, errors: int = 0, skipped: int = 0) -> ElementTree.Element:
    text = (
        f'<testsuites><testsuite tests="{tests}" failures="{failures}" errors="{errors}" '
        f'skipped="{skipped}" time="12.5"/></testsuites>'
    )
    return ElementTree.fromstring(text)


def test_counts_what_passed_and_what_did_not():
    rows = list(suites.counts("faults", report(10, failures=2, errors=1, skipped=3)))
    assert {row["metric"]: row["value"] for row in rows} == {
        "tests that pass": 4, "tests that fail": 3, "seconds": 12.5
    }  # fmt: skip
    assert {row["task"] for row in rows} == {"pytest -m fault"}


def test_a_suite_in_which_nothing_ran_is_no_success():
    with pytest.raises(ValueError, match="no test ran"):
        list(suites.counts("slow", report(2, skipped=2)))


@pytest.mark.parametrize("failures", [0, 1])
def test_lines_reach_the_page_and_a_failure_the_exit_code(monkeypatch, tmp_path: Path, failures):
    monkeypatch.setattr(suites, "tests", lambda suite: suites.counts(suite, report(5, failures)))
    out = tmp_path / "suites.jsonl"
    assert suites.main(["faults", "--out", str(out)]) == failures
    page = benchmarks_page.render(benchmarks_page.load(tmp_path))
    assert "pytest -m fault" in page
    assert ("**missed**" in page) == bool(failures)
    assert len(out.read_text().splitlines()) == 3
    assert json.loads(out.read_text().splitlines()[0])["command"].startswith("python scripts/suite")
