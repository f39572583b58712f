"""`scripts/pursuit_study.py`: what is pursued, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mbrl.preferences.best_of_n import best_of_n_kl
from scripts import pursuit_study, pursuit_study_figure
from scripts.pursuit import Pursuit
from scripts.studies import spread


def courses() -> list[Pursuit]:
    """Two seeds whose true reward rises by 1 until update 20, and falls by 2 until update 60."""
    update = np.arange(60.0)
    gold = np.where(update < 20, update / 20, 1 - (update - 20) / 20)
    found = {"update": update, "kl": update / 10, "score": update / 10, "gold": gold}
    return [
        Pursuit(f"seed {seed}", found | {"gold": gold + seed, "score/spread": 0.1 * update})
        for seed in range(2)
    ]


@pytest.mark.parametrize("name", pursuit_study.ARMS)
def test_every_arm_pursues_what_it_says(name: str) -> None:
    arm = pursuit_study.ARMS[name]
    learner = pursuit_study.pursuer(arm)
    assert (learner.kl_coef, learner.risk) == (0.0, arm.rule)
    assert learner.risk_coef == pursuit_study.UWO_COEF
    members = pursuit_study.TRAINED[arm.reward]["members"]
    assert (members > 1) == ("five" in name or "half" in name or "," in name)


def test_what_a_budget_leaves_of_the_peak() -> None:
    told = pursuit_study.told(courses(), budget=2.0)
    assert told["gold"]["mean"][:2] == [0.5, 0.55]
    # Means over five updates: the budget is passed at update 21 of the middle, the peak is at 20.
    peak = np.mean([0.9, 0.95, 1.0, 0.95, 0.9])
    assert told["of_peak_at_budget"][0] == pytest.approx((peak - 0.01) / peak, abs=0.02)
    assert told["rise"]["mean"] == pytest.approx(1.0)
    assert told["fall"]["mean"] == pytest.approx(1.95)
    # A budget that is never spent leaves what training ends with.
    unspent = pursuit_study.told(courses(), budget=100.0)
    assert unspent["of_peak_at_budget"][0] == pytest.approx(-0.85 / peak, abs=1e-6)


def test_the_figure_has_a_column_per_arm(tmp_path: Path) -> None:
    n = jnp.asarray(2 ** np.arange(5))
    best: dict[str, Any] = {
        "n": n.tolist(),
        "kl": np.asarray(best_of_n_kl(n)).tolist(),
    }
    values = spread(np.stack([np.arange(5.0), np.arange(5.0) + 1]))
    found = {"config": {"budget": 1.0}, "best_of_n": best, "ppo": {}}
    for name in ("one", "mean of five"):
        best[name] = {"gold": values, "score": values}
        found["ppo"][name] = pursuit_study.told(courses(), 1.0)
    pursuit_study_figure.draw(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
