"""Gymnasium environments as one stream of records, on the host."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import jax
import numpy as np

from envs.codec import (
    CLIP_LIMIT,
    FLOAT32_MAX,
    ActionCodec,
    Fault,
    ObservationCodec,
    number_fault,
    timestep,
)
from envs.spec import env_spec
from mbrl.types import TimeStep

OnBad = Literal["raise", "drop", "clip"]

DRAWING = 'drawing needs the extra: pip install "modelrl[video]"'

FIRST_LOG_SIZE = 1024
"""Actions to keep per environment at first, when episodes have no known limit."""

MAX_RESETS = 10
"""Resets in a row that may yield bad observations before 'drop' gives up."""


class Row(NamedTuple):
    """What one environment did in one call."""

    leaves: list[np.ndarray]
    reward: float = 0.0
    is_first: bool = True
    is_last: bool = False
    is_terminal: bool = False


class HostEnv:
    """`num_envs` Gymnasium environments as ONE stream of `TimeStep`s.

    The stream follows Gymnasium's NEXT_STEP convention: the final observation of an
    episode is a time step of its own (`is_last`), and the next call ignores the action of
    that environment and yields the first time step of a new episode. Episodes are reset
    with seeds of their own, derived from the run's seed, the environment and the number
    of the episode, so the stream is a function of the seed and the actions.

    Attributes:
      spec: spaces of the emitted arrays.
      num_envs: E.
      counters: 'bad_steps' = values that `on_bad` has dropped or clipped, by environment
        and call; 'restarts' = episodes that could not be replayed by `restore`.
    """

    def __init__(
        self,
        make_env: Callable[[], gym.Env[Any, Any]],
        num_envs: int = 1,
        on_bad: OnBad = "raise",
        id: str | None = None,
    ) -> None:
        """Build the environments.

        Args:
          make_env: builds a new environment at each call.
          num_envs: environments to step in turn.
          on_bad: what to do with a number that is not finite or outside the declared Box:
            'raise' a ValueError; 'drop' the step and begin a new episode (the record
            before it has no successor); 'clip' it into the space, with NaN as 0.
          id: name for messages; default: that of the environment.

        Raises:
          ValueError: for bad arguments and for spaces that are not supported.
        """
        if num_envs < 1:
            raise ValueError(f"num_envs: expected at least 1, got {num_envs}")
        if on_bad not in ("raise", "drop", "clip"):
            raise ValueError(f"on_bad: expected 'raise', 'drop' or 'clip', got {on_bad!r}")
        self._envs = [make_env() for _ in range(num_envs)]
        _check_siblings(self._envs)
        first = self._envs[0]
        limit = first.spec.max_episode_steps if first.spec else None
        name = id or (first.spec.id if first.spec else type(first.unwrapped).__name__)
        self.spec = env_spec(name, first.observation_space, first.action_space, limit)
        self.num_envs = num_envs
        self.counters: dict[str, int] = {"bad_steps": 0, "restarts": 0}
        self._on_bad = on_bad
        self._codec = ObservationCodec(first.observation_space)
        self._actions = ActionCodec(first.action_space, num_envs)
        self._seed = 0
        self._steps = 0
        self._episode = np.full(num_envs, -1, np.int64)
        self._length = np.zeros(num_envs, np.int64)
        shape = (num_envs, limit or FIRST_LOG_SIZE, *self._actions.shape[1:])
        self._log = np.zeros(shape, self._actions.dtype)
        self._now: TimeStep | None = None
        self._over = [False] * num_envs

    def reset(self, seed: int) -> TimeStep:
        """Start a new stream.

        Args:
          seed: non-negative; with the actions it determines everything that follows.

        Returns:
          `TimeStep` with leaves [E, ...], all `is_first`.
        """
        if seed < 0:
            raise ValueError(f"seed: expected a non-negative integer, got {seed}")
        self._seed, self._steps = int(seed), 0
        self._episode[:] = -1
        return self._emit([self._begin(e) for e in range(self.num_envs)])

    def step(self, action: Any) -> TimeStep:
        """Step every environment once.

        Args:
          action: leaves [E, *shape] in the units of the environment, integers counted from 0.
            Rows whose last time step was `is_last` are ignored.

        Returns:
          `TimeStep` with leaves [E, ...]; fresh arrays at every call.

        Raises:
          ValueError: for a bad action, an observation that contradicts the space or, if
            `on_bad` is 'raise', a bad number; naming environment, step, key and value.
        """
        if self._now is None:
            raise ValueError("step: the stream has not begun; call reset(seed) first")
        action = self._actions.check(action)
        values, packed = self._actions.to_env(action), self._actions.pack(action)
        self._steps += 1
        rows = []
        for e in range(self.num_envs):
            if self._over[e]:
                rows.append(self._begin(e))
            else:
                self._remember(e, packed[e])
                rows.append(self._advance(e, values[e]))
        return self._emit(rows)

    def render(self, index: int = 0) -> np.ndarray | None:
        """Return the current frame of one environment, or None if it draws none.

        Raises:
          ValueError: when a package that draws is missing, with the command to install it.
        """
        try:
            frame = self._envs[index].render()
        except gym.error.DependencyNotInstalled as error:
            raise ValueError(f"{self.spec.id} cannot be drawn: {error}; {DRAWING}") from error
        return frame if isinstance(frame, np.ndarray) else None

    def close(self) -> None:
        """Close the environments."""
        for env in self._envs:
            env.close()

    def state(self) -> dict[str, np.ndarray]:
        """Return what `restore` needs, as arrays.

        Shapes depend on `num_envs` and `spec` only, if episodes have a limit; without one
        the action log grows by doubling.
        """
        checks = [0] * self.num_envs if self._now is None else _checksums(self._now)
        return {
            "seed": np.array(self._seed, np.int64),
            "steps": np.array(self._steps, np.int64),
            "episode": self._episode.copy(),
            "length": self._length.copy(),
            "actions": self._log.copy(),
            "checksum": np.asarray(checks, np.uint32),
            "counters": np.array(list(self.counters.values()), np.int64),
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> TimeStep:
        """Rebuild the environments by replaying the running episodes.

        An episode that does not replay bit for bit (its `reset(seed=...)` does not
        determine it, or its simulator has changed) is replaced by a new one, with a
        warning: the record before it then has no successor.

        Args:
          state: from `state` of a HostEnv with the same environment and `num_envs`.

        Returns:
          The `TimeStep` that was current when `state` was called.

        Raises:
          ValueError: when the state does not belong to such a HostEnv.
        """
        self._load(state)
        rows = [self._replay(e) for e in range(self.num_envs)]
        on_bad, self._on_bad = self._on_bad, "clip"  # what got through once must do so again
        try:
            now = self._emit(rows)
        finally:
            self._on_bad = on_bad
        wanted = np.asarray(state["checksum"])
        stale = [e for e, check in enumerate(_checksums(now)) if check != wanted[e]]
        if stale:
            warnings.warn(
                f"{self.spec.id}: environments {stale} did not replay bit for bit and start new "
                "episodes; is reset(seed=...) deterministic, and the simulator the same version?",
                RuntimeWarning,
                stacklevel=2,
            )
            for e in stale:
                rows[e] = self._begin(e)
            now = self._emit(rows)
        counts = np.asarray(state["counters"]).tolist()
        self.counters.update(zip(self.counters, counts, strict=True))
        self.counters["restarts"] += len(stale)
        return now

    def _load(self, state: Mapping[str, np.ndarray]) -> None:
        expected = self.state()
        if state.keys() != expected.keys():
            raise ValueError(f"state: expected keys {sorted(expected)}, got {sorted(state)}")
        for name, like in expected.items():
            got = np.asarray(state[name])
            shapes = [got.shape, like.shape]
            if name == "actions":  # the log may have grown
                shapes = [(*shape[:1], *shape[2:]) for shape in shapes]
            if shapes[0] != shapes[1] or got.dtype != like.dtype:
                raise ValueError(
                    f"state[{name!r}]: expected {like.dtype} of shape {like.shape}, got "
                    f"{got.dtype} of shape {got.shape}; was it another environment or num_envs?"
                )
        episode, length = np.array(state["episode"]), np.array(state["length"])
        if (episode < 0).any():
            raise ValueError("state: it was taken before reset(seed); there is nothing to restore")
        if (length < 0).any() or (length > state["actions"].shape[1]).any():
            raise ValueError(f"state['length']: {length} does not fit the actions that came along")
        self._seed, self._steps = int(state["seed"]), int(state["steps"])
        self._episode, self._length = episode, length
        self._log = np.array(state["actions"])

    def _begin(self, e: int) -> Row:
        """Start the next episode of environment `e`."""
        self._episode[e] += 1
        self._length[e] = 0
        return Row(self._guard(e, self._restart, e))

    def _restart(self, e: int) -> list[np.ndarray]:
        """Reset environment `e` to the start of its current episode."""
        env = self._envs[e]
        words = np.random.SeedSequence([self._seed, e, int(self._episode[e])]).generate_state(1)
        seed = int(words[0] >> 1)  # some simulators take 31 bits only
        env.action_space.seed(seed)
        result = env.reset(seed=seed)
        if not isinstance(result, tuple) or len(result) != 2:
            raise ValueError(f"reset: expected (observation, info), got {type(result).__name__}")
        return self._codec.read(result[0])

    def _advance(self, e: int, action: Any) -> Row:
        return self._guard(e, self._step_one, e, action)

    def _step_one(self, e: int, action: Any) -> Row:
        result = self._envs[e].step(action)
        if not isinstance(result, tuple) or len(result) != 5:
            raise ValueError(
                "step: expected (observation, reward, terminated, truncated, info), got "
                f"{len(result) if isinstance(result, tuple) else type(result).__name__} values"
            )
        obs, reward, terminated, truncated, _ = result
        leaves = self._codec.read(obs)
        last = bool(terminated) or bool(truncated)
        return Row(leaves, _read_reward(reward), False, last, bool(terminated))

    def _guard(self, e: int, call: Callable[..., Any], *args: Any) -> Any:
        """Say which environment failed, and when."""
        try:
            return call(*args)
        except Exception as error:
            if isinstance(error, ValueError):
                raise ValueError(f"{self._where(e)}: {error}") from error
            error.add_note(self._where(e))
            raise

    def _where(self, e: int) -> str:
        return f"{self.spec.id}, environment {e}, step {self._steps}"

    def _remember(self, e: int, action: np.ndarray) -> None:
        if self._length[e] == self._log.shape[1]:
            self._log = np.concatenate([self._log, np.zeros_like(self._log)], 1)
        self._log[e, self._length[e]] = action
        self._length[e] += 1

    def _replay(self, e: int) -> Row:
        """Repeat the running episode of environment `e`; stop early where it ends early."""
        row = Row(self._guard(e, self._restart, e))
        actions = self._log[:, : self._length[e]]
        for t in range(actions.shape[1]):
            if row.is_last:
                break
            action = self._actions.unpack(actions[:, t])
            row = self._advance(e, self._actions.to_env(action)[e])
        return row

    def _emit(self, rows: list[Row]) -> TimeStep:
        """Check the numbers of all rows, act on the bad ones, and stack."""
        for _ in range(MAX_RESETS):
            batch = [np.array(column) for column in zip(*(r.leaves for r in rows), strict=True)]
            rewards = [row.reward for row in rows]
            faults = self._codec.faults(batch)
            faults += [
                number_fault(e, "reward", r) for e, r in enumerate(rewards) if not _is_float32(r)
            ]
            if not faults:
                break
            bad = self._refuse(faults)
            if self._on_bad == "clip":
                batch, rewards = self._codec.repair(batch), [_clip_reward(r) for r in rewards]
                break
            for e in bad:
                rows[e] = self._begin(e)
        else:
            raise ValueError(
                f"{self.spec.id}: {MAX_RESETS} resets in a row gave bad observations; last: "
                f"{faults[0].message}"
            )
        self._over = [row.is_last for row in rows]
        self._now = timestep(
            self._codec.finish(batch),
            np.array(rewards, np.float32),
            np.array([row.is_first for row in rows]),
            np.array(self._over),
            np.array([row.is_terminal for row in rows]),
        )
        return self._now

    def _refuse(self, faults: list[Fault]) -> list[int]:
        """Count the bad rows and list them, or raise."""
        for fault in faults:
            if self._on_bad == "raise" or not fault.can_clip:
                hint = (
                    "; fix the environment or its space, or pass on_bad='clip' or 'drop'"
                    if fault.can_clip
                    else ""
                )
                raise ValueError(f"{self._where(fault.row)}: {fault.message}{hint}")
        bad = sorted({fault.row for fault in faults})
        self.counters["bad_steps"] += len(bad)
        return bad


def _check_siblings(envs: list[gym.Env[Any, Any]]) -> None:
    first = envs[0]
    for e, env in enumerate(envs[1:], 1):
        if env.unwrapped is first.unwrapped:
            raise ValueError("make_env: it must build a new environment at each call")
        for name in ("observation_space", "action_space"):
            if getattr(env, name) != getattr(first, name):
                raise ValueError(
                    f"make_env: environments must agree, but {name} of environment {e} is "
                    f"{getattr(env, name)} and that of environment 0 is {getattr(first, name)}"
                )


def _read_reward(reward: Any) -> float:
    if isinstance(reward, float | int | np.number):
        return float(reward)
    x = np.asarray(reward)
    if x.shape != () or x.dtype.kind not in "fiub":
        raise ValueError(f"reward: expected a number, got {x.dtype} of shape {x.shape}")
    return float(x)


def _is_float32(x: float) -> bool:
    return abs(x) <= FLOAT32_MAX


def _clip_reward(x: float) -> float:
    if x != x:
        return 0.0
    return x if _is_float32(x) else float(np.copysign(CLIP_LIMIT, x))


def _checksums(now: TimeStep) -> list[int]:
    """Hash every row of a time step."""
    leaves = jax.tree.leaves(now)
    found = []
    for e in range(len(now.reward)):
        check = 0
        for x in leaves:
            check = zlib.crc32(np.ascontiguousarray(x[e]).tobytes(), check)
        found.append(check)
    return found
