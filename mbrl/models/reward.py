"""Reward models: an ensemble of scalar heads over (observation, action, next observation).

One model for every source of reward: fitted to observed rewards here, to comparisons by
whoever brings a loss over `RewardModel.score`, or replaced by a known function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy

from mbrl import normalization, spaces
from mbrl.losses.regression import (
    bounded_variance,
    gaussian_nll,
    symexp,
    symexp_bins,
    two_hot,
    two_hot_mean,
    two_hot_nll,
)
from mbrl.networks.core import ensemble, mlp
from mbrl.normalization import MIN_STD, Moments
from mbrl.types import Array, EnvSpec, Key, Metrics, Network, Params, Record, Transition
from mbrl.uncertainty import member_disagreement, total_variance

RewardKind = Literal["gaussian", "two_hot"]

LOGVAR_BOUNDS = (-10.0, 5.0)
"""Soft bounds of the Gaussian's log-variance, in standardized units."""

BIN_RANGE = 7.0
"""Symlog of the ratio of the largest bin to the width of those around 0: 1096."""


class RewardState(NamedTuple):
    """Parameters of a reward model; `reward = offset + scale * output`.

    Attributes:
      weights: trainable, leading [N] on every leaf.
      inputs: moments of the network input.
      offset: [], or [N, 1] for members with units of their own.
      scale: likewise; positive.
    """

    weights: Params
    inputs: Moments
    offset: Array
    scale: Array


class RewardEstimate(NamedTuple):
    """A predicted reward, all [B] and in units of reward.

    Attributes:
      mean: over members.
      aleatoric: standard deviation of the reward itself. Two-hot heads include the
        spacing of their bins.
      epistemic: standard deviation of the members' means.
    """

    mean: Array
    aleatoric: Array
    epistemic: Array


class RewardModel(NamedTuple):
    """An ensemble of reward heads. The model itself is a reward function of
    `mbrl.mdp.with_reward(mdp, model)`, whose parameters are a `RewardState`.

    Attributes:
      init: `(key) -> RewardState`.
      standardize: `(state, transition [M, ...], mask [M]) -> state`, refits the moments
        of the input and, unless `transition.reward` is None, the units of the output.
      loss: `(weights, state, transition [N, B, ...]) -> (losses [N], metrics)`.
      error: `(weights, state, transition [B, ...], mask [B]) -> [N]`, the logarithm of
        the held-out error (root mean square, or mean divergence of two-hot heads): a
        decrease of 0.01 is an improvement by 1 %.
      score: `(weights, state, transition [N, B, ...]) -> [N, B]` rewards of the members,
        differentiable. Takes any number of axes in place of B (segments of trajectories)
        and reads neither reward nor termination, which may be None.
      predict: `(state, obs, action, next_obs [B, ...]) -> RewardEstimate`.
    """

    init: Callable[[Key], RewardState]
    standardize: Callable[[RewardState, Transition, Array], RewardState]
    loss: Callable[[Params, RewardState, Transition], tuple[Array, Metrics]]
    error: Callable[[Params, RewardState, Transition, Array], Array]
    score: Callable[[Params, RewardState, Transition], Array]
    predict: Callable[[RewardState, Any, Array, Any], RewardEstimate]

    def __call__(
        self, params: RewardState, obs: Any, action: Array, next_obs: Any
    ) -> tuple[Array, Array]:
        """Return the mean reward [B] and its epistemic standard deviation [B]."""
        estimate = self.predict(params, obs, action, next_obs)
        return estimate.mean, estimate.epistemic


class _Head(NamedTuple):
    """What a network output [..., size] means, in standardized units of reward.

    Attributes:
      units: `(reward [M], mask [M]) -> (offset [], scale [])`.
      moments: `(out) -> (mean [...], variance [...])`.
      nll: `(out, target [...]) -> [...]` loss.
      error: `(out, target [B], weight [B]) -> [N]` log of the weighted mean error.
    """

    size: int
    units: Callable[[Array, Array], tuple[Array, Array]]
    moments: Callable[[Array], tuple[Array, Array]]
    nll: Callable[[Array, Array], Array]
    error: Callable[[Array, Array, Array], Array]


def _gaussian_head() -> _Head:
    def units(reward: Array, mask: Array) -> tuple[Array, Array]:
        moments = normalization.fit(reward, mask, feature_ndim=0)
        return moments.mean, moments.std

    def moments(out: Array) -> tuple[Array, Array]:
        return out[..., 0], bounded_variance(out[..., 1], *LOGVAR_BOUNDS)

    def nll(out: Array, target: Array) -> Array:
        # Plans are made of means: they get the gradient of a squared error, else a rare
        # reward is first explained as noise and then ignored.
        logvar = jnp.log(bounded_variance(out[..., 1], *LOGVAR_BOUNDS))
        return gaussian_nll(out[..., 0], logvar, target, beta=1.0)

    def error(out: Array, target: Array, weight: Array) -> Array:
        return 0.5 * jnp.log(jnp.sum(jnp.square(out[..., 0] - target) * weight, 1) + 1e-8)

    return _Head(2, units, moments, nll, error)


def _two_hot_head(num_bins: int) -> _Head:
    bins = symexp_bins(num_bins, BIN_RANGE) / symexp(jnp.float32(BIN_RANGE))

    def units(reward: Array, mask: Array) -> tuple[Array, Array]:
        # The outermost bins are the largest magnitude in the data: no probability is
        # wasted on, and no mean disturbed by, rewards that the task does not have.
        largest = jnp.max(jnp.where(mask, jnp.abs(reward), 0.0), initial=0.0)
        return jnp.zeros(()), jnp.where(largest < MIN_STD, 1.0, largest)

    def moments(out: Array) -> tuple[Array, Array]:
        mean = two_hot_mean(out, bins)
        spread = jnp.square(bins - mean[..., None])
        return mean, jnp.sum(jax.nn.softmax(out, -1) * spread, -1)

    def nll(out: Array, target: Array) -> Array:
        return two_hot_nll(out, target, bins)

    def error(out: Array, target: Array, weight: Array) -> Array:
        # Less the entropy of the target, which no prediction can remove: what remains is
        # 0 for a perfect one, and its logarithm tells progress on rare rewards.
        hot = two_hot(target, bins)
        divergence = nll(out, target) + xlogy(hot, hot).sum(-1)
        return jnp.log(jnp.maximum(jnp.sum(divergence * weight, 1), 0.0) + 1e-6)

    return _Head(num_bins, units, moments, nll, error)


def reward_model(
    spec: EnvSpec,
    num_members: int = 5,
    hidden: Sequence[int] = (64, 64),
    kind: RewardKind = "gaussian",
    network: Callable[[int], Network] | None = None,
    dtype: str = "float32",
    num_bins: int = 255,
) -> RewardModel:
    """Build an ensemble of reward heads.

    The networks see the observation, the action and the *change* of the observation, each
    standardized: a small change (a velocity, a bump) would drown in the next observation.

    Args:
      spec: spaces of the task; any observation that `mbrl.spaces.flatten` accepts.
      num_members: N.
      hidden: widths of the default network (ignored with `network`).
      kind: 'gaussian' = mean and variance, extrapolates. 'two_hot' = probabilities of
        bins whose spacing grows with the reward, for sparse and heavy-tailed rewards;
        never predicts beyond the largest magnitude that it was standardized with.
      network: `(out) -> Network`, one member; Linen, Haiku, NNX or plain functions.
      dtype: of the matrix products in the default network.
      num_bins: of 'two_hot'; odd, so that one of them is exactly 0.

    Returns:
      A `RewardModel` with N members.

    Raises:
      ValueError: for an unknown `kind` or an even `num_bins`.

    Reference: Chua et al. 2018 (arXiv:1805.12114) for the ensemble; Hafner et al. 2023
    (arXiv:2301.04104) for the two-hot head; Seitzer et al. 2022 (arXiv:2203.09168) for
    the weighting of the Gaussian likelihood.
    """
    head = _make_head(kind, num_bins)
    make = network or _default_network(hidden, kind, dtype)
    net = ensemble(make(head.size), num_members)
    num_obs = spaces.flat_size(spec.observation)
    num_inputs = 2 * num_obs + spaces.flat_size(spec.action)

    def features(obs: Any, action: Array, next_obs: Any) -> Array:
        before = spaces.flatten(spec.observation, obs)
        change = spaces.flatten(spec.observation, next_obs) - before
        return jnp.concatenate([before, spaces.encode_action(spec.action, action), change], -1)

    def forward(weights: Params, inputs: Moments, x: Array) -> Array:
        """Map raw features [N, ..., F] to outputs [N, ..., size]."""
        rows = normalization.normalize(inputs, x).reshape(x.shape[0], -1, num_inputs)
        return net.apply(weights, rows).reshape(*x.shape[:-1], head.size)

    def init(key: Key) -> RewardState:
        weights = net.init(key, jnp.zeros((num_members, 1, num_inputs)))
        units = jnp.zeros(()), jnp.ones(())
        return RewardState(weights, normalization.empty((num_inputs,)), *units)

    def standardize(state: RewardState, data: Transition, mask: Array) -> RewardState:
        x = features(data.obs, data.action, data.next_obs)
        state = state._replace(inputs=normalization.fit(x, mask))
        if data.reward is None:
            return state
        offset, scale = head.units(data.reward, mask)
        return state._replace(offset=offset, scale=scale)

    def loss(weights: Params, state: RewardState, batch: Transition) -> tuple[Array, Metrics]:
        out = forward(weights, state.inputs, features(batch.obs, batch.action, batch.next_obs))
        nll = head.nll(out, (batch.reward - state.offset) / state.scale)
        return nll.mean(1), {"reward/nll": nll.mean()}

    def everyone(state: RewardState, weights: Params, obs: Any, action: Array, after: Any) -> Array:
        """Ask every member about the same rows: [N, B, size]."""
        x = features(obs, action, after)
        return forward(weights, state.inputs, jnp.broadcast_to(x, (num_members, *x.shape)))

    def error(weights: Params, state: RewardState, batch: Transition, mask: Array) -> Array:
        out = everyone(state, weights, batch.obs, batch.action, batch.next_obs)
        weight = mask / jnp.maximum(mask.sum(), 1.0)
        return head.error(out, (batch.reward - state.offset) / state.scale, weight)

    def score(weights: Params, state: RewardState, batch: Transition) -> Array:
        x = features(batch.obs, batch.action, batch.next_obs)
        mean = head.moments(forward(weights, state.inputs, x))[0]
        return _per_row(state.offset, mean) + _per_row(state.scale, mean) * mean

    def predict(state: RewardState, obs: Any, action: Array, next_obs: Any) -> RewardEstimate:
        mean, variance = head.moments(everyone(state, state.weights, obs, action, next_obs))
        means = state.offset + state.scale * mean
        split = total_variance(means, jnp.square(state.scale) * variance)
        # A floor: the slope of the root at 0 would be infinite for gradient planners.
        aleatoric = jnp.sqrt(jnp.maximum(split.aleatoric, MIN_STD**2))
        return RewardEstimate(means.mean(0), aleatoric, member_disagreement(means))

    return RewardModel(init, standardize, loss, error, score, predict)


def _per_row(units: Array, like: Array) -> Array:
    """Reshape `[]` or `[N, 1]` so that it broadcasts against [N, ...]."""
    return units.reshape(units.shape[0], *(1,) * (like.ndim - 1)) if units.ndim else units


def _make_head(kind: RewardKind, num_bins: int) -> _Head:
    if kind not in ("gaussian", "two_hot"):
        raise ValueError(
            f"kind: got {kind!r}, expected 'gaussian' or 'two_hot'; a known reward function "
            "needs no model: wrap it in given_reward(fn)"
        )
    if num_bins % 2 == 0 or num_bins < 3:
        raise ValueError(f"num_bins: got {num_bins}, expected an odd number of at least 3")
    return _gaussian_head() if kind == "gaussian" else _two_hot_head(num_bins)


def _default_network(
    hidden: Sequence[int], kind: RewardKind, dtype: str
) -> Callable[[int], Network]:
    # Equal probabilities of symmetric bins have the mean 0; random ones would start with
    # rewards of the size of the largest.
    out_scale = 0.0 if kind == "two_hot" else 1.0
    return lambda out: mlp(hidden, out, dtype=dtype, out_scale=out_scale)


def given_reward(
    fn: Callable[[Any, Array, Any], Array],
) -> Callable[[Params, Any, Array, Any], tuple[Array, Array]]:
    """Turn a known reward into a reward function of `mbrl.mdp.with_reward`.

    Args:
      fn: `(obs, action, next_obs) -> reward [B]`, leaves [B, ...] in the units of the
        environment.

    Returns:
      `(params, obs, action, next_obs) -> (reward [B], zeros [B])`; `params` are not used.

    Raises:
      ValueError: when called, if the reward is not one number per row.
    """

    def reward(params: Params, obs: Any, action: Array, next_obs: Any) -> tuple[Array, Array]:
        del params
        value = jnp.asarray(fn(obs, action, next_obs), jnp.float32)
        batch = jax.tree.leaves(action)[0].shape[:1]
        if value.shape != batch:
            raise ValueError(
                f"reward function: got shape {value.shape}, expected {batch}, one number per "
                "row; reduce over the feature axes, for example with .sum(-1) or [..., 0]"
            )
        return value, jnp.zeros(batch)

    return reward


def relabeled(record: Record, fn: Callable[[Any, Array, Any], Array]) -> Record:
    """Replace the rewards of sequences by a known one.

    Args:
      record: [B, T, ...] sequences that may cross the borders of episodes.
      fn: as in `given_reward`.

    Returns:
      The records with the reward of the transition that led to each: 0 for the first of a
      sequence and of an episode, which none is known to have led to.

    Raises:
      ValueError: as in `given_reward`.
    """
    size = record.reward[:, 1:].shape

    def rows(tree: Any, part: slice) -> Any:
        return jax.tree.map(lambda x: x[:, part].reshape(-1, *x.shape[2:]), tree)

    old, new = slice(None, -1), slice(1, None)
    obs, action, next_obs = rows(record.obs, old), rows(record.action, old), rows(record.obs, new)
    reward, _ = given_reward(fn)(None, obs, action, next_obs)
    reward = jnp.where(record.is_first[:, 1:], 0.0, reward.reshape(size))
    return record._replace(reward=jnp.pad(reward, ((0, 0), (1, 0))))
