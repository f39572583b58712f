"""Running statistics of data and of returns, as explicit state."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from mbrl.types import Array

MIN_STD = 1e-6


class Moments(NamedTuple):
    """Mean and variance of everything seen so far.

    Attributes:
      mean: [*shape].
      var: [*shape] population variance (divided by the count).
      count: scalar float32, number of rows. Beyond 2^24 rows it stops growing one by one,
        which turns the average into one over a window of that length.
    """

    mean: Array
    var: Array
    count: Array

    @property
    def std(self) -> Array:
        """Return the scale [*shape] to divide by: 1 for a dimension that never varied."""
        std = jnp.sqrt(self.var)
        return jnp.where(std < MIN_STD, 1.0, std)


def empty(shape: tuple[int, ...] = ()) -> Moments:
    """Return the moments of no data; they normalize nothing (mean 0, scale 1)."""
    return Moments(jnp.zeros(shape), jnp.zeros(shape), jnp.zeros(()))


def fit(x: Array, mask: Array | None = None, feature_ndim: int = 1) -> Moments:
    """Compute the moments of one batch.

    Args:
      x: [*batch, *shape]; rows that are masked out may hold anything, NaN included.
      mask: bool [*batch], rows to count; None = all.
      feature_ndim: number of axes of `shape`: 1 for vectors, 0 for scalars.

    Returns:
      `Moments` over all batch axes, those of `empty` when no row counts.

    Raises:
      ValueError: when the mask does not have the shape of the batch axes.
    """
    lead = x.shape[: x.ndim - feature_ndim]
    shape = x.shape[x.ndim - feature_ndim :]
    if mask is not None and mask.shape != lead:
        raise ValueError(
            f"mask: got shape {mask.shape}, expected {lead}, the axes of x before its last "
            f"feature_ndim={feature_ndim}; pass feature_ndim=0 for scalars"
        )
    weight = jnp.ones(lead, bool) if mask is None else mask.astype(bool)
    weight = weight.reshape(-1)
    x = jnp.asarray(x, jnp.float32).reshape(weight.shape[0], *shape)
    rows = weight.reshape(-1, *(1,) * feature_ndim)
    count = jnp.sum(weight, dtype=jnp.float32)
    # Everything is measured from the first row that counts: a constant dimension then has
    # a variance of exactly 0 whatever its value, and a large offset costs no precision.
    origin = jnp.where(count > 0, x[jnp.argmax(weight)], 0.0)
    offset = jnp.where(rows, x - origin, 0.0)
    safe = jnp.maximum(count, 1.0)
    mean = jnp.sum(offset, 0) / safe
    var = jnp.sum(jnp.where(rows, jnp.square(offset - mean), 0.0), 0) / safe
    return Moments(origin + mean, var, count)


def merge(a: Moments, b: Moments) -> Moments:
    """Combine the moments of two disjoint sets of rows.

    Reference: Updating Formulae and a Pairwise Algorithm for Computing Sample Variances,
    Chan, Golub and LeVeque, 1979.
    """
    count = a.count + b.count
    share = b.count / jnp.maximum(count, 1.0)
    delta = b.mean - a.mean
    var = (1.0 - share) * a.var + share * b.var + share * (1.0 - share) * jnp.square(delta)
    return Moments(a.mean + share * delta, var, count)


def update(moments: Moments, x: Array, mask: Array | None = None) -> Moments:
    """Add a batch of rows [*batch, *shape], of which `mask` [*batch] counts (None = all)."""
    return merge(moments, fit(x, mask, moments.mean.ndim))


def normalize(moments: Moments, x: Array) -> Array:
    """Return `(x - mean) / std` for `x` [..., *shape]."""
    return (x - moments.mean) / moments.std


def denormalize(moments: Moments, x: Array) -> Array:
    """Return `mean + std x`, the inverse of `normalize`."""
    return moments.mean + moments.std * x


class ReturnScale(NamedTuple):
    """Running 5th and 95th percentiles of returns, scalars that start at zero.

    Reference: Mastering Diverse Domains through World Models (arXiv 2301.04104).
    """

    low: Array
    high: Array

    @property
    def value(self) -> Array:
        """Return the range to divide advantages by, at least 1: small returns stay small."""
        return jnp.maximum(1.0, self.high - self.low)


def empty_return_scale() -> ReturnScale:
    """Return the scale of no data; its value is 1."""
    return ReturnScale(jnp.zeros(()), jnp.zeros(()))


def update_return_scale(scale: ReturnScale, returns: Array, rate: float = 0.01) -> ReturnScale:
    """Move the percentiles by `rate` towards those of `returns`, of any shape."""
    low, high = jnp.percentile(returns, jnp.array([5.0, 95.0]))
    return ReturnScale(
        scale.low + rate * (low - scale.low), scale.high + rate * (high - scale.high)
    )
