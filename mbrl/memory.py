"""How much memory is left, asked before a large allocation rather than after it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import jax


def host_memory() -> int:
    """Return the bytes of host memory that can still be allocated, containers respected."""
    page = os.sysconf("SC_PAGE_SIZE")
    free = os.sysconf("SC_PHYS_PAGES") * page
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # No control group, or no limit ("max").
        pass
    return free


def device_memory() -> int | None:
    """Return the free bytes of the default accelerator; None where it does not tell."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def disk_space(folder: Path) -> int:
    """Return the free bytes of the disk that `folder` is on, or will be."""
    folder = Path(folder).absolute()
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free


def check_memory(
    num_bytes: int, what: str, available: int | None = None, where: str = "memory"
) -> str:
    """Refuse an allocation that cannot fit, before it is tried.

    Args:
      num_bytes: bytes to allocate, from `nbytes`.
      what: name of the thing for the message.
      available: bytes that are free; None = of the default device when it is an
        accelerator, else of the host. Pass `host_memory()` for a `HostRing`, or
        `disk_space(folder)` when it is mapped from files.
      where: what `available` is a size of, for the message.

    Returns:
      The size for people, for example '1.5 GiB'.

    Raises:
      ValueError: when `num_bytes` exceeds `available`.
    """
    if available is None:
        available = device_memory()
    if available is None:
        available = host_memory()
    if num_bytes > available:
        raise ValueError(
            f"{what} needs {readable(num_bytes)}, but only {readable(available)} of {where} "
            "are available; lower --capacity, --num-envs or --num-seeds, or take a smaller network"
        )
    return readable(num_bytes)


def readable(num_bytes: float) -> str:
    """Return a size for people, for example '1.5 GiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
