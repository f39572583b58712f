"""Candidate actions of a Gaussian policy: how a tree over indices acts in a Box."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm

from mbrl.types import Array, Key


def _log_density(x: Array, mean: Array, std: Array) -> Array:
    """Return the log-density [B, K] of normals clipped to `[-1, 1]`; on a bound, its log-mass."""
    z = (x - mean) / std
    inside = norm.logpdf(z) - jnp.log(std)
    found = jnp.where(x >= 1.0, norm.logsf(z), jnp.where(x <= -1.0, norm.logcdf(z), inside))
    return found.sum(-1)


def propose(key: Key, policy: Array, num: int, std: Any, flatten: Any) -> tuple[Array, Array]:
    """Sample candidate actions of a Gaussian policy, half of them from a flattened one.

    The prior over the candidates is the density of the policy over that of the sampling, so
    that its expectations are those of the policy, however the candidates were drawn.

    Reference: Sampled MuZero, Hubert et al. 2021 (arXiv:2104.06303); EfficientZero V2, Wang et
    al. 2024 (arXiv:2403.00564).

    Args:
      key: consumed.
      policy: [B, 2, A] mean and log-deviation, or [B, 1, A] mean, in half-ranges; what is not
        a number is read as 0, and the log-deviation is kept within [-7, 2].
      num: candidates K.
      std: deviation that goes with a mean alone.
      flatten: deviation of the flattened half (the smaller one) in units of the policy's.

    Returns:
      Candidates [B, K, A] clipped to `[-1, 1]` and the logits [B, K] of the prior.
    """
    policy = jnp.nan_to_num(policy, posinf=1.0, neginf=-1.0)[:, :, None]
    mean = policy[:, 0]
    narrow = jnp.full_like(mean, std)
    if policy.shape[1] == 2:
        narrow = jnp.exp(jnp.clip(policy[:, 1], -7.0, 2.0))
    wide, share = flatten * narrow, (num // 2) / num
    is_wide = (jnp.arange(num) >= num - num // 2)[:, None]
    white = jax.random.normal(key, (mean.shape[0], num, mean.shape[-1]))
    x = jnp.clip(mean + jnp.where(is_wide, wide, narrow) * white, -1.0, 1.0)
    own = _log_density(x, mean, narrow)
    sampled = own
    if share > 0.0:
        broad = _log_density(x, mean, wide) + math.log(share)
        sampled = jnp.logaddexp(own + math.log(1.0 - share), broad)
    return x, own - sampled
