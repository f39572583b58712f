"""What may end PPO on a language model before its last update."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from mbrl.preferences.monitor import Pursued, parted


def watch_of(job: Any) -> Any:
    """Return the `StageRun.watch` of a `PPOJob`; None when nothing may end it.

    Raises:
      ValueError: for limits that cannot be watched.
    """
    for name in ("kl_budget", "early_stop"):
        value = getattr(job, name)
        if value < 0:
            raise ValueError(f"{name}: got {value:g}, expected at least 0; 0 = never")
        if value and job.loop.num_seeds > 1:
            raise ValueError(
                f"{name}: got {value:g} with {job.loop.num_seeds} seeds, which reach it at "
                "different updates; run them one after the other"
            )
    if job.early_stop and not job.gold:
        raise ValueError(
            f"early_stop: got {job.early_stop} without a true reward, expected one to be watched; "
            "set --gold, or end training by --kl-budget"
        )
    if not (job.kl_budget or job.early_stop):
        return None
    return partial(_watched, job.kl_budget, job.early_stop)


def _watched(
    budget: float, window: int, memory: list[Any], metrics: Mapping[str, Any]
) -> tuple[list[Any], str]:
    kl = float(metrics["kl"])
    if budget and kl > budget:
        return memory, f"{kl:.2f} nats from the reference, {budget:g} allowed"
    if not window:
        return memory, ""
    newest = [float(metrics[name]) for name in ("score", "gold", "gold/error")]
    memory = [*memory, newest][-2 * window :]
    changed = parted([Pursued(*x) for x in memory], window)
    if changed is None:
        return memory, ""
    (learned, risen), (true, fallen) = changed
    return memory, (
        f"the true reward falls from {true:.3f} to {fallen:.3f} while the learned one rises from "
        f"{learned:.3f} to {risen:.3f}"
    )
