"""What the metrics of a run are taken for signs of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from agents.preferences import PreferencesConfig
from mbrl.training.learner import Report
from scripts.alarms import Alarms, warn_of_unasked


def report(step: int, **metrics: Any) -> Report:
    nothing: Any = None
    found = {f"preferences/{name}": np.asarray(x, float) for name, x in metrics.items()}
    return Report(step, nothing, found, nothing, lambda: None)


def test_a_reward_that_is_exploited_is_told_once(tmp_path: Path, capsys):
    alarms = Alarms(tmp_path)
    for step in range(12):
        # The first seed is in order; answers of the second turn against its reward.
        agreement = [0.8, 0.9 if step < 5 else 0.4]
        alarms.check(
            report(step, labels=[20 * step + 20] * 2, reward=[step] * 2, agreement=agreement)
        )
    text = capsys.readouterr().err
    assert text.count("warning") == 1
    assert "falls from 90% to" in text
    assert f"mbrl report {tmp_path} --preferences" in text


def test_a_session_counts_once_however_often_it_is_reported(tmp_path: Path, capsys):
    alarms = Alarms(tmp_path)
    for step in range(40):
        alarms.check(report(step, labels=[100], reward=[step], agreement=[0.9 - 0.02 * step]))
    assert capsys.readouterr().err == ""


def test_reports_between_sessions_do_not_take_the_place_of_sessions(tmp_path: Path, capsys):
    alarms = Alarms(tmp_path)
    # 100 answers against 100 tell 90 % from 75 %; the two sessions that six reports hold do not.
    for session in range(8):
        for _ in range(3):
            agreement = 0.9 if session < 4 else 0.75
            alarms.check(
                report(1, labels=[25 * session + 25], reward=[session], agreement=[agreement])
            )
    assert "falls from 90% to 75%" in capsys.readouterr().err


def gaps(step: int, *gap: float) -> Report:
    nothing: Any = None
    found = {"exploitation": gap, "predicted_return": [50.0] * len(gap), "realized_return": gap}
    metrics = {f"model/{name}": np.asarray(x, float) for name, x in found.items()}
    return Report(step, nothing, metrics, nothing, lambda: None)


def test_a_model_that_is_exploited_is_told_once(tmp_path: Path, capsys):
    alarms = Alarms(tmp_path)
    # The first seed is wrong in its favour now and then, the second always from step 2 on.
    for step in range(9):
        alarms.check(gaps(step, 3.0 if step % 4 else 0.0, 2.0 if step > 1 else np.nan))
        assert ("warning" in capsys.readouterr().err) == (step == 5)


def test_a_model_that_errs_to_both_sides_or_is_cautious_is_not_exploited(tmp_path: Path, capsys):
    alarms = Alarms(tmp_path)
    for step in range(40):
        alarms.check(gaps(step, 5.0 * (-1) ** step, -9.0, 0.9))
    assert capsys.readouterr().err == ""


def test_runs_without_preferences_and_before_the_first_update(tmp_path: Path, capsys):
    alarms = Alarms(tmp_path)
    alarms.check(report(1))
    nothing: Any = None
    alarms.check(Report(2, nothing, {"model/loss": np.ones(1)}, nothing, lambda: None))
    assert capsys.readouterr().err == ""


def test_labels_that_a_run_is_too_short_for_are_told(capsys):
    asked = PreferencesConfig(labels=100, sessions=20, ask_every=1000, rate="constant", first=0.24)
    warn_of_unasked(asked, 20_000)
    assert capsys.readouterr().err == ""
    warn_of_unasked(asked, 4_999)
    text = capsys.readouterr().err
    # 24 in the first session, and 4 in each of three others.
    assert "room for 4 of 20 sessions" in text
    assert "36 of 100 labels" in text
    assert "--preferences.ask-every 249" in text
