"""Uncertainty of ensembles, and risk measures that turn many predictions into one number."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
from jax.scipy.special import logsumexp

from mbrl.types import Array

RiskKind = Literal["mean", "lcb", "ucb", "uwo", "cvar", "worst"]

UncertaintyKind = Literal["std", "pairwise", "aleatoric", "jensen_renyi", "information_gain"]
"""How the predictions of all members become one number, see `member_uncertainty`."""

UncertaintyScale = Literal["reward", "raw"]
"""Units of an uncertainty, see `reported_uncertainty`."""


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


def finite_sqrt(x: Array) -> Array:
    """Return the square root [...] of numbers that are not negative, with slope 0 at 0."""
    # The square root has an infinite slope at 0, where all particles agree (always so with
    # one of them): planners that differentiate through a risk would get NaN.
    return jnp.where(x == 0, 0.0, jnp.sqrt(jnp.where(x == 0, 1.0, x)))


def _std(values: Array) -> Array:
    return finite_sqrt(values.var(0))


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


def member_uncertainty(means: Array, variances: Array, kind: UncertaintyKind = "std") -> Array:
    """Reduce the Gaussian predictions of all members to one number per row.

    The first three are lengths, in the units of the prediction; the last two are in nats, whatever
    the units. 'aleatoric' is not epistemic, and above 0 also where all members agree.

    Args:
      means: [N, B, D] means of the members.
      variances: [N, B, D] variances of the members, positive.
      kind: 'std' = norm of the members' standard deviations around their mean; 'pairwise' = largest
        distance between the means of two members; 'aleatoric' = largest norm of the standard
        deviations that a member predicts (MOPO); 'jensen_renyi' = entropy of the mixture less the
        mean entropy of its members, both quadratic Renyi entropies, which members of unequal
        variance can make negative: it is cut at 0; 'information_gain' = what an observation would
        tell about the mean, `sum_d log(1 + epistemic / aleatoric variance)`.

    Returns:
      [B] uncertainty, not negative; 0 for one member, except 'aleatoric'.

    Raises:
      ValueError: for an unknown kind.

    Reference: MOPO (arXiv 2005.13239) for 'aleatoric'; Model-Based Active Exploration (arXiv
    1810.12162) for 'jensen_renyi'; Optimistic Active Exploration (arXiv 2306.12371) for
    'information_gain'.
    """
    match kind:
        case "std":
            return finite_sqrt(means.var(0).sum(-1))
        case "pairwise":
            return finite_sqrt(jnp.square(means[:, None] - means).sum(-1)).max((0, 1))
        case "aleatoric":
            return finite_sqrt(variances.sum(-1)).max(0)
        case "jensen_renyi":
            return _jensen_renyi(means, variances)
        case "information_gain":
            return jnp.log1p(means.var(0) / variances.mean(0)).sum(-1)
    raise ValueError(f"kind: got {kind!r}, expected one of {list(get_args(UncertaintyKind))}")


def _jensen_renyi(means: Array, variances: Array) -> Array:
    # The integral of the product of two Gaussians is the density of one at the mean of the other,
    # with the sum of their variances. The constant 2 pi cancels in the difference of entropies.
    num = means.shape[0]
    both = variances[:, None] + variances
    log_overlap = -0.5 * (jnp.square(means[:, None] - means) / both + jnp.log(both)).sum(-1)
    mixture = 2.0 * jnp.log(num) - logsumexp(log_overlap, (0, 1))
    alone = 0.5 * jnp.log(2.0 * variances).sum(-1).mean(0)
    return jnp.maximum(mixture - alone, 0.0)


def reported_uncertainty(
    means: Array,
    variances: Array,
    spread: Array,
    kind: UncertaintyKind = "std",
    scale: UncertaintyScale = "reward",
    own_reward: bool = True,
) -> Array:
    """Compute what a model reports as `Outcome.uncertainty`, from all of its members.

    Args:
      means: [N, B, D + 1] means in standardized target units; the last target is the reward.
      variances: [N, B, D + 1] variances in the same units.
      spread: [D + 1] standard deviations of the targets in the data.
      kind: see `member_uncertainty`.
      scale: 'reward' = per target, relative to the spread of each, times the spread of the reward:
        one coefficient of a penalty then means the same in every environment. The lengths are root
        mean squares over targets, the information gain is a mean. 'raw' = in the units of the
        observations, as MOPO published it (norms, not per target).
      own_reward: count the last target as well. Where another reward is acted for, the members'
        own opinion of it says nothing; its spread is the unit still.

    Returns:
      [B] uncertainty, in units of reward ('reward') or of the targets ('raw').

    Raises:
      ValueError: for an unknown kind or scale.
    """
    if scale not in get_args(UncertaintyScale):
        raise ValueError(
            f"scale: got {scale!r}, expected one of {list(get_args(UncertaintyScale))}"
        )
    unit = spread[-1]
    if not own_reward:
        means, variances, spread = (x[..., :-1] for x in (means, variances, spread))
    if scale == "raw":
        return member_uncertainty(spread * means, jnp.square(spread) * variances, kind)
    size = means.shape[-1]
    parts = {"jensen_renyi": 1.0, "information_gain": size}.get(kind, size**0.5)
    return member_uncertainty(means, variances, kind) / parts * unit
