"""Dreamer with networks so small that compiling is all that a test waits for."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from agents.dreamer import DreamerConfig, Parts, build, make_dreamer
from mbrl import spaces
from mbrl.models.rssm import RSSMConfig
from mbrl.types import Agent, Discrete, EnvSpec, MultiDiscrete

SIZE = RSSMConfig(deter=16, hidden=8, units=8, depth=2, stoch=3, classes=4, blocks=2)
TINY = DreamerConfig(
    batch_size=2, length=5, horizon=3, random_steps=20, capacity=100, warmup=0, learning_rate=1e-2
)

ARM = spaces.box([-1.0, 0.0], [3.0, 0.5])
SIMPLE = EnvSpec("simple", spaces.box(-np.inf, np.inf, (3,)), Discrete(3))
RICH = EnvSpec(
    "rich",
    {
        "camera": spaces.box(0, 255, (5, 4, 1), np.uint8),
        "place": Discrete(3),
        "speed": spaces.box(-np.inf, np.inf, (2,)),
    },
    {"arm": ARM, "gear": MultiDiscrete((2, 3)), "tool": Discrete(2)},
)
"""An image, an integer and numbers; actions of every kind, sorted by name."""


def tiny_parts(spec: EnvSpec, config: DreamerConfig = TINY, reward_fn: Any = None) -> Parts:
    """Call `agents.dreamer.build` with networks of the size `SIZE`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agents.dreamer.rssm_size", _size)
        return build(spec, config, reward_fn)


def tiny_dreamer(spec: EnvSpec, config: DreamerConfig = TINY, reward_fn: Any = None) -> Agent:
    """Call `agents.dreamer.make_dreamer` with networks of the size `SIZE`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agents.dreamer.rssm_size", _size)
        return make_dreamer(spec, config, reward_fn)


def _size(size: str, **changes: Any) -> RSSMConfig:
    del size
    return dataclasses.replace(SIZE, **changes)
