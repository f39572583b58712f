"""Gymnasium spaces as `mbrl` spaces, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np

from mbrl.types import Box, Discrete, EnvSpec, MultiDiscrete, Space

SUPPORTED = "Box, Discrete, MultiDiscrete, MultiBinary, Dict and Tuple"
_INT32 = np.iinfo(np.int32)


def observation_space(space: gym.Space[Any], where: str = "observation") -> Space:
    """Convert the observation space of a Gymnasium environment.

    Floats become float32 and integers int32 (uint8 stays, as images are stored in it). A
    Tuple becomes a mapping with the keys '0', '1', ...; a MultiBinary becomes a
    MultiDiscrete of twos; integer spaces that start elsewhere are shifted to 0.

    Args:
      space: a Gymnasium space, possibly nested.
      where: name of the space in messages.

    Returns:
      The space of the arrays that `envs.host.HostEnv` emits.

    Raises:
      ValueError: for a space that has no fixed-size array form, naming it and a wrapper.
    """
    match space:
        case gym.spaces.Box():
            return _box(space)
        case gym.spaces.Discrete():
            return Discrete(int(space.n))
        case gym.spaces.MultiDiscrete():
            return MultiDiscrete(tuple(int(n) for n in space.nvec.reshape(-1)))
        case gym.spaces.MultiBinary():
            return MultiDiscrete((2,) * int(np.prod(space.shape)))
        case gym.spaces.Dict():
            named = space.spaces.items()
        case gym.spaces.Tuple():
            named = ((str(i), sub) for i, sub in enumerate(space.spaces))
        case _:
            raise ValueError(
                f"{where}: {type(space).__name__} spaces are not supported, expected {SUPPORTED}; "
                "turn it into a Box with gymnasium.wrappers.TransformObservation, or drop a Dict "
                "entry with gymnasium.wrappers.FilterObservation"
            )
    return {name: observation_space(sub, f"{where}/{name}") for name, sub in named}


def action_space(space: gym.Space[Any], where: str = "action") -> Space:
    """Convert the action space of a Gymnasium environment.

    Args:
      space: a bounded float Box, a Discrete, a MultiDiscrete, or a Dict of such spaces.
      where: name of the space in messages.

    Returns:
      The space of the arrays that `envs.host.HostEnv.step` takes.

    Raises:
      ValueError: for another kind of space, or a Box with an infinite bound.
    """
    match space:
        case gym.spaces.Box() if np.issubdtype(space.dtype, np.floating):
            for name in ("low", "high"):
                bound = getattr(space, name)
                if not np.all(np.isfinite(bound)):
                    raise ValueError(
                        f"{where}: the {name} bound of a Box must be finite, got {bound}; bound "
                        "it with gymnasium.wrappers.TransformAction(env, func, action_space)"
                    )
            return _box(space)
        case gym.spaces.Discrete():
            return Discrete(int(space.n))
        case gym.spaces.MultiDiscrete():
            return MultiDiscrete(tuple(int(n) for n in space.nvec.reshape(-1)))
        case gym.spaces.Dict():
            return {k: action_space(sub, f"{where}/{k}") for k, sub in space.spaces.items()}
    kind = type(space).__name__
    if isinstance(space, gym.spaces.Box):
        kind = f"Box of {space.dtype}"
    raise ValueError(
        f"{where}: {kind} is not supported, expected a bounded Box of floats, Discrete, "
        "MultiDiscrete or a Dict of those; convert it with "
        "gymnasium.wrappers.TransformAction(env, func, action_space)"
    )


def env_spec(
    id: str,
    observation: gym.Space[Any],
    action: gym.Space[Any],
    max_episode_steps: int | None = None,
) -> EnvSpec:
    """Describe a Gymnasium environment by its spaces.

    Raises:
      ValueError: when one of the spaces is not supported.
    """
    return EnvSpec(
        id,
        observation_space(observation, f"observation space of {id}"),
        action_space(action, f"action space of {id}"),
        max_episode_steps,
    )


def to_gymnasium(space: Space) -> gym.Space[Any]:
    """Convert an `mbrl` space to the Gymnasium space of the same arrays."""
    match space:
        case Box():
            low, high = np.asarray(space.low, space.dtype), np.asarray(space.high, space.dtype)
            return gym.spaces.Box(low, high, space.shape, space.dtype.type)
        case Discrete():
            return gym.spaces.Discrete(space.num)
        case MultiDiscrete():
            return gym.spaces.MultiDiscrete(np.asarray(space.nums, np.int64), np.int64)
        case Mapping():
            return gym.spaces.Dict({name: to_gymnasium(sub) for name, sub in space.items()})
    raise ValueError(
        f"space: expected an mbrl space (Box, Discrete, MultiDiscrete or a mapping of names to "
        f"spaces), got {type(space).__name__}"
    )


def _box(space: gym.spaces.Box) -> Box:
    low, high = np.asarray(space.low, np.float64), np.asarray(space.high, np.float64)
    if np.issubdtype(space.dtype, np.floating):
        return Box(space.shape, low, high, np.dtype(np.float32))
    if space.dtype in (np.uint8, np.bool_):
        return Box(space.shape, low, high, np.dtype(np.uint8))
    return Box(
        space.shape,
        np.clip(low, _INT32.min, _INT32.max),
        np.clip(high, _INT32.min, _INT32.max),
        np.dtype(np.int32),
    )
