"""User-supplied Gymnasium vector environments as the same stream as `HostEnv`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from envs.codec import (
    CLIP_LIMIT,
    FLOAT32_MAX,
    ActionCodec,
    ObservationCodec,
    number_fault,
    timestep,
)
from envs.spec import env_spec
from mbrl.types import TimeStep

REBUILD = (
    "rebuild it with gymnasium.make_vec(id, num_envs, "
    "vector_kwargs={'autoreset_mode': AutoresetMode.NEXT_STEP})"
)

Parts = tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]
"""Observation leaves, reward, terminated, truncated; each [E, ...]."""


class VectorStream:
    """A Gymnasium `VectorEnv` with the interface and the conventions of `HostEnv`.

    NEXT_STEP environments have the right stream already. Those of mode SAME_STEP and
    DISABLED have no call in which an ended environment stands still while the others
    move, so it takes one step that nobody sees, and is reset once more; the transitions
    are the same, at the price of one step per episode.

    A vector environment cannot be rewound: `state` is empty and `restore` begins new
    episodes.
    """

    def __init__(
        self, venv: VectorEnv[Any, Any, Any], on_bad: Literal["raise", "clip"] = "raise"
    ) -> None:
        if on_bad not in ("raise", "clip"):
            raise ValueError(
                f"on_bad: expected 'raise' or 'clip', got {on_bad!r}; 'drop' needs environments "
                "that can be reset one by one: use envs.host.HostEnv"
            )
        self._mode = _autoreset_mode(venv)
        self._venv = venv
        self._on_bad = on_bad
        spec = venv.spec or _first_spec(venv)
        name = spec.id if spec else type(venv).__name__
        limit = spec.max_episode_steps if spec else None
        self.num_envs = int(venv.num_envs)
        self.spec = env_spec(name, venv.single_observation_space, venv.single_action_space, limit)
        self.counters: dict[str, int] = {"bad_steps": 0}
        self._codec = ObservationCodec(venv.single_observation_space)
        self._actions = ActionCodec(venv.single_action_space, self.num_envs)
        self._over: np.ndarray | None = None
        self._started: list[np.ndarray] = []
        self._steps = 0

    def reset(self, seed: int | None) -> TimeStep:
        """Reset all environments; None goes on with the generators they have."""
        self._steps = 0
        obs, _ = self._venv.reset(seed=seed)
        nothing = np.zeros(self.num_envs, bool)
        leaves = self._read(obs)
        return self._emit((leaves, np.zeros(self.num_envs), nothing, nothing), ~nothing)

    def step(self, action: Any) -> TimeStep:
        """Step every environment once; see `HostEnv.step`."""
        if self._over is None:
            raise ValueError("step: the stream has not begun; call reset(seed) first")
        batch = self._actions.to_batch(self._actions.check(action))
        self._steps += 1
        first = self._over
        match self._mode:
            case AutoresetMode.NEXT_STEP:
                parts = self._move(batch)
            case AutoresetMode.SAME_STEP:
                parts = self._same_step(batch, first)
            case _:
                parts = self._disabled(batch, first)
        return self._emit(parts, first)

    def state(self) -> dict[str, np.ndarray]:
        """Return nothing: a vector environment cannot be rewound."""
        return {}

    def restore(self, state: Mapping[str, np.ndarray]) -> TimeStep:
        """Begin new episodes: records before have no successor in the new stream."""
        if state:
            raise ValueError(f"state: expected an empty mapping, got the keys {sorted(state)}")
        return self.reset(None)

    def render(self, index: int = 0) -> np.ndarray | None:
        """Return the current frame of one environment, or None if it draws none."""
        frames = self._venv.render()
        frame = frames[index] if frames else None
        return frame if isinstance(frame, np.ndarray) else None

    def close(self) -> None:
        """Close the vector environment."""
        self._venv.close()

    def _read(self, obs: Any) -> list[np.ndarray]:
        """Copy the leaves: vector environments may write into the same arrays again."""
        try:
            return [np.array(x) for x in self._codec.read(obs, (self.num_envs,))]
        except ValueError as error:
            raise ValueError(f"{self.spec.id}, step {self._steps}: {error}") from error

    def _move(self, action: np.ndarray) -> Parts:
        obs, reward, terminated, truncated, _ = self._venv.step(action)
        return self._read(obs), np.array(reward), np.array(terminated), np.array(truncated)

    def _masked_reset(self, mask: np.ndarray) -> list[np.ndarray]:
        obs, _ = self._venv.reset(options={"reset_mask": mask.copy()})
        return self._read(obs)

    def _disabled(self, action: np.ndarray, over: np.ndarray) -> Parts:
        if not over.any():
            return self._move(action)
        leaves = self._masked_reset(over)
        if over.all():
            return leaves, np.zeros(self.num_envs), ~over, ~over
        parts = self._move(action)
        return _replace(parts, over, self._masked_reset(over))

    def _same_step(self, action: np.ndarray, over: np.ndarray) -> Parts:
        if over.all():
            return self._started, np.zeros(self.num_envs), ~over, ~over
        obs, reward, terminated, truncated, info = self._venv.step(action)
        terminated, truncated = np.array(terminated), np.array(truncated)
        leaves = self._read(obs)
        self._started = [x.copy() for x in leaves]
        for e in np.flatnonzero((terminated | truncated) & ~over):
            if "final_obs" not in info or not info["_final_obs"][e]:
                raise ValueError(
                    f"{self.spec.id}: environment {e} ended at step {self._steps} without "
                    f"info['final_obs']; {REBUILD}"
                )
            for x, final in zip(leaves, self._codec.read(info["final_obs"][e]), strict=True):
                x[e] = final
        parts = leaves, np.array(reward), terminated, truncated
        return _replace(parts, over, self._masked_reset(over)) if over.any() else parts

    def _emit(self, parts: Parts, first: np.ndarray) -> TimeStep:
        leaves, reward, terminated, truncated = parts
        reward = np.where(first, 0.0, reward)
        finite = np.abs(reward) <= FLOAT32_MAX
        faults = self._codec.faults(leaves)
        faults += [number_fault(int(e), "reward", reward[e]) for e in np.flatnonzero(~finite)]
        for fault in faults:
            if self._on_bad == "raise" or not fault.can_clip:
                raise ValueError(
                    f"{self.spec.id}, environment {fault.row}, step {self._steps}: {fault.message}"
                )
        if faults:
            self.counters["bad_steps"] += len({fault.row for fault in faults})
            leaves = self._codec.repair(leaves)
            reward = np.where(finite, reward, np.nan_to_num(np.sign(reward)) * CLIP_LIMIT)
        self._over = (terminated | truncated) & ~first
        return timestep(
            self._codec.finish(leaves),
            reward.astype(np.float32),
            first.copy(),
            self._over.copy(),
            terminated & ~first,
        )


def from_vector_env(
    venv: VectorEnv[Any, Any, Any], on_bad: Literal["raise", "clip"] = "raise"
) -> VectorStream:
    """Adapt a Gymnasium vector environment to the interface of `HostEnv`.

    Args:
      venv: of any autoreset mode; SAME_STEP must be a Sync- or AsyncVectorEnv itself,
        because others need not know `reset_mask`.
      on_bad: 'raise' or 'clip', see `HostEnv`.

    Returns:
      `VectorStream`: `reset`, `step`, `render`, `close` as in `HostEnv`; its `state` is
      empty, and a restored run starts new episodes.

    Raises:
      ValueError: for a mode that cannot be adapted, with the way to rebuild it.
    """
    return VectorStream(venv, on_bad)


def _autoreset_mode(venv: VectorEnv[Any, Any, Any]) -> AutoresetMode:
    declared = venv.metadata.get("autoreset_mode")
    try:
        mode = AutoresetMode(declared)
    except ValueError:
        raise ValueError(
            f"venv: metadata['autoreset_mode'] must be an AutoresetMode, got {declared!r}; say "
            f"how {type(venv).__name__} resets, or {REBUILD}"
        ) from None
    if mode is AutoresetMode.SAME_STEP and not isinstance(venv, SyncVectorEnv | AsyncVectorEnv):
        raise ValueError(
            f"venv: {type(venv).__name__} resets in the same step, which only a bare SyncVectorEnv "
            f"or AsyncVectorEnv lets us undo; {REBUILD}"
        )
    return mode


def _first_spec(venv: VectorEnv[Any, Any, Any]) -> EnvSpec | None:
    return venv.envs[0].spec if isinstance(venv, SyncVectorEnv) else None


def _replace(parts: Parts, rows: np.ndarray, fresh: list[np.ndarray]) -> Parts:
    """Put the first observations of new episodes in `rows`; `first` masks the rest."""
    leaves, reward, terminated, truncated = parts
    for x, new in zip(leaves, fresh, strict=True):
        x[rows] = new[rows]
    return leaves, reward, terminated, truncated
