"""Action values: a stack of networks that are evaluated as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mbrl import spaces
from mbrl.networks.core import ensemble, mlp
from mbrl.types import Array, Discrete, Key, Params, Space


class Critics(NamedTuple):
    """N independent estimates of the value of an action.

    Attributes:
      init: `(key) -> params`, leaves [N, ...].
      considered: `(params, x [B, D], actions [B, S, A]) -> [N, B, S]` of encoded actions; for a
        Discrete space S is all of them, in order.
      taken: `(params, x [B, D], action [B, A]) -> [N, B]` of an encoded action. Both accept the
        parameters of a selection of critics.
    """

    init: Callable[[Key], Params]
    considered: Callable[[Params, Array, Array], Array]
    taken: Callable[[Params, Array, Array], Array]


def critics(
    space: Space, num_inputs: int, hidden: Sequence[int], num: int, norm: str | None = None
) -> Critics:
    """Build critics of a space: the action is an input, or every Discrete one has an output.

    Args:
      space: of the actions, Discrete, Box or a mapping of Boxes.
      num_inputs: D.
      hidden: widths of the hidden layers.
      num: of critics, N.
      norm: see `mbrl.networks.core.mlp`.
    """
    size = spaces.flat_size(space)
    discrete = isinstance(space, Discrete)
    inputs, outputs = (num_inputs, size) if discrete else (num_inputs + size, 1)
    member = mlp(hidden, outputs, "relu", "fan_in", norm=norm)
    net = ensemble(member, num)

    def init(key: Key) -> Params:
        return net.init(key, jnp.zeros((num, 1, inputs)))

    def everyone(params: Params, x: Array) -> Array:
        members = jax.tree.leaves(params)[0].shape[0]
        return net.apply(params, jnp.broadcast_to(x, (members, *x.shape)))

    def considered(params: Params, x: Array, actions: Array) -> Array:
        if discrete:
            return everyone(params, x)
        count = actions.shape[1]
        states = jnp.broadcast_to(x[:, None], (x.shape[0], count, x.shape[1]))
        rows = jnp.concatenate([states, actions], -1).reshape(-1, inputs)
        return everyone(params, rows).reshape(-1, x.shape[0], count)

    def taken(params: Params, x: Array, action: Array) -> Array:
        if discrete:
            return jnp.sum(everyone(params, x) * action, -1)
        return considered(params, x, action[:, None])[..., 0]

    return Critics(init, considered, taken)
