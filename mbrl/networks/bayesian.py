"""Multi-layer perceptrons with random weights or units, as their training needs them.

A posterior sample is an ordinary perceptron: `drop_units` and `sample_weights` put what is random
into its parameters. Whoever evaluates one needs no key, and meets the same function every time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mbrl.networks.core import matmul, silu
from mbrl.types import Array, Key, Params

Transform = Callable[[Key, Array], Array]


def layer_names(params: Params) -> list[str]:
    """Return the names of the layers of `mbrl.networks.core.mlp`, first to last."""
    return sorted(params, key=lambda name: int(name.rpartition("_")[2]))


def hidden_features(params: Params, x: Array) -> Array:
    """Return what the last layer of a perceptron sees of x [B, I]: [B, H]."""
    for name in layer_names(params)[:-1]:
        x = silu(x @ params[name]["kernel"] + params[name]["bias"])
    return x


def dropout_apply(params: Params, key: Key, x: Array, rate: float, dtype: str) -> Array:
    """Evaluate a perceptron with units dropped, other ones in every row.

    Args:
      params: of `mbrl.networks.core.mlp`.
      key: consumed.
      x: [B, I].
      rate: probability that a hidden unit is dropped; the others count `1 / (1 - rate)` times.
      dtype: of the matrix products.

    Returns:
      [B, O].

    Reference: Dropout as a Bayesian Approximation (arXiv 1506.02142).
    """
    names = layer_names(params)
    for name, unit_key in zip(names, jax.random.split(key, len(names)), strict=True):
        x = matmul(x, params[name]["kernel"], dtype) + params[name]["bias"]
        if name != names[-1]:
            x = silu(x) * _kept(unit_key, x.shape, rate)
    return x


def drop_units(params: Params, key: Key, rate: float) -> Params:
    """Draw one perceptron from those that dropout trains: dropped units lose their way out."""
    names = layer_names(params)
    keys = jax.random.split(key, len(names))
    thinned = {names[0]: params[names[0]]}
    for name, unit_key in zip(names[1:], keys[1:], strict=True):
        kernel = params[name]["kernel"]
        kept = _kept(unit_key, kernel.shape[:1], rate)
        thinned[name] = {"kernel": kernel * kept[:, None], "bias": params[name]["bias"]}
    return thinned


def _kept(key: Key, shape: tuple[int, ...], rate: float) -> Array:
    return jax.random.bernoulli(key, 1.0 - rate, shape) / (1.0 - rate)


def local_apply(mean: Params, logvar: Params, key: Key, x: Array, dtype: str) -> Array:
    """Evaluate a perceptron whose weights are independent Gaussians, other ones in every row.

    What is drawn are the sums that a layer puts out, not its weights: they are Gaussian too, and
    the gradient of the loss varies far less.

    Args:
      mean: means of the weights, as of `mbrl.networks.core.mlp`.
      logvar: logarithms of their variances.
      key: consumed.
      x: [B, I].
      dtype: of the matrix products.

    Returns:
      [B, O].

    Reference: Variational Dropout and the Local Reparameterization Trick (arXiv 1506.02557).
    """
    names = layer_names(mean)
    for name, noise_key in zip(names, jax.random.split(key, len(names)), strict=True):
        spread = jax.tree.map(jnp.exp, logvar[name])
        var = matmul(jnp.square(x), spread["kernel"], dtype) + spread["bias"]
        x = matmul(x, mean[name]["kernel"], dtype) + mean[name]["bias"]
        x = x + jnp.sqrt(var) * jax.random.normal(noise_key, x.shape)
        x = silu(x) if name != names[-1] else x
    return x


def sample_weights(mean: Params, logvar: Params, key: Key) -> Params:
    """Draw one perceptron from independent Gaussians."""
    leaves, structure = jax.tree.flatten(mean)
    keys = jax.tree.unflatten(structure, list(jax.random.split(key, len(leaves))))

    def draw(mean: Array, logvar: Array, key: Key) -> Array:
        return mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)

    return jax.tree.map(draw, mean, logvar, keys)


def prior_logvar(params: Params) -> Params:
    """Return the log-variance of the prior: 1 / inputs for a kernel, 1 for a bias.

    A layer of that prior puts out numbers of the size of its inputs, whatever its width.
    """

    def one(leaf: Array) -> Array:
        return jnp.full(leaf.shape, -jnp.log(leaf.shape[-2]) if leaf.ndim > 1 else 0.0)

    return jax.tree.map(one, params)


def prior_divergence(mean: Params, logvar: Params) -> Array:
    """Compute the divergence of independent Gaussians from the prior, in nats, a scalar."""

    def one(mean: Array, logvar: Array, prior: Array) -> Array:
        excess = logvar - prior
        return 0.5 * jnp.sum(jnp.exp(excess) + jnp.square(mean) * jnp.exp(-prior) - 1.0 - excess)

    terms: Any = jax.tree.map(one, mean, logvar, prior_logvar(mean))
    return sum(jax.tree.leaves(terms), jnp.zeros(()))
