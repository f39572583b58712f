"""Write `docs/benchmarks.md` from the committed result files `docs/results/*.jsonl`.

One line of a result file is one row of the page:

  {"benchmark": "PETS", "task": "Pendulum-v1", "agent": "pets", "setting": "learned reward",
   "metric": "return", "target": ">= -180", "value": -151.2, "values": [-148.0, -151.2],
   "steps": 2000, "seeds": 2, "command": "mbrl train pets ...", "versions": {"jax": "0.10.2"},
   "commit": "1a2b3c4", "hardware": "2 CPU cores", "date": "2026-11-30", "note": ""}

`target`, `values`, `steps`, `seeds`, `setting`, `agent` and `note` may be left out.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # run as a file: imports start at the checkout
    sys.path[0] = str(ROOT)

from scripts.cli import parse, run

SEEDS = 5
"""Seeds that a target of returns is for."""

REQUIRED = {
    "benchmark": str,
    "task": str,
    "metric": str,
    "value": (int, float),
    "command": str,
    "versions": dict,
    "commit": str,
    "hardware": str,
    "date": str,
}
OPTIONAL = {
    "agent": str,
    "setting": str,
    "target": (str, int, float, type(None)),
    "values": list,
    "steps": (int, type(None)),
    "seeds": (int, type(None)),
    "note": str,
}
HEADER = """# Benchmarks

<!-- Written by scripts/benchmarks_page.py from docs/results/*.jsonl: change those instead. -->

Every figure was measured by the command beside it, at the commit and on the machine named
there. Brackets hold the lowest and the highest seed. Targets that were missed stay listed;
those of returns are for five seeds.
"""


@dataclass(frozen=True)
class PageConfig:
    """Write the benchmark page from the committed result files."""

    results: str = str(ROOT / "docs" / "results")  # folder of *.jsonl files
    page: str = str(ROOT / "docs" / "benchmarks.md")  # Markdown file to write
    check: bool = False  # write nothing; fail when the page is not what the results give


def main(argv: list[str]) -> int:
    """Write the page, or with `--check` return 1 when it is out of date."""
    config = parse(PageConfig, argv, "benchmarks_page.py")
    text = render(load(Path(config.results)))
    page = Path(config.page)
    if not config.check:
        page.write_text(text, "utf-8")
        print(f"wrote {page}")
        return 0
    if page.is_file() and page.read_text("utf-8") == text:
        return 0
    print(f"{page} is out of date: run python scripts/benchmarks_page.py", file=sys.stderr)
    return 1


def load(folder: Path) -> list[dict[str, Any]]:
    """Read and check all result files, in the order of their names and lines.

    Raises:
      ValueError: naming file and line of a result that lacks a field or has a wrong one.
    """
    rows = []
    for file in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                _check(row)
            except ValueError as error:
                raise ValueError(f"{file.name}, line {number}: {error}") from error
            rows.append(row)
    return rows


def _check(row: Any) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    for name, kind in REQUIRED.items():
        if not isinstance(row.get(name), kind):
            raise ValueError(f"field {name!r}: got {row.get(name)!r}, expected {_named(kind)}")
    for name, kind in OPTIONAL.items():
        if name in row and not isinstance(row[name], kind):
            raise ValueError(f"field {name!r}: got {row[name]!r}, expected {_named(kind)}")
    unknown = row.keys() - REQUIRED.keys() - OPTIONAL.keys()
    if unknown:
        raise ValueError(f"unknown field {sorted(unknown)[0]!r}")
    values, seeds = row.get("values"), row.get("seeds")
    if values and seeds is not None and len(values) != seeds:
        raise ValueError(f"field 'values': got {len(values)} numbers for {seeds} seeds")
    if values and not min(values) <= row["value"] <= max(values):
        raise ValueError(f"field 'value': got {row['value']}, which is outside 'values'")
    met(row["value"], row.get("target"))


def _named(kind: type | tuple[type, ...]) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(k.__name__ for k in kinds)


def met(value: float, target: str | float | None) -> bool | None:
    """Compare a result with its target, `">= 475"` or `"<= 0.12"` (a bare number: at least).

    Returns:
      None without a target. A result that is not finite meets none.

    Raises:
      ValueError: when the target is not understood.
    """
    if target is None:
        return None
    text = str(target).strip()
    sign = text[:2] if text[:2] in (">=", "<=") else ""
    try:
        bound = float(text.removeprefix(sign))
    except ValueError:
        raise ValueError(f"target: got {target!r}, expected '>= number' or '<= number'") from None
    if not math.isfinite(value):
        return False
    return value <= bound if sign == "<=" else value >= bound


def render(rows: Sequence[dict[str, Any]]) -> str:
    """Return the page: one section per benchmark, each a table and the commands behind it."""
    sections = dict.fromkeys(row["benchmark"] for row in rows)
    parts = [HEADER] + [
        _section(name, [row for row in rows if row["benchmark"] == name]) for name in sections
    ]
    if not rows:
        parts.append("No results are committed yet.\n")
    return "\n".join(parts)


def _section(name: str, rows: Sequence[dict[str, Any]]) -> str:
    sources = list(dict.fromkeys(_source(row) for row in rows))  # one run may fill many rows
    columns: dict[str, list[str]] = {
        "#": [str(sources.index(_source(row)) + 1) for row in rows],
        "task": [row["task"] for row in rows],
        "agent": [row.get("agent", "") for row in rows],
        "setting": [row.get("setting", "") for row in rows],
        "steps": [_count(row.get("steps")) for row in rows],
        "seeds": [_count(row.get("seeds")) for row in rows],
        "metric": [row["metric"] for row in rows],
        "target": [_target(row.get("target")) for row in rows],
        "measured": [_measured(row) for row in rows],
        "result": [_verdict(row) for row in rows],
    }
    columns = {head: cells for head, cells in columns.items() if any(cells)}
    lines = [f"## {name}", "", _line(list(columns)), _line(["---"] * len(columns))]
    lines += [_line(cells) for cells in zip(*columns.values(), strict=True)]
    lines.append("")
    lines += [f"{i}. {source}" for i, source in enumerate(sources, 1)]
    return "\n".join(lines) + "\n"


def _source(row: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in sorted(row["versions"].items()))
    note = f" {row['note']}" if row.get("note") else ""
    return (
        f"`{row['command']}`  \n"
        f"   {row['date']}, {row['commit'][:12]}, {row['hardware']}; {versions}.{note}"
    )


def _verdict(row: Mapping[str, Any]) -> str:
    reached = met(row["value"], row.get("target"))
    if reached is None:
        return ""
    if not reached:
        return "**missed**"
    # A target of returns is one for five seeds: fewer can miss it, but not meet it.
    few = (row.get("seeds") or SEEDS) < SEEDS
    return f"met so far, {row['seeds']} of {SEEDS} seeds" if few else "met"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _target(target: str | float | None) -> str:
    if target is None or isinstance(target, str):
        return (target or "").strip()
    return f">= {shown(target)}"


def _measured(row: dict[str, Any]) -> str:
    values = row.get("values") or []
    if len(values) < 2:
        return shown(row["value"])
    return f"{shown(row['value'])} ({shown(min(values))} to {shown(max(values))})"


def shown(value: float) -> str:
    """Format a number with four significant digits, large ones in full."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(run(main))
