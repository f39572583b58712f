"""Sequences that are read from one record earlier on, which tells the reward of their first."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mbrl.types import Array, Batch, SampleSpec


def longer(sampling: SampleSpec, segment: int) -> SampleSpec:
    """Ask for one record more, and for whole segments of `segment` transitions."""
    if sampling.kind != "sequences":
        return sampling
    return sampling._replace(length=1 + max(sampling.length, segment))


def cut(batch: Batch, sampling: SampleSpec) -> Batch:
    """Hand on the sequences that `sampling` asked for, [K, B, T, ...] without the record before."""
    if sampling.kind != "sequences":
        return batch

    def part(x: Array) -> Array:
        return x[:, :, 1 : 1 + sampling.length]

    index = None if batch.index is None else batch.index + jnp.array([0, 1])
    return Batch(jax.tree.map(part, batch.record), part(batch.valid), index, batch.odds)


def aligned(feedback: Any, batch: Batch) -> Any:
    """Put what goes back into replay behind the record that was read before it."""
    if feedback is None:
        return None
    return {
        name: jnp.concatenate([batch.record.extras[name][:, :, :1], value], 2)
        for name, value in feedback.items()
    }
