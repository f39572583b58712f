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


UNKNOWN = float(jnp.finfo(jnp.float32).max)
"""Size of a bound that no data tell of; finite, as all that is learned and saved."""

SLACK = 0.01
"""How far beyond the survivors `cautious` bounds lie, as a share of the range they span."""


class Bounds(NamedTuple):
    """An interval per coordinate [E] that no episode has left alive."""

    low: Array
    high: Array

    def inside(self, x: Array) -> Array:
        """Tell which rows of x [..., E] lie within all intervals, [...]."""
        return jnp.all((x > self.low) & (x < self.high), -1)


class TerminationState(NamedTuple):
    """Parameters of the model.

    Attributes:
      weights: of the network, trainable, leading [N].
      inputs: moments of the embedded next observation.
      bounds: of the embedded next observation.
      visited: the range of survivors, with some slack.
      unexplained: bool [], whether the data hold an end that the bounds do not explain.
        Until then the network is neither trained nor evaluated.
      balance: [] how much more such an end counts than a surviving step.
    """

    weights: Params
    inputs: Moments
    bounds: Bounds
    visited: Bounds
    unexplained: Array
    balance: Array


class TerminationModel(NamedTuple):
    """A rule about the *next* observation, as simulators have it: bounds, then a network.

    Attributes:
      init: `(key) -> TerminationState`.
      standardize: `(state, transition [M, ...], mask [M]) -> state`, refits all but weights.
      loss: `(weights, state, transition [N, B, ...]) -> ([N], metrics)`.
      survival: `(state, weights, flat next obs [N', R, D]) -> [N', R]`, probability of not
        terminating there by each of the members whose `weights` are passed.
    """

    init: Callable[[Key], TerminationState]
    standardize: Callable[[TerminationState, Transition, Array], TerminationState]
    loss: Callable[[Params, TerminationState, Transition], tuple[Array, Metrics]]
    survival: Callable[[TerminationState, Params, Array], Array]


def fit_bounds(x: Array, survived: Array, ended: Array) -> Bounds:
    """Explain ends by few one-sided bounds on single coordinates.

    A side of a coordinate may be bounded where an end lies beyond every survivor. Sides are
    taken greedily, the one that explains most of the remaining ends first, so that a
    coordinate which merely was extreme at an end gets no bound. A bound lies halfway between
    the last survivor and the first end.

    Args:
      x: [M, E].
      survived: bool [M], rows that are known not to be terminal.
      ended: bool [M], rows that are known to be terminal.
    """
    size = x.shape[1]
    sides = jnp.concatenate([x, -x], 1)
    last = jnp.max(jnp.where(survived[:, None], sides, -jnp.inf), 0)
    beyond = ended[:, None] & (sides > last)
    first = jnp.min(jnp.where(beyond, sides, jnp.inf), 0)

    def take(_: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        left, taken = carry
        explained = beyond & left[:, None]
        best = jnp.argmax(explained.sum(0))
        taken = taken.at[best].set(taken[best] | explained[:, best].any())
        return left & ~explained[:, best], taken

    taken = jax.lax.fori_loop(0, 2 * size, take, (ended, jnp.zeros(2 * size, bool)))[1]
    bound = jnp.where(taken & jnp.isfinite(last), (last + first) / 2, UNKNOWN)
    return Bounds(-bound[size:], bound[:size])


def visited_range(x: Array, survived: Array) -> Bounds:
    """Return an interval per coordinate that holds the surviving rows of x [M, E]."""
    low = jnp.min(jnp.where(survived[:, None], x, UNKNOWN), 0)
    high = jnp.max(jnp.where(survived[:, None], x, -UNKNOWN), 0)
    slack = jnp.where(survived.any(), SLACK * (high - low), 0.0)
    return Bounds(low - slack, high + slack)


def cautious(state: TerminationState) -> TerminationState:
    """Close the sides that nobody has left yet of coordinates that have ended episodes.

    Whoever gathers data had better try them. Whoever is judged had better not: a cart that
    has only ever left its track on the right does not know that it may not do so on the left.
    """
    low, high = state.bounds
    ends_below, ends_above = low > -UNKNOWN, high < UNKNOWN
    bounds = Bounds(
        jnp.where(ends_above & ~ends_below, state.visited.low, low),
        jnp.where(ends_below & ~ends_above, state.visited.high, high),
    )
    return state._replace(bounds=bounds)


def termination_model(
    spec: EnvSpec,
    num_members: int,
    num_inputs: int,
    embed: Callable[[Array], Array],
    network: Callable[[int], Network] | None = None,
) -> TerminationModel:
    """Build a model that learns from few ends, far from where it must judge.

    A planner asks about states that were never visited, dozens in a row: an ensemble of
    classifiers that calls one safe state in fifty terminal refuses every plan, and one that
    is unsure just beyond a border drives across it. Most rules bound single coordinates,
    and bounds have neither fault: between survivors nothing ends, beyond a bound nothing
    survives. Only the ends that bounds cannot explain are left to an ensemble of networks.

    Only the next observation is seen, not the action, so no dynamics must be learned along
    with the rule. Fit the network apart from the dynamics, to all data and for a fixed time:
    held-out data of a small task hold one or two ends, too few to tell when to stop.

    Args:
      spec: spaces of the task.
      num_members: N.
      num_inputs: width of an embedded observation, E.
      embed: `(flat [..., D]) -> [..., E]`.
      network: `(out) -> Network` of one member; two hidden layers of 64 by default.
    """
    classifier = ensemble(network(1) if network else mlp((64, 64), 1), num_members)

    def init(key: Key) -> TerminationState:
        weights = classifier.init(key, jnp.zeros((num_members, 1, num_inputs)))
        unknown = jnp.full(num_inputs, UNKNOWN)
        open_sides = Bounds(-unknown, unknown)
        return TerminationState(
            weights, normalization.empty((num_inputs,)), open_sides, open_sides,
            jnp.zeros((), bool), jnp.ones(()),
        )  # fmt: skip

    def embedded(data: Transition) -> Array:
        return embed(spaces.flatten(spec.observation, data.next_obs))

    def standardize(state: TerminationState, data: Transition, mask: Array) -> TerminationState:
        x, ended, survived = embedded(data), mask & data.is_terminal, mask & ~data.is_terminal
        bounds = fit_bounds(x, survived, ended)
        unexplained = jnp.sum(ended & bounds.inside(x))
        balance = jnp.clip(survived.sum() / jnp.maximum(unexplained, 1), 1.0, MAX_BALANCE)
        return state._replace(
            inputs=normalization.fit(x, mask), bounds=bounds, visited=visited_range(x, survived),
            unexplained=unexplained > 0, balance=balance,
        )  # fmt: skip

    def log_odds(state: TerminationState, weights: Params, x: Array) -> Array:
        """Map x [N, R, E] to the log-odds of an end as the balanced loss has them, [N, R]."""
        return classifier.apply(weights, normalization.normalize(state.inputs, x))[..., 0]

    def loss(weights: Params, state: TerminationState, batch: Transition) -> tuple[Array, Metrics]:
        x = embedded(batch)
        nll = binary_nll(log_odds(state, weights, x), batch.is_terminal)
        weight = jnp.where(batch.is_terminal, state.balance, 1.0) * state.bounds.inside(x)
        return (weight * nll).mean(1), {}

    def survival(state: TerminationState, weights: Params, flat: Array) -> Array:
        x = embed(flat)

        def within() -> Array:
            # Ends counted `balance` times: without that, their odds are as much smaller.
            return jax.nn.sigmoid(jnp.log(state.balance) - log_odds(state, weights, x))

        alive = jax.lax.cond(state.unexplained, within, lambda: jnp.ones(flat.shape[:-1]))
        return alive * state.bounds.inside(x)

    return TerminationModel(init, standardize, loss, survival)
