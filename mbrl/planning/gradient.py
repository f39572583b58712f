"""Planning by gradient ascent on the imagined return, with optax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mbrl.planning.config import PlannerConfig
from mbrl.planning.plans import PlanSpace, plan_space
from mbrl.planning.sampling import best_plans, put_first
from mbrl.planning.score import Prior, Value, check_prior, prior_plans, score_plans
from mbrl.types import MDP, Array, Discrete, Key, Metrics, Params, Planner, State

Objective = Callable[[Array, Key], Array]
"""`(plans [B, P, H, ...], key) -> values [B, P]`."""


class GradientCarry(NamedTuple):
    """Warm start: the executed plan [B, H, ...], already shifted, and [B] if there is one."""

    plan: Array
    usable: Array


def gradient(
    mdp: MDP, config: PlannerConfig, prior: Prior | None = None, value: Value | None = None
) -> Planner:
    """Build a planner that ascends the gradient of the return with Adam.

    Box actions: the pathwise gradient through the model, from `population` restarts.
    Discrete actions: the score-function gradient on logits, with the mean return of the
    population as baseline, which needs no differentiable model.

    Reference: Henaff et al. 2017 (arXiv:1705.07177); Williams 1992.
    """
    check_prior(config, prior)
    space = plan_space(mdp.spec, config)
    optimizer = optax.adam(config.learning_rate)
    discrete = isinstance(mdp.spec.action, Discrete)

    def score(params: Params, key: Key, state: State, plans: Array) -> Array:
        return score_plans(mdp, space, config, params, key, state, plans, value)

    def init(batch: int) -> GradientCarry:
        return GradientCarry(space.mode(space.prior(batch)), jnp.zeros(batch, bool))

    def plan(
        params: Params, key: Key, state: State, carry: GradientCarry
    ) -> tuple[Array, GradientCarry, Metrics]:
        start_key, prior_key, ascent_key, score_key = jax.random.split(key, 4)
        batch = carry.usable.shape[0]
        starts = space.sample(start_key, space.prior(batch), config.population)
        if prior is not None:
            told = prior_plans(mdp, space, config, params, prior_key, state, prior)
            starts = jnp.concatenate([starts[:, : -config.prior_plans], told], 1)
        starts = put_first(starts, carry.plan[:, None], carry.usable)
        keys = jax.random.split(ascent_key, config.iterations)

        def objective(plans: Array, key: Key) -> Array:
            return score(params, key, state, plans)

        ascend = _score_function if discrete else _pathwise
        plans = ascend(space, optimizer, objective, starts, keys)
        values = score(params, score_key, state, plans)
        best = best_plans(plans, values, 1)[:, 0]
        actions = space.decode(best)
        shifted = jnp.concatenate([best[:, 1:], best[:, -1:]], 1)
        carry = GradientCarry(shifted, jnp.ones_like(carry.usable))
        return actions[:, 0], carry, {"value": values.max(1), "plan": actions}

    return Planner(init, plan)


def _pathwise(
    space: PlanSpace,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    starts: Array,
    keys: Key,
) -> Array:
    """Ascend through the model; plans [B, P, H, A] are projected onto the bounds."""
    del space

    def loss(plans: Array, key: Key) -> Array:
        values = objective(plans, key)
        return -jnp.sum(jnp.where(jnp.isfinite(values), values, 0.0))

    def step(carry: tuple[Array, optax.OptState], key: Key) -> tuple[Any, None]:
        plans, opt_state = carry
        grads = jnp.nan_to_num(jax.grad(loss)(plans, key), posinf=0.0, neginf=0.0)
        updates, opt_state = optimizer.update(grads, opt_state)
        stepped: Any = optax.apply_updates(plans, updates)
        return (jnp.clip(stepped, -1.0, 1.0), opt_state), None

    (plans, _), _ = jax.lax.scan(step, (starts, optimizer.init(starts)), keys)
    return plans


def _score_function(
    space: PlanSpace,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    starts: Array,
    keys: Key,
) -> Array:
    """Ascend the logits of a categorical plan [B, H, A]; return samples of the last one."""
    batch, population = starts.shape[:2]
    num = space.prior(batch).shape[-1]
    first = jax.nn.one_hot(starts[:, 0], num)
    logits = jnp.log(0.5 * first + 0.5 * jax.nn.one_hot(starts, num).mean(1) + 1e-3)

    def step(carry: tuple[Array, optax.OptState], key: Key) -> tuple[Any, None]:
        logits, opt_state = carry
        sample_key, score_key = jax.random.split(key)
        probs = jax.nn.softmax(logits)
        plans = space.sample(sample_key, probs, population)
        values = objective(plans, score_key)
        usable = jnp.isfinite(values)
        values = jnp.where(usable, values, 0.0)
        count = jnp.maximum(usable.sum(1, keepdims=True), 1)
        advantage = jnp.where(usable, values - values.sum(1, keepdims=True) / count, 0.0)
        advantage = advantage / (jnp.sqrt((advantage**2).sum(1, keepdims=True) / count) + 1e-8)
        score = jax.nn.one_hot(plans, num) - probs[:, None]
        grads = -jnp.einsum("bp,bpha->bha", advantage / count, score)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(logits, updates), opt_state), None

    last_key, keys = keys[-1], keys[:-1]
    (logits, _), _ = jax.lax.scan(step, (logits, optimizer.init(logits)), keys)
    plans = space.sample(last_key, jax.nn.softmax(logits), population)
    return put_first(plans, jnp.argmax(logits, -1)[:, None], jnp.ones(batch, bool))
