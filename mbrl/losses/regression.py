"""Regression losses: Gaussian likelihood, two-hot classification of scalars, binary labels.

Functions ending in `_nll` are elementwise, functions ending in `_loss` are scalar means.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from mbrl.types import Array

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


def bound_logvar(logvar: Array, low: Array | float, high: Array | float) -> Array:
    """Clamp a log-variance softly, keeping a gradient on both sides of the bounds.

    The result lies in `[low, high + exp(low - high)]`, far inside it is `logvar` itself,
    and the bounds may be learned: outside, the gradient flows to them.

    Args:
      logvar: [..., D] raw output of a network.
      low: [D] or scalar lower bound.
      high: [D] or scalar upper bound, above `low`.

    Returns:
      [..., D] bounded log-variance.

    Reference: Deep Reinforcement Learning in a Handful of Trials using Probabilistic
    Dynamics Models (arXiv 1805.12114), appendix A.1.
    """
    below_high = high - jax.nn.softplus(high - logvar)
    return low + jax.nn.softplus(below_high - low)


def symlog(x: Array) -> Array:
    """Return `sign(x) log(1 + |x|)`, elementwise.

    Reference: Mastering Diverse Domains through World Models (arXiv 2301.04104).
    """
    # Written with a sign that is never 0, so that the derivative at 0 is 1 and not 0.
    sign = jnp.where(x < 0, -1.0, 1.0)
    return sign * jnp.log1p(sign * x)


def symexp(x: Array) -> Array:
    """Return `sign(x) (exp|x| - 1)`, the inverse of `symlog`, elementwise."""
    sign = jnp.where(x < 0, -1.0, 1.0)
    return sign * jnp.expm1(sign * x)


def symexp_bins(num: int = 255, limit: float = 20.0) -> Array:
    """Return bin centres [num], equidistant in symlog space and exactly symmetric.

    Args:
      num: number of bins; an odd number puts one at exactly 0.
      limit: symlog of the largest centre.

    Raises:
      ValueError: when `num < 2`.
    """
    if num < 2:
        raise ValueError(f"num: got {num}, expected at least 2 bins")
    # Mirrored rather than computed from end to end: rounding would break the symmetry.
    negative = symexp(jnp.linspace(-limit, limit, num)[: num // 2])
    centre = jnp.zeros(num % 2)
    return jnp.concatenate([negative, centre, -negative[::-1]])


def two_hot(x: Array, bins: Array) -> Array:
    """Spread numbers over their two neighbouring bins so that the mean is preserved.

    Args:
      x: [...] numbers in the units of `bins`; clipped to the outermost bins.
      bins: [M] increasing bin centres.

    Returns:
      [..., M] probabilities; `sum(two_hot(x, bins) * bins) == x` inside the range.

    Reference: Mastering Diverse Domains through World Models (arXiv 2301.04104).
    """
    x = jnp.clip(x, bins[0], bins[-1])[..., None]
    # A hat function around every bin: a comparison-free formula has no gather or scatter.
    width = jnp.diff(bins)
    inner = jnp.ones_like(bins[:1])  # slope of the two outer flanks, which are cut off
    rising = 1.0 + (x - bins) / jnp.concatenate([inner, width])
    falling = 1.0 - (x - bins) / jnp.concatenate([width, inner])
    return jnp.clip(jnp.minimum(rising, falling), 0.0, 1.0)


def two_hot_mean(logits: Array, bins: Array) -> Array:
    """Compute the mean of a categorical distribution over bins.

    Args:
      logits: [..., M].
      bins: [M] bin centres.

    Returns:
      [...] mean in the units of `bins`; exactly 0 for equal logits and symmetric bins.
    """
    probs = jax.nn.softmax(logits, -1)
    half = bins.shape[0] // 2
    left, right = probs[..., :half], probs[..., ::-1][..., :half]
    low, high = bins[:half], bins[::-1][:half]
    # Mirror bins are added in pairs, as (p' - p)(b' - b)/2 + (p' + p)(b' + b)/2. Both terms
    # vanish exactly when p = p' and b = -b', even where the compiler fuses multiply and
    # add; p b + p' b' would leave a rounding error of the size of the largest bin (5e8).
    pairs = 0.5 * ((right - left) * (high - low) + (right + left) * (high + low))
    odd = bins.shape[0] % 2
    centre = jnp.sum(probs[..., half : half + odd] * bins[half : half + odd], -1)
    return jnp.sum(pairs, -1) + centre


def two_hot_nll(logits: Array, target: Array, bins: Array) -> Array:
    """Compute the cross-entropy of bin logits against two-hot targets.

    Args:
      logits: [..., M].
      target: [...] numbers in the units of `bins`; no gradient flows through them.
      bins: [M] increasing bin centres.

    Returns:
      [...] cross-entropy in nats.
    """
    probs = jax.lax.stop_gradient(two_hot(target, bins))
    return -jnp.sum(probs * jax.nn.log_softmax(logits, -1), -1)


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
