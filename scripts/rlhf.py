"""`mbrl rlhf STAGE`: language models from human feedback, one stage or the whole pipeline."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file: imports start at the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts import config_json, rlhf_jobs, rlhf_use
from scripts.cli import parse, run
from scripts.rlhf_pipeline import PipelineConfig, pipeline
from scripts.rlhf_stage import STOPPED, StoppedError

STAGES: dict[str, tuple[type[Any], Callable[[Any], Any], str]] = {
    "run": (PipelineConfig, pipeline, "data, sft, reward, ppo and dpo, one after the other"),
    "data": (rlhf_use.DataJob, rlhf_use.data, "write the synthetic task as files"),
    "new": (rlhf_use.NewJob, rlhf_use.new, "make a model with random weights"),
    "sft": (rlhf_jobs.SupervisedJob, rlhf_jobs.supervised, "fine-tune on demonstrations"),
    "reward": (rlhf_jobs.RewardJob, rlhf_jobs.reward, "train a reward model on rankings"),
    "ppo": (rlhf_jobs.PPOJob, rlhf_jobs.ppo, "improve a policy by a reward model"),
    "dpo": (rlhf_jobs.DirectJob, rlhf_jobs.direct, "fit a policy to comparisons directly"),
    "generate": (rlhf_use.GenerateJob, rlhf_use.generate_answers, "answer prompts"),
    "score": (rlhf_use.ScoreJob, rlhf_use.score, "judge a reward model, or answers by one"),
}


def main(argv: list[str]) -> int:
    """Run a stage; returns 0, or 75 when it was asked to stop and has saved."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: mbrl rlhf STAGE [flags]     (mbrl rlhf STAGE --help)\n")
        for name, (_, _, help_text) in STAGES.items():
            print(f"  {name:9} {help_text}")
        return 0 if argv else 2
    if argv[0] not in STAGES:
        raise ValueError(f"usage: mbrl rlhf STAGE; got {argv[0]!r}, stages: {', '.join(STAGES)}")
    config_class, job, help_text = STAGES[argv[0]]
    default, rest = _defaults(config_class, argv[1:])
    about = f"{help_text}. --config FILE.json gives the flags other defaults."
    config = parse(config_class, rest, f"mbrl rlhf {argv[0]}", about, default)
    try:
        found = job(config)
    except StoppedError as stopped:
        print(f"{stopped} (exit code {STOPPED}); the same command goes on", file=sys.stderr)
        return STOPPED
    if isinstance(found, Path):
        print(found)
    return 0


def _defaults(config_class: type[Any], argv: list[str]) -> tuple[Any, list[str]]:
    """Take `--config FILE` out of the flags: its values are the defaults of the others."""
    default, rest = config_class(), list(argv)
    for index, flag in enumerate(argv):
        if flag == "--config" or flag.startswith("--config="):
            values = argv[index + 1 : index + 2] if flag == "--config" else [flag[9:]]
            if not values:
                raise ValueError("--config: expected a file, got nothing")
            del rest[index : index + (2 if flag == "--config" else 1)]
            default = merged(default, read_config(Path(values[0])), values[0])
            break
    return default, rest


def read_config(file: Path) -> dict[str, Any]:
    """Read a file of settings.

    Raises:
      ValueError: naming the file, when it is not there or no JSON object.
    """
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: expected a JSON file of settings ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(found).__name__}")
    return found


def merged(default: Any, changes: dict[str, Any], where: str) -> Any:
    """Replace fields of nested configurations.

    Raises:
      ValueError: naming a field that does not exist, or whose value has another type.
    """
    fields = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
    values = {}
    for name, value in changes.items():
        key = name.replace("-", "_")
        if key not in fields:
            raise ValueError(f"{where}: unknown field {name!r}, expected some of {list(fields)}")
        old = fields[key]
        if dataclasses.is_dataclass(old):
            if not isinstance(value, dict):
                raise ValueError(f"{where}: {name}: expected an object, got {value!r:.60}")
            values[key] = merged(old, value, f"{where}: {name}")
            continue
        same = isinstance(value, type(old)) or (isinstance(old, float) and type(value) is int)
        if not same and not (isinstance(old, tuple) and isinstance(value, list)):
            raise ValueError(f"{where}: {name}: expected {type(old).__name__}, got {value!r:.60}")
        values[key] = config_json.from_json(type(old), value)
    return dataclasses.replace(default, **values)


if __name__ == "__main__":
    sys.exit(run(main))
