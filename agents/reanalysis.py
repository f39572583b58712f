"""What MuZero makes of records that an older policy left: targets that age, and a second search.

Reference: Schrittwieser et al. 2021 (arXiv:2104.06294); returns that shorten with age after Ye et
al. 2021 (arXiv:2111.00210), search values for old records after Wang et al. 2024
(arXiv:2403.00564).
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp

from mbrl import spaces
from mbrl.losses.value_equivalent import Targets, bootstrap_rows, unroll_targets
from mbrl.models.value_equivalent import ValueEquivalent, ValueEquivalentState
from mbrl.planning.search import Found, Search
from mbrl.types import Array, Box, EnvSpec, Key, Record

Config = Any
"""An `agents.muzero.MuZeroConfig`, which imports this module."""


def remember(spec: EnvSpec, found: Found) -> dict[str, Array]:
    """Return what is stored of a search: the improved policy, and what it expects."""
    kept = {"weights": found.weights, "value": jnp.sum(found.weights * found.qvalues, -1)}
    if isinstance(spec.action, Box):
        encode = jax.vmap(partial(spaces.encode_action, spec.action))
        kept["candidates"] = encode(cast(Array, found.candidates))
    return kept


def rows_of(tree: Any) -> Any:
    """Join the leading two axes of all leaves."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def num_reanalysed(config: Config) -> int:
    """Return how many sequences of a batch are searched again: its first ones."""
    return round(config.reanalyse * config.batch_size)


def reanalysed(
    spec: EnvSpec, config: Config, model: ValueEquivalent, find: Search,
    target: ValueEquivalentState, record: Record, key: Key,
) -> Record:  # fmt: skip
    """Search again, with the target network, where the first rows of a batch are unrolled."""
    rows, size = num_reanalysed(config), config.unroll + 1
    if not rows:
        return record
    init_key, search_key = jax.random.split(key)
    part = rows_of(jax.tree.map(lambda x: x[:rows, :size], record.obs))
    latent = model.mdp.init(target, init_key, part)
    fresh = remember(spec, find(target, search_key, latent, spaces.invalid_actions(spec, part)))

    def write(old: Array, new: Array) -> Array:
        return old.at[:rows, :size].set(new.reshape(rows, size, *new.shape[1:]))

    known = {name: record.extras[name] for name in fresh}
    return record._replace(extras={**record.extras, **jax.tree.map(write, known, fresh)})


def targets_of(
    spec: EnvSpec, config: Config, model: ValueEquivalent, target: ValueEquivalentState,
    updates: Array, record: Record, valid: Array,
) -> Targets:  # fmt: skip
    """Compute the targets of a batch [B, T, ...] that `reanalysed` has gone through."""
    steps, explored = jnp.full(valid.shape[0], config.td_steps), record.extras.get("explored")
    if config.td_age:  # rewards are those of whoever acted
        steps = steps - (updates - record.extras["born"][:, 0]) // config.td_age
    at_most = jnp.maximum(steps, 1)
    value = record.extras["value"]
    if config.bootstrap == "target":
        batch = jnp.arange(valid.shape[0])[:, None]
        read = jax.vmap(partial(bootstrap_rows, unroll=config.unroll))(record, at_most, explored)
        seen = rows_of(jax.tree.map(lambda x: x[batch, read], record.obs))
        latent = model.mdp.init(target, jax.random.key(0), seen)
        predicted = model.predictor.predict(target, latent)[1].reshape(read.shape)
        value = jnp.zeros(valid.shape).at[batch, read].set(predicted)
    gamma = -config.discount if spec.players == 2 else config.discount
    compute = partial(unroll_targets, unroll=config.unroll, n=config.td_steps, gamma=gamma)
    found = jax.vmap(compute)(record, valid, value, at_most, explored)
    if config.td_age and num_reanalysed(config):
        searched = jnp.arange(valid.shape[0]) < num_reanalysed(config)
        old = (steps < 1)[:, None] & (found.has_policy > 0)
        now = record.extras["value"][:, : config.unroll + 1]
        # An action of an old policy says nothing about the value of a better one.
        told = jnp.where(old, 1.0 * searched[:, None], found.has_value)
        found = found._replace(value=jnp.where(old, now, found.value), has_value=told)
    return jax.tree.map(jax.lax.stop_gradient, found)
