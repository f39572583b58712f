"""`mbrl train AGENT --env ID`: train, evaluate, and resume when given again."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

if __name__ == "__main__":  # run as a file: imports start at the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import tyro

from agents import AGENTS
from agents.preferences import PreferencesConfig
from agents.presets import preset
from mbrl.training import checkpoint, run_directory
from mbrl.training.evaluation import statistics
from mbrl.training.learner import DriverConfig, Report, updates_per_step
from mbrl.training.metrics import MetricsWriter
from mbrl.types import Record, TimeStep
from scripts import config_json, runs
from scripts.alarms import Alarms, warn_of_unasked
from scripts.cli import parse, run
from scripts.people import People, exchange
from scripts.progress import Progress

HARMLESS = {
    "steps", "log_every", "save_every", "eval_episodes", "eval_env", "replay", "versions",
}  # fmt: skip
"""Settings that may change on resume with --override-config."""

EVALUATION = "evaluation.json"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What every agent's training run needs."""

    env: str = "Pendulum-v1"
    """Gymnasium id, device/NAME, or module:Class."""
    steps: int = 2000
    """Environment steps per seed; with --data, updates per seed."""
    data: str = ""
    """Train on recorded data without an environment: a .npz file (see `mbrl collect`), or
    minari:NAME."""
    pixels: int = 0
    """Observe square images of so many pixels per side, drawn by the environment; 0 = no."""
    action_repeat: int = 1
    """Steps of the simulator per step."""
    seed: int = 0
    """Seed of the run; with several seeds, the first of them."""
    num_seeds: int = 1
    """Seeds to train in one compiled program."""
    num_envs: int = 1
    """Environments per seed."""
    out: str = ""
    """Folder of the run; runs/AGENT-ENV-SEED when empty."""
    eval_episodes: int = 20
    """Greedy episodes per seed at the end; 0 = none."""
    eval_env: str = ""
    """Environment id of these episodes, with the spaces of the task; the task itself when empty."""
    log_every: int = 0
    """Environment steps between log lines; 0 = a fiftieth of the run."""
    save_every: int = 1000
    """Environment steps between saves; the end and a stop are always saved."""
    on_bad: Literal["raise", "drop", "clip"] = "raise"
    """What to do with rewards and observations that are not finite."""
    wait_for_labels: bool = True
    """With --preferences.teacher people: train on when all questions have been answered."""
    replay: Literal["device", "host", "disk"] = "device"
    """Keep replay on the device, in host memory, or in files below OUT (Gymnasium only)."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    wandb: str | None = None
    """Weights & Biases project."""
    override_config: bool = False
    """Resume although harmless settings or versions have changed."""


def settings(agent: str, argv: list[str]) -> tuple[TrainConfig, Any, PreferencesConfig]:
    """Parse the flags of `mbrl train AGENT`; the preset of the environment gives defaults."""
    env = next((b for a, b in itertools.pairwise(argv) if a == "--env"), None)
    env = next((a.split("=", 1)[1] for a in argv if a.startswith("--env=")), env)
    config_class = AGENTS[agent].config
    joined = dataclasses.make_dataclass(
        "Settings",
        [
            ("run", Annotated[TrainConfig, tyro.conf.arg(name="")]),
            ("agent", Annotated[config_class, tyro.conf.arg(name="")]),
            ("preferences", PreferencesConfig),
        ],
        frozen=True,
    )
    default = joined(TrainConfig(), preset(agent, env or TrainConfig.env), PreferencesConfig())
    description = f"Train {agent}. The same command again resumes."
    parsed = parse(joined, argv, f"mbrl train {agent}", description, default)
    return parsed.run, parsed.agent, parsed.preferences


def main(argv: list[str]) -> int:
    """Run the job; returns 0 when the budget is spent, 75 when it was asked to stop."""
    if not argv or argv[0] not in AGENTS:
        wanted = f"got {argv[0]!r}, " if argv and not argv[0].startswith("-") else ""
        raise ValueError(f"usage: mbrl train AGENT [flags]; {wanted}agents: {', '.join(AGENTS)}")
    config, agent_config, preferences = settings(argv[0], argv[1:])
    seeds = tuple(range(config.seed, config.seed + config.num_seeds))
    if not seeds:
        raise ValueError(f"--num-seeds: expected at least 1, got {config.num_seeds}")
    if preferences.labels and preferences.teacher == "people" and len(seeds) > 1:
        raise ValueError(
            f"--num-seeds: got {config.num_seeds} with --preferences.teacher people, expected 1: "
            "each seed would ask its own questions; train one run per seed"
        )
    if preferences.labels:
        warn_of_unasked(preferences, config.steps)
    interval = config.log_every or max(1, config.steps // 50)
    driver = DriverConfig(config.steps, config.num_envs, seeds, interval)
    options = {"pixels": config.pixels or None, "action_repeat": config.action_repeat}
    job = runs.build(
        argv[0], agent_config, config.env, driver, config.on_bad, options, config.data,
        config.replay, preferences,
    )  # fmt: skip
    judged = runs.moved(job, config.eval_env or config.env)
    data = runs.read_data(job)
    name = f"{argv[0]}-{config.env.replace('/', '-').replace(':', '-')}-{config.seed}"
    out = Path(config.out or Path("runs") / name)
    if not job.data:
        print(runs.describe_memory(job, out), file=sys.stderr)
    out.mkdir(parents=True, exist_ok=True)
    with run_directory.Lock(out):
        _check_settings(out, job, config)
        restored = runs.restore(job, out)
        if restored is not None:
            print(f"resuming {out} at step {restored.step} of {config.steps}", file=sys.stderr)
        resumed = None if restored is None else restored.step
        with MetricsWriter(out, resumed, config.tensorboard, config.wandb) as log:
            with run_directory.StopSignal() as stop:
                trained = _train(out, job, config, restored, log, stop, data)
            # Signals have their usual effect again: all that training made is on disk.
            if trained.step >= config.steps and config.eval_episodes:
                _evaluate_once(out, judged, config, trained, log)
    if trained.step >= config.steps:
        return 0
    saved = "saved" if trained.saved == trained.step else f"NOT saved after step {trained.saved}"
    command = f"mbrl train {shlex.join(argv)}"
    print(
        f"stopped at step {trained.step}, {saved} (exit code 75); resume with: {command}",
        file=sys.stderr,
    )
    return 75


def _check_settings(out: Path, job: runs.Run, config: TrainConfig) -> None:
    current = {
        "agent": job.agent_name,
        "env": job.env_id,
        "env_options": dict(job.options),
        "data": job.data,
        "config": config_json.to_json(job.config),
        "preferences": config_json.to_json(job.preferences),
        "steps": config.steps,
        "seeds": list(job.driver.seeds),
        "num_envs": config.num_envs,
        "log_every": job.driver.interval,
        "save_every": config.save_every,
        "eval_episodes": config.eval_episodes,
        "eval_env": config.eval_env,
        "on_bad": config.on_bad,
        "replay": config.replay,
        "versions": run_directory.versions(),
    }
    saved = run_directory.read_config(out)
    if saved is not None:
        run_directory.check_config(saved, current, HARMLESS, config.override_config)
    run_directory.write_config(out, current)


class Trained(NamedTuple):
    """Where training has come to: the step, the newest save, and what a save holds."""

    step: int
    saved: int
    snapshot: Any


def _train(
    out: Path, job: runs.Run, config: TrainConfig, restored: checkpoint.Restored | None,
    log: MetricsWriter, stop: run_directory.StopSignal, data: Record | None,
) -> Trained:  # fmt: skip
    """Train from the newest save to the end, or until asked to stop."""
    step = saved = 0 if restored is None else restored.step
    snapshot, report = None if restored is None else restored.tree, None
    alarms = Alarms(out)
    ratio = updates_per_step(job.factory({}), config.num_envs)
    if ratio and data is None:
        print(f"{ratio:g} updates per environment step", file=sys.stderr)
    with (
        Progress(f"{job.agent_name} {job.env_id}", step, config.steps) as progress,
        runs.working_storage(job, out) as where,
    ):
        reports = runs.train(job, snapshot, lambda: stop.requested, data, where)
        for report in exchange(reports, _people(out, job, config, stop)):
            step = report.step
            progress.update(step, _write(log, job, report))
            if step - saved >= config.save_every or step >= config.steps or stop.requested:
                snapshot = report.snapshot()
                log.sync()
                saved = _save(out, step, snapshot, saved)
            alarms.check(report)
        if report is not None and saved < step:  # the stop came late, or a save failed
            snapshot = report.snapshot()
            saved = _save(out, step, snapshot, saved)
    return Trained(step, saved, snapshot)


def _people(
    out: Path, job: runs.Run, config: TrainConfig, stop: run_directory.StopSignal
) -> People | None:
    """Open the store that people answer in, where they are the teacher."""
    asked = job.preferences
    if not asked.labels or asked.teacher != "people":
        return None
    return People(
        out, job.spec, asked.segment, config.steps, config.wait_for_labels, lambda: stop.requested
    )


def _write(log: MetricsWriter, job: runs.Run, report: Report) -> float | None:
    """Write finished episodes and metrics; return the mean return of the interval."""
    episodes = report.episodes
    for index, seed in enumerate(job.driver.seeds):
        done = np.asarray(episodes.done)[index]
        for value, length in zip(
            np.asarray(episodes.returns)[index][done], np.asarray(episodes.lengths)[index][done],
            strict=True,
        ):  # fmt: skip
            line = {"episode_return": value, "episode_length": length}
            log.write(report.step, line, "train", seed)
        if report.metrics:
            log.write(report.step, {k: v[index] for k, v in report.metrics.items()}, "train", seed)
    everything = np.asarray(episodes.returns)[np.asarray(episodes.done)]
    return float(everything.mean()) if everything.size else None


def _save(out: Path, step: int, snapshot: Any, saved: int) -> int:
    """Save; a disk that refuses is announced and does not stop the run (F4)."""
    try:
        checkpoint.save(out / runs.CHECKPOINTS, step, snapshot, runs.manifest_of(snapshot))
    except OSError as error:
        print(f"warning: step {step} is not saved ({error}); trying again later", file=sys.stderr)
        return saved
    return step


def _is_evaluated(out: Path, env: str, step: int, episodes: int) -> bool:
    """Tell whether an earlier call has done the evaluation that ends the run."""
    try:
        result = json.loads((out / EVALUATION).read_text("utf-8"))
        counts = [len(seed["returns"]) for seed in result["seeds"].values()]
        return (result["env"], result["step"]) == (env, step) and set(counts) == {episodes}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def _evaluate_once(
    out: Path, job: runs.Run, config: TrainConfig, trained: Trained, log: MetricsWriter
) -> None:
    """Evaluate unless an earlier call has; a failure is announced, the run is whole (F19)."""
    if _is_evaluated(out, job.env_id, trained.step, config.eval_episodes):
        print(f"{out} is finished: its returns are in {out / EVALUATION}", file=sys.stderr)
        return
    try:
        _evaluate(out, job, trained.snapshot, config, log, trained.step)
    except Exception as error:
        print(
            f"warning: evaluation failed ({type(error).__name__}: {error}); training is complete "
            f"and saved; try again with: mbrl evaluate {shlex.quote(str(out))} --env {job.env_id}",
            file=sys.stderr,
        )


def _evaluate(
    out: Path, job: runs.Run, snapshot: Any, config: TrainConfig, log: MetricsWriter, step: int
) -> None:
    """Play greedy episodes at the end of the budget and keep the result."""
    start = time.perf_counter()
    agent_state = runs.learner_of(snapshot).agent
    seed = config.seed + runs.EVALUATION_SEED
    total, finished = config.eval_episodes * len(job.driver.seeds), 0

    def count(now: TimeStep, _: Any) -> None:
        nonlocal finished
        finished = min(finished + int(now.is_last.sum()), total)
        progress.update(finished, None)

    with Progress("evaluation", 0, total, "episode") as progress:
        returns = runs.evaluate(job, agent_state, config.eval_episodes, seed, count)
    result: dict[str, Any] = {"step": step, "env": job.env_id, "seeds": {}}
    for index, name in enumerate(job.driver.seeds):
        mean, std, iqm = statistics(returns[index])
        line = {"eval/return_mean": mean, "eval/return_std": std, "eval/return_iqm": iqm}
        log.write(step, line, "eval", name)
        result["seeds"][str(name)] = {
            "return_mean": mean, "return_std": std, "return_iqm": iqm,
            "returns": [float(r) for r in returns[index]],
        }  # fmt: skip
        print(f"seed {name}: {mean:.1f} +- {std:.1f} over {config.eval_episodes} greedy episodes")
    result["seconds"] = round(time.perf_counter() - start, 1)
    run_directory.write_json(out / EVALUATION, result)


if __name__ == "__main__":
    sys.exit(run(main))
