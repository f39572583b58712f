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


def repeat(state: State, num: int) -> State:
    """Repeat every row: leaves [B, ...] -> [B * num, ...]."""
    return jax.tree.map(lambda x: jnp.repeat(x, num, 0), state)


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

    All plans meet the same randomness (common random numbers): particle `q` of every plan
    sees the same noise and, in an ensemble, the same members. Plans are compared with each
    other, and what they share cancels in the comparison; drawing the noise costs nothing.

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
    horizon = plans.shape[2]

    def particle_returns(start: State, actions: Array) -> Array:
        """Imagine one plan [H, ...] from one state [...]: returns [Q]."""

        def broadcast(x: Array) -> Array:
            return jnp.broadcast_to(x, (config.particles, *x.shape))

        final, outcome = mdps.rollout(
            mdp, params, key, jax.tree.map(broadcast, start),
            lambda key, state, t: broadcast(actions[t]), horizon,
            lambda obs, action, outcome: outcome,
        )  # fmt: skip
        survival = jnp.cumprod(config.discount * outcome.discount, 0)  # [H, Q]
        returns = outcome.reward[0] + jnp.sum(survival[:-1] * outcome.reward[1:], 0)
        return returns if value is None else returns + survival[-1] * value(params, final)

    over_plans = jax.vmap(particle_returns, (None, 0), 1)
    returns = jax.vmap(over_plans, (0, 0), 1)(state, plan_space.decode(plans))  # [Q, B, P]
    finite = jnp.all(jnp.isfinite(returns), 0)
    safe = jnp.where(jnp.isfinite(returns), returns, 0.0)
    return jnp.where(finite, risk(safe, config.risk, config.risk_coef), -jnp.inf)


def check_prior(config: PlannerConfig, prior: Prior | None) -> None:
    """Refuse a policy prior that would not be asked, and plans from one that is missing.

    Raises:
      ValueError: unless `prior` and `config.prior_plans` are both given or both left out.
    """
    if (prior is None) != (config.prior_plans == 0):
        given = "no policy prior" if prior is None else "a policy prior"
        raise ValueError(
            f"planner.prior_plans: got {config.prior_plans} and {given}; expected some plans with "
            "a prior and 0 without one"
        )


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

    start = repeat(state, config.prior_plans)
    _, actions = mdps.rollout(
        mdp, params, key, start, policy, config.horizon, lambda obs, action, outcome: action
    )
    plans = plan_space.encode(jnp.moveaxis(actions, 0, 1))
    return plans.reshape(batch, config.prior_plans, *plans.shape[1:])
