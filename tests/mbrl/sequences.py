"""Random records of any spaces, and changes to some of them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from mbrl import spaces
from mbrl.types import Discrete, EnvSpec, MultiDiscrete, Record


def random_space(space: Any, lead: tuple[int, ...], rng: np.random.Generator) -> Any:
    """Draw elements of a space, leaves [*lead, ...]; what is unbounded lies in [-2, 2]."""

    def draw(leaf: Any) -> Any:
        if isinstance(leaf, Discrete):
            return rng.integers(0, leaf.num, lead).astype(np.int32)
        if isinstance(leaf, MultiDiscrete):
            return rng.integers(0, leaf.nums, (*lead, len(leaf.nums))).astype(np.int32)
        if leaf.dtype == np.uint8:
            return rng.integers(0, 256, (*lead, *leaf.shape)).astype(np.uint8)
        low, high = np.nan_to_num(leaf.low, neginf=-2.0), np.nan_to_num(leaf.high, posinf=2.0)
        return rng.uniform(low, high, (*lead, *leaf.shape)).astype(np.float32)

    found = [draw(leaf) for _, leaf in spaces.leaves(space)]
    return jax.tree.unflatten(jax.tree.structure(spaces.zeros(space)), found)


def random_records(spec: EnvSpec, latent: Any, lead: tuple[int, ...], seed: int = 0) -> Any:
    """Draw records [*lead, ...] in the middle of an episode.

    Args:
      spec: spaces of the task.
      latent: what one row of a packed latent looks like, leaves [1, ...]; fewer than 5
        categories are used of it.
      lead: axes of the records.
      seed: of the draw.
    """
    rng = np.random.default_rng(seed)

    def stored(leaf: Any) -> Any:
        shape = (*lead, *leaf.shape[1:])
        if np.issubdtype(leaf.dtype, np.integer):
            return rng.integers(0, 4, shape).astype(leaf.dtype)
        return rng.normal(size=shape).astype(leaf.dtype)

    off: Any = np.zeros(lead, bool)
    reward: Any = rng.normal(size=lead).astype(np.float32)
    obs, action = (random_space(x, lead, rng) for x in (spec.observation, spec.action))
    return Record(obs, action, reward, off, off, off, jax.tree.map(stored, latent))


def changed(tree: Any, where: Any) -> Any:
    """Change entries: numbers by a lot, integers to another one, flags to their opposite."""

    def change(x: Any) -> Any:
        x = x.copy()
        if x.dtype == bool:
            x[where] = ~x[where]
        elif x.dtype == np.uint8:
            x[where] = 255 - x[where]
        elif np.issubdtype(x.dtype, np.integer):
            x[where] = 1 - np.minimum(x[where], 1)
        else:
            x[where] += 1.0
        return x

    return jax.tree.map(change, tree)


def edited(record: Any, where: Any, *fields: str) -> Any:
    """Change some rows of some fields."""
    return record._replace(**{name: changed(getattr(record, name), where) for name in fields})
