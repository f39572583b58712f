"""`mbrl report --rlhf`: the course of a true reward is read off the metrics of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts import cli

ALPHA, BETA = 0.8, 0.5


def write(folder: Path, known: bool) -> None:
    lines = []
    for step, d in enumerate(np.linspace(0.0, 3.0, 31)):
        log = np.log(d) if d > 0.0 else 0.0
        line = {"step": step, "kl": d * d, "score": 0.1 + d, "score/spread": 0.2, "length": 7.0}
        lines.append(line | ({"gold": 0.5 + d * (ALPHA - BETA * log)} if known else {}))
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_course_of_the_true_reward_is_found(tmp_path: Path, capsys: Any) -> None:
    write(tmp_path / "run" / "ppo", True)
    write(tmp_path / "alone", False)
    for folder, names in (("run", {"gold", "score"}), ("alone", {"score"})):
        assert cli.main(["report", str(tmp_path / folder), "--rlhf"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert Path(found["figure"]).stat().st_size > 10_000
        assert set(found["fit"]) == names
        assert found["fit"]["score"]["alpha"] == pytest.approx(1.0, abs=1e-3)
        if folder == "run":
            gold = found["fit"]["gold"]
            assert gold["alpha"] == pytest.approx(ALPHA, abs=1e-3)
            assert gold["beta"] == pytest.approx(BETA, abs=1e-3)
            assert gold["r_squared"] == pytest.approx(1.0, abs=1e-4)
            # The slope alpha - beta (1 + log d) is 0 there.
            assert gold["summit"] == pytest.approx(np.exp(ALPHA / BETA - 1.0), rel=1e-2)
            # The other form is told too, and fits this course less well.
            assert 0.5 < gold["best_of_n"]["r_squared"] < gold["r_squared"]
            assert found["runs"][0]["gold"]["best"] > found["runs"][0]["gold"]["last"]


def test_other_folders_are_refused(tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["report", str(tmp_path), "--rlhf"]) == 2
    assert "expected the folder of mbrl rlhf ppo" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    assert cli.main(["report", str(tmp_path), "--rlhf"]) == 2
    assert "lacks one of the metrics score, kl" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path), "--rlhf", "--dream"]) == 2
