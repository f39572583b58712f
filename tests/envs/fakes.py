"""Environments whose every number is known."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np


class Counter(gym.Env):
    """The observation counts `[episode, step, sum of actions]`.

    Terminates when the sum reaches `goal`, truncates at `limit` steps. The reward is the
    number of the step. `faults` maps (episode, step) to `{"obs": ..., "reward": ...}`
    that replace what it would have returned.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012

    def __init__(
        self,
        limit: int = 5,
        goal: float = 100.0,
        observation_space: gym.Space[Any] | None = None,
        faults: dict[tuple[int, int], dict[str, Any]] | None = None,
        count_episodes: bool = True,
    ) -> None:
        self.observation_space = observation_space or gym.spaces.Box(
            -np.inf, np.inf, (3,), np.float64
        )
        self.action_space = gym.spaces.Box(-3.0, 5.0, (1,), np.float32)
        self.limit, self.goal, self.faults = limit, goal, faults or {}
        self.count_episodes = count_episodes
        self.episode, self.t, self.total = -1, 0, 0.0
        self.seeds: list[int | None] = []
        self.closed = False
        self.render_mode = "rgb_array"

    def _fault(self, name: str, value: Any) -> Any:
        return self.faults.get((self.episode, self.t), {}).get(name, value)

    def _obs(self) -> Any:
        episode = self.episode if self.count_episodes else 0
        return self._fault("obs", np.array([episode, self.t, self.total]))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.episode, self.t, self.total = self.episode + 1, 0, 0.0
        return self._obs(), {}

    def step(self, action):
        self.t += 1
        self.total += float(action[0])
        reward = self._fault("reward", float(self.t))
        return self._obs(), reward, self.total >= self.goal, self.t >= self.limit, {}

    def render(self):
        return np.full((2, 2, 3), self.t, np.uint8)

    def close(self):
        self.closed = True


class Levers(gym.Env):
    """Takes actions of every kind in a Dict; the observation is the last one, numbers in a row."""

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, limit: int = 4) -> None:
        self.observation_space = gym.spaces.Box(-9.0, 9.0, (6,), np.float32)
        self.action_space = gym.spaces.Dict(
            {
                "tool": gym.spaces.Discrete(3, start=1),
                "arm": gym.spaces.Box(-2.0, 2.0, (2,), np.float32),
                "box": gym.spaces.Dict({"gears": gym.spaces.MultiDiscrete([[2], [3]])}),
            }
        )
        self.limit, self.t = limit, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(6, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.t += 1
        parts = [[action["tool"]], action["arm"], action["box"]["gears"].ravel(), [self.t]]
        obs = np.concatenate(parts).astype(np.float32)
        return obs, float(action["tool"]), False, self.t >= self.limit, {}
