"""Scoring plans by imagined rollouts: the only place where planners touch a model."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mbrl import mdp as mdps
from mbrl.planning.config import PlannerConfig
from mbrl.planning.plans import PlanSpace
from mbrl.types import MDP, Array, Key, Params, State
from mbrl.uncertainty import risk

Value = Callable[[Params, State], Array]
"""Terminal value `(params, state) -> [B]`."""

Prior = Callable[[Params, Key, State], Array]
"""Policy prior `(params, key, state) -> action [B, ...]` in the units of the environment."""


def tile(state: State, particles: int, population: int) -> State:
    """Repeat every row for particles and plans: [B, ...] -> [Q * B * P, ...].

    Particles are the slowest axis, so that contiguous blocks of rows are independent
    draws: an ensemble hands each block to another member without moving data.
    """

    def repeat(x: Array) -> Array:
        shape = (particles, x.shape[0], population, *x.shape[1:])
        return jnp.broadcast_to(x[None, :, None], shape).reshape(-1, *x.shape[1:])

    return jax.tree.map(repeat, state)


def score_plans(
    mdp: MDP,
    plan_space: PlanSpace,
    config: PlannerConfig,
    params: Params,
    key: Key,
    state: State,
    plans: Array,
    value: Value | None = None,
) -> Array:
    """Estimate the return of plans by `config.particles` rollouts each.

    Args:
      mdp: the model.
      plan_space: how to decode plans.
      config: particles, discount and risk measure.
      params: parameters of the model.
      key: consumed.
      state: start states, leaves [B, ...].
      plans: [B, P, H, ...].
      value: optional terminal value.

    Returns:
      [B, P] risk measure over particles; -inf where any particle left the finite numbers.
    """
    batch, population, horizon = plans.shape[:3]
    actions = jnp.moveaxis(plan_space.decode(plans), 2, 0)  # [H, B, P, ...]
    shape = (config.particles, batch, population)

    def open_loop(key: Key, state: State, t: Array) -> Array:
        del key, state
        action = actions[t]
        tiled = jnp.broadcast_to(action, (*shape[:1], *action.shape))
        return tiled.reshape(-1, *action.shape[2:])

    start = tile(state, config.particles, population)
    final, outcome = mdps.rollout(
        mdp, params, key, start, open_loop, horizon, lambda obs, action, outcome: outcome
    )
    discount = config.discount * outcome.discount  # [H, Q * B * P]
    survival = jnp.cumprod(discount, 0)
    returns = outcome.reward[0] + jnp.sum(survival[:-1] * outcome.reward[1:], 0)
    if value is not None:
        returns = returns + survival[-1] * value(params, final)
    returns = returns.reshape(shape)
    finite = jnp.all(jnp.isfinite(returns), 0)
    safe = jnp.where(jnp.isfinite(returns), returns, 0.0)
    return jnp.where(finite, risk(safe, config.risk, config.risk_coef), -jnp.inf)


def prior_plans(
    mdp: MDP,
    plan_space: PlanSpace,
    config: PlannerConfig,
    params: Params,
    key: Key,
    state: State,
    prior: Prior,
) -> Array:
    """Imagine a policy and return what it did: `config.prior_plans` plans [B, K, H, ...]."""
    batch = jax.tree.leaves(state)[0].shape[0]

    def policy(key: Key, state: State, t: Array) -> Array:
        del t
        return prior(params, key, state)

    start = tile(state, 1, config.prior_plans)
    _, actions = mdps.rollout(
        mdp, params, key, start, policy, config.horizon, lambda obs, action, outcome: action
    )
    plans = plan_space.encode(jnp.moveaxis(actions, 0, 1))
    return plans.reshape(batch, config.prior_plans, *plans.shape[1:])
