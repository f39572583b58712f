"""The study of best of n: its data are what it says, its numbers add up, its figure is drawn."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scripts import best_of_n, best_of_n_figure
from scripts.best_of_n import RULES, BestOfNConfig

CONFIG = BestOfNConfig("", seeds=2, pairs=400, pool=512, most=8, members=3)


def test_labels_are_wrong_as_often_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(best_of_n, "SAMPLE", 400)

    @jax.jit
    def make(key):
        gold = best_of_n.make_gold(CONFIG, key)
        pairs = best_of_n.make_pairs(CONFIG, gold, key)
        return [best_of_n.score(best_of_n.TRUTH, gold, x.reshape(-1, 16))[0] for x in pairs]

    noisy, clean = (x.reshape(-1, 2) for x in make(jax.random.key(0)))
    assert bool(jnp.all(clean[:, 0] >= clean[:, 1]))
    wrong = float(jnp.mean(noisy[:, 0] < noisy[:, 1]))
    assert abs(wrong - 0.25) < 3 * (0.25 * 0.75 / 400) ** 0.5
    # The policy scores 0 +- 1, also on other sequences than those it was standardized by.
    assert abs(float(clean.mean())) < 0.2
    assert abs(float(clean.std()) - 1.0) < 0.2


def test_chunks_are_put_together_in_order() -> None:
    tokens = jnp.arange(2048).reshape(1024, 2)
    got = best_of_n.in_chunks(lambda x: jnp.stack([x[:, 0], x[:, 1]]), tokens)
    np.testing.assert_array_equal(got, tokens.T)


def found(seed: int) -> dict[str, np.ndarray]:
    """Pursue one proxy that is the true reward and two that are noise."""
    key = jax.random.split(jax.random.key(seed), 2)
    true, noise = jax.random.normal(key[0], (512,)), jax.random.normal(key[1], (2, 512))
    learned = jnp.concatenate([true[None], noise])
    of = jax.jit(partial(best_of_n.pursued, CONFIG))(learned, true)
    alike = jax.jit(partial(best_of_n.pursued, CONFIG))(jnp.stack([true] * 3), true)
    for rule in RULES:
        np.testing.assert_allclose(alike[f"gold/{rule}"], alike[f"proxy/{rule}"], rtol=1e-4)
    oracle = {"gold/oracle": alike["gold/mean"], "single_accuracy": 0.6, "ensemble_accuracy": 0.7}
    return {name: np.asarray(x, float) for name, x in (of | oracle).items()}


def test_numbers_and_figure(tmp_path: Path) -> None:
    seeds = [found(i) for i in range(2)]
    stacked = {name: np.stack([s[name] for s in seeds]) for name in seeds[0]}
    summary = best_of_n.summary(CONFIG, stacked)
    single, mean = summary["gold/single"], summary["gold/mean"]
    want = stacked["gold/mean"][:, -1] - stacked["gold/single"][:, -1]
    assert mean["over_single"]["mean"] == pytest.approx(want.mean())
    assert mean["over_single"]["error"] == pytest.approx(abs(want[0] - want[1]) / 2)
    # One member of three is right: a third of what the oracle gains.
    oracle = summary["gold/oracle"]["mean"]
    assert single["mean"][-1] - single["mean"][0] == pytest.approx(
        (oracle[-1] - oracle[0]) / 3, abs=0.2
    )
    assert summary["proxy/single"]["mean"][-1] > single["mean"][-1] + 0.5
    written = {
        "variants": {"8 passes": summary, "1 pass": summary},
        "n": best_of_n.draws(CONFIG).tolist(),
        "kl": best_of_n.divergence(CONFIG).tolist(),
        "seconds": 1.0,
        "processor_seconds": 1.0,
        "cores": 1,
    }
    text = best_of_n.report(json.loads(json.dumps(written)))
    assert "8 passes, worst: gold" in text and "at n = 8" in text
    best_of_n_figure.draw(written, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_whole_study_at_a_small_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(best_of_n, "SAMPLE", 512)
    out = tmp_path / "study.json"
    sizes = "--seeds 2 --members 2 --pairs 256 --flips 0 --pool 1024 --most 16".split()
    assert best_of_n.main(["--out", str(out), "--figure", str(tmp_path / "a.png"), *sizes]) == 0
    written = json.loads(out.read_text("utf-8"))
    assert written["n"] == [1, 2, 4, 8, 16]
    assert list(written["variants"]) == list(best_of_n.VARIANTS)
    assert (tmp_path / "a.png").exists()
    plain = written["variants"]["8 passes"]
    # It has learned something, wants more than it gets, and the oracle gets the most.
    assert plain["ensemble_accuracy"]["mean"] > 0.55
    ends = [plain[name]["mean"][-1] for name in ("gold/mean", "proxy/mean", "gold/oracle")]
    assert 0.1 < ends[0] < ends[1] and ends[0] < ends[2]
    boot = written["variants"]["8 passes, bootstrapped"]
    assert boot["single_accuracy"] != plain["single_accuracy"]


def test_a_pool_that_is_not_made_of_chunks_is_refused() -> None:
    with pytest.raises(ValueError, match="^pool: got 1000"):
        BestOfNConfig("", pool=1000)
