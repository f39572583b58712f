"""Probability distributions as named tuples of arrays: they pass through jit, vmap and scan.

All of them are elementwise over their leading axes: nothing is summed over the dimensions
of an event, `dist.log_prob(action).sum(-1)` is the log-probability of an action vector.
`Categorical` and `TwoHot` consume the last axis of their logits. Sampling a continuous
distribution is reparameterized, gradients flow to its parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mbrl.two_hot import two_hot, two_hot_mean
from mbrl.types import Array, Key

LOG_2PI = math.log(2.0 * math.pi)


class Normal(NamedTuple):
    """Gaussian with fields `mean` [...] and `std` [...] > 0."""

    mean: Array
    std: Array

    def sample(self, key: Key) -> Array:
        """Draw [...] reparameterized."""
        shape = jnp.broadcast_shapes(jnp.shape(self.mean), jnp.shape(self.std))
        return self.mean + self.std * jax.random.normal(key, shape)

    def log_prob(self, x: Array) -> Array:
        """Return the log-density [...] at `x` [...]."""
        return -0.5 * (jnp.square((x - self.mean) / self.std) + LOG_2PI) - jnp.log(self.std)

    def entropy(self) -> Array:
        """Return the differential entropy [...] in nats."""
        return jnp.log(self.std) + 0.5 * (1.0 + LOG_2PI) + jnp.zeros_like(self.mean)

    def mode(self) -> Array:
        """Return the mean [...]."""
        return self.mean


# Gauss-Hermite nodes and weights of a standard normal expectation.
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(32)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


class TanhNormal(NamedTuple):
    """Law of `tanh(u)` with Gaussian `u`: a policy over `(-1, 1)`.

    Attributes:
      loc: [...] mean of `u`.
      scale: [...] standard deviation of `u`, > 0.

    Reference: Soft Actor-Critic Algorithms and Applications (arXiv 1812.05905),
    appendix C.
    """

    loc: Array
    scale: Array

    def sample(self, key: Key) -> Array:
        """Draw [...] in `[-1, 1]`, reparameterized."""
        return jnp.tanh(Normal(self.loc, self.scale).sample(key))

    def sample_and_log_prob(self, key: Key) -> tuple[Array, Array]:
        """Draw [...] and its log-density [...].

        Exact even where tanh rounds to 1, which `log_prob(sample)` cannot be: use this one
        for losses.
        """
        base = Normal(self.loc, self.scale)
        u = base.sample(key)
        return jnp.tanh(u), base.log_prob(u) - _log_tanh_slope(u)

    def log_prob(self, x: Array) -> Array:
        """Return the log-density [...] at `x` [...] in `[-1, 1]`.

        The ends are moved inwards to the last number below 1, where `u` is 8.7.
        """
        end = 1.0 - 2.0**-24
        u = jnp.arctanh(jnp.clip(x, -end, end))
        return Normal(self.loc, self.scale).log_prob(u) - _log_tanh_slope(u)

    def entropy(self) -> Array:
        """Return the differential entropy [...] in nats.

        There is no closed form; this is a 32-point quadrature, within 1e-3 nats for scales
        up to 2 and 0.02 up to 4. It needs no key, unlike the estimate `-log_prob` of
        `sample_and_log_prob`, which is unbiased for any scale.
        """
        return Normal(self.loc, self.scale).entropy() + self._expect(_log_tanh_slope)

    def mode(self) -> Array:
        """Return `tanh(loc)` [...], the median: the action to take without exploration.

        The density may peak at the ends instead (scale above 1); policies never mean that.
        """
        return jnp.tanh(self.loc)

    @property
    def mean(self) -> Array:
        """Return the mean [...], by the quadrature of `entropy`."""
        return self._expect(jnp.tanh)

    def _expect(self, fn: Callable[[Array], Array]) -> Array:
        u = self.loc[..., None] + self.scale[..., None] * jnp.asarray(_NODES, jnp.float32)
        return jnp.sum(fn(u) * jnp.asarray(_WEIGHTS, jnp.float32), -1)


def _log_tanh_slope(u: Array) -> Array:
    # log(1 - tanh(u)^2), which the literal formula loses to rounding for |u| > 8.
    return 2.0 * (math.log(2.0) - u - jax.nn.softplus(-2.0 * u))


def unimix(logits: Array, amount: float) -> Array:
    """Mix a categorical distribution with the uniform one.

    Args:
      logits: [..., K].
      amount: share of the uniform distribution in [0, 1).

    Returns:
      [..., K] log-probabilities, none below `log(amount / K)`.

    Reference: Mastering Diverse Domains through World Models (arXiv 2301.04104).
    """
    probs = (1.0 - amount) * jax.nn.softmax(logits, -1) + amount / logits.shape[-1]
    return jnp.log(probs)


class Categorical(NamedTuple):
    """Law over `0 .. K-1` with field `logits` [..., K], not necessarily normalized.

    A logit of -inf forbids its category; one per row must be finite.
    """

    logits: Array

    def sample(self, key: Key) -> Array:
        """Draw int32 [...]."""
        return jax.random.categorical(key, self.logits).astype(jnp.int32)

    def one_hot_sample(self, key: Key) -> Array:
        """Draw one-hot [..., K] whose gradient is that of the probabilities.

        Reference: Mastering Atari with Discrete World Models (arXiv 2010.02193).
        """
        hot = jax.nn.one_hot(self.sample(key), self.logits.shape[-1])
        # The bracket is exactly zero, so that the value stays exactly one-hot.
        return hot + (self.probs - jax.lax.stop_gradient(self.probs))

    def log_prob(self, x: Array) -> Array:
        """Return the log-probability [...] of categories `x`, int [...]."""
        log_probs = jax.nn.log_softmax(self.logits, -1)
        return jnp.take_along_axis(log_probs, x[..., None], -1)[..., 0]

    def entropy(self) -> Array:
        """Return the entropy [...] in nats."""
        return -_expect_log(self.probs, jax.nn.log_softmax(self.logits, -1))

    def mode(self) -> Array:
        """Return the likeliest category, int32 [...]."""
        return jnp.argmax(self.logits, -1).astype(jnp.int32)

    @property
    def probs(self) -> Array:
        """Return the probabilities [..., K]."""
        return jax.nn.softmax(self.logits, -1)

    @property
    def mean(self) -> Array:
        """Return the mean of the one-hot sample: the probabilities [..., K]."""
        return self.probs


def _expect_log(probs: Array, log_ratio: Array) -> Array:
    # 0 log 0 = 0, in the value and in the gradient.
    return jnp.sum(probs * jnp.where(probs > 0, log_ratio, 0.0), -1)


class Bernoulli(NamedTuple):
    """Law of a yes/no variable with field `logit` [...], the log-odds of yes."""

    logit: Array

    def sample(self, key: Key) -> Array:
        """Draw bool [...]."""
        return jax.random.bernoulli(key, self.mean)

    def log_prob(self, x: Array) -> Array:
        """Return the log-probability [...] of `x`, bool or a soft label in [0, 1]."""
        return x * self.logit - jax.nn.softplus(self.logit)

    def entropy(self) -> Array:
        """Return the entropy [...] in nats."""
        return jax.nn.softplus(self.logit) - self.mean * self.logit

    def mode(self) -> Array:
        """Return bool [...], true where yes is likelier than no."""
        return self.logit > 0

    @property
    def mean(self) -> Array:
        """Return the probability [...] of yes."""
        return jax.nn.sigmoid(self.logit)


class TwoHot(NamedTuple):
    """A scalar predicted as a categorical law over bins.

    With `symexp_bins()` it covers rewards and values of any size. To average in symlog
    space instead, take linear bins, `log_prob(symlog(x))` and `symexp(dist.mean)`.

    Attributes:
      logits: [..., M].
      bins: [M] increasing bin centres.

    Reference: Mastering Diverse Domains through World Models (arXiv 2301.04104).
    """

    logits: Array
    bins: Array

    def sample(self, key: Key) -> Array:
        """Draw the centre of a bin [...]."""
        return self.bins[Categorical(self.logits).sample(key)]

    def log_prob(self, x: Array) -> Array:
        """Return minus the cross-entropy [...] of two-hot targets for `x` [...]."""
        return jnp.sum(two_hot(x, self.bins) * jax.nn.log_softmax(self.logits, -1), -1)

    def entropy(self) -> Array:
        """Return the entropy [...] over bins in nats."""
        return Categorical(self.logits).entropy()

    def mode(self) -> Array:
        """Return the centre [...] of the likeliest bin."""
        return self.bins[jnp.argmax(self.logits, -1)]

    @property
    def mean(self) -> Array:
        """Return the mean [...] in the units of the bins."""
        return two_hot_mean(self.logits, self.bins)


Distribution = Normal | TanhNormal | Categorical | Bernoulli | TwoHot


def kl(p: Distribution, q: Distribution) -> Array:
    """Compute the Kullback-Leibler divergence `KL(p || q)`, elementwise.

    Args:
      p: a distribution of this module.
      q: of the same type (for `TwoHot` with the same bins).

    Returns:
      [...] nats, in closed form.

    Raises:
      ValueError: when the types differ.
    """
    match p, q:
        case Normal(), Normal():
            ratio = p.std / q.std
            shift = (p.mean - q.mean) / q.std
            return 0.5 * (jnp.square(ratio) + jnp.square(shift) - 1.0) - jnp.log(ratio)
        case TanhNormal(), TanhNormal():  # a bijection of both leaves the divergence alone
            return kl(Normal(p.loc, p.scale), Normal(q.loc, q.scale))
        case (Categorical(), Categorical()) | (TwoHot(), TwoHot()):
            log_p, log_q = jax.nn.log_softmax(p.logits), jax.nn.log_softmax(q.logits)
            return _expect_log(jnp.exp(log_p), log_p - log_q)
        case Bernoulli(), Bernoulli():
            return p.mean * (p.logit - q.logit) + (
                jax.nn.softplus(q.logit) - jax.nn.softplus(p.logit)
            )
    raise ValueError(
        f"p, q: got {type(p).__name__} and {type(q).__name__}, expected two of one type"
    )
