"""What a model predicts without looking, to be laid beside what happened."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mbrl import spaces
from mbrl.mdp import rollout
from mbrl.models.rssm import RSSM, Latent, RSSMState
from mbrl.types import MDP, Array, Key, Params, Record

STILL = 1e-12
"""Variance, as a share of the squared mean, that float32 may report of a constant."""


class OpenLoop(NamedTuple):
    """Predictions for `T` records by `Q` samples of the model.

    Attributes:
      obs: leaves [B, Q, T, ...] in the units of the environment: reconstructions in the
        context, the same for every sample; predictions after it.
      reward: [B, Q, T] mean reward on arrival at each record.
      survival: [B, Q, T] probability that the episode goes on from each record.
    """

    obs: Any
    reward: Array
    survival: Array


def open_loop(
    model: RSSM, state: RSSMState, key: Key, record: Record, context: int, samples: int
) -> OpenLoop:
    """Filter the first records, then imagine the rest with the recorded actions.

    After the context the model sees the actions alone: it knows of no later observation,
    and of no later reset.

    Args:
      model: the world model.
      state: its parameters.
      key: consumed. The latents of the context do not depend on where the context ends.
      record: [B, T, ...]; nothing is known before its first row.
      context: rows to filter, 1 to T.
      samples: independent continuations, Q.

    Raises:
      ValueError: for a context that is empty or longer than the record, or no sample.
    """
    length = record.reward.shape[1]
    if not 1 <= context <= length:
        raise ValueError(f"context: got {context}, expected 1 to {length}, the records given")
    if samples < 1:
        raise ValueError(f"samples: got {samples}, expected at least 1")

    def read(latent: Latent) -> OpenLoop:
        obs = model.decode(state, latent)
        return OpenLoop(obs, model.reward(state, latent), model.survival(state, latent))

    def look(latent: Latent, inputs: Any) -> tuple[Latent, OpenLoop]:
        key, obs, prev_action, is_first = inputs
        latent = model.encode(state, key, latent, obs, prev_action, is_first)
        return latent, read(latent)

    def imagine(latent: Latent, inputs: Any) -> tuple[Latent, OpenLoop]:
        key, action = inputs
        latent, _ = model.mdp.step(state, key, latent, action)
        return latent, read(latent)

    filter_key, dream_key = jax.random.split(key)
    obs, action, is_first = jax.tree.map(
        lambda x: jnp.swapaxes(x, 0, 1), (record.obs, record.action, record.is_first)
    )
    encoded = spaces.encode_action(model.mdp.spec.action, action[:-1])
    prev_action = jnp.pad(encoded, ((1, 0), (0, 0), (0, 0)))
    inputs = jax.random.split(filter_key, length), obs, prev_action, is_first
    latent, seen = jax.lax.scan(
        look, model.begin(is_first.shape[1]), jax.tree.map(lambda x: x[:context], inputs)
    )

    def dream(key: Key) -> OpenLoop:
        keys = jax.random.split(key, length - context)
        return jax.lax.scan(imagine, latent, (keys, action[context - 1 : length - 1]))[1]

    def join(seen: Array, dreamt: Array) -> Array:
        seen = jnp.broadcast_to(seen, (samples, *seen.shape))
        return jnp.moveaxis(jnp.concatenate([seen, dreamt], 1), 2, 0)

    return jax.tree.map(join, seen, jax.vmap(dream)(jax.random.split(dream_key, samples)))


def open_loop_from_first(
    mdp: MDP, params: Params, key: Key, record: Record, samples: int
) -> OpenLoop:
    """Imagine records from the first of them alone, with the recorded actions.

    Args:
      mdp: whose `init` takes observations; what they do not tell it does not know.
      params: its parameters.
      key: consumed.
      record: [B, T, ...].
      samples: independent continuations, Q.

    Returns:
      `OpenLoop`, whose first row is the first record.
    """
    streams, length = record.reward.shape

    def every(x: Array) -> Array:  # samples first: what stays with one member stays with it
        return jnp.broadcast_to(x, (samples, *x.shape)).reshape(-1, *x.shape[1:])

    init_key, step_key = jax.random.split(key)
    action = jax.tree.map(lambda x: every(jnp.asarray(x)), record.action)
    start = mdp.init(params, init_key, jax.tree.map(lambda x: every(x[:, 0]), record.obs))

    def recorded(key: Key, state: Any, t: Array) -> Any:
        return jax.tree.map(lambda x: x[:, t], action)

    final, steps = rollout(mdp, params, step_key, start, recorded, length - 1)
    obs = jax.tree.map(
        lambda x, y: jnp.concatenate([x, y[None]]), steps.obs, mdp.observe(params, final)
    )
    nothing = jnp.zeros((1, samples * streams))
    reward = jnp.concatenate([nothing, steps.outcome.reward])
    survival = jnp.concatenate([nothing + 1.0, steps.outcome.discount])

    def sort(x: Array) -> Array:
        x = x.reshape(length, samples, streams, *x.shape[2:])
        return jnp.moveaxis(x, (0, 1, 2), (2, 1, 0))

    return jax.tree.map(sort, OpenLoop(obs, reward, survival))


class ErrorAhead(NamedTuple):
    """Normalized errors by the number of steps ahead, [K]; NaN where there is no record.

    Attributes:
      model: of the prediction.
      constant: of holding the last value that was observed.
    """

    model: Array
    constant: Array


def error_ahead(
    truth: Array, predicted: Array, valid: Array, context: int, steps: Array, pooled: bool = False
) -> ErrorAhead:
    """Compute root mean squared errors in standard deviations of the truth.

    1 is the error of the mean of the records to be predicted; a constant that has nothing
    to do with them any more comes to the square root of 2.

    Args:
      truth: [B, T, D].
      predicted: [B, T, D].
      valid: [B, T] bool, records to be counted.
      context: records that were seen.
      steps: [K] int32; 1 is the first record after the context.
      pooled: all D numbers have one unit (pixels) and are divided by the root of their mean
        variance; else each by its own deviation. Numbers that do not vary are left out.
    """
    weight = valid[:, context:, None].astype(jnp.float32)
    count = jnp.maximum(weight.sum(), 1.0)
    future = truth[:, context:].astype(jnp.float32)
    mean = jnp.sum(weight * future, (0, 1)) / count
    variance = jnp.sum(weight * jnp.square(future - mean), (0, 1)) / count
    moves = variance > STILL * jnp.square(mean)
    variance = jnp.where(moves, variance, 0.0)
    unit = jnp.full_like(variance, jnp.mean(variance)) if pooled else variance
    counted = jnp.full_like(moves, jnp.any(moves)) if pooled else moves
    unit = jnp.where(counted, unit, 1.0)

    def error(guess: Array) -> Array:
        square = jnp.square(guess.astype(jnp.float32) - future) / unit
        total = jnp.sum(jnp.where(weight * counted > 0, square, 0.0), (0, 2))
        number = jnp.sum(weight, (0, 2)) * counted.sum()
        by_step = jnp.sqrt(jnp.where(number > 0, total / jnp.maximum(number, 1.0), jnp.nan))
        inside = (steps >= 1) & (steps <= by_step.shape[0])
        return jnp.append(by_step, jnp.nan)[jnp.where(inside, steps - 1, -1)]

    last = truth[:, context - 1 : context].astype(jnp.float32)
    return ErrorAhead(error(predicted[:, context:]), error(jnp.broadcast_to(last, future.shape)))
