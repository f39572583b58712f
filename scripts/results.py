"""Turn finished runs and speed measurements into the result lines of the benchmark page.

  python scripts/results.py collect RUN... --out docs/results/pets.jsonl
  python scripts/results.py bench FILE.json --out docs/results/planning.jsonl
  python scripts/results.py rlhf FOLDER... | FILE.json --out docs/results/rlhf.jsonl

Lines of the same benchmark, task, agent, setting, steps and metric are replaced.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # run as a file: imports start at the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro

from agents.preferences import PreferencesConfig
from agents.presets import preset
from mbrl.training import run_directory
from scripts import config_json
from scripts.cli import parse, run
from scripts.results_rlhf import pipelines, study
from scripts.speed import cores_text, speed

Row = dict[str, Any]
IDENTITY = ("benchmark", "task", "agent", "setting", "steps", "metric")

TITLES = {
    "pets": "PETS", "dreamer": "Dreamer", "muzero": "MuZero", "ppo": "PPO", "mbpo": "MBPO",
    "sac": "SAC",
}  # fmt: skip
ALIKE = ("seeds", "versions", "log_every", "save_every", "eval_episodes")
"""Settings in which runs of one result may differ."""


class Target(NamedTuple):
    """What a return should reach: its median over seeds, or that of every seed."""

    bound: float
    every_seed: bool = False


_PENDULUM_LABELS = "--preferences.labels 200 --eval-env Pendulum-v1".split()
_PETS_LABELS = (
    "--preferences.labels 100 --preferences.sessions 8 --preferences.ask-every 400 "
    "--preferences.segment 25"
).split()
_SAC_LABELS = (
    "--preferences.labels 200 --preferences.sessions 10 --preferences.ask-every 500 "
    "--eval-env Pendulum-v1"
).split()
_CHEETAH_LABELS = (
    "--preferences.labels 700 --preferences.sessions 50 --preferences.ask-every 5000 "
    "--preferences.first 0.1 --preferences.segment 30 --preferences.updates 20"
).split()
_CURIOUS = "--uncertainty-scale raw --explore disagreement".split()
CHEETAH = 3380.0
"""What PPO reaches in HalfCheetah-v5 after 300,000 steps with the true reward."""
TARGETS = {
    ("pets", "Pendulum-v1", 1_000): Target(-250.0),
    ("pets", "Pendulum-v1", 2_000): Target(-180.0),
    ("pets", "device/CartPoleSwingUp", 2_000): Target(170.0),
    ("pets", "InvertedPendulum-v5", 2_500): Target(1_000.0, every_seed=True),
    ("pets", "InvertedPendulum-v5", 10_000): Target(1_000.0, every_seed=True),
    ("pets", "CartPole-v1", 3_000): Target(475.0, every_seed=True),
    ("pets", "Reacher-v5", 5_000): Target(-6.0),
    ("dreamer", "CartPole-v1", 10_000): Target(475.0, every_seed=True),
    ("dreamer", "Pendulum-v1", 20_000): Target(-200.0),
    ("dreamer", "Pendulum-v1", 10_000): Target(-200.0),
    ("dreamer", "device/Catch", 5_000): Target(1.0, every_seed=True),
    ("dreamer", "device/PixelCatch", 20_000): Target(1.0, every_seed=True),
    ("dreamer", "device/MemoryChain", 5_000): Target(0.9, every_seed=True),
    ("dreamer", "InvertedPendulum-v5", 10_000): Target(1_000.0, every_seed=True),
    ("dreamer", "dm_control/cartpole-balance-v0", 50_000): Target(490.0),
    ("muzero", "CartPole-v1", 25_000): Target(475.0, every_seed=True),
    ("muzero", "CartPole-v1", 25_000, "--simulations", "4"): Target(475.0, every_seed=True),
    ("muzero", "CartPole-v1", 10_000): Target(475.0, every_seed=True),
    ("muzero", "device/PixelCatch", 20_000): Target(1.0, every_seed=True),
    ("muzero", "Acrobot-v1", 60_000): Target(-100.0),
    ("muzero", "Pendulum-v1", 30_000): Target(-200.0),
    ("muzero", "LunarLander-v3", 300_000, "--on-bad", "clip"): Target(200.0),
    ("muzero", "device/TicTacToe", 150_000, "--eval-env", "device/TicTacToePerfect"): Target(
        0.0, every_seed=True
    ),
    ("mbpo", "Pendulum-v1", 2_500): Target(-180.0),
    ("mbpo", "InvertedPendulum-v5", 3_000): Target(1_000.0, every_seed=True),
    ("mbpo", "device/PendulumSparse", 8_000, *_CURIOUS): Target(100.0, every_seed=True),
    ("sac", "Pendulum-v1", 20_000): Target(-160.0),
    ("ppo", "device/CartPole", 100_000, "--eval-env", "CartPole-v1"): Target(475.0),
    ("ppo", "device/Pendulum", 50_000, *_PENDULUM_LABELS): Target(-200.0, every_seed=True),
    ("ppo", "HalfCheetah-v5", 300_000, *_CHEETAH_LABELS): Target(0.8 * CHEETAH),
    ("sac", "device/Pendulum", 20_000, *_SAC_LABELS): Target(-200.0, every_seed=True),
    ("pets", "Pendulum-v1", 4_000, *_PETS_LABELS): Target(-250.0),
}
"""By agent, environment, steps per seed, and the flags that differ from the preset."""


@dataclasses.dataclass(frozen=True)
class CollectConfig:
    """Turn finished runs into result lines; runs that differ only in the seed become one."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Folders of runs."""
    out: str
    """JSON-lines file; lines of other results in it stay."""
    note: str = ""
    """Remark on every line."""


@dataclasses.dataclass(frozen=True)
class SpeedConfig:
    """Turn what `mbrl bench` has measured into result lines."""

    file: tyro.conf.Positional[str]
    """JSON of `mbrl bench`."""
    out: str
    """JSON-lines file; lines of other results in it stay."""


def main(argv: list[str]) -> int:
    """Run the job."""
    if not argv or argv[0] not in ("collect", "bench", "rlhf"):
        raise ValueError(
            "usage: results.py collect RUN... | bench FILE | rlhf FOLDER... --out FILE"
        )
    if argv[0] == "collect":
        config = parse(CollectConfig, argv[1:], "results.py collect")
        rows = collect([Path(folder) for folder in config.runs], config.note)
    elif argv[0] == "rlhf":
        config = parse(CollectConfig, argv[1:], "results.py rlhf")
        rows = rlhf_rows([Path(path) for path in config.runs], config.note)
    else:
        config = parse(SpeedConfig, argv[1:], "results.py bench")
        rows = speed(json.loads(Path(config.file).read_text("utf-8")))
    write(Path(config.out), rows)
    print(f"wrote {len(rows)} lines to {config.out}")
    return 0


def rlhf_rows(paths: Sequence[Path], note: str = "") -> list[Row]:
    """Turn pipelines of RLHF that differ in their seeds, or the file of a study, into lines."""
    if paths[0].is_file():
        return study(paths[0])
    saved = run_directory.read_config(paths[0] / "sft")
    if saved is None:
        raise ValueError(f"{paths[0]}: expected the folder of a pipeline, found no sft in it")
    return [row | origin(saved["versions"]) | {"note": note} for row in pipelines(paths)]


def write(path: Path, rows: Sequence[Row]) -> None:
    """Add rows to a result file, in place of those with the same identity."""

    def identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in IDENTITY)

    old = path.read_text("utf-8").splitlines() if path.exists() else []
    merged = {identity(row): row for row in map(json.loads, filter(str.strip, old))}
    merged |= {identity(row): row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, allow_nan=False) + "\n" for row in merged.values()]
    path.write_text("".join(lines), "utf-8")


def collect(folders: Sequence[Path], note: str = "") -> list[Row]:
    """Turn runs into result lines: the median over seeds of the mean greedy return.

    Raises:
      ValueError: for a folder without a run, when none of those that belong together is
        finished, or when they come from different commits.
    """
    groups: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for folder in folders:
        saved = run_directory.read_config(folder)
        if saved is None:
            raise ValueError(f"{folder}: expected the folder of a run, found no config.json")
        same = {k: v for k, v in saved.items() if k not in ALIKE}
        groups.setdefault(json.dumps(same, sort_keys=True), []).append((folder, saved))
    return [row for group in groups.values() for row in _rows_of(group, note)]


def _rows_of(group: Sequence[tuple[Path, dict[str, Any]]], note: str) -> list[Row]:
    saved = group[0][1]
    done = [(f, s) for f, s in group if (f / "evaluation.json").exists()]
    if not done:
        raise ValueError(f"{group[0][0]}: there is no evaluation.json; finish the run first")
    commits = {s["versions"].get("commit", "unknown") for _, s in done}
    if len(commits) > 1:
        raise ValueError(f"{group[0][0]}: the runs are of several commits: {sorted(commits)}")
    results = [json.loads((folder / "evaluation.json").read_text("utf-8")) for folder, _ in done]
    values = [s["return_mean"] for result in results for s in result["seeds"].values()]
    # The last step of all environments may go beyond the budget, by less than their number.
    if any(not 0 <= r["step"] - saved["steps"] < saved["num_envs"] for r in results):
        raise ValueError(f"{group[0][0]}: evaluated after {results[0]['step']} steps, before the "
                         f"end of the run at {saved['steps']}; finish it first")  # fmt: skip
    if len(done) < len(group):
        note = f"{len(done)} of {len(group)} runs are finished. {note}".strip()
    flags = changed_flags(saved)
    row = {
        "benchmark": TITLES.get(saved["agent"], saved["agent"]),
        "task": saved["env"],
        "agent": saved["agent"],
        "setting": shlex.join(flags).replace("--", ""),
        "steps": saved["steps"],
        "seeds": len(values),
        "values": values,
        "command": command([s for _, s in done]),
        **origin(saved["versions"]),
        "commit": commits.pop(),
        "date": _date(max((folder / "evaluation.json").stat().st_mtime for folder, _ in done)),
        "note": note,
    }
    # Targets are those of the presets, an ablation has none; where to act is left open.
    fixed = tuple(changed_flags({**saved, "num_envs": 1}))
    target = TARGETS.get((saved["agent"], saved["env"], row["steps"], *fixed))
    median = row | {"metric": "return, median seed", "value": statistics.median(values)}
    if target is None:
        return [median]
    bound = f">= {target.bound:g}"
    if not target.every_seed:
        return [median | {"target": bound}]
    return [median, row | {"metric": "return, worst seed", "value": min(values), "target": bound}]


def changed_flags(saved: Mapping[str, Any]) -> list[str]:
    """List the flags by which a run differs from the preset of its environment."""
    default = config_json.to_json(preset(saved["agent"], saved["env"]))
    flags = list(_differences(saved["config"], default))
    asked = saved.get("preferences", {})
    if asked.get("labels"):
        usual = config_json.to_json(PreferencesConfig())
        flags += _differences(asked, usual, "preferences.")
    if saved["num_envs"] != 1:
        flags += ["--num-envs", str(saved["num_envs"])]
    if saved["on_bad"] != "raise":
        flags += ["--on-bad", saved["on_bad"]]
    if saved.get("eval_env"):
        flags += ["--eval-env", saved["eval_env"]]
    options = saved.get("env_options", {})
    for name, default in (("pixels", None), ("action_repeat", 1)):
        if options.get(name, default) != default:
            flags += [f"--{name.replace('_', '-')}", str(options[name])]
    return flags + (["--data", saved["data"]] if saved.get("data") else [])


def _differences(now: Mapping[str, Any], default: Mapping[str, Any], prefix: str = "") -> Any:
    for name, value in now.items():
        flag = name.replace("_", "-")
        if name in default and value == default[name]:
            continue
        if isinstance(value, dict):
            yield from _differences(value, default.get(name) or {}, f"{prefix}{flag}.")
        elif isinstance(value, bool):
            yield f"--{prefix}{flag if value else 'no-' + flag}"
        else:
            yield f"--{prefix}{flag}"
            yield from map(str, value if isinstance(value, list) else [value])


def command(configs: Sequence[Mapping[str, Any]]) -> str:
    """Return the line that makes runs which differ in their seeds."""
    words = []
    for saved in configs:
        seeds = saved["seeds"]
        line = ["mbrl", "train", saved["agent"], "--env", saved["env"]]
        line += ["--steps", str(saved["steps"])]
        line += ["--seed", str(seeds[0])] if seeds[0] else []
        line += ["--num-seeds", str(len(seeds))] if len(seeds) > 1 else []
        if saved["eval_episodes"] != 20:
            line += ["--eval-episodes", str(saved["eval_episodes"])]
        if saved["log_every"] != max(1, saved["steps"] // 50):
            line += ["--log-every", str(saved["log_every"])]
        words.append(shlex.join([*line, *changed_flags(saved)]))
    return " && ".join(words)


def origin(versions: Mapping[str, str]) -> Row:
    """Split the versions of a run into those of packages and the machine."""
    packages = dict(versions)
    packages.pop("commit", None)
    cpu, accelerator = packages.pop("cpu", "unknown"), packages.pop("accelerator", None)
    # The run does not say how many cores it had; this machine may be the same.
    cores = f", {cores_text(os.cpu_count() or 1)}" if cpu == run_directory.versions()["cpu"] else ""
    return {"versions": packages, "hardware": accelerator or f"{cpu}{cores}"}


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))


if __name__ == "__main__":
    sys.exit(run(main))
