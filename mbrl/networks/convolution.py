"""Convolutional encoder and decoder for images of any size.

The number of stages follows from the size: each halves the image until about four pixels
remain along its shorter side. Four stages for 64 x 64, two for 16 x 16.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from mbrl.networks.core import ACTIVATIONS, DOTS, INITIALIZERS, NORMS
from mbrl.networks.recurrent import BlockDense
from mbrl.types import Array

KERNEL = 5
MULTIPLES = (2, 3, 4)
"""Channels of the stages in units of `depth`; the last holds for all that follow."""


def stage_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """List the image sizes before, between and after the stages, [stages + 1]."""
    num = max(1, round(math.log2(min(height, width) / 4.0)))
    sizes = [(height, width)]
    for _ in range(num):
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    return sizes


def stage_channels(num: int, depth: int) -> list[int]:
    """List the channels that the stages of an encoder put out, [num]."""
    return [depth * MULTIPLES[min(i, len(MULTIPLES) - 1)] for i in range(num)]


def _conv(features: int, dtype: str) -> nn.Module:
    low = jnp.bfloat16 if dtype == "bfloat16" else jnp.float32
    init = INITIALIZERS["fan_in"]
    return nn.Conv(features, (KERNEL, KERNEL), kernel_init=init, dtype=low)


def _norm_act(x: Array) -> Array:
    return ACTIVATIONS["silu"](NORMS["rms"]()(x.astype(jnp.float32)))


def _halve(x: Array) -> Array:
    """Take the maximum of 2 x 2 pixels; an odd edge is a window of its own."""
    batch, height, width, channels = x.shape
    odd = ((0, 0), (0, height % 2), (0, width % 2), (0, 0))
    x = jnp.pad(x, odd, constant_values=-jnp.inf) if height % 2 or width % 2 else x
    x = x.reshape(batch, x.shape[1] // 2, 2, x.shape[2] // 2, 2, channels)
    # Reduced by hand: the gradient of a pooling primitive is a slow scatter on CPU.
    return x.max((2, 4))


class ConvEncoder(nn.Module):
    """Images [B, H, W, C], centred around 0, to vectors [B, F].

    Attributes:
      depth: unit of the channels.
      dtype: of the convolutions, 'float32' or 'bfloat16'.
    """

    depth: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, image: Array) -> Array:
        """Encode a batch of images."""
        num = len(stage_sizes(*image.shape[1:3])) - 1
        x = image
        for channels in stage_channels(num, self.depth):
            x = _norm_act(_halve(_conv(channels, self.dtype)(x)))
        return x.reshape(x.shape[0], -1)


class ConvDecoder(nn.Module):
    """Deterministic and stochastic latents [B, D], [B, Z] to images [B, H, W, C] in (0, 1).

    Attributes:
      shape: (H, W, C) of the image.
      depth: unit of the channels.
      units: half the width of the layer that reads the stochastic latent.
      blocks: groups of the deterministic latent.
      dtype: of the matrix products, 'float32' or 'bfloat16'.
    """

    shape: tuple[int, int, int]
    depth: int
    units: int
    blocks: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, deter: Array, stoch: Array) -> Array:
        """Decode a batch of latents."""
        sizes = stage_sizes(*self.shape[:2])
        channels = stage_channels(len(sizes) - 1, self.depth)
        height, width = sizes[-1]
        groups = math.gcd(self.blocks, channels[-1])
        x = BlockDense(height * width * channels[-1], groups, self.dtype)(deter)
        x = x.reshape(-1, groups, height, width, channels[-1] // groups)
        x = x.transpose(0, 2, 3, 1, 4).reshape(-1, height, width, channels[-1])
        dense = partial(nn.Dense, kernel_init=INITIALIZERS["fan_in"], dot_general=DOTS[self.dtype])
        y = dense(height * width * channels[-1])(_norm_act(dense(2 * self.units)(stoch)))
        x = _norm_act(x + y.reshape(x.shape))
        for number, size in zip(reversed(channels[:-1]), reversed(sizes[1:-1]), strict=True):
            x = _norm_act(_conv(number, self.dtype)(_double(x, size)))
        x = _conv(self.shape[2], self.dtype)(_double(x, sizes[0]))
        return jax.nn.sigmoid(x.astype(jnp.float32))


def _double(x: Array, size: tuple[int, int]) -> Array:
    """Repeat every pixel along both sides and cut to `size`."""
    return jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)[:, : size[0], : size[1]]
