"""Turn finished pipelines of RLHF into result lines; see `results.py rlhf`."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

MINUTES = 15.0
"""A pipeline on the synthetic task should take no longer."""


def pipelines(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Summarize pipelines that differ in their seeds only.

    Raises:
      ValueError: for a folder without a result, or results that do not belong together.
    """
    files = [folder / "result.json" for folder in folders]
    if missing := [file for file in files if not file.exists()]:
        raise ValueError(f"{missing[0]}: not found; finish the pipeline first")
    found = [json.loads(file.read_text("utf-8")) for file in files]
    alike = {json.dumps(_settings(one["config"]), sort_keys=True) for one in found}
    commits = {one["versions"].get("commit", "unknown") for one in found}
    if len(alike) > 1 or len(commits) > 1:
        raise ValueError(
            f"{folders[0]}: got pipelines of {len(alike)} settings and {len(commits)} commits, "
            "expected one that differs in seeds only"
        )
    seeds = [one["config"]["seed"] for one in found]
    common = {
        "benchmark": "RLHF",
        "task": "grammar",
        "seeds": len(found),
        "command": _command(seeds, found[0]["config"].get("num_seeds", 1)),
        "commit": commits.pop(),
        "date": time.strftime("%Y-%m-%d", time.localtime(files[-1].stat().st_mtime)),
    }
    return [common | row for row in _rows(found)]


def study(file: Path) -> list[dict[str, Any]]:
    """Summarize what `best_of_n.py` has written, by the way that the proxies were trained."""
    found = json.loads(file.read_text("utf-8"))
    size, most = found["config"]["members"], found["n"][-1]
    common = {
        "benchmark": "RLHF",
        "task": f"best of {most} by learned rewards, {found['config']['seeds']} true ones",
        "command": f"python scripts/best_of_n.py --out {file.name} --figure FIGURE.png",
        **{name: found[name] for name in ("versions", "hardware", "commit", "date")},
        "note": f"{found['processor_seconds']:.0f} s of processor time for all ways to train",
    }
    rows = []
    for name, one in found["variants"].items():
        gold = one["gold/single"]
        rows += [
            {"metric": "accuracy of one on clean pairs", "target": ">= 0.68",
             "value": one["single_accuracy"]["mean"]},
            {"metric": f"accuracy of the mean of {size}", "target": ">= 0.71",
             "value": one["ensemble_accuracy"]["mean"]},
            {"metric": "R2 of the curve of Gao et al., one reward", "target": ">= 0.95",
             "value": gold["fit"]["r_squared"]},
            {"metric": f"true reward at n = {most}, one reward", "value": gold["mean"][-1]},
            {"metric": "fall of the true reward from its peak, one reward",
             "value": gold["fall"]["mean"]},
            *(
                {"metric": f"true reward at n = {most} gained by {words}",
                 "value": one[f"gold/{rule}"]["over_single"]["mean"]}
                for rule, words in (
                    ("mean", "the mean"), ("worst", "the worst case"),
                    ("uwo", "the mean less half the variance"),
                )
            ),
        ]  # fmt: skip
        for row in rows:
            row.setdefault("setting", name)
    return [common | row for row in rows]


def _command(seeds: Sequence[int], at_once: int) -> str:
    if at_once > 1:
        return f"mbrl rlhf run --seed {min(seeds)} --num-seeds {at_once}"
    return " && ".join(f"mbrl rlhf run --seed {s} --out runs/rlhf-{s}" for s in seeds)


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in ("seed", "out")}


def _rows(found: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    def row(agent: str, metric: str, values: list[float], target: str | None = None) -> Any:
        value = statistics.mean(values)
        return {"agent": agent, "metric": metric, "value": value, "values": values,
                "target": target}  # fmt: skip

    policies = [name for name in ("sft", "ppo", "dpo") if name in found[0]]
    for name in policies:
        for metric, words in (
            ("gold", "true reward, mean over test prompts"),
            ("score", "learned reward, mean over test prompts"),
            ("kl", "nats per response from the reference"),
        ):
            if metric in found[0][name]:
                yield row(name, words, [one[name][metric]["mean"] for one in found])
    if "gold" in found[0]["ppo"] and len(found) > 1:
        gains = [one["ppo"]["gold"]["mean"] - one["sft"]["gold"]["mean"] for one in found]
        error = statistics.stdev(gains) / len(gains) ** 0.5
        yield {
            "agent": "ppo",
            "metric": "true reward gained over sft, in standard errors over seeds",
            "value": statistics.mean(gains) / error,
            "target": ">= 2",
        }
    yield row("reward", "accuracy on test rankings", [one["reward"]["accuracy"] for one in found])
    seconds = [one["seconds"] / 60.0 for one in found if one["seconds"] is not None]
    if len(seconds) == len(found):
        yield row("all stages", "minutes", seconds, f"<= {MINUTES:g}")
