"""Imagined rollouts as training data for an actor and a critic, on any `MDP`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mbrl import returns, spaces
from mbrl.mdp import discounted, rollout
from mbrl.types import MDP, Array, Key, Outcome, Params, Record, State, Transition


class Dream(NamedTuple):
    """Imagined trajectories of `H` steps from `M` states.

    Attributes:
      state: [H, M, ...] states of the model that actions were taken at, the start first.
      final: [M, ...] states after the last action.
      action: [H, M, A] encoded actions.
      reward: [H, M] of each step.
      discount: [H, M] survival times discount of each step.
    """

    state: State
    final: State
    action: Array
    reward: Array
    discount: Array


def imagine(
    mdp: MDP,
    params: Params,
    key: Key,
    start: State,
    act: Callable[[Key, State], Array],
    horizon: int,
    discount: Array | float,
) -> Dream:
    """Follow a policy through a model.

    Args:
      mdp: any decision process.
      params: its parameters.
      key: consumed.
      start: states, leaves [M, ...].
      act: `(key, state) -> encoded action [M, A]`, see `spaces.encode_action`. The model sees it
        within bounds, as environments do; the dream keeps it as it was drawn.
      horizon: steps H.
      discount: per step, on top of the survival that the model predicts.

    Returns:
      `Dream`, without a gradient: what it teaches, it teaches by likelihood ratios.

    Reference: Dream to Control (arXiv 1912.01603).
    """
    whole = discounted(mdp, discount)

    def step(params: Params, key: Key, state: State, action: Any) -> tuple[State, Outcome]:
        return whole.step(params, key, state, spaces.clip(mdp.spec.action, action))

    # The states themselves are kept, not what they would look like.
    bare = whole._replace(observe=lambda params, state: state, step=step)

    def choose(key: Key, state: State, t: Array) -> Any:
        return spaces.decode_action(mdp.spec.action, act(key, state))

    def keep(state: State, action: Any, outcome: Outcome) -> Any:
        encoded = spaces.encode_action(mdp.spec.action, action)
        return state, encoded, outcome.reward, outcome.discount

    final, (states, *rest) = rollout(bare, params, key, start, choose, horizon, keep)
    return jax.lax.stop_gradient(Dream(states, final, *rest))


class Targets(NamedTuple):
    """What an actor and a critic learn from a `Dream`, [H, M] each.

    Attributes:
      returns: lambda-returns of the departure states.
      advantage: returns minus values, in units of reward.
      weight: discounted probability that the step is reached at all.
    """

    returns: Array
    advantage: Array
    weight: Array


def imagined_targets(dream: Dream, values: Array, root: Array, lambda_: Array | float) -> Targets:
    """Compute returns and weights of imagined trajectories.

    Args:
      dream: H steps of M trajectories.
      values: [H + 1, M] of `dream.state` and `dream.final`.
      root: [M] survival times discount of the start states themselves: 0 where an episode
        has ended, because nothing follows from there.
      lambda_: mixes returns of different lengths.
    """
    along = jax.vmap(returns.lambda_returns, (1, 1, 1, None), 1)
    target = along(dream.reward, dream.discount, values[1:], lambda_)
    reached = jnp.cumprod(jnp.concatenate([root[None], dream.discount[:-1]]), 0)
    return jax.lax.stop_gradient(Targets(target, target - values[:-1], reached))


class ReplayTargets(NamedTuple):
    """What a critic learns from real sequences, [B, T - 1] each."""

    returns: Array
    weight: Array


def replay_targets(
    record: Record, valid: Array, beyond: Array, discount: Array | float, lambda_: Array | float
) -> ReplayTargets:
    """Compute returns of real rewards, beyond which imagined returns stand.

    Args:
      record: [B, T, ...] sequences that may cross the borders of episodes.
      valid: [B, T], rows that hold data.
      beyond: [B, T] return that is imagined from each record on.
      discount: per step.
      lambda_: mixes returns of different lengths.

    Returns:
      Returns of all records but the last, and 1 where such a record starts a transition.
    """
    signals = jax.vmap(returns.align, (0, None))(record, discount)
    both = valid[:, :-1] & valid[:, 1:]
    # Where the next transition lacks data, a return ends with what is imagined.
    trace = signals.trace_t * jnp.pad(both[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    target = jax.vmap(returns.lambda_returns)(
        signals.r_t, signals.discount_t, beyond[:, 1:], lambda_ * trace
    )
    weight = (signals.valid & both).astype(jnp.float32)
    return jax.lax.stop_gradient(ReplayTargets(target, weight))


def rollout_length(step: Array, schedule: tuple[int, int], length: tuple[int, int]) -> Array:
    """Return how many steps a model may be trusted for, int32 [].

    Args:
      step: environment steps so far.
      schedule: steps between which the length changes.
      length: before the first and after the second of them; between, whole numbers along a line.

    Reference: When to Trust Your Model (arXiv 1906.08253).
    """
    (first, last), (start, end) = schedule, length
    share = jnp.clip((step - first) / max(last - first, 1), 0.0, 1.0)
    # Rounded towards the start: every length is there for an equal stretch of steps.
    return start + jnp.trunc(share * (end - start)).astype(jnp.int32)


def branches(
    mdp: MDP,
    params: Params,
    key: Key,
    obs: Any,
    policy: Callable[[Key, Any], Any],
    length: Array | int,
    longest: int,
) -> tuple[Transition, Array]:
    """Imagine short rollouts from recorded observations, as data for off-policy learning.

    Args:
      mdp: any decision process whose `init` takes observations.
      params: its parameters.
      key: consumed.
      obs: leaves [M, ...], where episodes go on.
      policy: `(key, obs [M, ...]) -> action [M, ...]`.
      length: steps of every rollout, at most `longest`. May be traced.
      longest: steps that are computed, H.

    Returns:
      Transitions [H * M, ...], whose `is_terminal` is the predicted chance of an end; and which of
      them count, bool [H * M]: those within `length`, before a predicted end, and finite.

    Reference: When to Trust Your Model (arXiv 1906.08253).
    """
    init_key, step_key, end_key = jax.random.split(key, 3)
    start = mdp.init(params, init_key, obs)

    def choose(key: Key, state: State, t: Array) -> Any:
        return policy(key, mdp.observe(params, state))

    final, steps = rollout(mdp, params, step_key, start, choose, longest)
    after = jax.tree.map(
        lambda x, y: jnp.concatenate([x[1:], y[None]]), steps.obs, mdp.observe(params, final)
    )
    chance = steps.outcome.discount
    survived = jax.random.uniform(end_key, chance.shape) < chance
    alive = jnp.concatenate([jnp.ones_like(survived[:1]), survived[:-1]])
    finite = [
        jnp.isfinite(x.astype(jnp.float32)).reshape(*chance.shape, -1).all(-1)
        for x in jax.tree.leaves((after, steps.outcome.reward, chance))
    ]
    good = jnp.stack([alive, *finite]).all(0)
    counts = jnp.cumprod(good, 0).astype(bool) & (jnp.arange(longest) < length)[:, None]
    found = Transition(steps.obs, steps.action, steps.outcome.reward, after, 1.0 - chance)
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)
    return jax.lax.stop_gradient(rows), counts.reshape(-1)
