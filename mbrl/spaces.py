"""Spaces as plain data: sampling, validation, flattening to vectors, action scaling.

Environments keep their own units; models and planners see flat float32 vectors and
actions in `[-1, 1]`. The conversions live here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mbrl.types import Array, Box, Discrete, EnvSpec, Key, MultiDiscrete, Space


def box(low: Any, high: Any, shape: tuple[int, ...] | None = None, dtype: Any = np.float32) -> Box:
    """Make a `Box`; scalars broadcast to `shape`.

    Raises:
      ValueError: when a lower bound exceeds its upper bound.
    """
    shape = tuple(np.shape(low) if shape is None else shape)
    low = np.broadcast_to(np.asarray(low, np.float64), shape)
    high = np.broadcast_to(np.asarray(high, np.float64), shape)
    if np.any(low > high):
        raise ValueError(f"box: low must not exceed high, got low={low}, high={high}")
    return Box(shape, low, high, np.dtype(dtype))


def zeros(space: Space, batch: tuple[int, ...] = ()) -> Any:
    """Return an all-zero element of `space` with leading axes `batch`."""
    match space:
        case Box():
            return jnp.zeros((*batch, *space.shape), space.dtype)
        case Discrete():
            return jnp.zeros(batch, jnp.int32)
        case MultiDiscrete():
            return jnp.zeros((*batch, len(space.nums)), jnp.int32)
    return {name: zeros(sub, batch) for name, sub in space.items()}


def sample(
    space: Space, key: Key, batch: tuple[int, ...] = (), invalid: Array | None = None
) -> Any:
    """Draw uniformly from a bounded space, leaves `[*batch, ...]`.

    Args:
      space: what to draw from.
      key: consumed.
      batch: leading axes.
      invalid: bool [*batch, num], integers of a `Discrete` that are not drawn.

    Raises:
      ValueError: for a `Box` with a non-finite bound.
    """
    match space:
        case Box():
            low, high = finite_bounds(space, "space")
            u = jax.random.uniform(key, (*batch, *space.shape))
            return (low + (high - low) * u).astype(space.dtype)
        case Discrete() if invalid is not None:
            return jax.random.categorical(key, jnp.where(invalid, -1e9, 0.0))
        case Discrete():
            return jax.random.randint(key, batch, 0, space.num)
        case MultiDiscrete():
            return jax.random.randint(key, (*batch, len(space.nums)), 0, jnp.asarray(space.nums))
    names = sorted(space)
    keys = jax.random.split(key, len(names))
    return {name: sample(space[name], k, batch) for name, k in zip(names, keys, strict=True)}


ACTION_MASK = "action_mask"
"""Entry of a Dict observation, [num]: 0 marks what a Discrete action may not be."""


def invalid_actions(spec: EnvSpec, obs: Any) -> Array | None:
    """Read the mask of illegal actions from observations [B, ...].

    Returns:
      bool [B, num], nothing in it where the mask allows nothing (at the end of an episode); or
      None for a task whose observations have no entry `ACTION_MASK`.

    Raises:
      ValueError: for a mask that does not fit the action space.
    """
    if not isinstance(spec.observation, Mapping) or ACTION_MASK not in spec.observation:
        return None
    mask = spec.observation[ACTION_MASK]
    shape = zeros(mask).shape if not isinstance(mask, Mapping) else None
    if not isinstance(spec.action, Discrete) or shape != (spec.action.num,):
        raise ValueError(
            f"{ACTION_MASK} of {spec.id}: got {mask} for the actions {spec.action}, expected one "
            "number per Discrete action; rename the entry if it is no mask"
        )
    invalid = obs[ACTION_MASK] == 0
    return invalid & ~invalid.all(-1, keepdims=True)


def check_one_player(spec: EnvSpec, agent: str) -> None:
    """Refuse a task of two players for an agent that knows of none but itself.

    Raises:
      ValueError: naming the task and `agent`.
    """
    if spec.players != 1:
        raise ValueError(
            f"players: {spec.id} has {spec.players}, {agent} expected 1, or the rewards of another "
            "count as its own; train against an opponent (such as device/TicTacToeRandom), or with "
            "`mbrl train muzero`"
        )


def check_no_images(spec: EnvSpec, agent: str) -> None:
    """Refuse observations with images for an agent without an encoder.

    Raises:
      ValueError: naming the observation and `agent`.
    """
    for path, leaf in leaves(spec.observation):
        if isinstance(leaf, Box) and len(leaf.shape) >= 3:
            raise ValueError(
                f"observation {path or spec.id}: {agent} expected vectors, got an image of shape "
                f"{leaf.shape}; use an agent with an encoder (dreamer, muzero, ppo), or a vector "
                "observation"
            )


def finite_bounds(space: Box, name: str) -> tuple[Array, Array]:
    """Return `(low, high)` as float32 arrays `[*shape]`.

    Raises:
      ValueError: naming `name` when a bound is not finite.
    """
    if not (np.all(np.isfinite(space.low)) and np.all(np.isfinite(space.high))):
        raise ValueError(
            f"{name}: bounds must be finite, got low={space.low}, high={space.high}; "
            "wrap the environment so that its actions are bounded "
            "(for example gymnasium.wrappers.RescaleAction)"
        )
    return jnp.asarray(space.low, jnp.float32), jnp.asarray(space.high, jnp.float32)


def from_unit(space: Box, action: Array) -> Array:
    """Map `[-1, 1]` to the bounds of `space`, elementwise over `[..., *shape]`."""
    low, high = finite_bounds(space, "action space")
    return low + 0.5 * (action + 1.0) * (high - low)


def to_unit(space: Box, action: Array) -> Array:
    """Map the bounds of `space` to `[-1, 1]`; a degenerate dimension maps to 0."""
    low, high = finite_bounds(space, "action space")
    width = jnp.where(high > low, high - low, 1.0)
    return jnp.where(high > low, 2.0 * (action - low) / width - 1.0, 0.0)


def clip(space: Space, x: Any) -> Any:
    """Move elements of `space`, leaves [..., *shape], into the bounds of its Boxes."""
    if isinstance(space, Mapping):
        return {name: clip(space[name], x[name]) for name in sorted(space)}
    if not isinstance(space, Box):
        return x
    return jnp.clip(x, jnp.asarray(space.low, x.dtype), jnp.asarray(space.high, x.dtype))


def flat_size(space: Space) -> int:
    """Return the length of `flatten(space, x)` for one element `x`."""
    match space:
        case Box():
            return int(np.prod(space.shape, dtype=int))
        case Discrete():
            return space.num
        case MultiDiscrete():
            return sum(space.nums)
    return sum(flat_size(sub) for sub in space.values())


def flatten(space: Space, x: Any) -> Array:
    """Turn elements of `space` into float32 vectors.

    Box elements are reshaped (uint8 scaled to `[0, 1]`), integers become one-hot, Dict
    entries are concatenated in sorted order.

    Args:
      space: the space of one element.
      x: elements with any leading axes `[...]`.

    Returns:
      [..., flat_size(space)] float32.

    Raises:
      ValueError: for a Box element of another shape.
    """
    match space:
        case Box():
            lead = x.shape[: max(x.ndim - len(space.shape), 0)]
            if x.shape[len(lead) :] != space.shape:
                raise ValueError(
                    f"obs or action: got shape {x.shape}, expected {('...', *space.shape)}; its "
                    "last axes are those of the space"
                )
            scale = 255.0 if space.dtype == np.uint8 else 1.0
            return (x.astype(jnp.float32) / scale).reshape(*lead, flat_size(space))
        case Discrete():
            return jax.nn.one_hot(x, space.num)
        case MultiDiscrete():
            hot = [jax.nn.one_hot(x[..., i], n) for i, n in enumerate(space.nums)]
            return jnp.concatenate(hot, -1)
    return jnp.concatenate([flatten(space[name], x[name]) for name in sorted(space)], -1)


def unflatten(space: Space, flat: Array) -> Any:
    """Invert `flatten`; integers are the largest entry of their one-hot part.

    Args:
      space: the space of one element.
      flat: [..., flat_size(space)].

    Returns:
      Elements of `space` with leading axes `[...]`; uint8 is rounded.
    """
    match space:
        case Box():
            x = flat.reshape(*flat.shape[:-1], *space.shape)
            if space.dtype == np.uint8:
                x = jnp.clip(jnp.round(255.0 * x), 0, 255)
            return x.astype(space.dtype)
        case Discrete():
            return jnp.argmax(flat, -1).astype(jnp.int32)
        case MultiDiscrete():
            parts = jnp.split(flat, np.cumsum(space.nums)[:-1], -1)
            return jnp.stack([jnp.argmax(p, -1) for p in parts], -1).astype(jnp.int32)
    names = sorted(space)
    parts = jnp.split(flat, np.cumsum([flat_size(space[n]) for n in names])[:-1], -1)
    return {n: unflatten(space[n], part) for n, part in zip(names, parts, strict=True)}


def encode_action(space: Space, action: Array) -> Array:
    """Return actions as network input: Box scaled to `[-1, 1]`, integers one-hot.

    Args:
      space: action space; the parts of a Dict are joined in sorted order.
      action: leaves [..., *shape] or int32 [...].

    Returns:
      [..., flat_size(space)] float32.
    """
    if isinstance(space, Box):
        unit = to_unit(space, action)
        return unit.reshape(*unit.shape[: unit.ndim - len(space.shape)], flat_size(space))
    if isinstance(space, Mapping):
        parts = [encode_action(space[name], action[name]) for name in sorted(space)]
        return jnp.concatenate(parts, -1)
    return flatten(space, action)


def decode_action(space: Space, encoded: Array) -> Any:
    """Invert `encode_action`; numbers beyond `[-1, 1]` stay beyond the bounds.

    Args:
      space: action space.
      encoded: [..., flat_size(space)].

    Returns:
      Actions with leading axes `[...]`; integers are the largest entry of their part.
    """
    if isinstance(space, Box):
        unit = encoded.reshape(*encoded.shape[:-1], *space.shape)
        return from_unit(space, unit).astype(space.dtype)
    if isinstance(space, Mapping):
        names = sorted(space)
        parts = jnp.split(encoded, np.cumsum([flat_size(space[n]) for n in names])[:-1], -1)
        return {n: decode_action(space[n], part) for n, part in zip(names, parts, strict=True)}
    return unflatten(space, encoded)


def describe(space: Space) -> Any:
    """Return a JSON-serializable description, for manifests and messages."""
    match space:
        case Box():
            return {
                "box": list(space.shape),
                "low": [_json_number(x) for x in np.ravel(space.low)],
                "high": [_json_number(x) for x in np.ravel(space.high)],
                "dtype": str(space.dtype),
            }
        case Discrete():
            return {"discrete": space.num}
        case MultiDiscrete():
            return {"multi_discrete": list(space.nums)}
    return {name: describe(space[name]) for name in sorted(space)}


def _json_number(x: Any) -> float | str:
    return float(x) if np.isfinite(x) else str(float(x))


def leaves(space: Space, prefix: str = "") -> list[tuple[str, Box | Discrete | MultiDiscrete]]:
    """List `(path, leaf space)` of a possibly nested space; the path of a bare leaf is ''."""
    if isinstance(space, Mapping):
        found = []
        for name in sorted(space):
            found += leaves(space[name], f"{prefix}/{name}" if prefix else name)
        return found
    return [(prefix, space)]
