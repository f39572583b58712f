"""Distributions over open-loop plans: Gaussian for Box actions, categorical for Discrete.

Planners never look inside an action: they sample plans, weigh them and fit. Plans are
kept in units that all tasks share, `[-1, 1]` for Box, integers for Discrete.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm

from mbrl import spaces
from mbrl.planning.config import PlannerConfig
from mbrl.types import Array, Box, Discrete, EnvSpec, Key

Distribution = Any
"""Parameters of a distribution over plans: a pytree with a leading [B]."""

_SMOOTHING = 0.02  # every discrete action keeps this much probability, spread evenly


class PlanSpace(NamedTuple):
    """Operations on distributions over plans; plans are `[B, P, H, ...]`.

    Attributes:
      prior: `(batch) -> distribution` without any knowledge.
      sample: `(key, distribution, population) -> plans`.
      fit: `(distribution, plans, weights [B, P], momentum) -> distribution`, the weighted
        maximum-likelihood fit, blended with the old one. All-zero weights keep the old one.
      shift: `(distribution) -> distribution` one step later, spread as wide as `prior`.
      mode: `(distribution) -> plan [B, H, ...]`.
      uniform: `(key, batch, population) -> plans` drawn evenly over the action space.
      decode: `(plans) -> actions` in the units of the environment.
      encode: the inverse of `decode`.
    """

    prior: Callable[[int], Distribution]
    sample: Callable[[Key, Distribution, int], Array]
    fit: Callable[[Distribution, Array, Array, float | Array], Distribution]
    shift: Callable[[Distribution], Distribution]
    mode: Callable[[Distribution], Array]
    uniform: Callable[[Key, int, int], Array]
    decode: Callable[[Array], Array]
    encode: Callable[[Array], Array]


class Gaussian(NamedTuple):
    """Independent normals per step and action dimension, `[B, H, A]` each."""

    mean: Array
    std: Array


def noise_basis(horizon: int, beta: float) -> np.ndarray:
    """Return the matrix that colours white noise with a spectrum `1 / f^beta`.

    Reference: iCEM, Pinneri et al. 2020 (arXiv:2008.06389); Timmer and Koenig 1995.

    Args:
      horizon: H, length of the noise in steps.
      beta: spectral exponent; 0 gives white noise, 2 a random walk.

    Returns:
      [K, H]; `z @ basis` with standard normal `z` [..., K] has unit variance at each step.
    """
    frequencies = np.fft.rfftfreq(horizon)
    frequencies[0] = 1.0 / horizon  # as slow as the horizon can show
    scale = frequencies ** (-beta / 2.0)
    rows = np.concatenate([np.diag(scale), 1j * np.diag(scale)])
    basis = np.fft.irfft(rows, n=horizon, axis=-1)
    basis = basis[np.abs(basis).sum(-1) > 1e-12]  # imaginary parts that do not exist
    return (basis / np.sqrt((basis**2).sum(0))).astype(np.float32)


def _last_repeated(x: Array) -> Array:
    """Shift [B, H, ...] by one step; the last step repeats."""
    return jnp.concatenate([x[:, 1:], x[:, -1:]], 1)


def _normalized(weights: Array) -> tuple[Array, Array]:
    """Return weights [B, P] that sum to one and [B] whether any was positive."""
    total = weights.sum(1)
    return weights / jnp.where(total > 0, total, 1.0)[:, None], total > 0


def box_plans(space: Box, config: PlannerConfig, truncate: bool) -> PlanSpace:
    """Gaussian plans for a bounded Box.

    Args:
      space: action space; bounds must be finite.
      config: horizon, `init_std` and `noise_beta`.
      truncate: draw white noise cut at two sigmas inside the bounds (CEM) instead of
        coloured noise clipped to them.

    Raises:
      ValueError: for non-finite bounds.
    """
    spaces.finite_bounds(space, "action space")
    size, horizon = spaces.flat_size(space), config.horizon
    basis = jnp.asarray(noise_basis(horizon, config.noise_beta))

    def prior(batch: int) -> Gaussian:
        zeros = jnp.zeros((batch, horizon, size))
        return Gaussian(zeros, zeros + config.init_std)

    def sample(key: Key, dist: Gaussian, population: int) -> Array:
        batch = dist.mean.shape[0]
        mean, std = dist.mean[:, None], dist.std[:, None]
        if truncate:
            # A normal of a quarter of the distance to the bound never leaves it at 2 sigma.
            std = jnp.minimum(std, 0.5 * (1.0 - jnp.abs(mean)))
            noise = jax.random.truncated_normal(key, -2.0, 2.0, (batch, population, horizon, size))
        else:
            white = jax.random.normal(key, (batch, population, size, basis.shape[0]))
            noise = jnp.swapaxes(white @ basis, -1, -2)
        return jnp.clip(mean + std * noise, -1.0, 1.0)

    def fit(dist: Gaussian, plans: Array, weights: Array, momentum: float | Array) -> Gaussian:
        weights, known = _normalized(weights)
        mean = jnp.einsum("bp,bpha->bha", weights, plans)
        var = jnp.einsum("bp,bpha->bha", weights, (plans - mean[:, None]) ** 2)
        keep = jnp.where(known, momentum, 1.0)[:, None, None]
        mean = keep * dist.mean + (1.0 - keep) * mean
        return Gaussian(mean, jnp.sqrt(keep * dist.std**2 + (1.0 - keep) * var))

    def shift(dist: Gaussian) -> Gaussian:
        return Gaussian(_last_repeated(dist.mean), jnp.zeros_like(dist.std) + config.init_std)

    def uniform(key: Key, batch: int, population: int) -> Array:
        return jax.random.uniform(key, (batch, population, horizon, size), minval=-1.0)

    def decode(plans: Array) -> Array:
        return spaces.from_unit(space, plans.reshape(*plans.shape[:-1], *space.shape))

    def encode(actions: Array) -> Array:
        return jnp.clip(spaces.encode_action(space, actions), -1.0, 1.0)

    return PlanSpace(prior, sample, fit, shift, lambda d: d.mean, uniform, decode, encode)


def discrete_plans(space: Discrete, config: PlannerConfig) -> PlanSpace:
    """Categorical plans for a Discrete space; a distribution is probabilities [B, H, A].

    Samples are Gumbel maxima whose noise is coloured over time through a Gaussian copula:
    the marginals stay exact while actions persist, as coloured noise makes them for Box.
    """
    num, horizon = space.num, config.horizon
    basis = jnp.asarray(noise_basis(horizon, config.noise_beta))

    def prior(batch: int) -> Array:
        return jnp.full((batch, horizon, num), 1.0 / num)

    def sample(key: Key, dist: Array, population: int) -> Array:
        white = jax.random.normal(key, (dist.shape[0], population, num, basis.shape[0]))
        uniform = jnp.clip(norm.cdf(jnp.swapaxes(white @ basis, -1, -2)), 1e-6, 1.0 - 1e-6)
        gumbel = -jnp.log(-jnp.log(uniform))
        smooth = (1.0 - _SMOOTHING) * dist + _SMOOTHING / num
        return jnp.argmax(jnp.log(smooth)[:, None] + gumbel, -1)

    def fit(dist: Array, plans: Array, weights: Array, momentum: float | Array) -> Array:
        weights, known = _normalized(weights)
        probs = jnp.einsum("bp,bpha->bha", weights, jax.nn.one_hot(plans, num))
        keep = jnp.where(known, momentum, 1.0)[:, None, None]
        return keep * dist + (1.0 - keep) * probs

    def shift(dist: Array) -> Array:
        return 0.5 * _last_repeated(dist) + 0.5 / num

    def uniform(key: Key, batch: int, population: int) -> Array:
        return jax.random.randint(key, (batch, population, horizon), 0, num)

    def identity(plans: Array) -> Array:
        return plans

    return PlanSpace(
        prior, sample, fit, shift, lambda d: jnp.argmax(d, -1), uniform, identity, identity
    )


def plan_space(spec: EnvSpec, config: PlannerConfig, truncate: bool = False) -> PlanSpace:
    """Choose the distribution over plans that fits an action space.

    Raises:
      ValueError: for action spaces other than Box and Discrete.
    """
    match spec.action:
        case Box():
            return box_plans(spec.action, config, truncate)
        case Discrete():
            return discrete_plans(spec.action, config)
    raise ValueError(
        f"action space of {spec.id}: planners need Box or Discrete, got {spec.action}; "
        "flatten the action into one Discrete, or use an agent with a policy"
    )
