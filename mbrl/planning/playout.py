"""Values without learning: what random actions would collect."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mbrl import spaces
from mbrl.mdp import rollout
from mbrl.planning.score import Value, repeat
from mbrl.types import MDP, Array, Key, Outcome, Params, State


def playout_value(mdp: MDP, horizon: int, playouts: int = 1, discount: float = 1.0) -> Value:
    """Estimate the value of a state by rollouts of uniformly random actions.

    All states meet the same actions and the same noise (common random numbers): what they share
    cancels where they are compared, and the value is a function of the state alone.

    Reference: Monte-Carlo tree search, Coulom 2006; Kocsis and Szepesvári 2006.

    Args:
      mdp: the model.
      horizon: steps of a rollout.
      playouts: rollouts per state, averaged.
      discount: gamma per step.

    Returns:
      `(params, state) -> [B]` mean discounted return.

    Raises:
      ValueError: for a horizon or a number of playouts below 1.
    """
    for name, number in (("horizon", horizon), ("playouts", playouts)):
        if number < 1:
            raise ValueError(f"{name}: got {number}, expected at least 1")

    def value(params: Params, state: State) -> Array:
        num_states = jax.tree.leaves(state)[0].shape[0]

        def act(key: Key, state: State, t: Array) -> Array:
            action = spaces.sample(mdp.spec.action, key, (playouts,))
            return jnp.tile(action, (num_states,) + (1,) * (action.ndim - 1))

        def keep(obs: State, action: Array, outcome: Outcome) -> tuple[Array, Array]:
            return outcome.reward, discount * outcome.discount

        starts = repeat(state, playouts)
        key = jax.random.key(0)
        _, (reward, factor) = rollout(mdp, params, key, starts, act, horizon, keep)
        reached = jnp.concatenate([jnp.ones_like(factor[:1]), jnp.cumprod(factor[:-1], 0)])
        return jnp.sum(reached * reward, 0).reshape(num_states, playouts).mean(1)

    return value
