"""Learned termination: when an episode ends, as a function of where a step has led."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mbrl import normalization, spaces
from mbrl.losses.regression import binary_nll
from mbrl.networks.core import ensemble, mlp
from mbrl.normalization import Moments
from mbrl.types import Array, EnvSpec, Key, Metrics, Network, Params, Transition

MAX_BALANCE = 50.0
"""Of a terminal step against another one in the loss."""


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

    Few terminal steps then suffice, because no dynamics must be learned along with the rule.
    Terminal steps count as much as all others together (up to `MAX_BALANCE`), so that near
    the border of what has been survived the prediction errs on the side of caution.

    Fit it apart from the dynamics, to all data and for a fixed time: held-out data of a
    small task hold one or two terminal steps, too few to tell when to stop.

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


def termination_model(
    spec: EnvSpec,
    num_members: int,
    num_inputs: int,
    embed: Callable[[Array], Array],
    network: Callable[[int], Network] | None = None,
) -> TerminationModel:
    """Build the model.

    Args:
      spec: spaces of the task.
      num_members: N.
      num_inputs: width of an embedded observation, E.
      embed: `(flat [..., D]) -> [..., E]`.
      network: `(out) -> Network`, one member; two hidden layers of 64 by default.
    """
    net = ensemble(network(1) if network else mlp((64, 64), 1), num_members)

    def init(key: Key) -> TerminationState:
        weights = net.init(key, jnp.zeros((num_members, 1, num_inputs)))
        inputs = normalization.empty((num_inputs,))
        return TerminationState(weights, inputs, jnp.zeros((), bool), jnp.ones(()))

    def embedded(data: Transition) -> Array:
        return embed(spaces.flatten(spec.observation, data.next_obs))

    def standardize(state: TerminationState, data: Transition, mask: Array) -> TerminationState:
        ends = jnp.sum(data.is_terminal & mask)
        others = mask.sum() - ends
        balance = jnp.clip(others / jnp.maximum(ends, 1), 1.0, MAX_BALANCE)
        return state._replace(
            inputs=normalization.fit(embedded(data), mask), seen=ends > 0, balance=balance
        )

    def logit(state: TerminationState, weights: Params, x: Array) -> Array:
        return net.apply(weights, normalization.normalize(state.inputs, x))[..., 0]

    def loss(weights: Params, state: TerminationState, batch: Transition) -> tuple[Array, Metrics]:
        ends = batch.is_terminal
        nll = binary_nll(logit(state, weights, embedded(batch)), ends.astype(jnp.float32))
        return (jnp.where(ends, state.balance, 1.0) * nll).mean(1), {}

    def survival(state: TerminationState, weights: Params, flat: Array) -> Array:
        return jax.lax.cond(
            state.seen,
            lambda: jax.nn.sigmoid(-logit(state, weights, embed(flat))),
            lambda: jnp.ones(flat.shape[:-1]),
        )

    return TerminationModel(init, standardize, loss, survival)
