"""Probabilistic ensemble: learned dynamics, reward and termination as an `MDP` (PETS)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from mbrl import normalization, spaces
from mbrl.losses.regression import binary_nll, bound_logvar, gaussian_nll
from mbrl.networks.core import ensemble, mlp
from mbrl.normalization import Moments
from mbrl.types import (
    MDP,
    Array,
    EnvSpec,
    Key,
    Metrics,
    Network,
    Outcome,
    Params,
    Transition,
)
from mbrl.uncertainty import member_disagreement

Propagation = Literal["ts1", "tsinf", "mean", "moment_matching"]
Target = Literal["delta", "absolute", "angle"]
"""How a dimension of the next observation is predicted: its change, itself, or as an
angle in radians (input as sine and cosine, change wrapped to [-pi, pi))."""

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
    """

    weights: Weights
    inputs: Moments
    targets: Moments
    elites: Array


class Prediction(NamedTuple):
    """Network output in standardized target units, `[..., D + 1]`, and a logit `[...]`."""

    mean: Array
    logvar: Array
    terminal_logit: Array


class ProbabilisticEnsemble(NamedTuple):
    """A model of observation change, reward and termination, learned from transitions.

    Attributes:
      init: `(key) -> EnsembleState`.
      standardize: `(state, transition [M, ...], mask [M]) -> state`, refits the moments.
      loss: `(weights, state, transition [N, B, ...]) -> [N]`, the members' own losses.
      error: `(weights, state, transition [B, ...], mask [B]) -> [N]`, held-out error.
      predict: `(state, obs, action [B, ...]) -> Prediction` with a leading [N].
      mdp: `(propagation, uncertainty) -> MDP` whose parameters are `EnsembleState`.
    """

    init: Callable[[Key], EnsembleState]
    standardize: Callable[[EnsembleState, Transition, Array], EnsembleState]
    loss: Callable[[Weights, EnsembleState, Transition], tuple[Array, Metrics]]
    error: Callable[[Weights, EnsembleState, Transition, Array], Array]
    predict: Callable[[EnsembleState, Any, Array], Prediction]
    mdp: Callable[..., MDP]


def wrap_angle(x: Array) -> Array:
    """Map radians to [-pi, pi)."""
    return jnp.mod(x + jnp.pi, 2.0 * jnp.pi) - jnp.pi


def _targets(target: Target | Sequence[Target], size: int) -> list[Target]:
    targets: list[Target] = [target] * size if isinstance(target, str) else list(target)
    if len(targets) != size or not set(targets) <= {"delta", "absolute", "angle"}:
        raise ValueError(
            f"targets: got {target!r}, expected one of delta, absolute, angle, or a sequence "
            f"of {size} of them, one per dimension of the flattened observation"
        )
    return targets


def probabilistic_ensemble(
    spec: EnvSpec,
    num_members: int = 5,
    hidden: Sequence[int] = (200, 200, 200, 200),
    targets: Target | Sequence[Target] = "delta",
    num_elites: int | None = None,
    learn_bounds: bool = True,
    network: Callable[[int], Network] | None = None,
    dtype: str = "float32",
) -> ProbabilisticEnsemble:
    """Build an ensemble of Gaussian networks over flattened observations.

    Reference: Chua et al. 2018 (arXiv:1805.12114).

    Args:
      spec: spaces of the task; any observation that `mbrl.spaces.flatten` accepts.
      num_members: N.
      hidden: widths of the default network (ignored with `network`).
      targets: how each dimension of the next observation is predicted.
      num_elites: predict with the best M members on held-out data; None = all.
      learn_bounds: learn the log-variance bounds, else keep them at -10 and 0.5.
      network: `(out) -> Network`, one member; Linen, Haiku, NNX or plain functions.
      dtype: of the matrix products in the default network.

    Raises:
      ValueError: for `num_elites` outside 1..N or unknown `targets`.
    """
    size = spaces.flat_size(spec.observation)
    kinds = _targets(targets, size)
    num_elites = num_members if num_elites is None else num_elites
    if not 1 <= num_elites <= num_members:
        raise ValueError(
            f"num_elites: got {num_elites}, expected 1 to num_members = {num_members}"
        )
    angle = jnp.array([k == "angle" for k in kinds])
    relative = jnp.array([k != "absolute" for k in kinds])
    angle_index = [i for i, k in enumerate(kinds) if k == "angle"]
    num_inputs = size + len(angle_index) + spaces.flat_size(spec.action)
    num_targets = size + 1
    make = network or (lambda out: mlp(hidden, out, dtype=dtype))
    net = ensemble(make(2 * num_targets + 1), num_members)

    def features(flat: Array, action: Array) -> Array:
        # An angle enters as its sine in place, its cosine behind.
        cosines = [jnp.cos(flat[..., i : i + 1]) for i in angle_index]
        flat = jnp.where(angle, jnp.sin(flat), flat)
        return jnp.concatenate([flat, *cosines, spaces.encode_action(spec.action, action)], -1)

    def regression(data: Transition) -> tuple[Array, Array]:
        """Return raw network inputs [..., F] and targets [..., D + 1] of transitions."""
        obs = spaces.flatten(spec.observation, data.obs)
        delta = spaces.flatten(spec.observation, data.next_obs) - jnp.where(relative, obs, 0.0)
        delta = jnp.where(angle, wrap_angle(delta), delta)
        target = jnp.concatenate([delta, data.reward[..., None]], -1)
        return features(obs, data.action), target

    def init(key: Key) -> EnsembleState:
        def bounds(value: float) -> Array:
            return jnp.full((num_members, 1, num_targets), value)

        weights = net.init(key, jnp.zeros((num_members, 1, num_inputs)))
        return EnsembleState(
            Weights(weights, bounds(-10.0), bounds(0.5)),
            normalization.empty((num_inputs,)),
            normalization.empty((num_targets,)),
            jnp.arange(num_elites),
        )

    def standardize(state: EnsembleState, data: Transition, mask: Array) -> EnsembleState:
        x, y = regression(data)
        return state._replace(inputs=normalization.fit(x, mask), targets=normalization.fit(y, mask))

    def forward(weights: Weights, inputs: Moments, x: Array) -> Prediction:
        """Map raw features [N, R, F] to predictions [N, R, ...]."""
        out = net.apply(weights.network, normalization.normalize(inputs, x))
        mean, logvar, logit = jnp.split(out, [num_targets, 2 * num_targets], -1)
        low, high = weights.logvar_low, weights.logvar_high
        if not learn_bounds:
            low, high = jax.lax.stop_gradient((low, high))
        return Prediction(mean, bound_logvar(logvar, low, high), logit[..., 0])

    def loss(
        weights: Weights, state: EnsembleState, batch: Transition
    ) -> tuple[Array, Metrics]:
        x, y = regression(batch)
        out = forward(weights, state.inputs, x)
        target = normalization.normalize(state.targets, y)
        nll = gaussian_nll(out.mean, out.logvar, target).mean((1, 2))
        terminal = binary_nll(out.terminal_logit, batch.is_terminal.astype(jnp.float32)).mean(1)
        spread = (weights.logvar_high - weights.logvar_low).sum((1, 2))
        metrics = {"model/nll": nll.mean(), "model/terminal_nll": terminal.mean()}
        return nll + terminal + 0.01 * spread, metrics

    def error(
        weights: Weights, state: EnsembleState, batch: Transition, mask: Array
    ) -> Array:
        x, y = regression(batch)
        out = forward(weights, state.inputs, jnp.broadcast_to(x, (num_members, *x.shape)))
        target = normalization.normalize(state.targets, y)
        squared = jnp.mean((out.mean - target) ** 2, -1)
        terminal = binary_nll(out.terminal_logit, batch.is_terminal.astype(jnp.float32))
        weight = mask / jnp.maximum(mask.sum(), 1.0)
        return jnp.sum((squared + terminal) * weight, 1)

    def predict(state: EnsembleState, obs: Any, action: Array) -> Prediction:
        x = features(spaces.flatten(spec.observation, obs), action)
        x = jnp.broadcast_to(x, (num_members, *x.shape))
        return forward(state.weights, state.inputs, x)

    def next_obs(state: EnsembleState, obs: Array, target: Array) -> tuple[Array, Array]:
        """Undo standardization: flat next observation [..., D] and reward [...]."""
        target = normalization.denormalize(state.targets, target)
        flat = target[..., :-1] + jnp.where(relative, obs, 0.0)
        return jnp.where(angle, wrap_angle(flat), flat), target[..., -1]

    def mdp(propagation: Propagation = "ts1", uncertainty: bool = True) -> MDP:
        return _as_mdp(spec, features, forward, next_obs, num_elites, propagation, uncertainty)

    return ProbabilisticEnsemble(init, standardize, loss, error, predict, mdp)


def _elite(state: EnsembleState, num_elites: int) -> Weights:
    if state.weights.logvar_low.shape[0] == num_elites:
        return state.weights
    return jax.tree.map(lambda x: x[state.elites], state.weights)


def by_blocks(key: Key | None, members: int, x: Array, apply: Callable[[Array], Any]) -> Any:
    """Apply member networks to rows, each row by exactly one member, in one batched call.

    Rows are cut into equal contiguous blocks; a random permutation deals the blocks to
    the members, so that the member of every row is uniform. Without a key the deal is
    fixed by position, for rollouts that keep their member.

    Args:
      key: consumed; None deals in order.
      members: N.
      x: [R, F], any R.
      apply: `[N, R', F] -> pytree of [N, R', ...]`.

    Returns:
      Pytree of [R, ...], row by row what its member said.
    """
    rows = x.shape[0]
    padded = -(-rows // members) * members
    x = jnp.concatenate([x, jnp.broadcast_to(x[:1], (padded - rows, *x.shape[1:]))])
    num_blocks = max(
        k * members
        for k in range(1, max(_MAX_BLOCKS // members, 1) + 1)
        if padded % (k * members) == 0
    )
    order = jnp.arange(num_blocks) if key is None else jax.random.permutation(key, num_blocks)
    blocks = x.reshape(num_blocks, -1, x.shape[-1])
    blocks = blocks if key is None else blocks[order]
    out = apply(blocks.reshape(members, -1, x.shape[-1]))

    def undo(y: Array) -> Array:
        y = y.reshape(num_blocks, -1, *y.shape[2:])
        y = y if key is None else jnp.zeros_like(y).at[order].set(y, unique_indices=True)
        return y.reshape(padded, *y.shape[2:])[:rows]

    return jax.tree.map(undo, out)


def _as_mdp(
    spec: EnvSpec,
    features: Callable[[Any, Array], Array],
    forward: Callable[[Weights, Moments, Array], Prediction],
    next_obs: Callable[[EnsembleState, Array, Array], tuple[Array, Array]],
    num_elites: int,
    propagation: Propagation,
    uncertainty: bool,
) -> MDP:
    """Present the ensemble as an `MDP` over flattened observations.

    TS1 deals the members anew at every step, TS-infinity keeps row `r` of `R` with member
    `r * N // R`, 'mean' and 'moment_matching' use the mean, or one Gaussian of the same
    mean and variance, of the mixture of all members.
    """
    if propagation not in ("ts1", "tsinf", "mean", "moment_matching"):
        raise ValueError(
            f"propagation: got {propagation!r}, expected ts1, tsinf, mean or moment_matching"
        )
    sampled = propagation in ("ts1", "tsinf")

    def init(state: EnsembleState, key: Key, obs: Any = None, batch: int = 1) -> Array:
        del state, key, batch
        if obs is None:
            raise ValueError(
                "a learned model has no start states of its own: pass obs, or wrap it in "
                "mbrl.mdp.with_resets(mdp, start_obs)"
            )
        return spaces.flatten(spec.observation, obs)

    def everyone(state: EnsembleState, x: Array) -> Prediction:
        num_members = state.weights.logvar_low.shape[0]
        return forward(state.weights, state.inputs, jnp.broadcast_to(x, (num_members, *x.shape)))

    def one_each(state: EnsembleState, key: Key, x: Array) -> Mixture:
        weights = _elite(state, num_elites)
        deal = key if propagation == "ts1" else None
        out = by_blocks(deal, num_elites, x, lambda rows: forward(weights, state.inputs, rows))
        return Mixture(out.mean, jnp.exp(out.logvar), jax.nn.sigmoid(-out.terminal_logit))

    def step(state: EnsembleState, key: Key, obs: Array, action: Array) -> tuple[Array, Outcome]:
        deal_key, noise_key = jax.random.split(key)
        x = features(obs, action)
        members = everyone(state, x) if uncertainty or not sampled else None
        out = one_each(state, deal_key, x) if sampled else _mixture(state, members)
        target = out.mean
        if propagation != "mean":
            noise = jax.random.normal(noise_key, obs.shape)
            target = target.at[..., :-1].add(jnp.sqrt(out.var[..., :-1]) * noise)
        flat, reward = next_obs(state, obs, target)
        spread = _disagreement(state, members) if uncertainty else None
        return flat, Outcome(reward, out.survival, spread)

    def observe(state: EnsembleState, obs: Array) -> Any:
        del state
        return spaces.unflatten(spec.observation, obs)

    return MDP(init, step, observe, spec)


class Mixture(NamedTuple):
    """What a row is predicted to become: moments [R, D + 1] and survival [R]."""

    mean: Array
    var: Array
    survival: Array


def _mixture(state: EnsembleState, members: Prediction) -> Mixture:
    """Match the first two moments of the elites' mixture, row by row."""
    elite = jax.tree.map(lambda y: y[state.elites], members)
    var = jnp.exp(elite.logvar).mean(0) + elite.mean.var(0)
    return Mixture(elite.mean.mean(0), var, jax.nn.sigmoid(-elite.terminal_logit).mean(0))


def _disagreement(state: EnsembleState, members: Prediction) -> Array:
    """Return [R] root-mean-square member deviation, in units of reward.

    Relative to the spread of each target in the data, times the spread of the reward, so
    that one coefficient means the same in every environment.
    """
    relative = jnp.sqrt(jnp.mean(member_disagreement(members.mean) ** 2, -1))
    return relative * state.targets.std[-1]
