"""Learned termination: when an episode ends, as a function of where a step has led."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mbrl import normalization, spaces
from mbrl.networks.core import ensemble, mlp
from mbrl.normalization import Moments
from mbrl.types import Array, EnvSpec, Key, Metrics, Network, Params, Transition

MAX_BALANCE = 50.0
"""Of a terminal step against another one in the loss."""

MIXED_WEIGHT = 2.0
"""Of imagined safe steps, mixed from the coordinates of real ones, against real ones."""

JOINT_PENALTY = 0.01
"""On the squared output of the joint network."""

JOINT_SHIFT = 4.0
"""Added to the joint network's log-odds of survival, so that 0 means a probability of 0.98."""


class TerminationState(NamedTuple):
    """Parameters of the model.

    Attributes:
      weights: trainable, leading [N].
      inputs: moments of the embedded next observation.
      seen: bool [], whether the data held a terminal step. Until then survival is certain
        and the networks are not evaluated.
      balance: [] how much more a terminal step counts than another.
    """

    weights: Params
    inputs: Moments
    seen: Array
    balance: Array


class TerminationModel(NamedTuple):
    """An ensemble of classifiers of the *next* observation, as simulators decide it.

    Attributes:
      init: `(key) -> TerminationState`.
      standardize: `(state, transition [M, ...], mask [M]) -> state`, refits the moments.
      loss: `(weights, state, transition [N, B, ...]) -> ([N], metrics)`.
      survival: `(state, weights, flat next obs [N', R, D]) -> [N', R]`, probability of not
        terminating there by each of the members whose `weights` are passed.
    """

    init: Callable[[Key], TerminationState]
    standardize: Callable[[TerminationState, Transition, Array], TerminationState]
    loss: Callable[[Params, TerminationState, Transition], tuple[Array, Metrics]]
    survival: Callable[[TerminationState, Params, Array], Array]


def coordinate_network(size: int, width: int = 32, steepness: float = 4.0) -> Network:
    """Build one small network per coordinate: `[B, D] -> [B, D]`, each sees its own only.

    Args:
      size: number of coordinates D.
      width: hidden tanh units per coordinate; their centres cover -4 to 4, so the input
        must be standardized.
      steepness: standard deviation of the initial slopes. A border lies within a tenth of a
        standard deviation of what survived; gentle slopes would take long to find it.
    """

    def init(key: Key, x: Array) -> Params:
        del x
        slope_key, centre_key, out_key = jax.random.split(key, 3)
        slope = steepness * jax.random.normal(slope_key, (size, width))
        centre = jax.random.uniform(centre_key, (size, width), minval=-4.0, maxval=4.0)
        out = 0.1 * jax.random.normal(out_key, (size, width))
        bias = jnp.full(size, -JOINT_SHIFT)
        return {"slope": slope, "hidden_bias": -slope * centre, "out": out, "out_bias": bias}

    def apply(params: Params, x: Array) -> Array:
        hidden = jnp.tanh(x[..., None] * params["slope"] + params["hidden_bias"])
        return jnp.sum(hidden * params["out"], -1) + params["out_bias"]

    return Network(init, apply)


def mix_coordinates(x: Array, ends: Array) -> tuple[Array, Array]:
    """Combine coordinates of different rows, and tell which mixtures hold safe ones only.

    Args:
      x: [N, B, D] shuffled rows.
      ends: [N, B] which rows are terminal.

    Returns:
      [N, B, D] rows whose coordinate `i` comes from `i` rows before, and bool [N, B].
    """
    mixed = [jnp.roll(x[..., i], i, 1) for i in range(x.shape[-1])]
    unsafe = [jnp.roll(ends, i, 1) for i in range(x.shape[-1])]
    return jnp.stack(mixed, -1), ~jnp.any(jnp.stack(unsafe, -1), -1)


def termination_model(
    spec: EnvSpec,
    num_members: int,
    num_inputs: int,
    embed: Callable[[Array], Array],
    network: Callable[[int], Network] | None = None,
) -> TerminationModel:
    """Build a classifier that learns from few terminal steps, far from where it must judge.

    A planner asks about states that were never visited: after a dozen of episodes, a plain
    network calls a tenth of the safe ones terminal, and the planner refuses the manoeuvre
    that would save the episode. Three priors keep it from that; data overrule them.

    - Most rules bound single coordinates. Survival is a product: one small network per
      coordinate, times a joint network whose output is penalized, so that it explains only
      what single coordinates cannot.
    - What was safe in each coordinate alone is probably safe together: mixtures of the
      coordinates of surviving steps count as surviving steps.
    - Terminal steps count as much as all others together, within `MAX_BALANCE`.

    Only the next observation is seen, not the action, so no dynamics must be learned along
    with the rule. Fit it apart from the dynamics, to all data and for a fixed time: held-out
    data of a small task hold one or two terminal steps, too few to tell when to stop.

    Args:
      spec: spaces of the task.
      num_members: N.
      num_inputs: width of an embedded observation, E.
      embed: `(flat [..., D]) -> [..., E]`.
      network: `(out) -> Network`, the joint network of one member; two hidden layers of 64
        by default.
    """
    single = ensemble(coordinate_network(num_inputs), num_members)
    joint = ensemble(network(1) if network else mlp((64, 64), 1), num_members)

    def init(key: Key) -> TerminationState:
        single_key, joint_key = jax.random.split(key)
        x = jnp.zeros((num_members, 1, num_inputs))
        weights = {"single": single.init(single_key, x), "joint": joint.init(joint_key, x)}
        inputs = normalization.empty((num_inputs,))
        return TerminationState(weights, inputs, jnp.zeros((), bool), jnp.ones(()))

    def embedded(data: Transition) -> Array:
        return embed(spaces.flatten(spec.observation, data.next_obs))

    def standardize(state: TerminationState, data: Transition, mask: Array) -> TerminationState:
        ends = jnp.sum(data.is_terminal & mask)
        balance = jnp.clip((mask.sum() - ends) / jnp.maximum(ends, 1), 1.0, MAX_BALANCE)
        return state._replace(
            inputs=normalization.fit(embedded(data), mask), seen=ends > 0, balance=balance
        )

    def log_survival(weights: Params, x: Array) -> tuple[Array, Array]:
        """Map standardized x [N, R, E] to log-probabilities and the joint output [N, R]."""
        alone = jax.nn.softplus(single.apply(weights["single"], x)).sum(-1)
        together = joint.apply(weights["joint"], x)[..., 0]
        return -alone - jax.nn.softplus(together - JOINT_SHIFT), together

    def loss(weights: Params, state: TerminationState, batch: Transition) -> tuple[Array, Metrics]:
        x, ends = normalization.normalize(state.inputs, embedded(batch)), batch.is_terminal
        log_alive, together = log_survival(weights, x)
        log_ended = jnp.log(-jnp.expm1(jnp.minimum(log_alive, -1e-6)))
        nll = -jnp.where(ends, state.balance * log_ended, log_alive)
        mixed, safe = mix_coordinates(x, ends)
        mixed_nll = -jnp.where(safe, log_survival(weights, mixed)[0], 0.0)
        terms = nll + MIXED_WEIGHT * mixed_nll + JOINT_PENALTY * together**2
        return terms.mean(1), {}

    def survival(state: TerminationState, weights: Params, flat: Array) -> Array:
        def evaluate() -> Array:
            x = normalization.normalize(state.inputs, embed(flat))
            return jnp.exp(log_survival(weights, x)[0])

        return jax.lax.cond(state.seen, evaluate, lambda: jnp.ones(flat.shape[:-1]))

    return TerminationModel(init, standardize, loss, survival)
