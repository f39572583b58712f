"""Gymnasium's functional environments as MDPs, and MDPs as Gymnasium environments."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from gymnasium.experimental.functional import FuncEnv

from envs.mdp_env import into_space, mdp_to_env, mdp_to_vector_env
from envs.spec import env_spec, to_gymnasium
from mbrl.types import MDP, Array, Box, Key, Outcome, Params, State

__all__ = ["func_env_to_mdp", "mdp_to_env", "mdp_to_func_env", "mdp_to_vector_env"]


class FuncState(NamedTuple):
    """State of an `MDPFuncEnv`: Gymnasium asks for the outcome of a step separately."""

    state: State
    reward: Array
    terminal: Array


class MDPFuncEnv(FuncEnv):
    """An MDP with Gymnasium's functional interface; made by `mdp_to_func_env`."""

    def __init__(self, mdp: MDP, params: Params) -> None:
        self._mdp, self._params = mdp, params
        self.observation_space = to_gymnasium(mdp.spec.observation)
        self.action_space = to_gymnasium(mdp.spec.action)
        self._dtype = jnp.float32 if isinstance(mdp.spec.action, Box) else jnp.int32
        super().__init__()

    def get_default_params(self, **kwargs: Any) -> Params:
        """Return the parameters given to `mdp_to_func_env`."""
        return self._params

    def initial(self, rng: Key, params: Params = None) -> FuncState:
        """Draw a start state."""
        state = self._mdp.init(self._choose(params), rng, batch=1)
        return FuncState(_row(state), jnp.zeros(()), jnp.zeros((), bool))

    def transition(
        self, state: FuncState, action: Any, rng: Key, params: Params = None
    ) -> FuncState:
        """Take one step; a predicted discount ends the episode with that probability."""
        step_key, end_key = jax.random.split(rng)
        batch = jnp.asarray(action, self._dtype)[None]
        before = jax.tree.map(lambda x: x[None], state.state)
        after, outcome = self._mdp.step(self._choose(params), step_key, before, batch)
        ended = jax.random.uniform(end_key, (1,)) >= outcome.discount
        return FuncState(_row(after), outcome.reward[0], ended[0])

    def observation(self, state: FuncState, rng: Key, params: Params = None) -> Any:
        """Return the observation of a state, clipped into the space."""
        batch = jax.tree.map(lambda x: x[None], state.state)
        obs = self._mdp.observe(self._choose(params), batch)
        return _row(into_space(self._mdp.spec.observation, obs))

    def reward(
        self, state: FuncState, action: Any, next_state: FuncState, rng: Key, params: Params = None
    ) -> Array:
        """Return the reward of the step that led to `next_state`."""
        return next_state.reward

    def terminal(self, state: FuncState, rng: Key, params: Params = None) -> Array:
        """Return whether the step that led to `state` ended the episode."""
        return state.terminal

    def _choose(self, params: Params) -> Params:
        return self._params if params is None else params


def mdp_to_func_env(mdp: MDP, params: Params) -> FuncEnv:
    """Make an environment of Gymnasium's functional interface (unbatched) of an MDP."""
    return MDPFuncEnv(mdp, params)


class FuncMDPState(NamedTuple):
    """State of a FuncEnv and the observation drawn at it, leaves [B, ...]."""

    state: Any
    obs: Any


def func_env_to_mdp(
    func_env: FuncEnv, id: str | None = None, max_episode_steps: int | None = None
) -> MDP:
    """Make an MDP of a JAX environment with Gymnasium's functional interface.

    Args:
      func_env: its functions must be traceable; `params` None = its default parameters.
      id: name; default: that of the class.
      max_episode_steps: steps after which an episode is truncated.

    Returns:
      `MDP` whose `init` draws start states; it cannot invert an observation.

    Raises:
      ValueError: when its spaces are not supported.
    """
    spec = env_spec(
        id or type(func_env).__name__,
        func_env.observation_space,
        func_env.action_space,
        max_episode_steps,
    )

    def choose(params: Params) -> Params:
        return func_env.default_params if params is None else params

    def seen(params: Params, state: Any, key: Key) -> FuncMDPState:
        obs = func_env.observation(state, key, choose(params))
        return FuncMDPState(state, into_space(spec.observation, obs))

    def init(params: Params, key: Key, obs: Any = None, batch: int = 1) -> FuncMDPState:
        if obs is not None:
            raise ValueError(
                f"init: {spec.id} cannot tell its state from an observation; call it without obs"
            )

        def draw(key: Key) -> FuncMDPState:
            start_key, obs_key = jax.random.split(key)
            return seen(params, func_env.initial(start_key, choose(params)), obs_key)

        return jax.vmap(draw)(jax.random.split(key, batch))

    def step(
        params: Params, key: Key, state: FuncMDPState, action: Array
    ) -> tuple[FuncMDPState, Outcome]:
        def move(key: Key, before: Any, a: Array) -> tuple[FuncMDPState, Outcome]:
            keys, p = jax.random.split(key, 4), choose(params)
            after = func_env.transition(before, a, keys[0], p)
            reward = jnp.asarray(func_env.reward(before, a, after, keys[1], p), jnp.float32)
            alive = 1.0 - jnp.asarray(func_env.terminal(after, keys[2], p), jnp.float32)
            return seen(params, after, keys[3]), Outcome(reward, alive, jnp.zeros_like(reward))

        return jax.vmap(move)(jax.random.split(key, action.shape[0]), state.state, action)

    def observe(params: Params, state: FuncMDPState) -> Any:
        return state.obs

    return MDP(init, step, observe, spec)


def _row(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[0], tree)
