"""Recurrent cells: the block-diagonal gated unit of DreamerV3."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mbrl.networks.core import MLP, NORMS, matmul, sigmoid, silu
from mbrl.types import Array, Key


def scaled_init(key: Key, shape: Sequence[int], fan_in: int) -> Array:
    """Draw a part of a layer's kernel with the variance of the *whole* layer, 1 / fan_in.

    A block sees `1 / G` of the input: its own fan-in would make the initial weights
    `sqrt(G)` times as large as the published ones.
    """
    # The cut at two standard deviations takes 0.88 of the deviation away.
    std = fan_in**-0.5 / 0.87962566103423978
    return std * jax.random.truncated_normal(key, -2.0, 2.0, tuple(shape))


def span_init(key: Key, size: int, span: int) -> Array:
    """Draw biases [3, size] of reset, candidate and update gates for memories of `1..span` steps.

    At first a unit of the state then keeps `T / (1 + T)` of itself per step, with a `T` of its own
    between 1 and `span`.

    Reference: Can recurrent neural networks warp time?, Tallec and Ollivier 2018
    (arXiv:1804.11188).
    """
    steps = jax.random.uniform(key, (size,), minval=1.0, maxval=float(span))
    # The cell subtracts 1 from what opens its update gate.
    return jnp.zeros((3, size)).at[2].set(1.0 - jnp.log(steps))


def block_product(x: Array, kernel: Array, dtype: str = "float32", parts: int = 1) -> list[Array]:
    """Multiply by a block-diagonal matrix whose blocks put out several parts each.

    Args:
      x: [B, G * I].
      kernel: [G, I, parts * O].
      dtype: of the product's inputs, 'float32' or 'bfloat16'.
      parts: P.

    Returns:
      P arrays [B, G * O], each with its blocks side by side.
    """
    groups, _, width = kernel.shape

    def batched(x: Array, kernel: Array) -> list[Array]:
        rows = x.reshape(x.shape[0], groups, -1)
        y = jax.vmap(partial(matmul, dtype=dtype), (1, 0), 1)(rows, kernel)
        y = y.reshape(x.shape[0], groups, parts, -1)
        return [y[:, :, i].reshape(x.shape[0], -1) for i in range(parts)]

    def one_by_one(x: Array, kernel: Array) -> list[Array]:
        rows = jnp.split(x, groups, 1)
        ys = [matmul(row, block, dtype) for row, block in zip(rows, kernel, strict=True)]
        cuts = [jnp.split(y, parts, 1) for y in ys]
        return [jnp.concatenate([cut[i] for cut in cuts], 1) for i in range(parts)]

    # XLA:CPU transposes the operands of a batched product, which costs more than the
    # product itself unless there are few rows.
    few = x.shape[0] * width < 128 * 64
    return jax.lax.platform_dependent(
        x, kernel, cpu=batched if few else one_by_one, default=batched
    )


class BlockDense(nn.Module):
    """Dense layer [B, I] -> [B, features] whose kernel is block-diagonal.

    Attributes:
      features: width of the output, a multiple of `blocks`.
      blocks: G; the input width is a multiple of it too.
      dtype: of the matrix product.
    """

    features: int
    blocks: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Apply the layer."""
        shape = (self.blocks, x.shape[-1] // self.blocks, self.features // self.blocks)
        kernel: Any = self.param("kernel", scaled_init, shape, x.shape[-1])
        bias: Any = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        return block_product(x, kernel, self.dtype)[0] + bias


class BlockGRU(nn.Module):
    """Gated recurrent unit with a block-diagonal state, driven by two kinds of input.

    State, latent sample and action enter through a layer each; the blocks share all
    three. `drive` is what does not depend on the state: in training it is computed for a
    whole sequence at once, outside of the recurrence.

    Attributes:
      size: width D of the state, a multiple of `blocks`.
      hidden: width F of the three input layers.
      blocks: G.
      dtype: of the matrix products, 'float32' or 'bfloat16'.
      span: steps that the state is to remember from the start, see `span_init`; 0 = as published,
        about three.

    Reference: Mastering Diverse Domains through World Models (arXiv 2301.04104).
    """

    size: int
    hidden: int
    blocks: int = 8
    dtype: str = "float32"
    span: int = 0

    def setup(self) -> None:
        """Declare the layers."""
        assert self.size % self.blocks == 0
        layer = partial(MLP, (self.hidden,), None, "silu", "fan_in", self.dtype, "rms", 1.0)
        self.state_in, self.latent_in, self.action_in = layer(), layer(), layer()
        width = self.size // self.blocks
        # Every block sees its share of the state and all of the inputs. The part of the
        # kernel that reads the inputs is one dense product for all blocks together.
        fan_in = self.size + self.blocks * 3 * self.hidden
        self.recurrent: Any = self.param(
            "recurrent", scaled_init, (self.blocks, width, width), fan_in
        )
        self.shared: Any = self.param("shared", scaled_init, (3, self.hidden, self.size), fan_in)
        self.bias: Any = self.param("bias", nn.initializers.zeros_init(), (self.size,))
        self.norm = NORMS["rms"]()
        self.gates: Any = self.param(
            "gates", scaled_init, (self.blocks, width, 3 * width), self.size
        )
        zeros = nn.initializers.zeros_init()
        self.gates_bias: Any = (
            self.param("gates_bias", span_init, self.size, self.span)
            if self.span
            else self.param("gates_bias", zeros, (3, self.size))
        )

    def drive(self, action: Array) -> Array:
        """Return what encoded actions [..., A] contribute, [..., D]."""
        # No gradient through the scale: it only keeps huge actions from saturating.
        action = action / jax.lax.stop_gradient(jnp.maximum(1.0, jnp.abs(action)))
        return self._dot(self.action_in(action), self.shared[2])

    def __call__(self, state: Array, latent: Array, drive: Array) -> Array:
        """Move states [B, D] on, given latent samples [B, Z] and `drive` [B, D]."""
        inputs = jnp.concatenate([self.state_in(state), self.latent_in(latent)], -1)
        x = block_product(state, self.recurrent, self.dtype)[0]
        x = x + self._dot(inputs, self.shared[:2].reshape(-1, self.size)) + drive + self.bias
        x = silu(self.norm(x))
        parts = block_product(x, self.gates, self.dtype, parts=3)
        reset, candidate, update = (p + b for p, b in zip(parts, self.gates_bias, strict=True))
        candidate = jnp.tanh(sigmoid(reset) * candidate)
        # The bias makes the cell remember at first.
        update = sigmoid(update - 1.0)
        return update * candidate + (1.0 - update) * state

    def _dot(self, x: Array, kernel: Array) -> Array:
        return matmul(x, kernel, self.dtype)
