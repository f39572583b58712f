"""What `mbrl train` says, or stops for, when the metrics of a run tell of trouble."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from agents.preferences import PreferencesConfig
from mbrl.exploitation import STEPS, exploited
from mbrl.preferences.monitor import Session, overoptimized
from mbrl.preferences.queries import schedule
from mbrl.training import run_directory
from mbrl.training.learner import Report

MAX_SKIPPED = 100
"""Updates in a row with a gradient that is not finite, after which a run is stopped."""

MAX_CLIPPED = 0.01
"""Share of clipped targets above which a run says so, once."""


def warn_of_unasked(asked: PreferencesConfig, steps: int) -> None:
    """Say when a run ends before all labels have been asked for."""
    held = min(asked.sessions, max(1, steps // asked.ask_every))
    labels = int(schedule(asked.labels, asked.sessions, asked.rate, asked.first)[:held].sum())
    if labels < asked.labels:
        print(
            f"warning: {steps:,} steps have room for {held} of {asked.sessions} sessions, one "
            f"every {asked.ask_every:,} steps: {labels} of {asked.labels} labels will be asked "
            f"for; set --preferences.ask-every {max(1, steps // asked.sessions)}, or fewer "
            "--preferences.sessions",
            file=sys.stderr,
        )


class Alarms:
    """Reads the metrics of a run as they come; each warning is given once."""

    def __init__(self, out: Path) -> None:
        """Begin; `out` is the folder of the run."""
        self._out = out
        self._clipped = self._overoptimized = self._exploited = False
        self._gaps: dict[int, list[float]] = {}
        self._sessions: dict[int, list[Session]] = {}
        self._labels: dict[int, int] = {}

    def check(self, report: Report) -> None:
        """Look at the newest metrics.

        Raises:
          ValueError: where gradients have stayed non-finite; training on is pointless.
        """
        if not report.metrics:
            return
        self._stop_if_diverged(report)
        self._warn_if_clipped(report)
        if "model/exploitation" in report.metrics:
            self._warn_if_exploited(report)
        if "preferences/agreement" in report.metrics:
            self._warn_if_overoptimized(report)

    def _stop_if_diverged(self, report: Report) -> None:
        """Stop a run whose gradients have stayed non-finite, with what is known of it (F9)."""
        for name, values in report.metrics.items():
            if name.endswith("skipped_in_a_row") and np.max(values) >= MAX_SKIPPED:
                known = {k: np.asarray(v).astype(str).tolist() for k, v in report.metrics.items()}
                file = self._out / "diagnostics.json"
                run_directory.write_json(file, {"step": report.step, **known})
                raise ValueError(
                    f"step {report.step}: the last {int(np.max(values))} updates had gradients "
                    f"that are not finite and were skipped; see {file}; lower the learning rate, "
                    "or look for extreme values in the data"
                )

    def _warn_if_clipped(self, report: Report) -> None:
        """Say that targets lie beyond the bins they are predicted with."""
        share = float(np.max(report.metrics.get("model/clipped_targets", 0.0)))
        if share <= MAX_CLIPPED or self._clipped:
            return
        self._clipped = True
        print(
            f"warning: step {report.step}: {share:.0%} of the targets of reward or value lie "
            "beyond the largest that is told apart and are taken for it; raise --model.max-reward, "
            "or --model.max-value where only returns are large",
            file=sys.stderr,
        )

    def _warn_if_exploited(self, report: Report) -> None:
        """Say that the model promises more than its agent gets, and goes on doing so."""
        names = ("exploitation", "predicted_return", "realized_return")
        found = [np.asarray(report.metrics[f"model/{name}"]) for name in names]
        for seed, (gap, predicted, realized) in enumerate(zip(*found, strict=True)):
            gaps = self._gaps.setdefault(seed, [])
            gaps.append(float(gap))
            if self._exploited or not exploited(gaps):
                continue
            self._exploited = True
            print(
                f"warning: step {report.step}: for the actions that were taken the model promises "
                f"a return of {predicted:.4g} over {STEPS} steps or less, and {realized:.4g} came: "
                f"{gap:.1f} deviations less, in four reports in a row. The agent may exploit the "
                "errors of its model; make it cautious (--penalty 1.0; dreamer: --members 5 as "
                "well; muzero: --model.members 5), or let it learn from more steps before it is "
                f"relied on (--random-steps); see model/exploitation in {self._out}",
                file=sys.stderr,
            )

    def _warn_if_overoptimized(self, report: Report) -> None:
        """Say that the learned reward rises while people or teachers disagree with it more."""
        names = ("labels", "reward", "agreement")
        found = [np.asarray(report.metrics[f"preferences/{name}"]) for name in names]
        for seed, (labels, reward, agreement) in enumerate(zip(*found, strict=True)):
            new = int(labels) - self._labels.get(seed, 0)
            if new <= 0:
                continue
            self._labels[seed] = int(labels)
            sessions = self._sessions.setdefault(seed, [])
            sessions.append(Session(new, float(reward), float(agreement)))
            changed = overoptimized(sessions)
            if changed is None or self._overoptimized:
                continue
            self._overoptimized = True
            before, now = changed.agreement
            print(
                f"warning: step {report.step}: the learned reward rises from "
                f"{changed.reward[0]:.2f} to {changed.reward[1]:.2f}, but its agreement with fresh "
                f"answers falls from {before:.0%} to {now:.0%}: the agent may exploit its faults; "
                "ask for more labels, or set --preferences.penalty 1.0; see mbrl report "
                f"{self._out} --preferences",
                file=sys.stderr,
            )
