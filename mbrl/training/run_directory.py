"""The folder of a run: lock, configuration, versions, and a clean stop on signals."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import secrets
import signal
import socket
import subprocess
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

LOCK = "run.lock"
CONFIG = "config.json"
_PACKAGES = ("modelrl", "jax", "jaxlib", "flax", "optax", "numpy", "gymnasium", "mujoco")
_MISSING = "(absent)"


class Lock:
    """Holds a run directory for one process, as a context manager.

    The lock is a file with process id, host and start time. One whose process is gone is
    taken over with a warning.
    """

    def __init__(self, directory: Path) -> None:
        """Name the directory; it is locked on entry.

        Args:
          directory: of the run; made when missing.
        """
        self._path = Path(directory) / LOCK
        self._text = ""

    def __enter__(self) -> Lock:
        """Take the lock.

        Raises:
          ValueError: when another process holds it, naming its id and host.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        own = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": _start_of(os.getpid()),
            "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "token": secrets.token_hex(8),
        }
        self._text = json.dumps(own)
        for _ in range(10):
            if self._create():
                return self
            self._remove_if_stale()
        raise ValueError(f"{self._path}: other processes keep taking the lock; start one at a time")

    def __exit__(self, *_: object) -> None:
        """Release the lock, unless somebody has taken it over meanwhile."""
        try:
            if self._path.read_text() == self._text:
                self._path.unlink()
        except OSError as error:
            warnings.warn(f"could not remove {self._path}: {error}", stacklevel=2)

    def _create(self) -> bool:
        """Make the file with all its content, or return False when there is one."""
        # A link of a finished file: nobody sees a lock without its content, not even after
        # a power cut.
        temporary = self._path.with_name(f".{LOCK}-{secrets.token_hex(8)}")
        _write_new(temporary, self._text)
        try:
            os.link(temporary, self._path)
        except FileExistsError:
            return False
        except OSError:  # A file system without links.
            try:
                _write_new(self._path, self._text)
            except FileExistsError:
                return False
        finally:
            temporary.unlink()
        return True

    def _remove_if_stale(self) -> None:
        with _alone(self._path.parent):
            try:
                holder = json.loads(self._path.read_text())
                pid, host, started = int(holder["pid"]), str(holder["host"]), holder["started"]
            except FileNotFoundError:
                return
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f"{self._path} is no lock of ours; delete it when no run uses the directory"
                ) from None
            if host == socket.gethostname() and not _is_running(pid, started):
                self._path.unlink()
                warnings.warn(
                    f"{self._path}: process {pid} is gone; its lock is taken over", stacklevel=4
                )
                return
        raise ValueError(
            f"{self._path.parent} is in use by process {pid} on host {host} since "
            f"{holder.get('time')}; stop that run or choose another directory"
            + ("" if host == socket.gethostname() else f" (or delete {self._path})")
        )


def write_json(path: Path, obj: Any) -> None:
    """Write a JSON file in one atomic step.

    Raises:
      ValueError: when `obj` is not JSON; NaN and infinity are not.
    """
    path = Path(path)
    try:
        text = json.dumps(obj, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected what JSON can hold: {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Write `config.json` of a run.

    Raises:
      ValueError: when `config` is not JSON.
    """
    write_json(Path(directory) / CONFIG, dict(config))


def read_config(directory: Path) -> dict[str, Any] | None:
    """Return `config.json` of a run; None when there is none.

    Raises:
      ValueError: when it is damaged.
    """
    path = Path(directory) / CONFIG
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        fix = "restore it or start in a new directory"
        raise ValueError(f"{path} is damaged ({error}); {fix}") from error


def check_config(
    saved: Mapping[str, Any], current: Mapping[str, Any], harmless: set[str], override: bool
) -> None:
    """Refuse to resume a run with other settings.

    Args:
      saved: settings of the run, nested dicts of JSON values.
      current: settings now.
      harmless: dotted paths that may change with `--override-config`; a path stands for
        all below it.
      override: whether that flag was given.

    Raises:
      ValueError: listing every field that differs and may not.
    """
    before, now = _flatten(saved), _flatten(current)
    differing = [
        name for name in sorted(before.keys() | now.keys())
        if not _same(before.get(name, _MISSING), now.get(name, _MISSING))
    ]  # fmt: skip
    allowed = [name for name in differing if _is_below(name, harmless)]
    refused = [name for name in differing if not (override and name in allowed)]
    if not refused:
        return
    lines = [
        f"  {name}: {before.get(name, _MISSING)} -> {now.get(name, _MISSING)}" for name in refused
    ]
    if not set(refused) - set(allowed):
        fix = "these are harmless: add --override-config to change them"
    else:
        fix = "resume with the saved settings, or start in a new directory"
        if allowed and not override:
            fix += f" (--override-config allows only {', '.join(allowed)})"
    raise ValueError("the run was started with other settings:\n" + "\n".join(lines) + f"\n{fix}")


def versions() -> dict[str, str]:
    """Return versions of Python and packages, git commit, and the names of the devices.

    The accelerator is asked of jax, which starts its backend.
    """
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = _git_commit()
    if commit is not None:
        found["commit"] = commit
    found["cpu"] = _cpu_name()
    import jax

    device = jax.devices()[0]
    if device.platform != "cpu":
        found["accelerator"] = f"{len(jax.devices())} x {device.device_kind}"
    return found


class StopSignal:
    """Turns the first SIGTERM or SIGINT into a flag, as a context manager.

    A second SIGINT raises KeyboardInterrupt at once. Outside the main thread, where
    handlers cannot be installed, it does nothing.

    Attributes:
      requested: a signal has come: save at the next step boundary and stop.
      signal: its number; None before it came.
    """

    def __init__(self) -> None:
        """Prepare; handlers are installed on entry."""
        self.requested = False
        self.signal: int | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            # None: a handler that was not installed from Python cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._old = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        self.signal = number


def _write_new(path: Path, text: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Let one process at a time remove a stale lock, lest one removes the next one's."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        # Some network file systems have no such locks: then the check is all there is.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, Mapping) or (prefix and not config):
        return {prefix: config}
    found = {}
    for name, value in config.items():
        found |= _flatten(value, f"{prefix}.{name}" if prefix else str(name))
    return found


def _same(a: Any, b: Any) -> bool:
    """Compare as JSON does: a tuple is a list and 1 is 1.0, but 1 is not True."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def _is_below(name: str, paths: set[str]) -> bool:
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def _start_of(pid: int) -> str | None:
    """Return the boot of the machine and the start of a process in it; None if unknown."""
    try:
        # The name of the program, in parentheses, may hold spaces: count from its end.
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{ticks}"
    except (OSError, IndexError):
        return None


def _is_running(pid: int, started: str | None) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # It runs, for another user.
    now = _start_of(pid)
    return now is None or started is None or now == started


def _git_commit() -> str | None:
    file = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        # An installed package may lie in the checkout of another project: not our commit.
        git("ls-files", "--error-unmatch", file.name)
        return git("rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
