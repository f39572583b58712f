"""Combinators over `MDP`s, and the one rollout that everything imagines with.

A combinator takes an `MDP` and returns an `MDP`: penalties, other rewards, other
terminations, discounting and episodes compose in any order, on simulators and on learned
models alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mbrl.types import MDP, Array, Key, Outcome, Params, State, TimeStep, reset_rows
from mbrl.uncertainty import finite_sqrt


class Trajectory(NamedTuple):
    """What `rollout` collects; leaves `[H, B, ...]`."""

    obs: Any
    action: Array
    outcome: Outcome


Policy = Callable[[Key, State, Array], Array]
"""`(key, state, t) -> action [B, ...]`; `t` is the int32 step index."""

RewardFn = Callable[[Params, Any, Array, Any], tuple[Array, Array]]
"""`(params, obs, action, next_obs) -> (reward [B], epistemic standard deviation [B])`."""


class SplitParams(NamedTuple):
    """Parameters of a model and of the reward that replaces its own."""

    model: Params
    reward: Params


def collect_trajectory(obs: Any, action: Array, outcome: Outcome) -> Trajectory:
    """Keep everything: the default `collect` of `rollout`."""
    return Trajectory(obs, action, outcome)


def rollout(
    mdp: MDP,
    params: Params,
    key: Key,
    state: State,
    policy: Policy,
    horizon: int,
    collect: Callable[[Any, Array, Outcome], Any] = collect_trajectory,
) -> tuple[State, Any]:
    """Imagine `horizon` steps from `state` in one `lax.scan`.

    Args:
      mdp: any decision process.
      params: its parameters.
      key: consumed.
      state: pytree of [B, ...] leaves.
      policy: `(key, state, t) -> action`; an open-loop plan reads `plan[t]`.
      horizon: number of steps H.
      collect: `(obs_t, action_t, outcome_t) -> pytree` kept of every step. What it drops
        is never computed.

    Returns:
      The final state and the collected pytree with a leading [H].
    """

    def step(state: State, inputs: tuple[Key, Array]) -> tuple[State, Any]:
        key, t = inputs
        policy_key, step_key = jax.random.split(key)
        action = policy(policy_key, state, t)
        next_state, outcome = mdp.step(params, step_key, state, action)
        return next_state, collect(mdp.observe(params, state), action, outcome)

    return jax.lax.scan(step, state, (jax.random.split(key, horizon), jnp.arange(horizon)))


def _map_outcome(mdp: MDP, change: Callable[[Outcome], Outcome]) -> MDP:
    def step(params: Params, key: Key, state: State, action: Array) -> tuple[State, Outcome]:
        next_state, outcome = mdp.step(params, key, state, action)
        return next_state, change(outcome)

    return mdp._replace(step=step)


def uncertainty_of(outcome: Outcome, name: str) -> Array:
    """Return the uncertainty [B] of a step; a model without any is refused for `name`."""
    if outcome.uncertainty is None:
        raise ValueError(
            f"{name}: this MDP reports no uncertainty (Outcome.uncertainty is None); "
            "build the model with uncertainty=True"
        )
    return outcome.uncertainty


def penalized(mdp: MDP, coef: float | Array) -> MDP:
    """Subtract `coef` standard deviations of epistemic uncertainty from every reward.

    The uncertainty itself is still reported, unchanged. Hence penalties add up, as
    `penalized(penalized(mdp, a), b)` is `penalized(mdp, a + b)`; and `with_reward` replaces the
    reward with its penalty: penalize what it returns, where uncertainty counts once.

    Reference: MOPO, Yu et al. 2020 (arXiv:2005.13239).

    Args:
      mdp: a model that reports `Outcome.uncertainty` (a simulator reports 0).
      coef: penalty per unit of uncertainty, which is in units of reward; 0 is neutral,
        negative is optimistic. May be traced.

    Raises:
      ValueError: when stepped, if the model was built without uncertainty.
    """

    def change(outcome: Outcome) -> Outcome:
        uncertainty = uncertainty_of(outcome, "penalized")
        return outcome._replace(reward=outcome.reward - coef * uncertainty)

    return _map_outcome(mdp, change)


def optimistic(mdp: MDP, coef: float | Array) -> MDP:
    """Add `coef` standard deviations of epistemic uncertainty to every reward.

    Reference: Curi et al. 2020 (arXiv:2006.08684).
    """
    return penalized(mdp, -coef)


def with_intrinsic_reward(mdp: MDP) -> MDP:
    """Replace the reward by the epistemic uncertainty: act in order to learn the model.

    Reference: Plan2Explore, Sekar et al. 2020 (arXiv:2005.05960); with the information gain as the
    kind of uncertainty OPAX, Sukhija et al. 2023 (arXiv:2306.12371).

    Args:
      mdp: a model that reports `Outcome.uncertainty`.

    Raises:
      ValueError: when stepped, if the model was built without uncertainty.
    """

    def change(outcome: Outcome) -> Outcome:
        return outcome._replace(reward=uncertainty_of(outcome, "with_intrinsic_reward"))

    return _map_outcome(mdp, change)


def halted(mdp: MDP, threshold: float | Array, penalty: float | Array) -> MDP:
    """End the episode where the model does not know what a step does.

    Reference: MOReL, Kidambi et al. 2020 (arXiv:2005.05951).

    Args:
      mdp: a model that reports `Outcome.uncertainty` (a simulator reports 0).
      threshold: uncertainty, in units of reward, above which a step is unknown, as is one whose
        uncertainty is not a number; inf never halts. May be traced, see `mbrl.halting.fit_halt`.
      penalty: what the reward of an unknown step is lowered to, with the sign turned. Nothing
        follows, so it stands for all that would have: the discount of the step is 0.

    Raises:
      ValueError: when stepped, if the model was built without uncertainty.
    """

    def change(outcome: Outcome) -> Outcome:
        # What is not a number is not known either.
        known = uncertainty_of(outcome, "halted") <= threshold
        unknown = ~(known | (threshold == jnp.inf))
        return outcome._replace(
            reward=jnp.where(unknown, -penalty, outcome.reward),
            discount=jnp.where(unknown, 0.0, outcome.discount),
        )

    return _map_outcome(mdp, change)


def discounted(mdp: MDP, gamma: float | Array) -> MDP:
    """Multiply the discount of every step by `gamma` in (0, 1]."""

    def change(outcome: Outcome) -> Outcome:
        return outcome._replace(discount=gamma * outcome.discount)

    return _map_outcome(mdp, change)


def with_reward(mdp: MDP, reward: RewardFn) -> MDP:
    """Replace the reward of `mdp` by another source: given, regressed or from preferences.

    A penalty in the reward goes with it.

    Args:
      mdp: any decision process.
      reward: `(reward_params, obs, action, next_obs) -> (mean [B], epistemic [B])`.

    Returns:
      An `MDP` whose parameters are `SplitParams(model, reward)`. Its uncertainty is the
      reward's and the model's, as independent standard deviations in units of reward: a model that
      reports 'raw' ones adds up what cannot be compared. Build an ensemble with
      `own_reward=False`, or what it thinks of a reward that nobody is after counts as well.
    """

    def step(params: SplitParams, key: Key, state: State, action: Array) -> tuple[State, Outcome]:
        next_state, outcome = mdp.step(params.model, key, state, action)
        obs, next_obs = mdp.observe(params.model, state), mdp.observe(params.model, next_state)
        mean, epistemic = reward(params.reward, obs, action, next_obs)
        uncertainty = outcome.uncertainty
        if uncertainty is not None:
            uncertainty = finite_sqrt(uncertainty**2 + epistemic**2)
        return next_state, outcome._replace(reward=mean, uncertainty=uncertainty)

    def init(params: SplitParams, key: Key, obs: Any = None, batch: int = 1) -> State:
        return mdp.init(params.model, key, obs, batch)

    def observe(params: SplitParams, state: State) -> Any:
        return mdp.observe(params.model, state)

    return MDP(init, step, observe, mdp.spec)


def with_termination(mdp: MDP, terminates: Callable[[Any, Array, Any], Array]) -> MDP:
    """Replace the termination of `mdp` by a known rule.

    Args:
      mdp: any decision process.
      terminates: `(obs, action, next_obs) -> [B]` bool, or a probability in [0, 1].
    """

    def step(params: Params, key: Key, state: State, action: Array) -> tuple[State, Outcome]:
        next_state, outcome = mdp.step(params, key, state, action)
        obs, next_obs = mdp.observe(params, state), mdp.observe(params, next_state)
        discount = 1.0 - jnp.asarray(terminates(obs, action, next_obs), jnp.float32)
        return next_state, outcome._replace(discount=discount)

    return mdp._replace(step=step)


def with_resets(mdp: MDP, start_obs: Any) -> MDP:
    """Draw start states from recorded first observations: a learned model can then be reset.

    Args:
      mdp: a model whose `init` accepts an observation.
      start_obs: observation pytree with a leading [M].
    """
    num = jax.tree.leaves(start_obs)[0].shape[0]

    def init(params: Params, key: Key, obs: Any = None, batch: int = 1) -> State:
        pick_key, init_key = jax.random.split(key)
        if obs is None:
            rows = jax.random.randint(pick_key, (batch,), 0, num)
            obs = jax.tree.map(lambda x: jnp.asarray(x)[rows], start_obs)
        return mdp.init(params, init_key, obs, batch)

    return mdp._replace(init=init)


class EpisodicState(NamedTuple):
    """State of `episodic`: the inner state and the flags of the current record, `[B]`."""

    inner: State
    time: Array
    reward: Array
    is_first: Array
    is_last: Array
    is_terminal: Array


def episodic(mdp: MDP, max_steps: int | None) -> MDP:
    """Turn a decision process into an endless stream of episodes with fresh starts.

    The step after a last observation ignores the action and yields the first observation
    of the next episode with reward 0, as Gymnasium's NEXT_STEP mode does. A predicted
    survival probability ends the episode by a draw.

    Args:
      mdp: any decision process.
      max_steps: truncation length; None never truncates.

    Returns:
      An `MDP` over `EpisodicState`; read the stream with `timestep`.
    """

    def init(params: Params, key: Key, obs: Any = None, batch: int = 1) -> EpisodicState:
        inner = mdp.init(params, key, obs, batch)
        batch = jax.tree.leaves(inner)[0].shape[0]
        off = jnp.zeros(batch, bool)
        return EpisodicState(
            inner, jnp.zeros(batch, jnp.int32), jnp.zeros(batch), off | True, off, off
        )

    def step(
        params: Params, key: Key, state: EpisodicState, action: Array
    ) -> tuple[EpisodicState, Outcome]:
        reset_key, step_key, end_key = jax.random.split(key, 3)
        restart = state.is_last
        inner, outcome = mdp.step(params, step_key, state.inner, action)
        inner = reset_rows(restart, mdp.init(params, reset_key, None, restart.shape[0]), inner)
        time = jnp.where(restart, 0, state.time + 1)
        alive = jax.random.uniform(end_key, restart.shape) < outcome.discount
        is_terminal = ~restart & ~alive
        is_last = is_terminal
        if max_steps is not None:
            is_last = is_last | (time >= max_steps)
        reward = jnp.where(restart, 0.0, outcome.reward).astype(jnp.float32)
        discount = jnp.where(restart, 1.0, outcome.discount)
        next_state = EpisodicState(inner, time, reward, restart, is_last, is_terminal)
        return next_state, outcome._replace(reward=reward, discount=discount)

    def observe(params: Params, state: EpisodicState) -> Any:
        return mdp.observe(params, state.inner)

    return MDP(init, step, observe, mdp.spec)


def timestep(mdp: MDP, params: Params, state: EpisodicState) -> TimeStep:
    """Read the current record of an `episodic` stream, leaves `[B, ...]`."""
    obs = mdp.observe(params, state)
    return TimeStep(obs, state.reward, state.is_first, state.is_last, state.is_terminal)
