"""Convolutional encoder and decoder for images of any size.

The number of stages follows from the size: each halves the image until about four pixels
remain along its shorter side. Four stages for 64 x 64, two for 16 x 16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mbrl.networks.core import ACTIVATIONS, DOTS, INITIALIZERS, NORMS, matmul
from mbrl.networks.recurrent import BlockDense
from mbrl.types import Array

KERNEL = 5
CHUNK = 32
"""Images that are convolved at a time on CPU."""
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


def _norm_act(x: Array) -> Array:
    return ACTIVATIONS["silu"](NORMS["rms"]()(x))


def conv_halve(x: Array, kernel: Array, dtype: str = "float32") -> Array:
    """Convolve, then take the maximum of 2 x 2 pixels; an odd edge is a window of its own.

    Args:
      x: [B, H, W, C].
      kernel: [5, 5, C, O].
      dtype: of the products' inputs, 'float32' or 'bfloat16'.

    Returns:
      [B, ceil(H / 2), ceil(W / 2), O].
    """
    height, width = x.shape[1:3]
    odd = ((0, 0), (0, height % 2), (0, width % 2), (0, 0))

    def products(x: Array, kernel: Array) -> Array:
        batch, height, width, channels = (x := jnp.pad(x, odd)).shape
        x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).swapaxes(2, 3)
        x = x.reshape(batch, height // 2, width // 2, 4 * channels)
        return largest(_neighbours_times(x, _phases(kernel).swapaxes(1, 2), dtype))

    def convolution(x: Array, kernel: Array) -> Array:
        y = jnp.pad(_convolve(x, kernel, dtype), odd)
        y = y.reshape(y.shape[0], y.shape[1] // 2, 2, y.shape[2] // 2, 2, -1).swapaxes(2, 3)
        return largest(y.reshape(*y.shape[:3], 4, -1))

    def largest(y: Array) -> Array:
        rows, columns = _pixels(y.shape[1], height), _pixels(y.shape[2], width)
        inside = rows[:, None, :, None] & columns[:, None]
        y = y if inside.all() else jnp.where(inside.reshape(*y.shape[1:4], 1), y, -jnp.inf)
        # Reduced by hand: the gradient of a pooling primitive is a slow scatter on CPU.
        return y.max(3)

    return _on_cpu(products, convolution)(x, kernel)


def double_conv(x: Array, kernel: Array, size: tuple[int, int], dtype: str = "float32") -> Array:
    """Repeat every pixel along both sides, convolve, and cut.

    Args:
      x: [B, H, W, C].
      kernel: [5, 5, C, O].
      size: height and width of the result, up to (2 H, 2 W).
      dtype: of the products' inputs, 'float32' or 'bfloat16'.

    Returns:
      [B, *size, O].
    """

    def products(x: Array, kernel: Array) -> Array:
        # Taps that read the same pixel before it was repeated are added up.
        y = _neighbours_times(x, _phases(kernel).sum((1, 3)), dtype)
        y = y.reshape(*x.shape[:3], 2, 2, -1).swapaxes(2, 3)
        return y.reshape(x.shape[0], 2 * x.shape[1], 2 * x.shape[2], -1)

    def convolution(x: Array, kernel: Array) -> Array:
        return _convolve(jnp.repeat(jnp.repeat(x, 2, 1), 2, 2), kernel, dtype)

    return _on_cpu(products, convolution)(x, kernel)[:, : size[0], : size[1]]


def _on_cpu(products: Callable[..., Array], convolution: Callable[..., Array]) -> Any:
    """Choose between two ways to the same result.

    XLA:CPU computes the gradient of a convolution that stands in a loop thirty times slower
    than outside, and all training happens in loops. With the four pixels of a window as
    channels, a convolution of 5 x 5 becomes one of 3 x 3 windows, and that a matrix product.
    """

    def few_at_a_time(x: Array, kernel: Array) -> Array:
        # The neighbours of all images would not fit into the cache, nor would it be wise to
        # keep them for the gradient.
        batch = x.shape[0]
        few = min(batch, CHUNK)
        x = jnp.pad(x, ((0, -batch % few), *[(0, 0)] * 3)).reshape(-1, few, *x.shape[1:])
        y = jax.lax.map(jax.checkpoint(lambda x: products(x, kernel)), x)
        return y.reshape(-1, *y.shape[2:])[:batch]

    return partial(jax.lax.platform_dependent, cpu=few_at_a_time, default=convolution)


def _convolve(x: Array, kernel: Array, dtype: str) -> Array:
    low = jnp.bfloat16 if dtype == "bfloat16" else jnp.float32
    y = jax.lax.conv_general_dilated(
        x.astype(low), kernel.astype(low), (1, 1), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    return y.astype(jnp.float32)


def _phases(kernel: Array) -> Array:
    """Lay out [5, 5, C, O] over 3 x 3 windows of 2 x 2 pixels, [3, 2, 3, 2, C, 4, O].

    One kernel for each pixel of the window in the middle, shifted to where it stands.
    """
    shifts = [(row, column) for row in (0, 1) for column in (0, 1)]
    shifted = [jnp.pad(kernel, ((r, 1 - r), (c, 1 - c), (0, 0), (0, 0))) for r, c in shifts]
    stacked = jnp.stack(shifted, 3)
    return stacked.reshape(3, 2, 3, 2, *stacked.shape[2:])


def _neighbours_times(x: Array, kernel: Array, dtype: str) -> Array:
    """Multiply each pixel's 3 x 3 neighbours [B, H, W, 9 * C] by `kernel`, [B, H, W, 4, O]."""
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    near = [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    rows = jnp.concatenate(near, -1)
    flat = kernel.reshape(rows.shape[-1], -1)
    y = matmul(rows.reshape(-1, rows.shape[-1]), flat, dtype)
    return y.reshape(*rows.shape[:3], 4, -1)


def _pixels(windows: int, size: int) -> np.ndarray:
    """Tell which pixels of each window lie in an image side of `size`, [windows, 2]."""
    return np.arange(2 * windows).reshape(-1, 2) < size


class Conv(nn.Module):
    """Weights of a convolution, applied by `conv_halve` or `double_conv`."""

    features: int
    apply_kernel: Callable[..., Array]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (KERNEL, KERNEL, x.shape[-1], self.features)
        kernel: Any = self.param("kernel", INITIALIZERS["fan_in"], shape)
        bias: Any = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        return self.apply_kernel(x, kernel) + bias


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
            x = _norm_act(Conv(channels, partial(conv_halve, dtype=self.dtype))(x))
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
            x = _norm_act(Conv(number, partial(double_conv, size=size, dtype=self.dtype))(x))
        last = partial(double_conv, size=sizes[0], dtype=self.dtype)
        return jax.nn.sigmoid(Conv(self.shape[2], last)(x))
