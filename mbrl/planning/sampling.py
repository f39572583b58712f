"""The loop that random shooting, CEM, iCEM and MPPI share: sample, score, weigh, fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mbrl.planning.config import PlannerConfig, populations
from mbrl.planning.plans import Distribution, PlanSpace
from mbrl.planning.score import Prior, Value, check_prior, prior_plans, score_plans
from mbrl.types import MDP, Array, Key, Metrics, Params, Planner, State

Weigh = Callable[[Array], Array]
"""`values [B, P] -> weights [B, P]`; zero weight for -inf."""


class SamplingCarry(NamedTuple):
    """Warm start of a sampling planner: the last distribution and the plans worth keeping.

    Attributes:
      dist: distribution over plans of the last step, already shifted.
      kept: [B, K, H, ...] best plans of the last step, already shifted.
      usable: [B] False before the first step of an episode.
    """

    dist: Distribution
    kept: Array
    usable: Array


class Recipe(NamedTuple):
    """What distinguishes one sampling planner from another.

    Attributes:
      weigh: how much each scored plan counts in the fit.
      num_kept: best plans carried between iterations and steps.
      insert_mode: score the mode of the distribution in the last iteration.
      execute_best: act with the best plan of the last iteration instead of the mode.
    """

    weigh: Weigh
    num_kept: int = 0
    insert_mode: bool = False
    execute_best: bool = False


def put_first(plans: Array, insert: Array, where: Array) -> Array:
    """Overwrite the first plans [B, P, ...] by `insert` [B, K, ...] in the rows `where` [B]."""
    num = insert.shape[1]
    where = where.reshape((-1,) + (1,) * (plans.ndim - 1))
    return plans.at[:, :num].set(jnp.where(where, insert, plans[:, :num]))


def best_plans(plans: Array, values: Array, num: int) -> Array:
    """Return the `num` best plans [B, num, ...] of [B, P, ...] by `values` [B, P]."""
    _, order = jax.lax.top_k(values, num)
    return jnp.take_along_axis(plans, order.reshape(*order.shape, *(1,) * (plans.ndim - 2)), 1)


def sampling_planner(
    mdp: MDP,
    config: PlannerConfig,
    space: PlanSpace,
    recipe: Recipe,
    prior: Prior | None = None,
    value: Value | None = None,
) -> Planner:
    """Build a planner that refines a distribution over plans by scored samples.

    Args:
      mdp: the model to plan in.
      config: sizes; see `PlannerConfig`.
      space: distributions over plans.
      recipe: what makes it CEM, iCEM, MPPI or random shooting.
      prior: optional policy whose imagined plans join every population.
      value: optional terminal value of the last imagined state.

    Returns:
      A `Planner`; `info` holds `value` [B], the score of the best plan of the last
      iteration, and `plan` [B, H, ...], what is executed, in the units of the environment.
    """

    check_prior(config, prior)

    def init(batch: int) -> SamplingCarry:
        dist = space.prior(batch)
        mode = space.mode(dist)
        kept = jnp.repeat(mode[:, None], recipe.num_kept, 1)
        return SamplingCarry(dist, kept, jnp.zeros(batch, bool))

    def iterate(
        params: Params,
        state: State,
        carry: SamplingCarry,
        key: Key,
        population: int,
        last: Array | bool,
    ) -> tuple[SamplingCarry, tuple[Array, Array]]:
        """Refine once; return the best plan [B, H, ...] and its value [B] as well."""
        sample_key, prior_key, score_key = jax.random.split(key, 3)
        plans = space.sample(sample_key, carry.dist, population)
        plans = put_first(plans, carry.kept, carry.usable)
        if prior is not None:
            told = prior_plans(mdp, space, config, params, prior_key, state, prior)
            plans = jnp.concatenate([plans[:, : population - config.prior_plans], told], 1)
        if recipe.insert_mode:
            mode = space.mode(carry.dist)[:, None]
            plans = put_first(plans, mode, jnp.broadcast_to(last, carry.usable.shape))
        values = score_plans(mdp, space, config, params, score_key, state, plans, value)
        dist = space.fit(carry.dist, plans, recipe.weigh(values), config.momentum)
        kept = best_plans(plans, values, max(recipe.num_kept, 1))
        usable = jnp.ones_like(carry.usable)
        best = kept[:, 0], values.max(1)
        return SamplingCarry(dist, kept[:, : recipe.num_kept], usable), best

    def plan(
        params: Params, key: Key, state: State, carry: SamplingCarry
    ) -> tuple[Array, SamplingCarry, Metrics]:
        fresh_key, key = jax.random.split(key)
        sizes = populations(config)
        keys = jax.random.split(key, len(sizes))
        if len(set(sizes)) == 1:  # one traced body compiles several times faster
            lasts = jnp.arange(len(sizes)) == len(sizes) - 1
            carry, (plans, values) = jax.lax.scan(
                lambda carry, x: iterate(params, state, carry, x[0], sizes[0], x[1]),
                carry, (keys, lasts),
            )  # fmt: skip
            best, best_value = plans[-1], values[-1]
        else:
            for i, size in enumerate(sizes):
                last = i == len(sizes) - 1
                carry, best = iterate(params, state, carry, keys[i], size, last)
            best, best_value = best
        actions = space.decode(best if recipe.execute_best else space.mode(carry.dist))
        info = {"value": best_value, "plan": actions}
        return actions[:, 0], _advance(fresh_key, carry), info

    def _advance(key: Key, carry: SamplingCarry) -> SamplingCarry:
        """Move the warm start one step on; kept plans end in a fresh random action."""
        batch = carry.usable.shape[0]
        kept = carry.kept
        if recipe.num_kept:
            fresh = space.uniform(key, batch, recipe.num_kept)
            kept = jnp.concatenate([kept[:, :, 1:], fresh[:, :, -1:]], 2)
        return SamplingCarry(space.shift(carry.dist), kept, carry.usable)

    return Planner(init, plan)


def elite_weights(num: int) -> Weigh:
    """Weigh the `num` best finite plans equally and all others by zero (CEM)."""

    def weigh(values: Array) -> Array:
        threshold = jax.lax.top_k(values, num)[0][:, -1:]
        return ((values >= threshold) & jnp.isfinite(values)).astype(jnp.float32)

    return weigh


def softmax_weights(temperature: Any) -> Weigh:
    """Weigh plans by `exp((value - max) / (temperature * std))` (MPPI)."""

    def weigh(values: Array) -> Array:
        finite = jnp.isfinite(values)
        best = jnp.max(values, 1, keepdims=True, initial=-jnp.inf)
        best = jnp.where(jnp.isfinite(best), best, 0.0)
        gap = jnp.where(finite, values - best, 0.0)
        count = jnp.maximum(finite.sum(1, keepdims=True), 1)
        mean = gap.sum(1, keepdims=True) / count
        var = jnp.where(finite, (gap - mean) ** 2, 0.0).sum(1, keepdims=True) / count
        scale = temperature * jnp.sqrt(var) + 1e-8
        return jnp.where(finite, jnp.exp(gap / scale), 0.0)

    return weigh
