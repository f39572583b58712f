"""Regression losses: Gaussian likelihood, two-hot classification of scalars, binary labels.

Functions ending in `_nll` are elementwise, functions ending in `_loss` are scalar means.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from mbrl.distributions import TwoHot
from mbrl.two_hot import symexp, symexp_bins, symlog, two_hot, two_hot_mean
from mbrl.types import Array

__all__ = [
    "binary_nll",
    "bounded_variance",
    "gaussian_nll",
    "symexp",
    "symexp_bins",
    "symlog",
    "two_hot",
    "two_hot_loss",
    "two_hot_mean",
    "two_hot_nll",
]

LOG_2PI = math.log(2.0 * math.pi)


def gaussian_nll(mean: Array, logvar: Array, target: Array, beta: float = 0.0) -> Array:
    """Compute `-log N(target; mean, exp(logvar))`, elementwise.

    Args:
      mean: [...] predicted mean.
      logvar: [...] predicted log-variance.
      target: [...] observed value.
      beta: weight each element by its variance to this power, without gradient through
        the weight: 0 is the likelihood, 1 gives the mean the gradient of a squared error,
        0.5 is the recommended compromise. It keeps rows whose variance was once
        overestimated from being ignored for good.

    Returns:
      [...] negative log-density, including its constant.

    Reference: On the Pitfalls of Heteroscedastic Uncertainty Estimation with
    Probabilistic Neural Networks (arXiv 2203.09168).
    """
    nll = 0.5 * (jnp.square(target - mean) * jnp.exp(-logvar) + logvar + LOG_2PI)
    if isinstance(beta, int | float) and beta == 0:
        return nll
    return nll * jax.lax.stop_gradient(jnp.exp(beta * logvar))


def bounded_variance(logvar: Array, low: Array | float, high: Array | float) -> Array:
    """Return a variance between two bounds, keeping a gradient on both sides of them.

    The exponential of the published clamp `low + softplus(high - softplus(high - logvar)
    - low)`, in closed form: `exp(low) + exp(high) sigmoid(logvar - high)`, at a third of the
    time. It lies between `exp(low)` and `exp(low) + exp(high)`, far inside it is
    `exp(logvar)`, and the bounds may be learned: outside, the gradient flows to them.

    Args:
      logvar: [..., D] raw output of a network.
      low: [D] or scalar lower bound of the log-variance.
      high: [D] or scalar upper bound, above `low`.

    Returns:
      [..., D] variance, positive.

    Reference: Deep Reinforcement Learning in a Handful of Trials using Probabilistic
    Dynamics Models (arXiv 1805.12114), appendix A.1.
    """
    return jnp.exp(low) + jnp.exp(high) * jax.nn.sigmoid(logvar - high)


def two_hot_nll(logits: Array, target: Array, bins: Array) -> Array:
    """Compute the cross-entropy of bin logits against two-hot targets.

    Args:
      logits: [..., M].
      target: [...] numbers in the units of `bins`; no gradient flows through them.
      bins: [M] increasing bin centres.

    Returns:
      [...] cross-entropy in nats.
    """
    return -TwoHot(logits, bins).log_prob(jax.lax.stop_gradient(target))


def two_hot_loss(logits: Array, target: Array, bins: Array) -> Array:
    """Compute the mean of `two_hot_nll` as a scalar."""
    return jnp.mean(two_hot_nll(logits, target, bins))


def binary_nll(logit: Array, label: Array) -> Array:
    """Compute `-log` probability of a binary label, elementwise.

    Args:
      logit: [...] log-odds of label 1.
      label: [...] in [0, 1]; a fraction is a soft label (cross-entropy).

    Returns:
      [...] nats, without overflow for any finite logit.
    """
    return jax.nn.softplus(logit) - label * logit
