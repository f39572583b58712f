"""Progress of a run: a bar with ETA on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from typing import Any

LINES = 20
"""Lines of a whole run where there is no terminal."""


class Progress:
    """Shows steps (or episodes), return, speed and remaining time on stderr; a context manager."""

    def __init__(
        self, title: str, step: int, total: int, unit: str = "step", value: str = "return"
    ) -> None:
        """Begin at `step` of `total`, counted in `unit`; `value` names the number beside them."""
        self._title, self._start, self._total, self._unit = title, step, total, unit
        self._began = time.perf_counter()
        self._shown = step
        self._name, self._digits = value, ".1f" if value == "return" else ".3f"
        self._value: float | None = None
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(),
                TextColumn(f"{{task.completed:.0f}}/{{task.total:.0f}} {self._unit}s"),
                TimeRemainingColumn(), TextColumn("{task.fields[told]}"),
                console=Console(stderr=True),
            )  # fmt: skip
            self._task = self._bar.add_task(
                self._title, total=self._total, completed=self._start, told="compiling"
            )
            self._bar.start()
        else:
            print(f"{self._title}: compiling, then {self._total} {self._unit}s", file=sys.stderr)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, value: float | None) -> None:
        """Show that `step` is reached; `value` None keeps the last one."""
        self._value = self._value if value is None else value
        speed = (step - self._start) / max(time.perf_counter() - self._began, 1e-9)
        told = f"{speed:.1f} {self._unit}s/s" + (
            "" if self._value is None else f"  {self._name} {self._value:{self._digits}}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, told=told)
        elif step >= self._total or step - self._shown >= self._total / LINES:
            self._shown = step
            left = (self._total - step) / max(speed, 1e-9)
            reached = f"{self._unit} {step}/{self._total}"
            print(f"{reached}  {told}  {left:.0f} s left", file=sys.stderr)
