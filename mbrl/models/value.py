"""Value models: an ensemble that predicts the discounted return which follows an observation.

A planner that looks `H` steps ahead is blind to what comes after. A value learned from replay
tells it, and lets `H` be short: an unstable system amplifies an open-loop plan exponentially, so
that long plans are hard to search, where a short one with a value is easy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mbrl import normalization, spaces
from mbrl.networks.core import ensemble, mlp
from mbrl.normalization import Moments
from mbrl.returns import lambda_returns
from mbrl.types import MDP, Array, Batch, EnvSpec, Key, Metrics, Network, Params, State


class ValueState(NamedTuple):
    """Parameters of a value model; `value = units.mean + units.std * output`.

    Attributes:
      weights: trainable, leading [N] on every leaf.
      inputs: moments of the flattened observation.
      units: moments [] of the returns that it was fitted to.
      low: [] least of these returns; nothing beyond is ever predicted.
      high: [] greatest of them.
    """

    weights: Params
    inputs: Moments
    units: Moments
    low: Array
    high: Array


class Returns(NamedTuple):
    """What a value model learns from: flat observations [..., D] and returns [...]."""

    obs: Array
    target: Array


class ValueModel(NamedTuple):
    """An ensemble of value heads over flattened observations.

    Attributes:
      init: `(key) -> ValueState`, which predicts 0.
      returns: `(state, batch) -> Returns` of every row of a ring, [E * C, ...].
      standardize: `(state, returns [M, ...], mask [M]) -> state`, refits all but weights.
      loss: `(weights, state, returns [N, B, ...]) -> (losses [N], metrics)`.
      predict: `(state, obs [B, ...]) -> [N, B]`, in units of reward.
    """

    init: Callable[[Key], ValueState]
    returns: Callable[[ValueState, Batch], Returns]
    standardize: Callable[[ValueState, Returns, Array], ValueState]
    loss: Callable[[Params, ValueState, Returns], tuple[Array, Metrics]]
    predict: Callable[[ValueState, Any], Array]


def ring_returns(batch: Batch, value: Array, gamma: Array | float, lambda_: Array | float) -> Array:
    """Compute the lambda-returns that follow every record of a ring.

    A return bootstraps where no transition leaves its next record: at the end of an episode
    that was cut, at the newest record, and at the last row of the ring.

    Args:
      batch: of kind 'all', leaves [E, C, ...].
      value: [E, C] of every record's observation.
      gamma: discount per step.
      lambda_: trace parameter.

    Returns:
      [E, C]; it means something where `batch.valid`.
    """

    def after(x: Array) -> Array:
        return jnp.roll(x, -1, 1)

    record = batch.record
    discount = gamma * (1.0 - after(record.is_terminal))
    trace = lambda_ * after(batch.valid)
    return jax.vmap(lambda_returns)(after(record.reward), discount, after(value), trace)


def terminal_value(
    value: ValueModel, state: ValueState, mdp: MDP
) -> Callable[[Params, State], Array]:
    """Make the value of where a plan ends: the least of the members.

    A planner seeks what any one of them overestimates.

    Args:
      value: the ensemble.
      state: its parameters.
      mdp: model that is planned in; its observations are those of `value`.

    Returns:
      `(params, state) -> [B]`, for `mbrl.planning`.
    """
    return lambda params, imagined: value.predict(state, mdp.observe(params, imagined)).min(0)


def value_model(
    spec: EnvSpec,
    gamma: Array | float,
    num_members: int = 5,
    hidden: Sequence[int] = (64, 64),
    network: Callable[[int], Network] | None = None,
    lambda_: Array | float = 0.3,
) -> ValueModel:
    """Build an ensemble that is fitted to lambda-returns of replay, bootstrapped from itself.

    Alternate `returns`, `standardize` and a fit (fitted value iteration). What is learned is the
    value of whatever acted. Whoever plans with it acts better and is evaluated next: policy
    iteration whose improvement step is the planner. All members have the same targets.

    Replay holds the failures of every controller that was tried. Long returns blame the states
    where those began; with a small `lambda_` blame comes from the next states alone, which
    hardly depend on who acted, and many rounds carry it as far as it deserves.

    Reference: Lowrey et al. 2018 (arXiv:1811.01848).

    Args:
      spec: spaces of the task; any observation that `mbrl.spaces.flatten` accepts.
      gamma: discount per step, below 1.
      num_members: N.
      hidden: widths of the default network (ignored with `network`).
      network: `(out) -> Network`, one member; Linen, Haiku, NNX or plain functions.
      lambda_: trace parameter of the targets.
    """
    net = ensemble(network(1) if network else mlp(hidden, 1, out_scale=0.0), num_members)
    size = spaces.flat_size(spec.observation)

    def init(key: Key) -> ValueState:
        weights = net.init(key, jnp.zeros((num_members, 1, size)))
        zero = jnp.zeros(())
        moments = normalization.empty((size,)), normalization.empty()
        return ValueState(weights, *moments, zero, zero)

    def forward(weights: Params, inputs: Moments, flat: Array) -> Array:
        """Map flat observations [N, R, D] to standardized values [N, R]."""
        return net.apply(weights, normalization.normalize(inputs, flat))[..., 0]

    def predict(state: ValueState, obs: Any) -> Array:
        flat = spaces.flatten(spec.observation, obs)
        everyone = jnp.broadcast_to(flat, (num_members, *flat.shape))
        out = forward(state.weights, state.inputs, everyone)
        return jnp.clip(normalization.denormalize(state.units, out), state.low, state.high)

    def returns(state: ValueState, batch: Batch) -> Returns:
        obs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch.record.obs)
        value = predict(state, obs).mean(0).reshape(batch.valid.shape)
        target = ring_returns(batch, value, gamma, lambda_)
        return Returns(spaces.flatten(spec.observation, obs), target.reshape(-1))

    def standardize(state: ValueState, data: Returns, mask: Array) -> ValueState:
        inputs = normalization.fit(data.obs, mask)
        units = normalization.fit(data.target, mask, feature_ndim=0)
        low = jnp.min(data.target, initial=jnp.inf, where=mask)
        high = jnp.max(data.target, initial=-jnp.inf, where=mask)
        known = mask.any()
        low, high = (jnp.where(known, bound, 0.0) for bound in (low, high))
        return state._replace(inputs=inputs, units=units, low=low, high=high)

    def loss(weights: Params, state: ValueState, data: Returns) -> tuple[Array, Metrics]:
        target = normalization.normalize(state.units, data.target)
        error = jnp.square(forward(weights, state.inputs, data.obs) - target)
        return 0.5 * error.mean(1), {"value/error": error.mean()}

    return ValueModel(init, returns, standardize, loss, predict)
