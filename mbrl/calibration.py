"""Calibration: whether predicted distributions hold what they promise, and one scale that mends it.

Members of an ensemble, or samples of a posterior, are read as the mixture of their Gaussians with
equal weights. That is what particles are drawn from; one Gaussian of the same mean and variance
would be another distribution where members disagree. Targets are judged one dimension at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm

from mbrl.types import Array
from mbrl.uncertainty import member_disagreement

INTERVALS = (0.5, 0.8, 0.95)
"""Central intervals whose coverage is told."""
LEVELS = tuple(i / 20 for i in range(1, 20))
"""Levels of the reliability curve."""
_WIDEST, _HALVINGS = 7.0, 24


class Calibration(NamedTuple):
    """How predictions of `B` rows compare with what came.

    Attributes:
      nll: [D] mean negative log-likelihood in nats.
      coverage: [3, D] share of targets inside each of `INTERVALS`.
      reliability: [L, D] share of targets below the predicted quantile of each of `LEVELS`.
      error: [D] mean distance of the reliability from its level.
      correlation: [] Spearman's, of |error| and epistemic deviation, both as roots of their mean
        squares over dimensions.
    """

    nll: Array
    coverage: Array
    reliability: Array
    error: Array
    correlation: Array


def calibration(
    means: Array, variances: Array, targets: Array, mask: Array | None = None
) -> Calibration:
    """Compare predictions with targets.

    Args:
      means: [N, B, D] of the members, in units in which the dimensions may be averaged.
      variances: [N, B, D] of the members.
      targets: [B, D].
      mask: bool [B], rows that count; None = all.

    Reference: Accurate Uncertainties for Deep Learning Using Calibrated Regression, Kuleshov et al.
    2018 (arXiv:1807.00263).
    """
    below = mixture_cdf(means, variances, targets)
    curve = reliability(below, jnp.asarray(LEVELS), mask)
    wrong = jnp.sqrt(jnp.mean((means.mean(0) - targets) ** 2, -1))
    unsure = jnp.sqrt(jnp.mean(member_disagreement(means) ** 2, -1))
    return Calibration(
        _share(mixture_nll(means, variances, targets)[None], mask)[0],
        interval_coverage(below, jnp.asarray(INTERVALS), mask),
        curve,
        jnp.abs(curve - jnp.asarray(LEVELS)[:, None]).mean(0),
        rank_correlation(wrong, unsure, mask),
    )


def mixture_cdf(means: Array, variances: Array, targets: Array) -> Array:
    """Return the probability [B, D] that a mixture gives to values below the target.

    It is uniform between 0 and 1 where predictions are calibrated.

    Args:
      means: [N, B, D] of the members.
      variances: [N, B, D] of the members.
      targets: [B, D].
    """
    return norm.cdf((targets - means) / jnp.sqrt(variances)).mean(0)


def mixture_nll(means: Array, variances: Array, targets: Array) -> Array:
    """Return the negative log-likelihood [B, D] of the mixture in nats; arguments as above."""
    each = norm.logpdf(targets, means, jnp.sqrt(variances))
    return jnp.log(means.shape[0]) - jax.nn.logsumexp(each, 0)


def interval_coverage(below: Array, levels: Array, mask: Array | None = None) -> Array:
    """Return the share [L, D] of targets in the central interval of each level.

    Args:
      below: [B, D] of `mixture_cdf`.
      levels: [L] in (0, 1).
      mask: bool [B], rows that count; None = all. Without any, the share is 0.
    """
    return _share(jnp.abs(2.0 * below - 1.0) <= levels[:, None, None], mask)


def reliability(below: Array, levels: Array, mask: Array | None = None) -> Array:
    """Return the share [L, D] of targets below the quantile of each level; arguments as above."""
    return _share(below <= levels[:, None, None], mask)


def _share(x: Array, mask: Array | None) -> Array:
    """Average [L, B, D] over the rows that count; others may hold anything, NaN included."""
    counts = jnp.ones(x.shape[1], bool) if mask is None else mask
    total = jnp.where(counts[:, None], x, 0.0).sum(1)
    return total / jnp.maximum(counts.sum(), 1)


def rank_correlation(a: Array, b: Array, mask: Array | None = None) -> Array:
    """Compute Spearman's rank correlation; ties share the mean of their ranks.

    Args:
      a: [B].
      b: [B].
      mask: bool [B], rows that count; None = all.
    """
    counts = jnp.ones(a.shape, bool) if mask is None else mask
    total = jnp.maximum(counts.sum(), 1)

    def ranks(x: Array) -> Array:
        x = jnp.where(counts, x, jnp.inf)  # behind all that count
        ordered = jnp.sort(x)
        first, after = (jnp.searchsorted(ordered, x, side=side) for side in ("left", "right"))
        rank = jnp.where(counts, (first + after) / 2.0, 0.0)
        return jnp.where(counts, rank - rank.sum() / total, 0.0)

    one, two = ranks(a), ranks(b)
    return jnp.sum(one * two) / jnp.sqrt(jnp.sum(one**2) * jnp.sum(two**2))


def interval_scale(
    means: Array, variances: Array, targets: Array, mask: Array, level: float = 0.95
) -> Array:
    """Find the factor of the members' deviations that makes one central interval right.

    It is the smallest with which the interval holds the share `level` of the targets, rounded as
    in conformal prediction: of n + 1 rows, the new one included. The likelihood would have chosen
    another: a few rows that are predicted badly, contacts or resets, count there by the square
    of their error, and widen the intervals of all others.

    Args:
      means: [N, B, D] of the members. Their spread is not scaled: rollouts that follow one member
        do not know it. Where it alone covers too much, the factor is the least there is.
      variances: [N, B, D] of the members.
      targets: [B, D] that the members were not fitted to.
      mask: bool [B], rows that count.
      level: of the interval, in (0, 1).

    Returns:
      [D] between 1/128 and 128; 1 without any row.

    Reference: Distribution-Free Predictive Inference for Regression, Lei et al. 2018
    (arXiv:1604.04173).
    """
    count = mask.sum()
    # A hair less than a whole number of rows, so that rounding does not ask for one more.
    needed = jnp.minimum(jnp.ceil((count + 1) * level) - 0.5, count - 0.5)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2.0
        below = mixture_cdf(means, 4.0**middle * variances, targets)
        held = interval_coverage(below, jnp.asarray([level]), mask)[0] * count
        enough = held >= needed
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    edge = jnp.full(targets.shape[-1], _WIDEST)
    _, exponent = jax.lax.fori_loop(0, _HALVINGS, halve, (-edge, edge))
    return jnp.where(count > 0, 2.0**exponent, 1.0)
