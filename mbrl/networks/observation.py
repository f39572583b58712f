"""Encoder and decoder for observations of any space: vectors, images, integers, Dicts.

Numbers are standardized and squashed by symlog, integers are one-hot, and both share one
network; every image (a bounded `Box` of rank three) has a convolutional one of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mbrl import normalization, spaces
from mbrl.distributions import Categorical
from mbrl.networks.convolution import ConvDecoder, ConvEncoder
from mbrl.networks.core import DOTS, INITIALIZERS, MLP
from mbrl.normalization import Moments
from mbrl.two_hot import symexp, symlog
from mbrl.types import Array, Box, Discrete, MultiDiscrete, Space

LAYERS = 3
"""Hidden layers of the networks for vectors."""

Leaf = Box | Discrete | MultiDiscrete


def is_image(leaf: Leaf) -> bool:
    """Tell whether a leaf space is an image [H, W, C] with finite bounds."""
    if not isinstance(leaf, Box) or len(leaf.shape) != 3:
        return False
    return bool(np.isfinite(leaf.low).all() and np.isfinite(leaf.high).all())


class Prepared(NamedTuple):
    """An observation as network input.

    Attributes:
      vector: [B, D] standardized symlog numbers and one-hot integers of all leaves that are
        no images.
      images: [B, H, W, C] each, from 0 (lower bound) to 1 (upper bound).
    """

    vector: Array
    images: tuple[Array, ...]


def vector_of(space: Space, obs: Any) -> Array:
    """Join all leaves of observations [B, ...] that are no images, [B, D] as they are."""
    parts = [jnp.zeros((jax.tree.leaves(obs)[0].shape[0], 0))]
    for (_, leaf), x in zip(spaces.leaves(space), jax.tree.leaves(obs), strict=True):
        if not is_image(leaf):
            parts.append(spaces.flatten(leaf, x))
    return jnp.concatenate(parts, -1)


def numeric(space: Space) -> np.ndarray:
    """Mark the entries of `vector_of` that are numbers and not categories, bool [D]."""
    found = [leaf for _, leaf in spaces.leaves(space) if not is_image(leaf)]
    return np.array(
        [isinstance(leaf, Box) for leaf in found for _ in range(spaces.flat_size(leaf))], bool
    )


def prepare(space: Space, obs: Any, moments: Moments) -> Prepared:
    """Turn observations of `space`, leaves [B, ...], into network input.

    Args:
      space: of the observations.
      obs: leaves [B, ...].
      moments: [D] of `vector_of`; those of no data leave the numbers to symlog alone.
    """
    images = []
    for (_, leaf), x in zip(spaces.leaves(space), jax.tree.leaves(obs), strict=True):
        if isinstance(leaf, Box) and is_image(leaf):
            low, high = spaces.finite_bounds(leaf, "observation")
            images.append((x.astype(jnp.float32) - low) / jnp.maximum(high - low, 1e-6))
    vector = vector_of(space, obs)
    squashed = symlog(normalization.normalize(moments, vector))
    return Prepared(jnp.where(numeric(space), squashed, vector), tuple(images))


def restore(space: Space, prediction: Prepared, moments: Moments) -> Any:
    """Turn predictions of a `Decoder` into observations of `space`: the likeliest values."""
    found, images, start = [], list(prediction.images), 0
    numbers = normalization.denormalize(moments, symexp(prediction.vector))
    vector = jnp.where(numeric(space), numbers, prediction.vector)
    for _, leaf in spaces.leaves(space):
        if isinstance(leaf, Box) and is_image(leaf):
            low, high = spaces.finite_bounds(leaf, "observation")
            x = low + images.pop(0) * (high - low)
            found.append((jnp.round(x) if leaf.dtype == np.uint8 else x).astype(leaf.dtype))
        else:
            size = spaces.flat_size(leaf)
            found.append(spaces.unflatten(leaf, vector[..., start : start + size]))
            start += size
    return jax.tree.unflatten(jax.tree.structure(spaces.zeros(space)), found)


def reconstruction_nll(space: Space, prediction: Prepared, target: Prepared) -> Array:
    """Compute the reconstruction error of observations, [B].

    Squared errors of symlog numbers and of pixels, and cross-entropies of integers, summed
    over everything that is observed.
    """
    total, start = jnp.zeros(target.vector.shape[0]), 0
    for x, y in zip(prediction.images, target.images, strict=True):
        total += jnp.sum(jnp.square(x - y), (1, 2, 3))
    for _, leaf in spaces.leaves(space):
        if is_image(leaf):
            continue
        for size in leaf.nums if isinstance(leaf, MultiDiscrete) else [spaces.flat_size(leaf)]:
            part = slice(start, start + size)
            x, y = prediction.vector[:, part], target.vector[:, part]
            if isinstance(leaf, Box):
                total += jnp.sum(jnp.square(x - y), -1)
            else:
                total -= Categorical(x).log_prob(jnp.argmax(y, -1))
            start += size
    return total


class Encoder(nn.Module):
    """`Prepared` observations to tokens [B, F].

    Attributes:
      units: width of the hidden layers for vectors.
      depth: unit of the channels for images.
      dtype: of the matrix products, 'float32' or 'bfloat16'.
      norm: of the hidden layers for vectors, or None. The first of them sees little more than
        the direction of its input if it is normalized, which near the mean observation is
        anything.
      layers: hidden layers for vectors.
    """

    units: int
    depth: int
    dtype: str = "float32"
    norm: str | None = "rms"
    layers: int = LAYERS

    @nn.compact
    def __call__(self, obs: Prepared) -> Array:
        """Encode a batch of observations."""
        tokens = [ConvEncoder(self.depth, self.dtype)(image - 0.5) for image in obs.images]
        if obs.vector.shape[-1]:
            hidden = (self.units,) * self.layers
            net = MLP(hidden, None, "silu", "fan_in", self.dtype, self.norm, 1.0)
            tokens.append(net(obs.vector))
        return jnp.concatenate(tokens, -1)


class Decoder(nn.Module):
    """Latents [B, D], [B, Z] to `Prepared` predictions.

    Attributes:
      num_numbers: width of the vector part.
      shapes: (H, W, C) of every image.
      units: width of the hidden layers for vectors.
      depth: unit of the channels for images.
      blocks: groups of the deterministic latent.
      dtype: of the matrix products, 'float32' or 'bfloat16'.
    """

    num_numbers: int
    shapes: tuple[tuple[int, int, int], ...]
    units: int
    depth: int
    blocks: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, deter: Array, stoch: Array) -> Prepared:
        """Decode a batch of latents."""
        images = tuple(
            ConvDecoder(shape, self.depth, self.units, self.blocks, self.dtype)(deter, stoch)
            for shape in self.shapes
        )
        x = jnp.concatenate([deter, stoch], -1)
        if not self.num_numbers:
            return Prepared(x[:, :0], images)
        hidden = (self.units,) * LAYERS
        x = MLP(hidden, None, "silu", "fan_in", self.dtype, "rms", 1.0)(x)
        dense = nn.Dense(
            self.num_numbers, kernel_init=INITIALIZERS["fan_in"], dot_general=DOTS[self.dtype]
        )
        return Prepared(dense(x), images)


def decoder_for(space: Space, units: int, depth: int, blocks: int, dtype: str) -> Decoder:
    """Make the decoder of a space; arguments as in `Decoder`."""
    found = [leaf for _, leaf in spaces.leaves(space)]
    shapes = tuple(
        (leaf.shape[0], leaf.shape[1], leaf.shape[2])
        for leaf in found
        if isinstance(leaf, Box) and is_image(leaf)
    )
    numbers = sum(spaces.flat_size(leaf) for leaf in found if not is_image(leaf))
    return Decoder(numbers, shapes, units, depth, blocks, dtype)
