"""Metrics to a local JSON-lines file, always; to TensorBoard and W&B while they work.

A backend that fails never stops a run: it is switched off with one warning. The local
file is complete: what could not be written is kept and retried, and after a resume no step
appears twice or is missing.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import secrets
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FILE = "metrics.jsonl"
_RESERVED = ("step", "kind", "seed", "time")
_FLUSH_SECONDS = 10.0


class _Backend(NamedTuple):
    """Somewhere else to send scalars.

    Attributes:
      name: for messages.
      write: `(step, {tag: value})`.
      close: at the end of the run.
      drop: after a failure; unlike `close` it must not wait for a network.
    """

    name: str
    write: Callable[[int, dict[str, float]], None]
    close: Callable[[], None]
    drop: Callable[[], None]


class MetricsWriter:
    """Writes metrics of a run; one per run directory.

    Write the metrics of a step before its save: on resume the lines up to the step of the
    save are kept, and those after it are written again.
    """

    def __init__(
        self,
        directory: Path,
        resume_step: int | None = None,
        tensorboard: bool = True,
        wandb: str | None = None,
    ) -> None:
        """Open the file of a run, and the backends.

        Args:
          directory: of the run; `metrics.jsonl` and `tensorboard/` are made in it.
          resume_step: step of the restored save; lines of later steps are removed. None =
            the run starts at its beginning: a file that is there is renamed to
            `metrics.old.jsonl`.
          tensorboard: also write TensorBoard events.
          wandb: name of a Weights & Biases project to log to as well.

        Raises:
          ValueError: when `wandb` is asked for and not installed.
        """
        module = None if wandb is None else _import_wandb(wandb)
        directory = Path(directory).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / FILE
        if path.exists():
            if resume_step is None:
                os.replace(path, directory / "metrics.old.jsonl")
            else:
                _cut(path, resume_step)
        self._file = path.open("ab", buffering=0)
        self._good = path.stat().st_size
        self._pending: list[bytes] = []
        self._failing = False
        self._backends: list[_Backend] = []
        if wandb is not None:
            self._open("W&B", lambda: _wandb(module, directory, wandb))
        if tensorboard:
            self._open("TensorBoard", lambda: _tensorboard(directory / "tensorboard", resume_step))

    def write(
        self,
        step: int,
        metrics: Mapping[str, Any],
        kind: str = "train",
        seed: int | None = None,
    ) -> None:
        """Write one line, and its scalars to the backends.

        Args:
          step: environment steps so far.
          metrics: numbers and arrays by name; arrays go to the local file only. NaN and
            infinity become null.
          kind: 'train', 'eval', ...; the folder of the tags in TensorBoard.
          seed: index of the seed where several are trained at once.

        Raises:
          ValueError: when a name is reserved or a value is no number.
        """
        values = {name: _as_array(name, value) for name, value in metrics.items()}
        head = {"step": int(step), "kind": kind, "seed": seed, "time": time.time()}
        line = {**head, **{name: _jsonable(value.tolist()) for name, value in values.items()}}
        self._pending.append(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._flush()
        place = kind if seed is None else f"{kind}/seed_{seed}"
        scalars = {f"{place}/{k}": float(v.item()) for k, v in values.items() if v.size == 1}
        for backend in list(self._backends):
            self._guard(backend, lambda b=backend: b.write(int(step), scalars))

    def sync(self) -> None:
        """Wait until all lines are on the disk; call it before a save."""
        self._flush()
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self._complain(error)

    def close(self) -> None:
        """Write what is pending and close the backends; a second call does nothing."""
        if self._file.closed:
            return
        self.sync()
        self._file.close()
        for backend in list(self._backends):
            self._guard(backend, backend.close)
        self._backends = []

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _flush(self) -> None:
        data = b"".join(self._pending)
        try:
            # A disk that fills up takes the first half of a line: it must not stay.
            self._file.truncate(self._good)
            if self._file.write(data) != len(data):
                raise OSError(f"only a part of {len(data)} bytes could be written")
        except OSError as error:
            self._complain(error)
            return
        self._good += len(data)
        self._pending, self._failing = [], False

    def _complain(self, error: OSError) -> None:
        if not self._failing:
            warnings.warn(
                f"{self._file.name}: {error}; metrics are kept in memory and tried again",
                stacklevel=4,
            )
        self._failing = True

    def _open(self, name: str, make: Callable[[], _Backend]) -> None:
        try:
            self._backends.append(make())
        except Exception as error:
            _warn(name, error)

    def _guard(self, backend: _Backend, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._backends.remove(backend)
            with contextlib.suppress(Exception):
                backend.drop()
            _warn(backend.name, error)


def read(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics file; a torn last line is left out.

    Args:
      path: the file, or the run directory.

    Returns:
      One dict per line, in the order written; null values are None.

    Raises:
      ValueError: naming file and line when a line before the last is no JSON object.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    found = []
    for number, line, good in _lines(path):
        if good is None and line.endswith(b"\n"):
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {line[:80]!r}")
        if good is not None:
            found.append(good)
    return found


def _lines(path: Path) -> list[tuple[int, bytes, dict[str, Any] | None]]:
    """Return (number, bytes, object) of all lines; None where there is no object."""
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        try:
            value = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            value = None
        good = isinstance(value, dict) and isinstance(value.get("step"), int)
        found.append((number, line, value if good else None))
    return found


def _cut(path: Path, resume_step: int) -> None:
    """Keep the whole lines up to `resume_step`, atomically."""
    lines = _lines(path)
    for number, line, good in lines:
        if good is None and line.endswith(b"\n"):
            warnings.warn(f"{path}, line {number} is damaged and removed", stacklevel=4)
    kept = [line for _, line, good in lines if good is not None and good["step"] <= resume_step]
    if len(kept) == len(lines):
        return
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    with temporary.open("wb") as file:
        file.write(b"".join(kept))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _as_array(name: str, value: Any) -> np.ndarray:
    if name in _RESERVED:
        raise ValueError(f"metrics: the name {name!r} is reserved, of {_RESERVED}; rename it")
    array = np.asarray(value)
    if array.dtype.kind == "V" and array.dtype.names is None:  # bfloat16 and its like
        array = array.astype(np.float32)
    if array.dtype.kind not in "biuf":
        raise ValueError(
            f"metrics: {name!r} must be a number or an array of numbers, got "
            f"{type(value).__name__} of dtype {array.dtype}"
        )
    return array


def _jsonable(value: Any) -> Any:
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _warn(name: str, error: Exception) -> None:
    warnings.warn(
        f"{name} failed and is switched off ({type(error).__name__}: {error}); {FILE} goes on",
        stacklevel=4,
    )


def _tensorboard(directory: Path, resume_step: int | None) -> _Backend:
    # Not SummaryWriter: it writes in a thread, and when that thread has died of a full
    # disk, its queue of ten entries blocks the trainer for ever.
    from tensorboardX.event_file_writer import EventsWriter

    event_pb2: Any = importlib.import_module("tensorboardX.proto.event_pb2")
    summary_pb2: Any = importlib.import_module("tensorboardX.proto.summary_pb2")
    directory.mkdir(parents=True, exist_ok=True)
    events = EventsWriter(str(directory / "events"), f".{os.getpid()}.{secrets.token_hex(2)}")
    # TensorBoard hides what earlier files of the folder have from this step on.
    first = 0 if resume_step is None else resume_step + 1
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    events.write_event(event_pb2.Event(wall_time=time.time(), step=first, session_log=start))
    events.flush()
    flushed = time.monotonic()

    def write(step: int, scalars: dict[str, float]) -> None:
        nonlocal flushed
        values = [summary_pb2.Summary.Value(tag=k, simple_value=v) for k, v in scalars.items()]
        summary = summary_pb2.Summary(value=values)
        events.write_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - flushed > _FLUSH_SECONDS:
            events.flush()
            flushed = time.monotonic()

    def close() -> None:
        events.close()

    return _Backend("TensorBoard", write, close, close)


def _import_wandb(project: str) -> Any:
    try:
        module = importlib.import_module("wandb")
        module.init  # noqa: B018  A folder `wandb` of an earlier run imports as a package.
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"wandb: got the project {project!r}, but wandb is not installed; "
            'pip install "modelrl[wandb]"'
        ) from error
    return module


def _wandb(module: Any, directory: Path, project: str) -> _Backend:
    # The identity is kept with the run, so that a resumed run continues its page.
    name = directory / "wandb.id"
    if not name.exists():
        name.write_text(secrets.token_hex(8))
    options = {"id": name.read_text().strip(), "resume": "allow", "name": directory.name}
    run = module.init(project=project, dir=str(directory), **options)

    def write(step: int, scalars: dict[str, float]) -> None:
        run.log(scalars, step=step)

    return _Backend("W&B", write, run.finish, lambda: None)
