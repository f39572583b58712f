"""Actor and critic side by side, with an optional memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mbrl.networks.convolution import ConvEncoder
from mbrl.networks.core import MLP
from mbrl.networks.observation import Prepared
from mbrl.types import Array


class ActorCritic(nn.Module):
    """Two networks of equal shape on the same observation; images and memory are shared.

    Attributes:
      constant: one entry per output of the actor, true where it does not depend on the
        observation, as the deviations of PPO.
      start: of the constant outputs.
      hidden: widths of the hidden layers.
      memory: width of the gated recurrent unit that both read; 0 = they read observations.
      depth: unit of the channels for images.
    """

    constant: tuple[bool, ...]
    start: float = 0.0
    hidden: tuple[int, ...] = (64, 64)
    memory: int = 0
    depth: int = 8

    @nn.compact
    def __call__(self, memory: Array, obs: Prepared, is_first: Array) -> tuple[Array, Array, Array]:
        """Evaluate a batch.

        Args:
          memory: [B, memory] of what came before; it is empty where `is_first`.
          obs: leaves [B, ...].
          is_first: bool [B].

        Returns:
          The next memory [B, memory], outputs of the actor [B, A] and values [B].
        """
        images = [ConvEncoder(self.depth)(image - 0.5) for image in obs.images]
        x = jnp.concatenate([obs.vector, *images], -1)
        if self.memory:
            memory = jnp.where(is_first[:, None], 0.0, memory)
            memory, x = nn.GRUCell(self.memory)(memory, x)
        # silu and not tanh: policies that are judged without noise need sharp turns. Nearly
        # uniform at first: the first rollouts should not depend on the seed's taste.
        actor = MLP(self.hidden, len(self.constant), "silu", "orthogonal", "float32", None, 0.01)
        critic = MLP(self.hidden, 1, "silu", "orthogonal", "float32", None, 0.7)
        shape = (len(self.constant),)
        free: Any = self.param("constant", nn.initializers.constant(self.start), shape)
        outputs = jnp.where(np.array(self.constant), free, actor(x))
        return memory, outputs, critic(x)[:, 0]


def unroll(
    net: ActorCritic, params: Any, memory: Array, obs: Prepared, is_first: Array
) -> tuple[Array, Array]:
    """Evaluate sequences.

    Args:
      net: the networks.
      params: of `net`.
      memory: [B, memory] before the first step.
      obs: leaves [B, T, ...].
      is_first: bool [B, T].

    Returns:
      Outputs of the actor [B, T, A] and values [B, T].
    """
    if not net.memory:  # all steps are one batch
        batch, time = is_first.shape
        rows = jax.tree.map(lambda x: x.reshape(batch * time, *x.shape[2:]), (obs, is_first))
        nothing = jnp.zeros((batch * time, 0))
        _, outputs, value = evaluate(net, params, nothing, *rows)
        return outputs.reshape(batch, time, -1), value.reshape(batch, time)

    def step(memory: Array, inputs: Any) -> tuple[Array, tuple[Array, Array]]:
        memory, outputs, value = evaluate(net, params, memory, *inputs)
        return memory, (outputs, value)

    time_first = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (obs, is_first))
    _, found = jax.lax.scan(step, memory, time_first)
    return jnp.swapaxes(found[0], 0, 1), jnp.swapaxes(found[1], 0, 1)


def evaluate(net: ActorCritic, params: Any, memory: Array, obs: Prepared, is_first: Array) -> Any:
    """Call `net` on a batch: the next memory, outputs of the actor and values."""
    return net.apply({"params": params}, memory, obs, is_first)
