"""A small task that breaks on request; `tests.faults.tasks:Cart` on a command line."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

REQUEST = "MBRL_TEST_FAULT"
"""JSON of `{"kind": ..., "step": k, "once": path}`: what happens at the k-th call of step."""


class Cart(gym.Env):
    """Push a point towards zero, ten steps per episode."""

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Dict(
            {
                "place": gym.spaces.Box(-np.inf, np.inf, (1,), np.float32),
                "speed": gym.spaces.Box(-np.inf, np.inf, (1,), np.float32),
            }
        )
        self.action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.fault = json.loads(os.environ.get(REQUEST, "{}"))
        self.calls = 0

    def _obs(self) -> dict[str, np.ndarray]:
        return {"place": self.x.copy(), "speed": self.v.copy()}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t, self.v = 0, np.zeros(1, np.float32)
        self.x = self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self._obs(), {}

    def step(self, action: Any) -> Any:
        self.calls += 1
        self.t += 1
        self.v = (0.8 * self.v + 0.2 * action).astype(np.float32)
        self.x = (self.x + self.v).astype(np.float32)
        obs, reward = self._obs(), -float(np.abs(self.x[0]))
        kind = self.fault.get("kind") if self.calls == self.fault.get("step") else None
        if kind == "reward":
            reward = float("nan")
        elif kind == "observation":
            obs["speed"] = np.full(1, np.nan, np.float32)
        elif kind == "shape":
            obs["speed"] = np.zeros(3, np.float32)
        elif kind is not None:
            self._send(kind)
        return obs, reward, False, self.t >= 10, {}

    def _send(self, kind: str) -> None:
        """Send this process a signal, unless it has been sent before."""
        once = Path(self.fault["once"])
        if not once.exists():
            once.touch()
            os.kill(os.getpid(), getattr(signal, kind))
