"""The examples of the documentation run, and what they say is true."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "examples"


def test_reward_modeling_tells_its_story(capsys: pytest.CaptureFixture[str]) -> None:
    file = EXAMPLES / "reward_modeling_pairwise.py"
    assert len(file.read_text("utf-8").splitlines()) < 80
    runpy.run_path(str(file))
    lines = capsys.readouterr().out.splitlines()
    loss, right, calibration, ladder, *climb = (
        [float(x) for x in re.findall(r"-?\d+\.\d+", line)] for line in lines
    )
    assert loss[0] == pytest.approx(0.693, abs=0.05)
    assert loss[1] < 0.5
    # Nobody can foretell more of noisy answers than the reward that they were drawn from.
    assert right[1] - 0.06 < right[0] <= right[1]
    assert calibration[0] < 0.05
    assert ladder == sorted(ladder)
    learned, true = zip(*climb, strict=True)
    assert list(learned) == sorted(learned) and learned[-1] > learned[0] + 2.0
    assert max(true) > true[0] + 1.0 > true[-1] + 2.0


def test_the_page_of_the_example_shows_it_as_it_is() -> None:
    page = (EXAMPLES.parent / "reward_modeling.md").read_text("utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    assert code == (EXAMPLES / "reward_modeling_pairwise.py").read_text("utf-8")
