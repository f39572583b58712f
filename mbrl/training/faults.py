"""Numbers of a simulator that are not finite, found inside of a compiled loop (F8).

A compiled loop cannot stop, but it can remember where it should have: three integers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mbrl.types import Array, Record, TimeStep


class Fault(NamedTuple):
    """Where the first such number was, int32 []; nowhere when `step` is negative."""

    step: Array
    env: Array
    leaf: Array


def no_fault() -> Fault:
    """Return what a loop begins with."""
    nowhere = jnp.full((), -1, jnp.int32)
    return Fault(nowhere, nowhere, nowhere)


def first_fault(fault: Fault, now: TimeStep, step: Array | int) -> Fault:
    """Look at the rewards and observations [E, ...] of a step, unless one before was bad."""
    bad = jnp.stack(
        [~jnp.isfinite(x).reshape(x.shape[0], -1).all(-1) for _, x in _floats(now)]
    )  # [L, E]
    leaf, env = jnp.unravel_index(jnp.argmax(bad), bad.shape)
    found = Fault(*(jnp.asarray(x, jnp.int32) for x in (step, env, leaf)))
    is_new = (fault.step < 0) & bad.any()
    return jax.tree.map(lambda new, old: jnp.where(is_new, new, old), found, fault)


def raise_fault(
    fault: Fault, record: Record, start: int, env_id: str, seeds: tuple[int, ...]
) -> None:
    """Refuse to go on after a fault.

    Args:
      fault: leaves [S], steps counted from `start`.
      record: any record of the simulator, for the names of its leaves.
      start: step at which the loop began; 0 is the first reset.
      env_id: name of the simulator.
      seeds: S of them.

    Raises:
      ValueError: naming seed, environment, step and leaf of the first fault of all seeds.
    """
    steps = np.asarray(fault.step)
    if (steps < 0).all():
        return
    index = int(np.argmin(np.where(steps < 0, np.iinfo(steps.dtype).max, steps)))
    step, env, leaf = (int(np.asarray(x)[index]) for x in fault)
    where = f"{env_id}, seed {seeds[index]}, environment {env}, step {start + step}"
    raise ValueError(
        f"{where}: {_floats(record)[leaf][0]} is NaN or Inf, expected a finite float32; look for "
        "a division, a root or a logarithm in the `step` of the MDP"
    )


def _floats(now: TimeStep | Record) -> list[tuple[str, Any]]:
    tree = {"observation": now.obs, "reward": now.reward}
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
