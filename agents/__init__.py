"""Agents: wiring of `mbrl` components. Each file reads like its paper's algorithm box."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from agents.dreamer import DreamerConfig, make_dreamer
from agents.mbpo import MBPOConfig, make_mbpo
from agents.muzero import MuZeroConfig, make_muzero
from agents.pets import PETSConfig, make_pets
from agents.ppo import PPOConfig, make_ppo
from agents.sac import SACConfig, make_sac
from mbrl.types import Agent, EnvSpec


class Entry(NamedTuple):
    """How to configure and build an agent: `make(spec, config) -> Agent`."""

    config: type
    make: Callable[[EnvSpec, Any], Agent]


AGENTS = {
    "dreamer": Entry(DreamerConfig, make_dreamer),
    "mbpo": Entry(MBPOConfig, make_mbpo),
    "muzero": Entry(MuZeroConfig, make_muzero),
    "pets": Entry(PETSConfig, make_pets),
    "ppo": Entry(PPOConfig, make_ppo),
    "sac": Entry(SACConfig, make_sac),
}
"""Agents by the name that the command line uses."""
