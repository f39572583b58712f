"""The two searches of mctx as one function each, safe against models that are not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mctx

from mbrl.planning.config import SearchConfig
from mbrl.types import Array, Key, State

MASKED = -1e9
"""Logit of an action that does not exist: finite, so that no softmax is NaN."""
HUGE = 1e30
"""Beyond, sums and differences of values overflow."""

_BROKEN = -1e6  # score of an action whose outcome is not a number, above that of a masked one

# Type checkers read neither chex dataclasses nor the array types of chex.
_mctx: Any = mctx


class Node(NamedTuple):
    """What mctx stores per node, leaves [B, ...].

    Attributes:
      state: of the model.
      actions: [K, A] candidates in `[-1, 1]`; None for Discrete.
      value: predicted.
      scale: largest reward or value on the way from the root, its sign left out.
      broken: the step that led here left the finite numbers.
    """

    state: State
    actions: Array | None
    value: Array
    scale: Array
    broken: Array


def avoid_broken(qtransform: Callable[..., Array]) -> Callable[[Any, Array], Array]:
    """Keep broken children out of the scale of their siblings, and out of any choice.

    They stand in at the mean of the intact ones that were visited, which extends no range, and
    get a score of their own afterwards.
    """

    def transform(tree: Any, index: Array) -> Array:
        child, visits = tree.children_index[index], tree.children_visits[index]
        broken = (child >= 0) & tree.embeddings.broken[child]
        intact = (visits > 0) & ~broken
        total = jnp.sum(jnp.where(intact, tree.qvalues(index), 0.0))
        mean = jnp.where(intact.any(), total / jnp.maximum(intact.sum(), 1), tree.raw_values[index])
        row = {
            name: getattr(tree, name)[index][None]
            for name in (
                "node_values", "raw_values", "children_prior_logits", "children_values",
                "children_visits",
            )
        }  # fmt: skip
        alone = tree.replace(
            children_rewards=jnp.where(broken, mean, tree.children_rewards[index])[None],
            children_discounts=jnp.where(broken, 0.0, tree.children_discounts[index])[None],
            **row,
        )
        return jnp.where(broken, _BROKEN, qtransform(alone, jnp.zeros((), jnp.int32)))

    return transform


def _choose(key: Key, summary: Any, usable: Array, temperature: Array) -> tuple[Array, Array]:
    """Pick by visits [B, A] at a temperature [B]; at 0 the most visited, the best if several."""
    visits = jnp.where(usable, summary.visit_counts, 0.0)
    visits = jnp.where(visits.sum(-1, keepdims=True) > 0, visits, summary.visit_counts)
    most = visits == visits.max(-1, keepdims=True)
    greedy = jnp.argmax(jnp.where(most, summary.qvalues, -jnp.inf), -1)
    logits = jnp.log(visits / visits.max(-1, keepdims=True))
    drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6)[:, None])
    weights = visits / visits.sum(-1, keepdims=True)
    return jnp.where(temperature > 0.0, drawn, greedy), weights


def gumbel(
    config: SearchConfig, key: Key, root: Any, common: Any, noise: Array, temperature: Array
) -> tuple[Array, Array, Any]:
    """Run Gumbel MuZero: actions [B], weights [B, A] and the tree."""
    del temperature
    num = root.prior_logits.shape[-1]
    completed = functools.partial(
        _mctx.qtransform_completed_by_mix_value,
        value_scale=config.value_scale,
        maxvisit_init=config.maxvisit_init,
    )
    out = _mctx.gumbel_muzero_policy(
        rng_key=key,
        root=root,
        qtransform=avoid_broken(completed),
        max_num_considered_actions=min(config.max_considered, config.simulations, num),
        gumbel_scale=noise[:, None],
        **common,
    )
    return out.action, out.action_weights, out.search_tree


def puct(
    config: SearchConfig, key: Key, root: Any, common: Any, noise: Array, temperature: Array
) -> tuple[Array, Array, Any]:
    """Run MuZero's search: actions [B], weights [B, A] and the tree.

    mctx breaks ties, of which there are many, by draws from the key that serves for everything
    else; with a constant one they are broken alike in every search. Noise and choice are ours.
    """
    noise_key, choice_key = jax.random.split(key)
    banned, share = common["invalid_actions"], config.dirichlet_fraction * noise[:, None]
    alpha = jnp.full(banned.shape[-1], config.dirichlet_alpha)
    drawn = jax.random.dirichlet(noise_key, alpha, banned.shape[:1])
    probs = (1.0 - share) * jax.nn.softmax(root.prior_logits) + share * drawn
    noisy = jnp.log(jnp.maximum(probs, jnp.finfo(probs.dtype).tiny))
    out = _mctx.muzero_policy(
        rng_key=jax.random.key(0),
        root=root.replace(prior_logits=jnp.where(banned, MASKED, noisy)),
        qtransform=avoid_broken(_mctx.qtransform_by_parent_and_siblings),
        dirichlet_fraction=0.0,
        pb_c_init=config.pb_c_init,
        pb_c_base=config.pb_c_base,
        **common,
    )
    tree = out.search_tree
    summary, child = tree.summary(), tree.children_index[:, tree.ROOT_INDEX]
    broken = (child >= 0) & jnp.take_along_axis(tree.embeddings.broken, jnp.maximum(child, 0), 1)
    temperature = jnp.where(noise > 0.0, temperature, 0.0)
    usable = ~(broken | banned)
    action, weights = _choose(choice_key, summary, usable, temperature)
    return action, weights, tree
