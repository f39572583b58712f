"""Runs a stage of RLHF in a folder: locked, logged, resumable to the bit, stopped with a save."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from agents.rlhf.stage import Stage
from mbrl.parallel import make_mesh, shard_params, shard_rows
from mbrl.settings import check_whole
from mbrl.training import checkpoint, run_directory
from mbrl.training.metrics import MetricsWriter
from scripts.alarms import MAX_SKIPPED
from scripts.progress import Progress

CHECKPOINTS = "checkpoints"
STOPPED = 75
"""Exit code of a run that was asked to stop."""
HARMLESS = {
    "loop.steps", "loop.log_every", "loop.save_every", "loop.data_devices", "loop.tensor_devices",
    "versions",
}  # fmt: skip
"""Settings that may change on resume with --override-config."""


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long a stage runs, and what it leaves behind."""

    steps: int = 200
    """Updates."""
    batch_size: int = 32
    """Rows of data per update."""
    seed: int = 0
    """Of first weights, order of the data and samples."""
    num_seeds: int = 1
    """Seeds trained in one program, `seed` the first; `{seed}` in a path stands for each."""
    log_every: int = 10
    """Updates between lines of metrics, each a mean over them."""
    save_every: int = 100
    """Updates between saves; the end and a stop are always saved."""
    data_devices: int = 1
    """Devices that share the rows of a batch."""
    tensor_devices: int = 1
    """Devices that share the matrices of the models."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    override_config: bool = False
    """Resume although harmless settings or versions have changed."""

    def __post_init__(self) -> None:
        check_whole(
            self, "steps", "batch_size", "num_seeds", "log_every", "save_every", "data_devices",
            "tensor_devices",
        )  # fmt: skip
        if self.num_seeds > 1 and self.data_devices * self.tensor_devices > 1:
            raise ValueError(
                f"num_seeds: got {self.num_seeds} with {self.data_devices} x {self.tensor_devices} "
                "devices, expected one of the two; run the seeds one after the other"
            )


class StageRun(NamedTuple):
    """A stage with all that it needs.

    Attributes:
      name: for messages.
      stage: the learner.
      given: what it does not change.
      batch: `(update) -> batch`, the same for the same update.
      watch: `(memory, metrics of an update) -> (memory, reason)` to end after it, or ''. It is
        asked after every update; its memory, a list of numbers at first empty, is saved.
    """

    name: str
    stage: Stage
    given: Any
    batch: Callable[[int], Any]
    watch: Callable[[list[Any], Mapping[str, Any]], tuple[list[Any], str]] | None = None


def keys(loop: LoopConfig, number: int) -> Any:
    """Return a typed key, or those of all seeds [S]: number 0 for the first weights, t for update
    t, counted from 1.
    """
    if loop.num_seeds == 1:
        return jax.random.fold_in(jax.random.key(loop.seed), number)
    seeds = jnp.arange(loop.seed, loop.seed + loop.num_seeds)
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), number))(seeds)


class StoppedError(Exception):
    """A signal has ended a run after a save."""


class Ended(NamedTuple):
    """A stage at its end: its state, and the updates that have made it."""

    state: Any
    update: int


def run_stage(run: StageRun, loop: LoopConfig, out: Path, settings: Mapping[str, Any]) -> Ended:
    """Train from the newest save to the end.

    Args:
      run: what to train.
      loop: for how long.
      out: folder of the run.
      settings: what must be the same for a run to go on, as JSON.

    Returns:
      What the stage has ended with.

    Raises:
      StoppedError: when a signal came; the run is saved, and the same call goes on with it.
      ValueError: for settings that have changed, or when updates stay without effect.
    """
    out.mkdir(parents=True, exist_ok=True)
    with run_directory.Lock(out):
        settings = {**settings, "loop": dataclasses.asdict(loop)}
        del settings["loop"]["override_config"], settings["loop"]["tensorboard"]
        current = {**settings, "versions": run_directory.versions()}
        saved = run_directory.read_config(out)
        if saved is not None:
            run_directory.check_config(saved, current, HARMLESS, loop.override_config)
        run_directory.write_config(out, current)
        begin = jax.jit(run.stage.init)
        first = jax.eval_shape(begin, keys(loop, 0), run.given)
        restored = checkpoint.restore(out / CHECKPOINTS, first)
        if restored is None:
            state, step, ended, memory = begin(keys(loop, 0), run.given), 0, "", []
        else:
            state, step = restored.tree, restored.step
            ended, memory = (restored.manifest[name] for name in ("ended", "memory"))
            if step < loop.steps and not ended:
                print(f"resuming {out} at update {step} of {loop.steps}", file=sys.stderr)
        if step >= loop.steps or ended:
            return Ended(state, step)
        if loop.data_devices * loop.tensor_devices > 1:
            run, state = spread(run, state, make_mesh(loop.data_devices, loop.tensor_devices))
        with (
            MetricsWriter(out, None if restored is None else step, loop.tensorboard) as log,
            run_directory.StopSignal() as stop,
        ):
            return _train(run, loop, out, Ended(state, step), memory, log, stop)


def spread(run: StageRun, state: Any, mesh: Any) -> tuple[StageRun, Any]:
    """Lay out what a stage computes with over several devices; jit does the rest."""

    def batch(update: int) -> Any:
        return shard_rows(run.batch(update), mesh)

    return run._replace(given=shard_params(run.given, mesh), batch=batch), shard_params(state, mesh)


def _train(
    run: StageRun, loop: LoopConfig, out: Path, begun: Ended, memory: list[Any],
    log: MetricsWriter, stop: run_directory.StopSignal,
) -> Ended:  # fmt: skip
    state, step = begun
    update = jax.jit(run.stage.step, donate_argnums=0)
    pending: list[Any] = []
    began = time.perf_counter()
    saved = step
    told = "score" if run.name == "ppo" else "loss"
    with Progress(run.name, step, loop.steps, "update", told) as progress:
        while True:
            batch = run.batch(step)
            state, metrics = update(state, run.given, batch, keys(loop, step + 1))
            step += 1
            pending.append(metrics)
            reason = ""
            if run.watch is not None:  # not of an interval, which a signal may cut short
                memory, reason = run.watch(memory, jax.device_get(metrics))
            over = step >= loop.steps or bool(reason)
            if step % loop.log_every == 0 or over or stop.requested:
                means = _means(pending)
                means["seconds"] = time.perf_counter() - began
                pending = []
                _write(log, step, means, loop.num_seeds)
                _stop_if_diverged(out, means)
                progress.update(step, float(np.mean(means[told])))
            if reason:
                print(f"{run.name}: ended at update {step}: {reason}", file=sys.stderr)
            if over or stop.requested or step - saved >= loop.save_every:
                log.sync()
                saved = _save(out, step, state, {"ended": reason, "memory": memory}, saved)
            if over:
                return Ended(state, step)
            if stop.requested:
                kept = "saved" if saved == step else f"NOT saved after update {saved}"
                raise StoppedError(f"{run.name}: stopped at update {step}, {kept}")


def _means(pending: list[Any]) -> dict[str, Any]:
    fetched = jax.device_get(pending)
    return {name: np.mean([m[name] for m in fetched], 0) for name in fetched[0]}


def _write(log: MetricsWriter, step: int, means: Mapping[str, Any], num_seeds: int) -> None:
    if num_seeds == 1:
        log.write(step, means)
        return
    for seed in range(num_seeds):
        mine = {name: x if np.ndim(x) == 0 else x[seed] for name, x in means.items()}
        log.write(step, mine, seed=seed)


def _save(out: Path, step: int, state: Any, about: Mapping[str, Any], saved: int) -> int:
    """Save; a disk that refuses is announced and does not stop the run."""
    try:
        checkpoint.save(out / CHECKPOINTS, step, state, about)
    except OSError as error:
        print(f"warning: update {step} is not saved ({error}); trying later", file=sys.stderr)
        return saved
    return step


def _stop_if_diverged(out: Path, means: Mapping[str, Any]) -> None:
    in_a_row = float(np.max(means.get("model/skipped_in_a_row", 0.0)))
    if in_a_row > MAX_SKIPPED:
        raise ValueError(
            f"{out}: more than {MAX_SKIPPED} updates in a row had gradients that are not finite; "
            "lower tuning.learning_rate, or look at the data"
        )
