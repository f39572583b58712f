"""How imagined states move through an ensemble: trajectory sampling and its relatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mbrl import spaces
from mbrl.models.termination import TerminationState
from mbrl.normalization import Moments
from mbrl.types import MDP, Array, EnvSpec, Key, Outcome, Params, StepFn

Propagation = Literal["ts1", "tsinf", "mean", "moment_matching"]

_MAX_BLOCKS = 64


class Weights(NamedTuple):
    """Trainable parameters; every leaf has a leading [N], so members never mix."""

    network: Params
    logvar_low: Array
    logvar_high: Array


class EnsembleState(NamedTuple):
    """Parameters of the model as an `MDP`.

    Attributes:
      weights: trainable, leading [N].
      inputs: moments of the network input.
      targets: moments of the regression targets [D + 1]; the last is the reward.
      elites: int32 [M], members that predict; all of them unless selected.
      termination: model of the end of an episode.
      scale: [D + 1] factor of the predicted deviations; 1 until it is fitted to held-out rows.
    """

    weights: Weights
    inputs: Moments
    targets: Moments
    elites: Array
    termination: TerminationState
    scale: Array


class Prediction(NamedTuple):
    """Change and reward in standardized target units, `[..., D + 1]` each."""

    mean: Array
    var: Array


Measure = Callable[[EnsembleState, Prediction], Array]
"""`(state, predictions of all members [N, R, D + 1]) -> [R]`, what is reported as uncertainty."""

Step = tuple[Array, Array, Array]
"""Next flat observation [R, D], reward [R] and survival probability [R]."""


class Heads(NamedTuple):
    """The learned functions behind the `MDP`.

    Attributes:
      features: `(flat [..., D], action) -> [..., F]` raw network input.
      forward: `(state, weights, features [N, R, F]) -> Prediction [N, R, ...]`, by weights that
        may be those of the elites, with recalibrated variances.
      decode: `(state, flat, target [..., D + 1]) -> (next flat, reward)`.
      survival: see `TerminationModel`.
    """

    features: Callable[[Array, Array], Array]
    forward: Callable[[EnsembleState, Weights, Array], Prediction]
    decode: Callable[[EnsembleState, Array, Array], tuple[Array, Array]]
    survival: Callable[[TerminationState, Params, Array], Array]


def by_blocks(key: Key | None, members: int, rows: Any, apply: Callable[[Any], Any]) -> Any:
    """Hand every row to exactly one of the members, in one batched call.

    Rows are cut into equal contiguous blocks; a random permutation deals the blocks to
    the members, so that the member of each row is uniform. Without a key the deal is
    fixed by position, for rollouts that keep their member. Any number of rows will do.

    Args:
      key: consumed; None gives row `r` of `R` to member `r * N // R`.
      members: N.
      rows: pytree of [R, ...].
      apply: `[N, R', ...] -> pytree of [N, R', ...]`.

    Returns:
      Pytree of [R, ...]: row by row what its member made of it.
    """
    num_rows = jax.tree.leaves(rows)[0].shape[0]
    if key is None and num_rows % members:  # blocks of unequal size
        member = np.arange(num_rows) * members // num_rows
        column = np.arange(num_rows) - np.searchsorted(member, member)
        table = np.zeros((members, column.max() + 1), int)
        table[member, column] = np.arange(num_rows)
        served = apply(jax.tree.map(lambda x: x[table], rows))
        return jax.tree.map(lambda y: y[member, column], served)
    padded = -(-num_rows // members) * members
    sizes = [k * members for k in range(1, max(_MAX_BLOCKS // members, 1) + 1)]
    num_blocks = max(size for size in sizes if padded % size == 0)
    order = jnp.arange(num_blocks) if key is None else jax.random.permutation(key, num_blocks)

    def deal(x: Array) -> Array:
        if padded > num_rows:
            x = jnp.concatenate([x, jnp.broadcast_to(x[:1], (padded - num_rows, *x.shape[1:]))])
        x = x.reshape(num_blocks, -1, *x.shape[1:])
        return (x if key is None else x[order]).reshape(members, -1, *x.shape[2:])

    def collect(y: Array) -> Array:
        y = y.reshape(num_blocks, -1, *y.shape[2:])
        y = y if key is None else y[jnp.argsort(order)]
        return y.reshape(padded, *y.shape[2:])[:num_rows]

    return jax.tree.map(collect, apply(jax.tree.map(deal, rows)))


def ensemble_mdp(
    spec: EnvSpec,
    heads: Heads,
    num_members: int,
    num_elites: int,
    propagation: Propagation,
    uncertainty: Measure | None,
) -> MDP:
    """Present an ensemble as an `MDP` over flattened observations.

    TS1 deals the members anew at every step, TS-infinity keeps row `r` of `R` with member
    `r * N // R`, so rows must stay in place during a rollout; 'mean' and
    'moment_matching' use the mean, or one Gaussian of the same mean and variance, of the
    mixture of all members, row by row.

    Reference: Chua et al. 2018 (arXiv:1805.12114), section 5.

    Args:
      spec: spaces of the task.
      heads: the learned functions.
      num_members: N.
      num_elites: M, how many members predict.
      propagation: how rows choose members.
      uncertainty: what is reported as `Outcome.uncertainty`, of all members and not of the elites
        alone; it costs one evaluation of every member per row. None = nothing.

    Raises:
      ValueError: for an unknown propagation.
    """
    if propagation not in ("ts1", "tsinf", "mean", "moment_matching"):
        raise ValueError(
            f"propagation: got {propagation!r}, expected ts1, tsinf, mean or moment_matching"
        )

    def elites(state: EnsembleState, tree: Any) -> Any:
        return take_elites(state, tree, num_elites, num_members)

    def sampled(state: EnsembleState, key: Key, flat: Array, x: Array) -> Step:
        """One member per row."""
        deal_key, noise_key = jax.random.split(key)
        weights, ending = elites(state, (state.weights, state.termination.weights))

        def advance(rows: tuple[Array, Array]) -> Step:
            flat, x = rows
            out = heads.forward(state, weights, x)
            target = perturb(noise_key, out.mean, jnp.sqrt(out.var))
            flat, reward = heads.decode(state, flat, target)
            return flat, reward, heads.survival(state.termination, ending, flat)

        deal = deal_key if propagation == "ts1" else None
        return by_blocks(deal, num_elites, (flat, x), advance)

    def mixture(state: EnsembleState, key: Key, flat: Array, members: Prediction) -> Step:
        """All members per row."""
        out = elites(state, members)
        target = out.mean.mean(0)
        if propagation == "moment_matching":
            target = perturb(key, target, jnp.sqrt(out.var.mean(0) + out.mean.var(0)))
        flat, reward = heads.decode(state, flat, target)
        ending = elites(state, state.termination.weights)
        return flat, reward, mean_survival(heads, state, ending, flat)

    def step(state: EnsembleState, key: Key, flat: Array, action: Array) -> tuple[Array, Outcome]:
        x = heads.features(flat, action)
        alone = propagation in ("ts1", "tsinf")
        if alone and uncertainty is None:
            return _outcome(*sampled(state, key, flat, x), None)
        everyone = jnp.broadcast_to(x, (num_members, *x.shape))
        members = heads.forward(state, state.weights, everyone)
        out = sampled(state, key, flat, x) if alone else mixture(state, key, flat, members)
        return _outcome(*out, None if uncertainty is None else uncertainty(state, members))

    return flat_mdp(step, spec)


def flat_mdp(step: StepFn, spec: EnvSpec) -> MDP:
    """Complete a step over flattened observations [B, D] to an `MDP`."""

    def init(state: EnsembleState, key: Key, obs: Any = None, batch: int = 1) -> Array:
        del state, key, batch
        if obs is None:
            raise ValueError(
                "a learned model has no start states of its own: pass obs, or wrap it in "
                "mbrl.mdp.with_resets(mdp, start_obs)"
            )
        flat = spaces.flatten(spec.observation, obs)
        if flat.ndim != 2:
            raise ValueError(
                f"obs: got leading axes {flat.shape[:-1]}, expected one, the batch [B]; add it "
                "with obs[None], or map over the others with jax.vmap"
            )
        return flat

    def observe(state: EnsembleState, flat: Array) -> Any:
        del state
        return spaces.unflatten(spec.observation, flat)

    return MDP(init, step, observe, spec)


def take_elites(state: EnsembleState, tree: Any, num_elites: int, num_members: int) -> Any:
    """Select the members that predict, from leaves [N, ...]."""
    if num_elites == num_members:
        return tree
    return jax.tree.map(lambda x: x[state.elites], tree)


def mean_survival(heads: Heads, state: EnsembleState, ending: Params, flat: Array) -> Array:
    """Return the mean over members `ending` of the chance that an episode goes on, [R]."""
    num = jax.tree.leaves(ending)[0].shape[0]
    rows = jnp.broadcast_to(flat, (num, *flat.shape))
    return heads.survival(state.termination, ending, rows).mean(0)


def _outcome(
    flat: Array, reward: Array, survival: Array, uncertainty: Array | None
) -> tuple[Array, Outcome]:
    return flat, Outcome(reward, survival, uncertainty)


def perturb(key: Key, mean: Array, std: Array) -> Array:
    """Add noise to the observation part of targets [..., D + 1]; the reward stays a mean."""
    noise = jax.random.normal(key, (*mean.shape[:-1], mean.shape[-1] - 1))
    noise = jnp.concatenate([noise, jnp.zeros_like(mean[..., :1])], -1)
    # Planners map this over plans that share the noise: XLA must not draw it for each.
    return mean + std * jax.lax.optimization_barrier(noise)
