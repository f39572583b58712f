"""`mbrl report`: statistics over seeds, and a figure from whatever metrics there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mbrl.training.metrics import MetricsWriter
from scripts import curves, report
from scripts.cli import run as run_job


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def episode(step: int, value: float, seed: int = 0, **more: float) -> dict[str, Any]:
    return {
        "step": step,
        "kind": "train",
        "seed": seed,
        "time": 0.1,
        "episode_return": value,
        **more,
    }


def evaluation(step: int, value: float, seed: int = 0) -> dict[str, Any]:
    return {"step": step, "kind": "eval", "seed": seed, "time": 0.1, "eval/return_mean": value}


def test_moving_average_by_hand() -> None:
    values = np.array([2.0, 4.0, 6.0, 8.0])
    np.testing.assert_allclose(curves.smooth(values, 1), values)
    np.testing.assert_allclose(curves.smooth(values, 2), [2, 3, 5, 7])
    np.testing.assert_allclose(curves.smooth(values, 99), [2, 3, 4, 5])


def test_median_and_range_of_seeds_on_different_steps() -> None:
    steps = np.array([0.0, 10.0])
    seeds = [(steps, steps * k) for k in (1.0, 2.0, 6.0)]
    seeds.append((np.array([5.0, 20.0]), np.array([10.0, 40.0])))  # again 2 per step
    line = curves.curve(seeds)
    np.testing.assert_allclose(line.steps, [5, 10])
    np.testing.assert_allclose(line.median, [10, 20])
    np.testing.assert_allclose(line.low, [8.75, 17.5])  # quartiles of 1, 2, 2, 6
    np.testing.assert_allclose(line.high, [15, 30])
    three = curves.curve(seeds[:3])
    np.testing.assert_allclose(three.low, three.steps)
    np.testing.assert_allclose(three.high, 6 * three.steps)


def test_seeds_without_common_steps() -> None:
    line = curves.curve([(np.array([0.0, 1.0]), np.ones(2)), (np.array([5.0]), np.full(1, 3.0))])
    np.testing.assert_allclose(line.median, [2.0])


def test_summary_uses_the_last_evaluation_of_each_seed(tmp_path: Path) -> None:
    rows = [evaluation(100, 9.0), evaluation(200, 1.0), evaluation(100, 9.0, 1)]
    rows += [evaluation(200, 3.0, 1), episode(300, 77.0)]
    row = report.summarize(curves.load(write(tmp_path, *rows), "x"))
    assert row["mean"] == 2.0
    assert row["std"] == 1.0
    assert row["iqm"] == 2.0
    assert (row["min"], row["max"], row["seeds"], row["steps"]) == (1.0, 3.0, 2, 300)
    assert row["source"] == "evaluation"


def test_summary_without_evaluation(tmp_path: Path) -> None:
    rows = [episode(t, float(t)) for t in range(1, 21)]
    row = report.summarize(curves.load(write(tmp_path, *rows), "x"))
    assert row["mean"] == np.mean(range(11, 21))
    empty = write(tmp_path / "b", {"step": 5, "kind": "train", "seed": 0, "model/loss": 1.0})
    assert report.summarize(curves.load(empty, "x"))["source"] == "no finished episode"


def test_reads_what_the_metrics_writer_writes(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(100, {"episode_return": 1.5, "histogram": np.arange(3.0)})
        writer.write(100, {"return_mean": 7.0}, kind="eval", seed=0)
        writer.write(100, {"return_mean": 9.0, "gap": np.nan}, kind="eval", seed=1)
    loaded = curves.load(tmp_path, "x")
    assert set(loaded.series) == {"episode_return", "eval/return_mean"}
    assert report.summarize(loaded)["mean"] == 8.0


def test_seeds_in_folders_of_their_own_are_kept_apart(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / f"run{i}", evaluation(100, float(i)))
    assert report.summarize(curves.load(tmp_path, "x"))["mean"] == 1.0
    assert report.summarize(curves.load(tmp_path, "x"))["seeds"] == 3


def test_missing_numbers_and_a_torn_last_line_are_skipped(tmp_path: Path) -> None:
    write(tmp_path, episode(1, 2.0), episode(2, float("nan")), {"step": 3, "episode_return": None})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "episode_ret')
    steps, values = curves.load(tmp_path, "x").series["episode_return"][(0, 0)]
    assert (steps.tolist(), values.tolist()) == ([1], [2.0])


@pytest.mark.parametrize(
    "line", ["{not json", "[1, 2]", '{"episode_return": 1.0}', '{"step": "1"}']
)
def test_malformed_line_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "episode_return": 1}\n' + line + '\n{"step": 2}\n'
    )
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: "):
        curves.load(tmp_path, "x")


def test_panels_prefer_held_out_errors() -> None:
    names = ("value", "model/loss", "eval/loss", "model/holdout_mse", "reward/error", "a_loss")
    line = {(0, 0): (np.arange(3), np.arange(3.0))}
    flat = {(0, 0): (np.arange(3), np.zeros(3))}
    one = curves.Run("x", dict.fromkeys(names, line) | {"ends/holdout_error": flat})
    assert report.panels([one]) == ["model/holdout_mse", "a_loss", "model/loss"]


def png_size(file: Path) -> tuple[int, int]:
    data = file.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_figure_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        episode(t, -1000.0 + t + 10 * seed, seed, **{"model/holdout_mse": 1 / t})
        for t in range(100, 1100, 100)
        for seed in range(5)
    ]
    many = write(tmp_path / "many", *rows, *[evaluation(1000, -5.0, seed) for seed in range(5)])
    single = write(tmp_path / "single", episode(100, -3.0), episode(20_000, -2.0))
    out = tmp_path / "new" / "a.png"
    argv = [str(many), str(single), "--out", str(out), "--labels", "PETS", "other", "--json"]
    assert report.main(argv) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["run"] for row in printed["runs"]] == ["PETS", "other"]
    assert [row["mean"] for row in printed["runs"]] == [-5.0, -2.5]
    wide = png_size(out)
    assert report.main([str(single)]) == 0
    assert "single" in capsys.readouterr().out
    narrow = png_size(single / "curve.png")
    assert narrow[0] < wide[0]  # without model errors there is no second column
    assert narrow[1] == wide[1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "RUN: got none"),
        (["{nowhere}"], "expected a folder with metrics.jsonl"),
        (["{run}", "--labels", "a", "b"], "--labels: got 2 for 1 runs"),
        (["{run}", "--window", "0"], "--window: got 0, expected at least 1"),
        (["{run}", "--out", "curve.txt"], "--out: got curve.txt"),
        (["{empty}"], "holds no metrics yet"),
    ],
)
def test_bad_input(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "run", episode(1, 1.0))
    write(tmp_path / "empty")
    places = {name: str(tmp_path / name) for name in ("run", "empty", "nowhere")}
    assert run_job(report.main, [arg.format(**places) for arg in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def preference_rows(step: int, seed: int, **more: float) -> dict[str, Any]:
    names = ("reward", "true_reward", "agreement", "accuracy", "correlation", "gap")
    found = {f"preferences/{name}": step / 100 - seed for name in names}
    return {"step": step, "kind": "train", "seed": seed, "time": 0.1, **found, **more}


def drawn_by(monkeypatch: pytest.MonkeyPatch, *argv: str) -> list[tuple[Any, Any, str]]:
    """Draw, and return what lines were drawn: x, y and label."""
    from matplotlib.axes import Axes

    lines, plot = [], Axes.plot

    def spy(axes: Any, x: Any, y: Any, *fmt: str, **style: Any) -> Any:
        lines.append((np.asarray(x), np.asarray(y), style["label"]))
        return plot(axes, x, y, *fmt, **style)

    monkeypatch.setattr(Axes, "plot", spy)
    assert report.main([*argv, "--preferences"]) == 0
    return lines


def test_learned_and_true_reward_over_the_distance_from_the_first_policy(tmp_path, monkeypatch):
    for name, shift in (("a", 0), ("b", 5)):
        rows = [
            preference_rows(step, seed + shift, **{"policy/kl_from_start": step**2 / 100})
            for seed in (0, 1, 2)
            for step in (0, 10, 20)
        ]
        write(tmp_path / name, *rows)
    runs = [str(tmp_path / "a"), str(tmp_path / "b")]
    out = tmp_path / "x.png"
    lines = drawn_by(monkeypatch, *runs, "--out", str(out), "--labels", "one", "two")
    assert out.stat().st_size > 10_000
    assert [label for *_, label in lines] == ["one"] * 6 + ["two"] * 6
    x, y, _ = lines[0]
    np.testing.assert_allclose(x, [0, 1, 2])  # roots of the divergence
    np.testing.assert_allclose(y, [-1, -0.9, -0.8])  # the median over seeds
    x, y, _ = lines[8]
    np.testing.assert_allclose(x, [0, 10, 20])
    np.testing.assert_allclose(y, [-6, -5.9, -5.8])


def test_agents_without_a_distance_are_drawn_over_steps(tmp_path, monkeypatch):
    write(tmp_path, preference_rows(0, 0), preference_rows(10, 0))
    for x, _, _ in drawn_by(monkeypatch, str(tmp_path)):
        np.testing.assert_allclose(x, [0, 10])
    assert (tmp_path / "preferences.png").stat().st_size > 10_000


def test_preferences_of_a_run_without_any(tmp_path):
    write(tmp_path, episode(1, 2.0))
    with pytest.raises(ValueError, match=r"expected runs that learned their reward"):
        report.main([str(tmp_path), "--preferences"])
