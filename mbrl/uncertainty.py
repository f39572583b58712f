"""Uncertainty of ensembles, and risk measures that turn many predictions into one number."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp

from mbrl.types import Array

RiskKind = Literal["mean", "lcb", "ucb", "uwo", "cvar", "worst"]


def risk(values: Array, kind: RiskKind = "mean", coef: Array | float = 1.0) -> Array:
    """Reduce the particle axis of returns, larger being better.

    Args:
      values: [Q, ...] one value per particle.
      kind: 'mean'; 'lcb' = mean - coef * std; 'ucb' = mean + coef * std; 'uwo'
        (uncertainty-weighted) = mean - coef * variance; 'cvar' = mean of the worst share
        `coef` of the particles; 'worst' = minimum. Spread is that of the population, so
        that one particle has none.
      coef: weight of the spread (lcb, ucb, uwo) or the share in (0, 1] (cvar); it may be
        traced. Not used by 'mean' and 'worst'.

    Returns:
      [...] risk-adjusted values. With one particle every kind returns it.

    Raises:
      ValueError: for an unknown kind, or a share outside (0, 1].

    Reference: Reward Model Ensembles Help Mitigate Overoptimization (arXiv 2310.02743) for
    'uwo' and 'worst'.
    """
    if kind not in get_args(RiskKind):
        raise ValueError(f"kind: got {kind!r}, expected one of {list(get_args(RiskKind))}")
    match kind:
        case "lcb":
            return values.mean(0) - coef * _std(values)
        case "ucb":
            return values.mean(0) + coef * _std(values)
        case "uwo":
            return values.mean(0) - coef * values.var(0)
        case "cvar":
            return cvar(values, coef)
        case "worst":
            return values.min(0)
    return values.mean(0)


def _sqrt(x: Array) -> Array:
    # The square root has an infinite slope at 0, where all particles agree (always so with
    # one of them): planners that differentiate through a risk would get NaN.
    return jnp.where(x == 0, 0.0, jnp.sqrt(jnp.where(x == 0, 1.0, x)))


def _std(values: Array) -> Array:
    return _sqrt(values.var(0))


def cvar(values: Array, alpha: Array | float) -> Array:
    """Compute the conditional value at risk: the mean of the worst share of particles.

    A share that is no whole number of particles counts the last one in part, so that the
    measure is continuous in `alpha`.

    Args:
      values: [Q, ...], larger is better.
      alpha: share in (0, 1]; 1 is the mean, `1 / Q` or less the minimum.

    Returns:
      [...] conditional value at risk.

    Raises:
      ValueError: when a concrete `alpha` lies outside (0, 1].

    Reference: Optimization of Conditional Value-at-Risk, Rockafellar and Uryasev, 2000.
    """
    if isinstance(alpha, int | float) and not 0.0 < alpha <= 1.0:
        raise ValueError(f"alpha: got {alpha}, expected a share of the particles in (0, 1]")
    num = values.shape[0]
    rank = jnp.arange(num, dtype=values.dtype)
    weight = jnp.clip(alpha * num - rank, 0.0, 1.0)
    weight = weight / weight.sum()
    return jnp.tensordot(weight, jnp.sort(values, axis=0), 1)


def member_disagreement(means: Array) -> Array:
    """Compute the standard deviation of the members' predictions.

    Args:
      means: [N, B, D] mean prediction of every member.

    Returns:
      [B, D] epistemic standard deviation in the units of the prediction; 0 for one member.
    """
    return _std(means)


class Uncertainty(NamedTuple):
    """Variance split by its source, in squared units of the prediction.

    Attributes:
      aleatoric: [B, D] noise of the process, which more data will not remove.
      epistemic: [B, D] disagreement about the mean, which more data will remove.
    """

    aleatoric: Array
    epistemic: Array


def total_variance(means: Array, variances: Array) -> Uncertainty:
    """Split the variance of a mixture of members; the two parts add up to all of it.

    Args:
      means: [N, B, D] means of the members.
      variances: [N, B, D] variances of the members.

    Returns:
      `Uncertainty` of [B, D].

    Reference: Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles
    (arXiv 1612.01474), by the law of total variance.
    """
    return Uncertainty(variances.mean(0), means.var(0))


def max_aleatoric(variances: Array) -> Array:
    """Compute the penalty of MOPO: the largest norm of a member's standard deviations.

    Args:
      variances: [N, B, D] variances of the members.

    Returns:
      [B] penalty in the units of the prediction.

    Reference: MOPO: Model-based Offline Policy Optimization (arXiv 2005.13239).
    """
    return _sqrt(variances.sum(-1)).max(0)


def max_deviation(means: Array) -> Array:
    """Compute the largest distance of a member from the mean of the members.

    Args:
      means: [N, B, D] means of the members.

    Returns:
      [B] distance in the units of the prediction.
    """
    return _sqrt(jnp.square(means - means.mean(0)).sum(-1)).max(0)
