"""Gymnasium values to arrays and back, checked against the declared spaces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from envs.spec import action_space, observation_space
from mbrl.types import Box, Discrete, MultiDiscrete, TimeStep

TOLERANCE = 1e-4
"""Slack of Box bounds, relative to the bound: what float32 rounding may exceed."""

FLOAT32_MAX = float(np.finfo(np.float32).max)
CLIP_LIMIT = 1e6
"""What 'clip' makes of an infinity that no bound of the space replaces."""


class Leaf(NamedTuple):
    """How to read one leaf of an observation space.

    Attributes:
      key: 'observation', or 'observation/a/b' in a nested space.
      shape: of the value that the environment returns.
      kinds: numpy dtype kinds that are accepted.
      start: subtracted from integers, so that they begin at 0.
      low: [*shape] lower bound after that.
      high: [*shape] upper bound.
      accepted: (smallest, largest) value that passes: the bounds with their tolerance;
        None where the dtype alone keeps the bounds (images).
      categorical: integers that mean categories, which clipping would falsify.
      out_shape: shape of the emitted array, without the environment axis.
      dtype: of the emitted array.
    """

    key: str
    shape: tuple[int, ...]
    kinds: str
    start: Any
    low: np.ndarray
    high: np.ndarray
    accepted: tuple[np.ndarray, np.ndarray] | None
    categorical: bool
    out_shape: tuple[int, ...]
    dtype: np.dtype


class Fault(NamedTuple):
    """A value that must not reach a learner, and the environment it came from."""

    row: int
    message: str
    can_clip: bool


def number_fault(row: int, key: str, value: float, can_clip: bool = True) -> Fault:
    """Describe a number that is not finite (as float32)."""
    return Fault(row, f"{key} is {value}, expected a finite float32", can_clip)


class ObservationCodec:
    """Read observations of one Gymnasium space into arrays, and find what is wrong."""

    def __init__(self, space: gym.Space[Any]) -> None:
        self.space = space
        self.leaves = list(_leaves(space, "observation"))

    def read(self, value: Any, batch: tuple[int, ...] = ()) -> list[np.ndarray]:
        """Check the structure of an observation and list its leaves.

        Args:
          value: an observation, or a batch of them as vector environments return it.
          batch: leading axes of the value.

        Returns:
          One array `[*batch, *shape]` per leaf, in the dtype of the environment. It may
          share memory with `value`.

        Raises:
          ValueError: naming the key, what was expected and what came.
        """
        values = _values(self.space, value, "observation")
        return [_read_leaf(leaf, x, batch) for leaf, x in zip(self.leaves, values, strict=True)]

    def faults(self, batch: list[np.ndarray]) -> list[Fault]:
        """List the values `[E, *shape]` that are not finite or outside the space.

        One fault per leaf and environment.
        """
        found = []
        for leaf, x in zip(self.leaves, batch, strict=True):
            if leaf.accepted is None:
                continue
            good = (x >= leaf.accepted[0]) & (x <= leaf.accepted[1])
            if not good.all():
                found += list(_faults(leaf, x, good))
        return found

    def repair(self, batch: list[np.ndarray]) -> list[np.ndarray]:
        """Replace NaN by 0 and clip everything else into the space (or to 1e6)."""
        return [_repair(leaf, x) for leaf, x in zip(self.leaves, batch, strict=True)]

    def finish(self, batch: list[np.ndarray]) -> Any:
        """Return the observation pytree `[E, ...]` of checked leaves."""
        pairs = zip(self.leaves, batch, strict=True)
        return _build(self.space, iter([_finish(leaf, x) for leaf, x in pairs]))


class ActionCodec:
    """Check actions of an agent and hand them to environments in their own form.

    Attributes:
      shape, dtype: of the array [E, ...] that `pack` returns.
    """

    def __init__(self, space: gym.Space[Any], num_envs: int, key: str = "action") -> None:
        self.gym_space, self._key = space, key
        self.space = action_space(space)
        self._parts: dict[str, ActionCodec] = {}
        match self.space:
            case Box():
                shape, self.dtype = self.space.shape, np.dtype(np.float32)
            case Discrete():
                shape, self.dtype, self._limit = (), np.dtype(np.int32), self.space.num
            case MultiDiscrete():
                shape, self.dtype = (len(self.space.nums),), np.dtype(np.int32)
                self._limit = np.asarray(self.space.nums)
            case _:
                assert isinstance(space, gym.spaces.Dict)
                self._parts = {
                    name: ActionCodec(sub, num_envs, f"{key}/{name}")
                    for name, sub in space.spaces.items()
                }
                self._sizes = [int(np.prod(p.shape[1:])) for p in self._parts.values()]
                # Holds every float32 and every int32 as it is.
                shape, self.dtype = (sum(self._sizes),), np.dtype(np.float64)
        self.shape = (num_envs, *shape)

    def check(self, action: Any) -> Any:
        """Return the action as float32 or int32 `[E, *shape]`, or a dict of them.

        Raises:
          ValueError: for a wrong shape or dtype, NaN, an integer out of range, or other keys.
        """
        if self._parts:
            _check_keys(self._parts, action, self._key)
            return {name: part.check(action[name]) for name, part in self._parts.items()}
        x = np.asarray(action)
        kinds = "f" if isinstance(self.space, Box) else "iu"
        if x.shape != self.shape or x.dtype.kind not in kinds:
            raise ValueError(
                f"{self._key}: expected {self.dtype} of shape {self.shape} (environments first), "
                f"got {x.dtype} of shape {x.shape}"
            )
        if isinstance(self.space, Box):
            good = np.isfinite(x)
        else:
            good = (x >= 0) & (x < self._limit)
        if not good.all():
            row = int(np.argwhere(~good)[0][0])
            wanted = "finite numbers" if isinstance(self.space, Box) else f"0 <= a < {self._limit}"
            raise ValueError(f"{self._key}: expected {wanted}, got {x[row]} for environment {row}")
        return x.astype(self.dtype, copy=False)

    def to_env(self, action: Any) -> Any:
        """Return a sequence with one action per environment, in the environment's form.

        Args:
          action: [E, *shape] as `check` returns it.
        """
        if self._parts:
            columns = [part.to_env(action[name]) for name, part in self._parts.items()]
            return [dict(zip(self._parts, row, strict=True)) for row in zip(*columns, strict=True)]
        batch = self.to_batch(action)
        return batch.tolist() if isinstance(self.space, Discrete) else batch

    def to_batch(self, action: Any) -> Any:
        """Return what a vector environment takes, leaves `[E, ...]`; always a copy."""
        if self._parts:
            return {name: part.to_batch(action[name]) for name, part in self._parts.items()}
        space = self.gym_space
        if isinstance(space, gym.spaces.Box):
            x = action.astype(space.dtype)
            # A float32 bound can lie outside the float64 bound that it was rounded from.
            return x if space.dtype == np.float32 else np.clip(x, space.low, space.high)
        if isinstance(space, gym.spaces.Discrete):
            return action.astype(np.int64) + int(space.start)
        assert isinstance(space, gym.spaces.MultiDiscrete)
        return (action.reshape(-1, *space.nvec.shape) + space.start).astype(space.dtype)

    def pack(self, action: Any) -> np.ndarray:
        """Return one array `[E, ...]` of an action as `check` returns it."""
        if not self._parts:
            return action
        packed = [part.pack(action[name]) for name, part in self._parts.items()]
        return np.concatenate([x.reshape(len(x), -1).astype(self.dtype) for x in packed], 1)

    def unpack(self, packed: np.ndarray) -> Any:
        """Invert `pack`."""
        if not self._parts:
            return packed
        columns = np.split(packed, np.cumsum(self._sizes)[:-1], 1)
        return {
            name: part.unpack(x.reshape(-1, *part.shape[1:]).astype(part.dtype))
            for (name, part), x in zip(self._parts.items(), columns, strict=True)
        }


def timestep(
    obs: Any,
    reward: np.ndarray,
    is_first: np.ndarray,
    is_last: np.ndarray,
    is_terminal: np.ndarray,
) -> TimeStep:
    """Make a `TimeStep` of numpy arrays: its fields are declared for jax arrays."""
    fields: Any = (obs, reward, is_first, is_last, is_terminal)
    return TimeStep(*fields)


def _leaves(space: gym.Space[Any], key: str) -> Iterator[Leaf]:
    if isinstance(space, gym.spaces.Dict | gym.spaces.Tuple):
        for name, sub in _children(space):
            yield from _leaves(sub, f"{key}/{name}")
        return
    match out := observation_space(space, key):
        case Box():
            is_float = out.dtype == np.float32
            low, high = out.low, out.high
            bounds = _accepted_floats(low, high) if is_float else _accepted_integers(out)
            kinds = "fiub" if is_float else "iub"
            yield Leaf(key, out.shape, kinds, 0, low, high, bounds, False, out.shape, out.dtype)
            return
        case Discrete():
            shape, high = (), np.array(out.num - 1)
        case MultiDiscrete():
            shape = (len(out.nums),)
            high = np.asarray(out.nums).reshape(space.shape or ()) - 1
    low = np.zeros_like(high)
    start = getattr(space, "start", 0)
    dtype = np.dtype(np.int32)
    yield Leaf(key, high.shape, "iub", start, low, high, (low, high), True, shape, dtype)


def _children(
    space: gym.spaces.Dict | gym.spaces.Tuple,
) -> Iterable[tuple[Any, gym.Space[Any]]]:
    return enumerate(space.spaces) if isinstance(space, gym.spaces.Tuple) else space.spaces.items()


def _accepted_floats(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Widen the bounds; with float32's limits for infinities they catch NaN and Inf too."""
    low = low - TOLERANCE * np.maximum(1.0, np.abs(low))
    high = high + TOLERANCE * np.maximum(1.0, np.abs(high))
    return np.maximum(low, -FLOAT32_MAX), np.minimum(high, FLOAT32_MAX)


def _accepted_integers(box: Box) -> tuple[np.ndarray, np.ndarray] | None:
    limit = np.iinfo(box.dtype)
    if box.dtype == np.uint8 and np.all(box.low <= limit.min) and np.all(box.high >= limit.max):
        return None
    return box.low.astype(np.int64), box.high.astype(np.int64)


def _values(space: gym.Space[Any], value: Any, key: str) -> Iterator[Any]:
    """Walk a nested observation in the order of `_leaves`."""
    if isinstance(space, gym.spaces.Dict):
        _check_keys(space.spaces, value, key)
        for name, sub in space.spaces.items():
            yield from _values(sub, value[name], f"{key}/{name}")
    elif isinstance(space, gym.spaces.Tuple):
        if not isinstance(value, tuple | list) or len(value) != len(space.spaces):
            got = f"{len(value)} entries" if hasattr(value, "__len__") else type(value).__name__
            raise ValueError(f"{key}: expected a tuple of {len(space.spaces)} entries, got {got}")
        for i, sub in enumerate(space.spaces):
            yield from _values(sub, value[i], f"{key}/{i}")
    else:
        yield value


def _check_keys(wanted: Mapping[Any, Any], value: Any, key: str) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{key}: expected a dict, got {type(value).__name__}")
    if value.keys() != wanted.keys():
        missing = sorted(map(str, wanted.keys() - value.keys()))
        extra = sorted(map(str, value.keys() - wanted.keys()))
        raise ValueError(
            f"{key}: expected the keys {sorted(map(str, wanted))}, got "
            f"{sorted(map(str, value))} (missing {missing}, unexpected {extra})"
        )


def _read_leaf(leaf: Leaf, value: Any, batch: tuple[int, ...]) -> np.ndarray:
    try:
        x = np.asarray(value)
    except ValueError as error:  # ragged lists
        raise ValueError(f"{leaf.key}: cannot be made an array ({error})") from None
    shape = (*batch, *leaf.shape)
    if x.shape != shape:
        raise ValueError(f"{leaf.key}: expected shape {shape}, got {x.shape}")
    if x.dtype.kind not in leaf.kinds:
        raise ValueError(f"{leaf.key}: expected a dtype that casts to {leaf.dtype}, got {x.dtype}")
    if x.dtype.kind == "b":
        x = x.astype(np.uint8)
    if leaf.accepted is None and x.dtype != leaf.dtype and x.size:
        # Without bounds to check, the cast itself could wrap around.
        limit = np.iinfo(leaf.dtype)
        if x.min() < limit.min or x.max() > limit.max:
            raise ValueError(
                f"{leaf.key}: expected values in [{limit.min}, {limit.max}], got {x.dtype} "
                f"from {x.min()} to {x.max()}"
            )
    return x.astype(np.int64) - leaf.start if leaf.categorical else x


def _faults(leaf: Leaf, x: np.ndarray, good: np.ndarray) -> Iterator[Fault]:
    for row in np.flatnonzero(~good.reshape(len(good), -1).all(1)):
        index = tuple(int(i) for i in np.argwhere(~good[row])[0])
        value = x[row][index]
        key = f"{leaf.key}{list(index)}" if index else leaf.key
        if not abs(float(value)) <= FLOAT32_MAX:
            yield number_fault(int(row), key, value)
        else:
            start = np.broadcast_to(leaf.start, leaf.shape)[index]
            low, high = leaf.low[index] + start, leaf.high[index] + start
            message = f"{key} is {value + start}, expected a value of the space, {low} to {high}"
            yield Fault(int(row), message, not leaf.categorical)


def _repair(leaf: Leaf, x: np.ndarray) -> np.ndarray:
    if leaf.accepted is None or leaf.categorical:
        return x
    ceiling = np.where(np.isfinite(leaf.high), leaf.high, CLIP_LIMIT)
    floor = np.where(np.isfinite(leaf.low), leaf.low, -CLIP_LIMIT)
    x = np.where(np.isnan(x), 0.0, x)
    x = np.where(x > FLOAT32_MAX, ceiling, np.where(x < -FLOAT32_MAX, floor, x))
    return np.clip(x, leaf.low, leaf.high)


def _finish(leaf: Leaf, x: np.ndarray) -> np.ndarray:
    return x.astype(leaf.dtype, copy=False).reshape(len(x), *leaf.out_shape)


def _build(space: gym.Space[Any], arrays: Iterator[np.ndarray]) -> Any:
    if isinstance(space, gym.spaces.Dict | gym.spaces.Tuple):
        return {str(name): _build(sub, arrays) for name, sub in _children(space)}
    return next(arrays)
