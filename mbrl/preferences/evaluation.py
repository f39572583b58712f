"""What a reward learned from preferences is worth: accuracy, calibration, distance to the truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mbrl.losses.preference import pair_nll, ranked_pairs
from mbrl.types import Array, Transition

RewardFn = Callable[[Any, Array, Any], Array]
"""`(obs, action, next_obs) -> reward [B]`, leaves [B, ...]."""

INVERSE_BOUNDS = (1e-3, 1e3)
"""Of the inverse temperature, where differences have a root mean square of 1."""


def accuracy(scores: Array, rank: Array, mask: Array | None = None) -> Array:
    """Compute the share of pairs whose better answer has the larger score.

    Args:
      scores: [Q, K].
      rank: int [Q, K], 0 = best, equal = tie, -1 = absent.
      mask: bool [Q], rows that count; None = all.

    Returns:
      Scalar over all present pairs that are not tied, of any row; equal scores count one
      half. 0 when there is no such pair.
    """
    pairs = ranked_pairs(scores, rank)
    counts = pairs.present & ~pairs.tied
    if mask is not None:
        counts = counts & mask[:, None]
    right = (1.0 + jnp.sign(pairs.better - pairs.worse)) / 2.0
    return jnp.sum(jnp.where(counts, right, 0.0)) / jnp.maximum(counts.sum(), 1)


def log_loss(scores: Array, rank: Array, mask: Array | None = None) -> Array:
    """Compute the mean of `pair_nll` over rankings; every ranking weighs the same.

    Args:
      scores: [Q, K].
      rank: int [Q, K], 0 = best, equal = tie, -1 = absent.
      mask: bool [Q], rows that count; None = all.

    Returns:
      Scalar in nats; log 2 is that of a constant. Rankings of fewer than two answers do not
      count; 0 when there is no other.
    """
    counts = jnp.sum(rank >= 0, -1) > 1
    counts = counts if mask is None else counts & mask
    nll = jnp.where(counts, jax.vmap(pair_nll)(scores, rank), 0.0)
    return jnp.sum(nll) / jnp.maximum(counts.sum(), 1)


def expected_calibration_error(
    prob: Array, correct: Array, mask: Array | None = None, bins: int = 10, low: float = 0.5
) -> Array:
    """Compute how far confidence is from accuracy: `sum_b share_b |accuracy_b - confidence_b|`.

    Args:
      prob: [Q] probability that the model gave to what it predicted.
      correct: [Q] 1 where that was right, 0 where not; fractions are soft labels.
      mask: bool [Q], entries that count; None = all.
      bins: of equal width, from `low` to 1; a bin holds its lower edge.
      low: the least confidence: 0.5 for the preferred one of two, 0 for the probability of
        a fixed outcome, with `correct` = whether it came about. Smaller ones go to the
        first bin.

    Returns:
      Scalar in [0, 1].

    Reference: Guo et al. 2017 (arXiv:1706.04599).
    """
    weight = jnp.ones(prob.shape) if mask is None else mask.astype(jnp.float32)
    index = jnp.floor((prob - low) / (1.0 - low) * bins)
    index = jnp.clip(jnp.where(weight > 0, index, 0.0), 0, bins - 1).astype(jnp.int32)
    gap = jnp.where(weight > 0, correct - prob, 0.0)
    per_bin = jnp.zeros(bins).at[index].add(gap)
    return jnp.sum(jnp.abs(per_bin)) / jnp.maximum(weight.sum(), 1.0)


def fit_temperature(
    difference: Array, outcome: Array, mask: Array | None = None, steps: int = 32
) -> Array:
    """Find the temperature T at which `sigmoid(difference / T)` fits the outcomes best.

    The likelihood is convex in 1 / T: the root of its slope is bisected. Newton's method would
    creep where the differences are nearly always right, and diverge where they always are.

    Args:
      difference: [Q] score of the first less that of the second.
      outcome: [Q] 1 where the first was preferred, 0 the second, 1/2 a tie.
      mask: bool [Q], entries that count; None = all.
      steps: of bisection; 32 leave nothing but rounding.

    Returns:
      Scalar T > 0, in units of score; above 1 the model was too sure of itself. At most 1000
      times the root mean square of the differences, as when they say nothing of the outcome
      or the opposite, and at least a thousandth, as when they are never wrong. 1 without data.

    Reference: Guo et al. 2017 (arXiv:1706.04599).
    """
    mask = jnp.ones(difference.shape, bool) if mask is None else mask
    x = jnp.where(mask, difference, 0.0)
    y = jnp.where(mask, outcome, 0.5)
    square = jnp.sum(jnp.square(x)) / jnp.maximum(mask.sum(), 1)
    known = square > 0.0
    unit = jnp.sqrt(jnp.where(known, square, 1.0))
    x = x / unit

    def bisect(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = 0.5 * (low + high)
        # A slope of 0 is one that has underflowed, where all differences are right.
        falls = jnp.sum((jax.nn.sigmoid(jnp.exp(middle) * x) - y) * x) <= 0.0
        return jnp.where(falls, middle, low), jnp.where(falls, high, middle)

    low, high = (jnp.log(jnp.float32(bound)) for bound in INVERSE_BOUNDS)
    low, high = jax.lax.fori_loop(0, steps, bisect, (low, high))
    return jnp.where(known, unit * jnp.exp(-0.5 * (low + high)), 1.0)


def reward_correlation(a: Array, b: Array, mask: Array | None = None) -> Array:
    """Compute the correlation of Pearson between two rewards of the same steps.

    Args:
      a: [...].
      b: [...].
      mask: bool [...], entries that count; None = all.

    Returns:
      Scalar in [-1, 1]; 0 when one of them is constant.
    """
    mask = jnp.ones(a.shape, bool) if mask is None else mask
    return jnp.clip(jnp.sum(_unit(a, mask) * _unit(b, mask)), -1.0, 1.0)


def canonical_reward(
    reward: RewardFn, transition: Transition, states: Any, actions: Array, discount: float
) -> Array:
    """Compute the canonically shaped reward, which all shaped versions of a reward share.

    `R(s, a, s') + E[discount R(s', A, S') - R(s, A, S') - discount R(S, A, S')]`, where the
    expectation is the mean over the S given pairs of an action A and a state S', and S is
    any of those states. A potential `discount phi(s') - phi(s)` added to R cancels exactly,
    whatever the states and actions are.

    Args:
      reward: R.
      transition: where to evaluate, leaves [B, ...]; reward and termination may be None.
      states: leaves [S, ...], draws from a distribution that covers the states.
      actions: [S, ...], independent draws; row i goes with row i of the states. In a finite
        problem give all pairs, and the expectation is exact.
      discount: of the task.

    Returns:
      [B] in units of reward.

    Reference: EPIC, Gleave et al. 2020 (arXiv:2006.13900), definition 4.1.
    """

    def mean_from(obs: Any) -> Array:
        """Return `E[R(obs, A, S')]` for one observation without batch axis."""
        tiled = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (jax.tree.leaves(actions)[0].shape[0], *x.shape)), obs
        )
        return jnp.mean(reward(tiled, actions, states))

    # One row at a time: all of them at once would be B x S rows of network activations.
    after = jax.lax.map(mean_from, transition.next_obs)
    before = jax.lax.map(mean_from, transition.obs)
    anywhere = jnp.mean(jax.lax.map(mean_from, states))
    plain = reward(transition.obs, transition.action, transition.next_obs)
    return plain + discount * after - before - discount * anywhere


def epic_distance(
    reward_a: RewardFn,
    reward_b: RewardFn,
    transition: Transition,
    states: Any,
    actions: Array,
    discount: float,
) -> Array:
    """Compute a distance of rewards that shaping, scale and offset do not change.

    `sqrt((1 - correlation) / 2)` of the two canonically shaped rewards over the transitions.

    Args:
      reward_a: `(obs, action, next_obs) -> reward [B]`; of a `RewardModel`,
        `lambda *step: model(params, *step)[0]`.
      reward_b: likewise.
      transition: leaves [B, ...], draws from a distribution that covers the transitions.
      states: see `canonical_reward`.
      actions: likewise.
      discount: of the task.

    Returns:
      Scalar: 0 for equivalent rewards, 1 for opposite ones, sqrt(1/2) for unrelated ones. A
      reward that is equivalent to zero has no direction: 1/2 from all others, 0 from zero.

    Reference: EPIC, Gleave et al. 2020 (arXiv:2006.13900).
    """
    mask = jnp.ones(jax.tree.leaves(transition.action)[0].shape[:1], bool)

    def direction(reward: RewardFn) -> Array:
        size = jnp.abs(reward(transition.obs, transition.action, transition.next_obs)).max()
        return _unit(canonical_reward(reward, transition, states, actions, discount), mask, size)

    # Half the distance of unit vectors is that root, without the cancellation near 0.
    return 0.5 * jnp.linalg.norm(direction(reward_a) - direction(reward_b))


def _unit(x: Array, mask: Array, size: Array | None = None) -> Array:
    """Center `x` and scale it to length 1; 0 where it is constant but for rounding.

    `size` is the magnitude of what it was computed from; None = that of `x`.
    """
    count = jnp.maximum(mask.sum(), 1)
    x = jnp.where(mask, x, 0.0)
    size = jnp.abs(x).max() if size is None else size
    x = jnp.where(mask, x - jnp.sum(x) / count, 0.0)
    length = jnp.sqrt(jnp.sum(jnp.square(x)))
    constant = length <= 1e-6 * size * jnp.sqrt(count.astype(jnp.float32))
    return jnp.where(constant, 0.0, x / jnp.where(constant, 1.0, length))
