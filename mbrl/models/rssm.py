"""Recurrent state-space model: a latent world model learned from sequences, as an `MDP`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mbrl import normalization, spaces
from mbrl.losses.regression import binary_nll, two_hot_nll
from mbrl.losses.world_model import balanced_kl
from mbrl.models.rssm_networks import (
    NUM_BINS,
    RSSMConfig,
    RSSMNetworks,
    Size,
    Stochastic,
    rssm_networks,
    rssm_size,
    stochastic,
)
from mbrl.networks import observation
from mbrl.networks.core import DOTS
from mbrl.normalization import Moments
from mbrl.two_hot import symexp_bins, two_hot_mean
from mbrl.types import MDP, Array, Box, EnvSpec, Key, Metrics, Outcome, Params, Record
from mbrl.uncertainty import finite_sqrt, member_disagreement

__all__ = [
    "NUM_BINS",
    "RSSM",
    "Latent",
    "Learned",
    "RSSMConfig",
    "RSSMState",
    "Size",
    "Statistics",
    "recalled",
    "rssm",
    "rssm_size",
]


REPRESENTATION = 0.1
"""Weight of the posterior's side of the divergence, beside 1 for the prior's."""


class Latent(NamedTuple):
    """State of the model.

    Attributes:
      deter: [B, D] recurrent state.
      stoch: [B, Z] sample of the stochastic latents; categories are one-hot, S * C numbers.
    """

    deter: Array
    stoch: Array


class Statistics(NamedTuple):
    """Running moments of the data.

    Attributes:
      observations: [D] of everything that is observed and no image.
      rewards: scalar; their deviation is the unit of uncertainty.
    """

    observations: Moments
    rewards: Moments


class RSSMState(NamedTuple):
    """Parameters of the model as an `MDP`.

    Attributes:
      weights: dict of trainable parameters.
      statistics: what inputs are standardized by.
    """

    weights: Params
    statistics: Statistics


class Learned(NamedTuple):
    """What `RSSM.loss` finds on the way.

    Attributes:
      latent: [B, T] posterior of every record.
      metrics: scalars.
    """

    latent: Latent
    metrics: Metrics


class RSSM(NamedTuple):
    """A world model that filters while acting and imagines through its `mdp`.

    Attributes:
      init: `(key) -> RSSMState`.
      begin: `(batch) -> Latent`, before any observation.
      encode: `(state, key, latent, obs, prev_action, is_first) -> Latent`, one step of the
        filter; `prev_action` is encoded, [B, A]. Rows with `is_first` forget latent and
        action. Without a key (None), the latent is the likeliest one instead of a sample.
      loss: `(state, key, record, valid) -> (loss, Learned)`, to be differentiated by the
        weights; `record` is [B, T + 1, ...] with the latent of its first row among its
        extras, `valid` [B, T + 1].
      standardize: `(statistics, record [B, T, ...], valid [B, T]) -> statistics` with these
        records added.
      feature: `(latent) -> [B, D + Z]`, what heads, actor and critic see.
      reward: `(state, latent) -> [B]` mean reward on arrival.
      survival: `(state, latent) -> [B]` probability of going on from here.
      decode: `(state, latent) -> obs`, the likeliest observation.
      pack, unpack: latents to and from the extras of a record.
      mdp: imagination. `Outcome.discount` is the survival probability alone.
    """

    init: Callable[[Key], RSSMState]
    begin: Callable[[int], Latent]
    encode: Callable[[RSSMState, Key | None, Latent, Any, Array, Array], Latent]
    loss: Callable[[RSSMState, Key, Record, Array], tuple[Array, Learned]]
    standardize: Callable[[Statistics, Record, Array], Statistics]
    feature: Callable[[Latent], Array]
    reward: Callable[[RSSMState, Latent], Array]
    survival: Callable[[RSSMState, Latent], Array]
    decode: Callable[[RSSMState, Latent], Any]
    pack: Callable[[Latent], dict[str, Array]]
    unpack: Callable[[dict[str, Array]], Latent]
    mdp: MDP


def rssm(spec: EnvSpec, config: RSSMConfig) -> RSSM:
    """Build the model.

    Records are filtered by `h_t = f(h_tm1, z_tm1, a_tm1)`, `z_t ~ q(z | h_t, o_t)`, and
    imagined by `z_t ~ p(z | h_t)`; observation, reward and survival are read from
    `(h_t, z_t)`. All arrive with the record `t` that the action `a_tm1` led to. Without
    memory, `h_t = f(0, z_tm1, a_tm1)` and `z_t ~ q(z | 0, o_t)`: a Markov chain of the `z`.

    Args:
      spec: spaces of the task: any observation, any action with finite bounds.
      config: size and kind; see `rssm_size`.

    Raises:
      ValueError: for unbounded actions, or widths that do not divide by the blocks.

    Reference: Learning Latent Dynamics for Planning from Pixels (arXiv 1811.04551),
    Mastering Diverse Domains through World Models (arXiv 2301.04104).
    """
    _check(spec, config)
    law = stochastic(config)
    nets = rssm_networks(spec, config, law)
    bins, seen = symexp_bins(NUM_BINS), partial(feature, config)

    def init(key: Key) -> RSSMState:
        obs = spaces.zeros(spec.observation, (1,))
        size = observation.vector_of(spec.observation, obs).shape[-1]
        empty = Statistics(normalization.empty((size,)), normalization.empty())
        return RSSMState(nets.init(key), empty)

    def begin(batch: int) -> Latent:
        return Latent(jnp.zeros((batch, config.deter)), jnp.zeros((batch, law.size)))

    def encode(
        state: RSSMState, key: Key | None, latent: Latent, obs: Any, prev_action: Array,
        is_first: Array,
    ) -> Latent:  # fmt: skip
        seen = observation.prepare(spec.observation, obs, state.statistics.observations)
        tokens = nets.tokens(state.weights, seen)
        step = tokens[:, None], prev_action[:, None], is_first[:, None]
        found, _ = filter_sequence(config, nets, law, state.weights, key, latent, *step)
        return jax.tree.map(lambda x: x[:, 0], found)

    def reward(state: RSSMState, latent: Latent) -> Array:
        return two_hot_mean(nets.reward(state.weights, seen(latent)), bins)

    def survival(state: RSSMState, latent: Latent) -> Array:
        # The head predicts survival times discount. The discount, a constant, is taken out
        # again: whoever imagines applies one, once.
        share = jax.nn.sigmoid(nets.survival(state.weights, seen(latent))) / config.discount
        return jnp.minimum(share, 1.0)

    def decode(state: RSSMState, latent: Latent) -> Any:
        prediction = nets.decoder(state.weights, latent.deter, latent.stoch)
        return observation.restore(spec.observation, prediction, state.statistics.observations)

    def loss(state: RSSMState, key: Key, record: Record, valid: Array) -> tuple[Array, Learned]:
        before = unpack(jax.tree.map(lambda x: x[:, 0], record.extras))
        return rssm_loss(spec, config, law, nets, state, key, before, record, valid)

    def standardize(statistics: Statistics, record: Record, valid: Array) -> Statistics:
        rewards = normalization.update(statistics.rewards, record.reward, valid)
        if not config.normalize:
            return statistics._replace(rewards=rewards)
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), record.obs)
        vectors = observation.vector_of(spec.observation, rows)
        seen = normalization.update(statistics.observations, vectors, valid.reshape(-1))
        return Statistics(seen, rewards)

    def uncertainty(state: RSSMState, latent: Latent, action: Array) -> Array:
        """Return [B]: how far the members differ, in units of reward."""
        spread = member_disagreement(nets.members(state.weights, seen(latent), action))
        # One reward among many latents: a mean over all of them would hardly see it.
        square = jnp.square(spread[..., -1]) + jnp.mean(jnp.square(spread[..., :-1]), -1)
        return finite_sqrt(square) * state.statistics.rewards.std

    def start(state: RSSMState, key: Key, obs: Any = None, batch: int = 1) -> Latent:
        if obs is None:
            raise ValueError(
                "a learned model has no start states of its own: pass obs, or wrap it in "
                "mbrl.mdp.with_resets(mdp, start_obs)"
            )
        batch = jax.tree.leaves(obs)[0].shape[0]
        action = jnp.zeros((batch, spaces.flat_size(spec.action)))
        return encode(state, key, begin(batch), obs, action, jnp.ones(batch, bool))

    def step(state: RSSMState, key: Key, latent: Latent, action: Any) -> tuple[Latent, Outcome]:
        weights, action = state.weights, spaces.encode_action(spec.action, action)
        before = recalled(latent.deter, config.memory)
        deter = nets.core(weights, before, latent.stoch, nets.drive(weights, action))
        prior = law.distribution(nets.prior(weights, deter))
        found = Latent(deter, law.sample(prior, law.noise(key, (deter.shape[0],))))
        spread = uncertainty(state, latent, action) if config.members else None
        return found, Outcome(reward(state, found), survival(state, found), spread)

    def pack(latent: Latent) -> dict[str, Array]:
        return {"deter": latent.deter, "stoch": law.pack(latent.stoch)}

    def unpack(extras: dict[str, Array]) -> Latent:
        return Latent(extras["deter"], law.unpack(extras["stoch"]))

    mdp = MDP(start, step, decode, spec)
    return RSSM(
        init, begin, encode, loss, standardize, seen, reward, survival, decode, pack, unpack, mdp
    )  # fmt: skip


def feature(config: RSSMConfig, latent: Latent) -> Array:
    """Return what heads, actor and critic see of latents, [..., D + Z]."""
    deter = latent.deter
    if config.span:
        # Beside samples, which are one-hot, nobody would notice what a slow state says.
        square = jnp.mean(jnp.square(deter), -1, keepdims=True)
        deter = deter * jax.lax.rsqrt(square + 1e-4)
    return jnp.concatenate([deter, latent.stoch], -1)


def recalled(deter: Array, memory: bool) -> Array:
    """Return what may be known of recurrent states [..., D]: zeros without memory."""
    return deter if memory else jnp.zeros_like(deter)


def filter_sequence(
    config: RSSMConfig, nets: RSSMNetworks, law: Stochastic, weights: Params, key: Key | None,
    latent: Latent, tokens: Array, prev_action: Array, is_first: Array,
) -> tuple[Latent, Any]:  # fmt: skip
    """Infer latents along sequences.

    Args:
      config: of the model.
      nets: its networks.
      law: its stochastic latents.
      weights: parameters.
      key: consumed; None = the likeliest latents instead of samples.
      latent: [B] before the first record.
      tokens: [B, T, F] encoded observations.
      prev_action: [B, T, A] encoded action that led to each record.
      is_first: [B, T]; such a record forgets latent and previous action.

    Returns:
      The posterior samples [B, T] and their distribution [B, T, S].
    """
    keep = 1.0 - is_first.astype(jnp.float32)[..., None]
    # Whatever does not depend on the recurrent state is computed for all steps at once.
    drive = nets.drive(weights, prev_action * keep)
    evidence = nets.evidence(weights, tokens)
    noise = None if key is None else law.noise(key, (is_first.shape[1], is_first.shape[0]))

    def step(latent: Latent, inputs: Any) -> tuple[Latent, Any]:
        keep, drive, evidence, noise = inputs
        before = recalled(latent.deter * keep, config.memory)
        deter = nets.core(weights, before, latent.stoch * keep, drive)
        outputs = nets.posterior(weights, recalled(deter, config.memory), evidence)
        found = Latent(deter, law.sample(law.distribution(outputs), noise))
        return found, (found, outputs)

    time_major = jax.tree.map(lambda x: x.swapaxes(0, 1), (keep, drive, evidence))
    _, found = jax.lax.scan(step, latent, (*time_major, noise))
    latent, outputs = jax.tree.map(lambda x: x.swapaxes(0, 1), found)
    return latent, law.distribution(outputs)


def rssm_loss(
    spec: EnvSpec, config: RSSMConfig, law: Stochastic, nets: RSSMNetworks, state: RSSMState,
    key: Key, before: Latent, record: Record, valid: Array,
) -> tuple[Array, Learned]:  # fmt: skip
    """Compute the loss of the world model on sequences.

    Args:
      spec: spaces of the task.
      config: of the model.
      law: its stochastic latents.
      nets: its networks.
      state: their parameters.
      key: consumed.
      before: [B] latent of the first record.
      record: [B, T + 1, ...]; the first serves for its action only.
      valid: [B, T + 1], rows that hold data.

    Returns:
      Scalar, the mean over T records, and what was found on the way.
    """
    weights, now = state.weights, jax.tree.map(lambda x: x[:, 1:], record)
    mask = valid[:, 1:].astype(jnp.float32)
    action = spaces.encode_action(spec.action, record.action)
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), now.obs)
    target = observation.prepare(spec.observation, rows, state.statistics.observations)
    tokens = nets.tokens(weights, target).reshape(*mask.shape, -1)
    latent, posterior = filter_sequence(
        config, nets, law, weights, key, before, tokens, action[:, :-1], now.is_first
    )
    prior = law.distribution(nets.prior(weights, latent.deter))
    divergence = balanced_kl(posterior, prior, config.free_nats)
    flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), latent)
    drawn = nets.decoder(weights, flat.deter, flat.stoch)
    seen, bins = feature(config, latent), symexp_bins(NUM_BINS)
    alive = config.discount * (1.0 - now.is_terminal)
    terms = {
        "reconstruction": observation.reconstruction_nll(spec.observation, drawn, target),
        "reward": two_hot_nll(nets.reward(weights, seen), now.reward, bins),
        "survival": binary_nll(nets.survival(weights, seen), alive),
        "dynamics": divergence.dynamics,
        "representation": REPRESENTATION * divergence.representation,
    }
    if config.members:
        error = _members_error(nets, state, latent, seen, action[:, 1:], now)
        # A pair counts where both of its records hold data.
        terms["ensemble"] = error * jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    means = {f"model/{k}": jnp.mean(mask * v.reshape(mask.shape)) for k, v in terms.items()}
    entropies = {
        "model/prior_entropy": prior.entropy().sum(-1).mean(),
        "model/posterior_entropy": posterior.entropy().sum(-1).mean(),
    }
    return sum(means.values(), jnp.zeros(())), Learned(latent, means | entropies)


def _members_error(
    nets: RSSMNetworks, state: RSSMState, latent: Latent, seen: Array, action: Array, now: Record
) -> Array:
    """Let every member predict the next latent and reward, [B, T]; nothing reaches the rest."""
    latent, seen = jax.lax.stop_gradient((latent, seen))
    rewards = state.statistics.rewards
    out = nets.members(state.weights, seen, action)[:, :, :-1]
    reward = (now.reward - rewards.mean) / rewards.std
    target = jnp.concatenate([latent.stoch, reward[..., None]], -1)[:, 1:]
    follows = ~now.is_last[:, :-1] & ~now.is_first[:, 1:]
    error = jnp.sum(jnp.square(out - target), (0, -1)) * follows
    return jnp.pad(error, ((0, 0), (0, 1)))


def _check(spec: EnvSpec, config: RSSMConfig) -> None:
    if config.deter % config.blocks:
        raise ValueError(
            f"deter: got {config.deter}, expected a multiple of blocks = {config.blocks}"
        )
    if config.dtype not in DOTS:
        raise ValueError(f"dtype: got {config.dtype!r}, expected one of {list(DOTS)}")
    if config.span < 0 or config.stoch < 1:
        raise ValueError(
            f"span, stoch: got {config.span} and {config.stoch}, expected at least 0 steps to "
            "remember and at least 1 latent"
        )
    if not 0 <= config.classes <= 256 or config.classes == 1:
        raise ValueError(f"classes: got {config.classes}, expected 2 to 256, or 0 for Gaussian")
    for path, leaf in spaces.leaves(spec.action):
        if isinstance(leaf, Box):
            spaces.finite_bounds(leaf, f"action {path or spec.id}")
