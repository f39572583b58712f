"""Scalars of any size for networks: symlog scaling and two-hot classification over bins."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mbrl.types import Array


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


def signed_hyperbolic(x: Array, eps: float = 1e-3) -> Array:
    """Return `sign(x) (sqrt(|x| + 1) - 1) + eps x`, elementwise.

    Reference: Observe and Look Further (arXiv 1805.11593).
    """
    # sqrt(|x| + 1) - 1 = |x| / (sqrt(|x| + 1) + 1), which does not cancel near 0.
    return x / (jnp.sqrt(jnp.abs(x) + 1.0) + 1.0) + eps * x


def signed_parabolic(y: Array, eps: float = 1e-3) -> Array:
    """Return the inverse of `signed_hyperbolic`, elementwise."""
    # With s = sqrt(|x| + 1): eps s^2 + s = c, and s - 1 = |y| - eps |x|. The published form
    # subtracts two roots and is 6 % off at 1e-4 in float32.
    size = jnp.abs(y)
    c = 1.0 + size + eps
    s = 2.0 * c / (1.0 + jnp.sqrt(1.0 + 4.0 * eps * c))
    return y * (s + 1.0) / (1.0 + eps * (s + 1.0))


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
    return jnp.concatenate([negative, jnp.zeros(num % 2), -negative[::-1]])


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
    # A hat function around every bin: no comparison, gather or scatter. A flank starts at the
    # neighbour, where it is exactly 0 however the compiler rounds a quotient.
    width = jnp.diff(bins)
    outermost = jnp.ones_like(x)
    rising = jnp.concatenate([outermost, (x - bins[:-1]) / width], -1)
    falling = jnp.concatenate([(bins[1:] - x) / width, outermost], -1)
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
    half, odd = divmod(bins.shape[0], 2)
    left, right = probs[..., :half], probs[..., ::-1][..., :half]
    low, high = bins[:half], bins[::-1][:half]
    # Mirror bins are added in pairs, as (p' - p)(b' - b)/2 + (p' + p)(b' + b)/2. Both terms
    # vanish exactly when p = p' and b = -b', even where the compiler fuses multiply and
    # add; p b + p' b' would leave a rounding error of the size of the largest bin (5e8).
    pairs = 0.5 * ((right - left) * (high - low) + (right + left) * (high + low))
    centre = jnp.sum(probs[..., half : half + odd] * bins[half : half + odd], -1)
    return jnp.sum(pairs, -1) + centre
