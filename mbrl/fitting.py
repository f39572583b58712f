"""Fitting an ensemble to a growing data set: bootstrap, holdout, early stop per member."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mbrl.types import Array, Key, Metrics, Params

Loss = Callable[..., tuple[Array, Metrics]]
"""`(weights, batch [N, B, ...]) -> (losses [N], metrics)`; weight leaves lead with [N]. Losses that
are random take a key as well."""

Error = Callable[[Params, Any, Array], Array]
"""`(weights, batch [B, ...], mask [B]) -> [N]` error on held-out data, in nats (a log)."""


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """How long and on what each member trains."""

    batch_size: int = 256
    """Rows per member and step."""
    max_epochs: int = 50
    """Passes over the data per call at most."""
    patience: int = 5
    """Epochs without improvement after which a member stops."""
    min_improvement: float = 0.01
    """Decrease of the held-out error, in nats, that counts as improvement (1 %)."""
    min_batches: int = 20
    """Gradient steps per epoch at least; small data sets are passed several times."""
    bootstrap: bool = True
    """Give each member its own resample with replacement, fixed during the call."""
    averaging: float = 0.98
    """Decay per step of the average over weights that is evaluated and kept; 0 = none. It
    does what a decaying learning rate would, without knowing when a member will stop."""
    max_holdout: int = 1000
    """Held-out rows that are evaluated at most, evenly spread over all of them."""


class Progress(NamedTuple):
    """State of the epoch loop; `[N]` unless said otherwise."""

    epoch: Array  # []
    weights: Params
    average: Params
    opt_state: optax.OptState
    best_weights: Params
    best_error: Array
    stale: Array  # epochs since the last improvement
    loss: Array  # [] mean over the last epoch
    key: Key


class Fit(NamedTuple):
    """What `fit_members` returns; metrics are scalars."""

    weights: Params
    opt_state: optax.OptState
    error: Array
    metrics: Metrics


def select_members(mask: Array, new: Params, old: Params) -> Params:
    """Take member `n` from `new` where `mask[n]`, else from `old`; leaves [N, ...]."""
    return jax.tree.map(
        lambda a, b: jnp.where(mask.reshape((-1,) + (1,) * (a.ndim - 1)), a, b), new, old
    )


def spread_rows(mask: Array, num: int) -> tuple[Array, Array]:
    """Choose true entries of a mask [M], evenly spread over it where there are more than asked for.

    The first ones of a ring would be the oldest, of a policy that is long gone.

    Returns:
      Their indices [num] in order, padded, and which of them are real, bool [num].
    """
    count = mask.sum()
    place = jnp.nonzero(mask, size=mask.shape[0], fill_value=0)[0]
    index = jnp.arange(num)
    share = (index * (count / num)).astype(jnp.int32)
    return place[jnp.where(count > num, share, index)], index < count


def bootstrap_rows(key: Key, num_members: int, rows: Array, count: Array, resample: bool) -> Array:
    """Choose each member's data set among the first `count` of `rows` [M]: [N, M].

    Only the first `count` columns mean anything. The choice is made once per fit, so a
    member sees the same resample in every epoch.
    """
    shape = (num_members, rows.shape[0])
    if not resample:
        return jnp.broadcast_to(rows, shape)
    return rows[jax.random.randint(key, shape, 0, jnp.maximum(count, 1))]


def _shuffle(key: Key, members: Array, count: Array) -> Array:
    """Permute the first `count` columns of [N, M] in each row; the rest goes behind."""
    noise = jax.random.uniform(key, members.shape)
    noise = jnp.where(jnp.arange(members.shape[1]) < count, noise, 2.0)
    return jnp.take_along_axis(members, jnp.argsort(noise, axis=1), 1)


def fit_members(
    loss: Loss,
    error: Error | None,
    optimizer: optax.GradientTransformation,
    weights: Params,
    opt_state: optax.OptState,
    data: Any,
    train: Array,
    holdout: Array,
    key: Key,
    config: FitConfig,
    keyed: bool = False,
) -> Fit:
    """Train every member until its own held-out error stops improving; keep its best weights.

    All shapes are static: how much of the ring is filled only changes trip counts, so a
    growing data set never retraces.

    Args:
      loss: per-member loss of a minibatch.
      error: per-member error on held-out rows; None = train for `max_epochs` and keep the
        last weights.
      optimizer: elementwise or per-member; nothing may mix members.
      weights: leaves [N, ...].
      opt_state: its state.
      data: pytree of rows [M, ...].
      train: [M] bool, rows to learn from.
      holdout: [M] bool, rows to stop by. Without any, members run for `max_epochs`.
      key: consumed.
      config: see `FitConfig`.
      keyed: whether `loss` takes a key behind the batch, a new one at every step.

    Returns:
      A `Fit` with the best weights of every member; unchanged when `train` is empty.
    """
    num_members = jax.tree.leaves(weights)[0].shape[0]
    boot_key, epoch_key = jax.random.split(key)
    count = train.sum()
    rows, _ = spread_rows(train, train.shape[0])
    members = bootstrap_rows(boot_key, num_members, rows, count, config.bootstrap)
    held, held_mask = spread_rows(holdout, min(config.max_holdout, holdout.shape[0]))
    held_data = jax.tree.map(lambda x: x[held], data)
    known = held_mask.any() & (error is not None)
    num_batches = jnp.maximum(-(-count // config.batch_size), config.min_batches)

    def train_step(j: Array, carry: Any, order: Array, active: Array, *noise: Key) -> Any:
        weights, average, opt_state, total = carry
        columns = (j * config.batch_size + jnp.arange(config.batch_size)) % jnp.maximum(count, 1)
        batch = jax.tree.map(lambda x: x[order[:, columns]], data)

        def objective(weights: Params) -> tuple[Array, Array]:
            losses = loss(weights, batch, *(jax.random.fold_in(key, j) for key in noise))[0]
            return losses.sum(), losses.mean()  # a sum keeps the members' gradients apart

        grads, mean = jax.grad(objective, has_aux=True)(weights)
        updates, opt_state = optimizer.update(grads, opt_state, weights)
        weights = select_members(active, optax.apply_updates(weights, updates), weights)
        average = optax.incremental_update(weights, average, 1.0 - config.averaging)
        return weights, average, opt_state, total + mean

    def held_out_error(weights: Params) -> Array:
        if error is None:
            return jnp.zeros(num_members)
        return error(weights, held_data, held_mask.astype(jnp.float32))

    def epoch(p: Progress) -> Progress:
        shuffle_key, key = jax.random.split(p.key)
        shuffle_key, *noise = jax.random.split(shuffle_key) if keyed else (shuffle_key,)
        order = _shuffle(shuffle_key, members, count)
        active = p.stale < config.patience
        weights, average, opt_state, total = jax.lax.fori_loop(
            0,
            num_batches,
            lambda j, carry: train_step(j, carry, order, active, *noise),
            (p.weights, p.average, p.opt_state, jnp.zeros(())),
        )
        current = held_out_error(average)
        better = active & (current < p.best_error - config.min_improvement)
        better = jnp.where(known, better, active)
        return Progress(
            p.epoch + 1,
            weights,
            average,
            opt_state,
            select_members(better, average, p.best_weights),
            jnp.where(better, current, p.best_error),
            jnp.where(better, 0, p.stale + 1),
            total / jnp.maximum(num_batches, 1),
            key,
        )

    def running(p: Progress) -> Array:
        return (p.epoch < config.max_epochs) & jnp.any(p.stale < config.patience) & (count > 0)

    start = Progress(
        jnp.zeros((), jnp.int32),
        weights,
        weights,
        opt_state,
        weights,
        held_out_error(weights),
        jnp.zeros(num_members, jnp.int32),
        jnp.zeros(()),
        epoch_key,
    )
    end = jax.lax.while_loop(running, epoch, start)
    metrics = {
        "model/loss": end.loss,
        "model/holdout_error": end.best_error.mean(),
        "model/epochs": end.epoch.astype(jnp.float32),
        "model/transitions": (count + holdout.sum()).astype(jnp.float32),
    }
    return Fit(end.best_weights, end.opt_state, end.best_error, metrics)
