"""A cue to remember: the smallest task that nobody can solve without memory."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from envs.ondevice.physics import outcome
from mbrl.spaces import box
from mbrl.types import MDP, Array, Discrete, EnvSpec, Key, Outcome


class MemoryChainState(NamedTuple):
    """Steps taken and the cue, -1 or 1; int32 [B]."""

    time: Array
    cue: Array


def make(length: int = 10) -> MDP:
    """Make the memory chain: see a cue, wait `length` steps, then name it.

    The first observation shows the cue, the `length` after it do not. At the last of them
    the question is asked: action 1 is right for the cue 1, action 0 for the cue -1. The
    reward is 1 if right and -1 if not, and the episode ends; all other actions are
    ignored at reward 0. Hence an episode has `length + 1` steps, and whoever acts on the
    current observation alone expects a return of 0. A finished episode stays as it is, at
    reward 0, without a question.

    Reference: memory length in bsuite, Osband et al. 2019 (arXiv:1908.03568).

    Args:
      length: steps from the cue to the question, at least 1.

    Returns:
      `MDP` with observation `[time / length, cue or 0, question 0 or 1]` and two actions.
      It has no parameters, and its `init` cannot invert an observation.

    Raises:
      ValueError: for a chain without a step; from `init`, when called with `obs`.
    """
    if length < 1:
        raise ValueError(f"length: expected at least 1, got {length}")

    def init(params: None, key: Key, obs: Array | None = None, batch: int = 1) -> MemoryChainState:
        if obs is not None:
            raise ValueError(
                "init: device/MemoryChain cannot tell its state from an observation, which hides "
                "the cue; call it without obs"
            )
        cue = 2 * jax.random.randint(key, (batch,), 0, 2) - 1
        return MemoryChainState(jnp.zeros_like(cue), cue)

    def step(
        params: None, key: Key, state: MemoryChainState, action: Array
    ) -> tuple[MemoryChainState, Outcome]:
        asked, time = state.time == length, jnp.minimum(state.time + 1, length + 1)
        right = jnp.where((action == 1) == (state.cue == 1), 1.0, -1.0)
        return state._replace(time=time), outcome(jnp.where(asked, right, 0.0), time > length)

    def observe(params: None, state: MemoryChainState) -> Array:
        time = jnp.minimum(state.time / length, 1.0)
        cue, question = jnp.where(state.time == 0, state.cue, 0), state.time == length
        return jnp.stack([time, cue, question], -1).astype(jnp.float32)

    space = box(np.array([0.0, -1.0, 0.0]), np.ones(3))
    spec = EnvSpec("device/MemoryChain", space, Discrete(2), 2 * (length + 1))
    return MDP(init, step, observe, spec)
