"""Returns and advantages over one sequence `[T]`; batch them with `jax.vmap`.

Entry `k` of every argument belongs to the transition from time `k` to `k + 1`, written
`tm1 -> t`: `v_tm1[k]` is the value where it starts, `r_t[k]`, `discount_t[k]` and `v_t[k]`
are the reward, discount and value where it arrives.

Termination and truncation are told apart by two arrays. `discount_t = gamma (1 - terminal)`
removes the value beyond a terminal state. `lambda_` may be an array too, and a 0 where the
arrival state ends a stretch of data (truncation, a crash of the environment, the end of a
real rollout) makes the return bootstrap from `v_t` there instead of reading on across the
border. `align` derives both from records. Gradients flow through all arguments: put
`jax.lax.stop_gradient` around what serves as a target.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from mbrl.types import Array, Record


class Signals(NamedTuple):
    """What `T + 1` consecutive records say about the `T` transitions between them.

    Attributes:
      r_t: [T] rewards.
      discount_t: [T] discounts, 0 into a terminal state.
      trace_t: [T] float, 0 where no transition leaves the arrival state: multiply it onto
        the trace parameter, `lambda_ * trace_t`.
      valid: [T] bool, false for the pair of records at an episode border, which is no
        transition: mask its loss.
    """

    r_t: Array
    discount_t: Array
    trace_t: Array
    valid: Array


def align(record: Record, gamma: Array | float) -> Signals:
    """Turn the records of a stream into the signals of its transitions.

    Args:
      record: `T + 1` records, leaves [T+1, ...]; reward and flags arrive with the
        observation.
      gamma: discount per step.

    Returns:
      `Signals` of [T].
    """
    valid = ~record.is_last[:-1] & ~record.is_first[1:]
    leaves = jnp.concatenate([valid[1:], jnp.ones(1, bool)])
    return Signals(
        r_t=record.reward[1:],
        discount_t=gamma * (1.0 - record.is_terminal[1:]),
        trace_t=leaves.astype(jnp.float32),
        valid=valid,
    )


def _accumulate(bias: Array, decay: Array, last: Array | float) -> Array:
    """Solve `y[k] = bias[k] + decay[k] y[k + 1]` with `y[T] = last`."""

    def step(y: Array, x: tuple[Array, Array]) -> tuple[Array, Array]:
        y = x[0] + x[1] * y
        return y, y

    start = jnp.asarray(last, bias.dtype)
    return jax.lax.scan(step, start, (bias, decay), reverse=True)[1]


def _check(*arrays: Array) -> None:
    chex.assert_rank(arrays, 1)
    chex.assert_equal_shape(arrays)


def discounted(r_t: Array, discount_t: Array, bootstrap: Array | float = 0.0) -> Array:
    """Compute `G_tm1 = r_t + discount_t G_t`, the discounted sum of rewards.

    Args:
      r_t: [T].
      discount_t: [T].
      bootstrap: scalar value of the state after the last transition.

    Returns:
      [T] returns from the start of every transition.
    """
    _check(r_t, discount_t)
    return _accumulate(r_t, discount_t, bootstrap)


def running(reward: Array, is_first: Array, gamma: Array | float) -> Array:
    """Sum the discounted rewards of the past: `S_t = gamma S_tm1 + r_t` since `is_first`.

    Its spread is the scale of returns that reward normalization divides by.

    Args:
      reward: [T] arriving with the records.
      is_first: bool [T].
      gamma: discount per step.

    Returns:
      [T], as if nothing had come before the first record.
    """
    _check(reward, is_first)
    decay = gamma * (1.0 - is_first.astype(reward.dtype))
    return _accumulate(reward[::-1], decay[::-1], 0.0)[::-1]


def lambda_returns(
    r_t: Array, discount_t: Array, v_t: Array, lambda_: Array | float = 1.0
) -> Array:
    """Compute `G_tm1 = r_t + discount_t ((1 - lambda) v_t + lambda G_t)`.

    Args:
      r_t: [T].
      discount_t: [T].
      v_t: [T] values of the arrival states; the last one bootstraps.
      lambda_: scalar or [T] in [0, 1]; 0 is the one-step target, 1 the discounted return.

    Returns:
      [T] returns from the start of every transition.

    Reference: Reinforcement Learning: An Introduction, Sutton and Barto, section 12.1.
    """
    _check(r_t, discount_t, v_t)
    lambda_ = jnp.broadcast_to(lambda_, r_t.shape)
    return _accumulate(r_t + discount_t * (1.0 - lambda_) * v_t, discount_t * lambda_, v_t[-1])


def gae(r_t: Array, discount_t: Array, v_tm1: Array, v_t: Array, lambda_: Array | float) -> Array:
    """Compute generalized advantages, `A_tm1 = delta_t + discount_t lambda A_t`.

    `delta_t = r_t + discount_t v_t - v_tm1`. The advantage plus `v_tm1` is the
    lambda-return.

    Args:
      r_t: [T].
      discount_t: [T].
      v_tm1: [T] values of the states the transitions start from.
      v_t: [T] values of the states they arrive at.
      lambda_: scalar or [T] in [0, 1].

    Returns:
      [T] advantages.

    Reference: High-Dimensional Continuous Control Using Generalized Advantage Estimation
    (arXiv 1506.02438).
    """
    _check(r_t, discount_t, v_tm1, v_t)
    return _accumulate(r_t + discount_t * v_t - v_tm1, discount_t * lambda_, 0.0)


def n_step(
    r_t: Array,
    discount_t: Array,
    v_t: Array,
    n: int,
    lambda_: Array | float = 1.0,
    at_most: Array | None = None,
) -> Array:
    """Compute `n`-step returns: `n` rewards, then the value of the state reached.

    Near the end of the sequence, and where `lambda_` cuts, fewer rewards are summed.

    Args:
      r_t: [T].
      discount_t: [T].
      v_t: [T] values of the arrival states.
      n: rewards per return.
      lambda_: scalar or [T] in [0, 1] mixing in the earlier values, as in
        `lambda_returns`.
      at_most: scalar int, rewards per return where that is fewer than `n`; may be traced.

    Returns:
      [T] returns from the start of every transition.

    Raises:
      ValueError: when `n < 1`.
    """
    if n < 1:
        raise ValueError(f"n: got {n}, expected at least 1 reward")
    _check(r_t, discount_t, v_t)
    size = r_t.shape[0]
    rows = jnp.stack([r_t, discount_t, jnp.broadcast_to(lambda_, r_t.shape), v_t])
    # Beyond the sequence: no reward, no discount, the value of the last state for ever.
    beyond = jnp.array([0.0, 1.0, 1.0, 0.0]).at[3].set(v_t[-1])
    rows = jnp.concatenate([rows, jnp.broadcast_to(beyond[:, None], (4, n - 1))], 1)

    def step(target: Array, shift: Array) -> tuple[Array, None]:
        r, d, mix, v = jax.lax.dynamic_slice_in_dim(rows, shift, size, 1)
        if at_most is not None:
            mix = jnp.where(shift < at_most - 1, mix, 0.0)
        return r + d * ((1.0 - mix) * v + mix * target), None

    return jax.lax.scan(step, rows[3, n - 1 :], jnp.arange(n), reverse=True)[0]


class VTrace(NamedTuple):
    """Off-policy corrected targets.

    Attributes:
      target: [T] value targets for the states the transitions start from.
      advantage: [T] importance-weighted policy-gradient advantages.
    """

    target: Array
    advantage: Array


def vtrace(
    r_t: Array,
    discount_t: Array,
    v_tm1: Array,
    v_t: Array,
    rho_tm1: Array,
    lambda_: Array | float = 1.0,
    clip_rho: float = 1.0,
    clip_pg_rho: float = 1.0,
) -> VTrace:
    """Compute V-trace targets and advantages from data of another policy.

    Args:
      r_t: [T].
      discount_t: [T].
      v_tm1: [T] values of the states the transitions start from.
      v_t: [T] values of the states they arrive at.
      rho_tm1: [T] importance ratios of the actions, target over behaviour policy.
      lambda_: scalar or [T] in [0, 1].
      clip_rho: upper bound of the ratio in the temporal differences; decides which
        policy's value is estimated.
      clip_pg_rho: upper bound of the ratio on the advantages.

    Returns:
      `VTrace` of [T]. Trace ratios are clipped at 1.

    Reference: IMPALA: Scalable Distributed Deep-RL with Importance Weighted Actor-Learner
    Architectures (arXiv 1802.01561).
    """
    _check(r_t, discount_t, v_tm1, v_t, rho_tm1)
    lambda_ = jnp.broadcast_to(lambda_, r_t.shape)
    delta = jnp.minimum(rho_tm1, clip_rho) * (r_t + discount_t * v_t - v_tm1)
    trace = discount_t * lambda_ * jnp.minimum(rho_tm1, 1.0)
    target = v_tm1 + _accumulate(delta, trace, 0.0)
    target_t = jnp.concatenate([target[1:], v_t[-1:]])
    q_tm1 = r_t + discount_t * ((1.0 - lambda_) * v_t + lambda_ * target_t)
    return VTrace(target, jnp.minimum(rho_tm1, clip_pg_rho) * (q_tm1 - v_tm1))
