"""Targets and loss of value-equivalent models, which predict what planning needs and no more."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mbrl import returns
from mbrl.types import Array, Record


def scale_gradient(x: Array, factor: float) -> Array:
    """Return `x`, whose gradient is multiplied by `factor`."""
    return factor * x + (1.0 - factor) * jax.lax.stop_gradient(x)


class Targets(NamedTuple):
    """What a model should predict at the start of an unroll and after each of K actions.

    Attributes:
      value: [K + 1] n-step returns.
      reward: [K + 1] rewards on arrival; the first is not predicted.
      has_value: [K + 1] float, 1 where the value is known.
      has_reward: [K + 1] float, 1 where the reward is known; 0 at the start.
      has_policy: [K + 1] float, 1 where an action was taken within the same episode.
    """

    value: Array
    reward: Array
    has_value: Array
    has_reward: Array
    has_policy: Array


def bootstrap_rows(
    record: Record, n: Array | int, explored: Array | None = None, *, unroll: int
) -> Array:
    """Find the records whose value `unroll_targets` reads.

    Args:
      record: [T, ...] as there.
      n: scalar, rewards per return.
      explored: as there.
      unroll: K, actions of the unroll.

    Returns:
      int32 [K + 1] rows of the record, one per return.
    """
    size = record.reward.shape[0]
    goes_on = jnp.concatenate([returns.align(record, 1.0).valid, jnp.zeros(1, bool)])
    goes_on = goes_on if explored is None else goes_on & ~explored
    stop = jax.lax.cummin(jnp.where(goes_on, size - 1, jnp.arange(size)), reverse=True)
    start = jnp.arange(unroll + 1)
    return jnp.minimum(stop[1 : unroll + 2], start + n)


def unroll_targets(
    record: Record,
    valid: Array,
    value: Array,
    at_most: Array | None = None,
    explored: Array | None = None,
    *,
    unroll: int,
    n: int,
    gamma: Array | float,
) -> Targets:
    """Compute the targets of an unroll over one sequence of records.

    A terminal state and all that is imagined beyond it are absorbing: value and reward 0.
    Beyond a truncation nothing is known, so nothing is asked for; returns up to it bootstrap
    from the value of the last observation.

    Args:
      record: `T >= unroll + n + 1` records [T, ...].
      valid: bool [T], false where the sequence holds no data.
      value: [T] value of every observation to bootstrap from; see `bootstrap_rows`.
      at_most: scalar int, rewards per return where that is fewer than `n`; may be traced.
      explored: bool [T], actions that were not the policy's own. Returns end before them, and
        the value where one was taken is not asked for.
      unroll: K, actions of the unroll.
      n: rewards per return.
      gamma: discount per step; negative where two players alternate.

    Returns:
      `Targets` of [K + 1].

    Raises:
      ValueError: when the records are too few for returns of `n` rewards.

    Reference: Schrittwieser et al. 2020 (arXiv:1911.08265).
    """
    size = unroll + 1
    if record.reward.shape[0] < unroll + n + 1:
        raise ValueError(
            f"record: got {record.reward.shape[0]} records, expected at least unroll + n + 1 = "
            f"{unroll + n + 1}, or late returns would see fewer rewards; ask for longer sequences"
        )
    signals = returns.align(record, gamma)
    own = jnp.ones_like(valid) if explored is None else ~explored
    trace = signals.trace_t * own[1:]
    target = returns.n_step(signals.r_t, signals.discount_t, value[1:], n, trace, at_most)[:size]
    last, terminal = record.is_last[:size], record.is_terminal[:size]
    border = jnp.concatenate([jnp.zeros(1, bool), last[:-1] | record.is_first[1:size]])
    same = jnp.cumsum(border) == 0  # still the episode of the first record
    before = jnp.concatenate([jnp.zeros(1, bool), terminal[:-1]])
    absorbed = jnp.cumsum(before & (jnp.cumsum(border) == 1)) > 0
    known = jnp.cumsum(~valid[:size]) == 0
    acts = same & ~last & known
    ended = absorbed | (same & terminal)
    arrived = (same | absorbed) & known
    return Targets(
        value=jnp.where(ended, 0.0, target),
        reward=jnp.where(same, record.reward[:size], 0.0),
        has_value=(((acts & own[:size]) | ended) & known).astype(jnp.float32),
        has_reward=arrived.astype(jnp.float32).at[0].set(0.0),
        has_policy=acts.astype(jnp.float32),
    )


def unroll_weights(unroll: int) -> Array:
    """Weigh the start of an unroll by 1 and each of its K steps by 1 / K, [K + 1]."""
    return jnp.concatenate([jnp.ones(1), jnp.full(unroll, 1.0 / max(unroll, 1))])


def cosine_error(prediction: Array, target: Array) -> Array:
    """Return 1 minus the cosine of two vectors [..., D]; no gradient flows to the target.

    Reference: SimSiam, Chen and He 2020 (arXiv:2011.10566).
    """

    def unit(x: Array) -> Array:
        return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + 1e-8)

    return 1.0 - jnp.sum(unit(prediction) * unit(jax.lax.stop_gradient(target)), -1)
