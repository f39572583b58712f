"""Losses of latent world models."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mbrl.distributions import Distribution, kl
from mbrl.types import Array


class BalancedKL(NamedTuple):
    """The two halves of the divergence between posterior and prior, [...] nats each.

    Attributes:
      dynamics: trains the prior to predict the posterior.
      representation: trains the posterior to be predictable.
    """

    dynamics: Array
    representation: Array


def balanced_kl(posterior: Distribution, prior: Distribution, free_nats: float) -> BalancedKL:
    """Compute `KL(posterior || prior)` with the gradient to one side at a time.

    Args:
      posterior: of the latents, leaves [..., S] after reduction of categories.
      prior: of the same type.
      free_nats: divergences below this number, *summed* over all latents of a state, cost
        nothing.

    Returns:
      `BalancedKL` of [...], equal values with different gradients.

    Reference: Mastering Diverse Domains through World Models (arXiv 2301.04104).
    """

    def one_side(p: Distribution, q: Distribution) -> Array:
        return jnp.maximum(kl(p, q).sum(-1), free_nats)

    stop = jax.lax.stop_gradient
    return BalancedKL(one_side(stop(posterior), prior), one_side(posterior, stop(prior)))
