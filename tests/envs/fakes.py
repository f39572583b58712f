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
