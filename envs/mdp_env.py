"""MDPs as Gymnasium environments.

A learned model is an `MDP` like any simulator, so that what is written for Gymnasium can
train or be tested inside of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from envs.codec import ActionCodec
from envs.spec import to_gymnasium
from mbrl.types import MDP, Array, Box, Key, Params, Space, State, reset_rows

Render = Callable[[Params, State], np.ndarray]
"""`(params, state) -> [height, width, 3] uint8`; state leaves are [1, ...]."""

NEVER = np.iinfo(np.int32).max


class EnvPrograms(NamedTuple):
    """Compiled functions of an MDP, shared by the environments made of it."""

    init: Callable[..., tuple[Key, State, Any]]
    step: Callable[..., tuple[Key, State, Any, Array, Array]]


class MDPEnv(gym.Env[Any, Any]):
    """One episode at a time of an `MDP`; made by `mdp_to_env`."""

    def __init__(
        self,
        mdp: MDP,
        params: Params,
        programs: EnvPrograms,
        max_episode_steps: int | None,
        render: Render | None,
        render_mode: str | None = None,
    ) -> None:
        modes = ["rgb_array"] if render else []
        if render_mode is not None and render_mode not in modes:
            raise ValueError(f"render_mode: expected one of {modes} or None, got {render_mode!r}")
        self.metadata = {"render_modes": modes, "render_fps": 30}
        self.render_mode = render_mode
        self.observation_space = to_gymnasium(mdp.spec.observation)
        self.action_space = to_gymnasium(mdp.spec.action)
        self._space, self._params = mdp.spec.observation, params
        self._programs, self._render = programs, render
        self._actions = ActionCodec(self.action_space, 1)
        self._limit = NEVER if max_episode_steps is None else max_episode_steps
        self._key: Key | None = None
        self._state: State = None
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; `options={'obs': obs}` begins it at that observation."""
        super().reset(seed=seed)
        start = (options or {}).get("obs")
        if start is not None:
            start = jax.tree.map(lambda x: jnp.asarray(x)[None], start)
        key = _draw_key(self.np_random)
        self._key, self._state, obs = self._programs.init(self._params, key, start, 1)
        self._steps = 0
        return _first_row(self._space, obs), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take one step; a predicted discount ends the episode with that probability."""
        if self._state is None:
            raise gym.error.ResetNeeded("step: the episode has not begun; call reset() first")
        batch = self._actions.check(_one_row(action))
        self._key, self._state, obs, reward, ended = self._programs.step(
            self._params, self._key, self._state, batch
        )
        self._steps += 1
        truncated = self._steps >= self._limit
        row = _first_row(self._space, obs)
        return row, float(reward[0]), bool(ended[0]), truncated, {}

    def render(self) -> Any:
        """Draw the state with the function given to `mdp_to_env`."""
        if self._render is None or self.render_mode is None or self._state is None:
            return None
        return np.asarray(self._render(self._params, self._state))


def _one_row(action: Any) -> Any:
    if isinstance(action, Mapping):
        return {name: _one_row(part) for name, part in action.items()}
    return np.asarray(action)[None]


def mdp_to_env(
    mdp: MDP,
    params: Params,
    max_episode_steps: int | None = None,
    render: Render | None = None,
) -> gym.Env[Any, Any]:
    """Make a Gymnasium environment of an MDP, simulated or learned.

    Args:
      mdp: any decision process; observations are clipped into its space.
      params: its parameters.
      max_episode_steps: steps until truncation; None = that of `mdp.spec`.
      render: draws a state; without it the environment has no render mode.

    Returns:
      An environment that is a function of the seed of `reset` and of the actions. Its
      `spec.make(render_mode=...)` makes further ones that share the compiled programs.
    """
    limit = mdp.spec.max_episode_steps if max_episode_steps is None else max_episode_steps
    programs = _env_programs(mdp)

    def create(render_mode: str | None = None) -> gym.Env[Any, Any]:
        return MDPEnv(mdp, params, programs, limit, render, render_mode)

    env = create("rgb_array" if render else None)
    creator: Any = create
    env.spec = EnvSpec(
        "mdp/" + re.sub(r"[^\w.-]", "-", mdp.spec.id),
        entry_point=creator,
        max_episode_steps=limit,
        order_enforce=False,
        disable_env_checker=True,
    )
    return env


class VectorProgramState(NamedTuple):
    """What the compiled step of a vector environment carries."""

    key: Key
    state: State
    over: Array
    steps: Array


class MDPVectorEnv(VectorEnv[Any, Any, Any]):
    """`num_envs` episodes of an `MDP` in one compiled step; made by `mdp_to_vector_env`."""

    def __init__(
        self, mdp: MDP, params: Params, num_envs: int, max_episode_steps: int | None
    ) -> None:
        self.metadata = {
            "autoreset_mode": AutoresetMode.NEXT_STEP,
            "render_modes": [],
            "render_fps": 30,
        }
        self.num_envs = num_envs
        self.single_observation_space = to_gymnasium(mdp.spec.observation)
        self.single_action_space = to_gymnasium(mdp.spec.action)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._space, self._params = mdp.spec.observation, params
        self._actions = ActionCodec(self.single_action_space, num_envs)
        self._init = _env_programs(mdp).init
        self._step = jax.jit(_vector_step(mdp, num_envs, max_episode_steps or NEVER))
        self._carry: VectorProgramState | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode in every row."""
        super().reset(seed=seed)
        key = _draw_key(self.np_random)
        key, state, obs = self._init(self._params, key, None, self.num_envs)
        rows = jnp.zeros(self.num_envs, jnp.int32)
        self._carry = VectorProgramState(key, state, rows.astype(bool), rows)
        return _to_host(self._space, obs), {}

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step every row, or begin its next episode where the last one has ended."""
        if self._carry is None:
            raise gym.error.ResetNeeded("step: no episode has begun; call reset() first")
        batch = self._actions.check(actions)
        self._carry, out = self._step(self._params, self._carry, batch)
        reward, terminated, truncated = (np.array(x) for x in out[1:])
        return _to_host(self._space, out[0]), reward, terminated, truncated, {}

    def render(self) -> None:
        """Draw nothing: `mdp_to_env` takes a render function."""


def mdp_to_vector_env(
    mdp: MDP, params: Params, num_envs: int, max_episode_steps: int | None = None
) -> VectorEnv[Any, Any, Any]:
    """Make a Gymnasium vector environment (autoreset NEXT_STEP) of an MDP.

    Args:
      mdp: any decision process; observations are clipped into its space.
      params: its parameters.
      num_envs: episodes that run side by side.
      max_episode_steps: steps until truncation; None = that of `mdp.spec`.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs: expected at least 1, got {num_envs}")
    limit = mdp.spec.max_episode_steps if max_episode_steps is None else max_episode_steps
    return MDPVectorEnv(mdp, params, num_envs, limit)


def into_space(space: Space, obs: Any) -> Any:
    """Clip observations `[..., *shape]` into the bounds of `space`, in its dtype."""
    match space:
        case Box():
            low, high = jnp.asarray(space.low, jnp.float32), jnp.asarray(space.high, jnp.float32)
            return jnp.clip(obs, low, high).astype(space.dtype)
        case Mapping():
            return {name: into_space(sub, obs[name]) for name, sub in space.items()}
    return jnp.asarray(obs, jnp.int32)


def _draw_key(rng: np.random.Generator) -> Key:
    return jax.random.key(int(rng.integers(2**31)))


def _to_host(space: Space, obs: Any) -> Any:
    """Copy observations to numpy, with integers of the width that Gymnasium expects."""
    if isinstance(space, Mapping):
        return {name: _to_host(sub, obs[name]) for name, sub in space.items()}
    return np.array(obs, None if isinstance(space, Box) else np.int64)


def _first_row(space: Space, obs: Any) -> Any:
    """Row 0 on the host; a scalar becomes a numpy scalar, as Discrete spaces want."""
    return jax.tree.map(lambda x: x[0], _to_host(space, obs))


def _env_programs(mdp: MDP) -> EnvPrograms:
    def init(params: Params, key: Key, obs: Any, batch: int) -> tuple[Key, State, Any]:
        key, start_key = jax.random.split(key)
        state = mdp.init(params, start_key, obs=obs, batch=batch)
        return key, state, into_space(mdp.spec.observation, mdp.observe(params, state))

    def step(
        params: Params, key: Key, state: State, action: Array
    ) -> tuple[Key, State, Any, Array, Array]:
        key, step_key, end_key = jax.random.split(key, 3)
        state, outcome = mdp.step(params, step_key, state, action)
        ended = jax.random.uniform(end_key, outcome.discount.shape) >= outcome.discount
        obs = into_space(mdp.spec.observation, mdp.observe(params, state))
        return key, state, obs, outcome.reward, ended

    return EnvPrograms(jax.jit(init, static_argnums=3), jax.jit(step))


def _vector_step(mdp: MDP, num_envs: int, limit: int) -> Callable[..., Any]:
    def step(
        params: Params, carry: VectorProgramState, action: Array
    ) -> tuple[VectorProgramState, tuple[Any, Array, Array, Array]]:
        over = carry.over
        key, step_key, end_key, start_key = jax.random.split(carry.key, 4)
        moved, outcome = mdp.step(params, step_key, carry.state, action)
        ended = jax.random.uniform(end_key, (num_envs,)) >= outcome.discount
        fresh = jax.lax.cond(
            jnp.any(over), lambda: mdp.init(params, start_key, batch=num_envs), lambda: moved
        )
        state = reset_rows(over, fresh, moved)
        steps = jnp.where(over, 0, carry.steps + 1)
        terminated, truncated = ended & ~over, (steps >= limit) & ~over
        obs = into_space(mdp.spec.observation, mdp.observe(params, state))
        carry = VectorProgramState(key, state, terminated | truncated, steps)
        return carry, (obs, jnp.where(over, 0.0, outcome.reward), terminated, truncated)

    return step
