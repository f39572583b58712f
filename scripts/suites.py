"""Run a suite that takes too long for every change, and write what came of it as result lines.

  python scripts/suites.py faults --out docs/results/suites.jsonl

demo: `make demo` from a fresh clone with a fresh environment. faults, learning, slow: the tests
with that mark, those deselected by default included.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # run as a file: imports start at the checkout
    sys.path[0] = str(ROOT)

import tyro

from mbrl.training.run_directory import versions
from scripts.cli import parse, run
from scripts.results import Row, origin, write

MARKS = {"faults": "fault", "learning": "learning", "slow": "slow"}

DEMO_SECONDS = 300
"""What `make demo` may take on two cores, its install included."""


@dataclasses.dataclass(frozen=True)
class SuiteConfig:
    """Run one suite of this checkout and write its result lines."""

    suite: tyro.conf.Positional[Literal["demo", "faults", "learning", "slow"]]
    """What to run."""
    out: str
    """JSON-lines file; lines of other suites in it stay."""
    note: str = ""
    """Remark on every line."""


def main(argv: list[str]) -> int:
    """Run the job; returns 1 when a test fails or the demo does."""
    config = parse(SuiteConfig, argv, "suites.py")
    lines = demo() if config.suite == "demo" else tests(config.suite)
    found = versions()
    common = {
        "benchmark": "Suites",
        "command": f"python scripts/suites.py {config.suite} --out {config.out}",
        "commit": found.pop("commit", "unknown"),
        "date": time.strftime("%Y-%m-%d"),
        "note": config.note,
        **origin(found),
    }
    rows = [common | line for line in lines]
    write(Path(config.out), rows)
    for row in rows:
        print(f"{row['task']}: {row['value']:.0f} {row['metric']}")
    return int(any(row["metric"] == "tests that fail" and row["value"] for row in rows))


def demo() -> list[Row]:
    """Time `make demo` in a fresh clone of this checkout's last commit.

    Raises:
      ValueError: when it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(Path(folder) / "cache")}
        start = time.perf_counter()
        code = subprocess.run(["make", "demo"], cwd=clone, env=environment, check=False).returncode
        seconds = time.perf_counter() - start
        left = [
            (clone / "runs" / "demo" / name).exists() for name in ("metrics.jsonl", "curve.png")
        ]
    if code or not all(left):
        raise ValueError(f"make demo: exit code {code}, metrics and curve there: {left}")
    return [
        {"task": "make demo", "setting": "fresh clone, environment and cache", "metric": "seconds",
         "value": seconds, "target": f"<= {DEMO_SECONDS}"}
    ]  # fmt: skip


def tests(suite: str) -> list[Row]:
    """Run the tests of a mark, one process per core, and count how they end."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        workers = str(os.cpu_count() or 1) if suite != "learning" else "0"
        command = [sys.executable, "-m", "pytest", "-m", MARKS[suite], "-n", workers]
        environment = os.environ | ({"XLA_FLAGS": ""} if suite == "learning" else {})
        subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, env=environment, check=False)
        return list(counts(suite, ElementTree.parse(report).getroot()))


def counts(suite: str, report: Any) -> Iterable[Row]:
    """Read a JUnit report: how many tests passed, how many did not, and their seconds.

    Raises:
      ValueError: when no test ran.
    """
    suites = list(report.iter("testsuite"))
    total, failures, errors, skipped = (
        sum(int(s.get(name, 0)) for s in suites)
        for name in ("tests", "failures", "errors", "skipped")
    )
    if not total - skipped:
        raise ValueError(f"{suite}: no test ran; install what development needs (make test)")
    task = f"pytest -m {MARKS[suite]}"
    failed = failures + errors
    yield {"task": task, "metric": "tests that pass", "value": total - failed - skipped}
    yield {"task": task, "metric": "tests that fail", "value": failed, "target": "<= 0"}
    yield {
        "task": task, "metric": "seconds", "value": sum(float(s.get("time", 0)) for s in suites)
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(run(main))
