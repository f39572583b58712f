"""Value-equivalent model (MuZero): a latent that need only tell rewards, values and policies."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mbrl import normalization, policies, spaces
from mbrl.losses.value_equivalent import scale_gradient
from mbrl.networks import observation
from mbrl.networks.core import ensemble, mlp
from mbrl.normalization import Moments
from mbrl.settings import check_whole, check_within
from mbrl.two_hot import signed_hyperbolic, signed_parabolic, two_hot, two_hot_mean
from mbrl.types import MDP, Array, Box, EnvSpec, Key, Network, Outcome, Params, Predictor

GRADIENT_SCALE = 0.5
"""Of the latent that enters the dynamics, so that long unrolls do not outweigh short ones."""


@dataclasses.dataclass(frozen=True)
class ValueEquivalentConfig:
    """Size of the model and range of what it predicts."""

    latent: int = 64
    """Width of the latent state."""
    hidden: int = 128
    """Width of the hidden layers."""
    depth: int = 8
    """Unit of the channels of convolutions, for images."""
    members: int = 1
    """Heads for reward and for value; several tell how little they know."""
    max_reward: float = 1.0
    """Largest magnitude of a reward that is told apart."""
    max_value: float = 0.0
    """Largest magnitude of a return that is told apart; 0 = max_reward / (1 - discount)."""
    bins_per_unit: int = 2
    """Bins of reward and value per unit of the contracted scale."""
    dtype: str = "float32"
    """Of the matrix products, float32 or bfloat16."""

    def __post_init__(self) -> None:
        check_whole(self, "latent", "hidden", "depth", "members", "bins_per_unit")
        check_within(self, "max_reward", 0, ends="(]")
        check_within(self, "max_value", 0)


class Scalar(NamedTuple):
    """A number as a distribution over bins, equidistant on the contracted scale.

    Attributes:
      bins: [M] centres on the contracted scale.
    """

    bins: Array

    def mean(self, logits: Array) -> Array:
        """Map logits [..., M] to numbers [...]."""
        return signed_parabolic(two_hot_mean(logits, self.bins))

    def nll(self, logits: Array, target: Array) -> Array:
        """Return the cross-entropy [...] of logits [..., M] and numbers [...]."""
        hot = two_hot(signed_hyperbolic(target), self.bins)
        return -jnp.sum(hot * jax.nn.log_softmax(logits, -1), -1)

    def clips(self, target: Array) -> Array:
        """Tell which numbers [...] lie beyond the outermost bins."""
        return jnp.abs(signed_hyperbolic(target)) > self.bins[-1] * (1.0 + 1e-5)


def scalar(largest: float, bins_per_unit: int) -> Scalar:
    """Make bins for numbers up to `largest` in magnitude; one of them is exactly 0."""
    limit = math.sqrt(largest + 1.0) - 1.0 + 1e-3 * largest  # signed_hyperbolic, not traced
    side = max(1, math.ceil(limit * bins_per_unit))
    return Scalar(jnp.linspace(-limit, limit, 2 * side + 1).at[side].set(0.0))


class ValueEquivalentState(NamedTuple):
    """Parameters of the model as an `MDP`.

    Attributes:
      weights: dict of trainable parameters.
      moments: [D] running moments of everything that is observed and no image.
    """

    weights: Params
    moments: Moments


class Unrolled(NamedTuple):
    """Predictions along an unroll of K actions, leaves [K + 1, ...].

    Attributes:
      latent: [K + 1, B, L].
      policy: [K + 1, B, A] outputs of the policy head.
      value: [K + 1, N, B, M] logits of the value heads.
      reward: [K + 1, N, B, M] logits of the reward heads; those of the start mean nothing.
      projection: [K + 1, B, P] what should resemble `project` of the true observation.
    """

    latent: Array
    policy: Array
    value: Array
    reward: Array
    projection: Array


class ValueEquivalent(NamedTuple):
    """A model of rewards and values, without a model of observations.

    Attributes:
      init: `(key) -> ValueEquivalentState`.
      standardize: `(moments, obs [B, ...], mask [B]) -> moments` with these rows added.
      unroll: `(state, obs [B, ...], action [K, B, ...]) -> Unrolled`.
      project: `(state, obs [B, ...]) -> [B, P]`, the target of consistency.
      reward, value: the scales of the two.
      predictor: of a latent: logits, or mean and log-deviation of a Box action scaled to
        [-1, 1], [B, 2 A]; and the value.
      mdp: imagination over latents [B, L], which are all that can be observed of it. Nothing
        ends: what follows an end is worth 0. Its uncertainty is the deviation of the reward heads
        and, per step, of the value heads: `1 - discount` of theirs, nothing without discount.
    """

    init: Callable[[Key], ValueEquivalentState]
    standardize: Callable[[Moments, Any, Array], Moments]
    unroll: Callable[[ValueEquivalentState, Any, Array], Unrolled]
    project: Callable[[ValueEquivalentState, Any], Array]
    reward: Scalar
    value: Scalar
    predictor: Predictor
    mdp: MDP


def unit_range(x: Array) -> Array:
    """Stretch every row of [..., L] to the interval [0, 1].

    Reference: Schrittwieser et al. 2020 (arXiv:1911.08265), appendix G.
    """
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    return (x - low) / jnp.maximum(high - low, 1e-5)


class _Networks(NamedTuple):
    encoder: observation.Encoder
    latent: Network
    dynamics: Network
    policy: Network
    value: Network
    reward: Network
    projector: Network
    guess: Network


def _networks(
    spec: EnvSpec, config: ValueEquivalentConfig, reward: Scalar, value: Scalar
) -> _Networks:
    def net(layers: int, out: int, scale: float = 1.0) -> Network:
        hidden = (config.hidden,) * layers
        return mlp(hidden, out, "silu", "fan_in", config.dtype, "layer", scale)

    def heads(scale: Scalar) -> Network:
        return ensemble(net(1, scale.bins.shape[0], 0.0), config.members)

    encoder = observation.Encoder(config.hidden, config.depth, config.dtype, norm=None, layers=1)
    policy = net(1, policies.num_outputs(spec.action), 0.0)
    return _Networks(
        encoder, net(1, config.latent), net(2, config.latent), policy, heads(value), heads(reward),
        net(1, config.latent), net(1, config.latent),
    )  # fmt: skip


def _init(
    spec: EnvSpec, config: ValueEquivalentConfig, nets: _Networks, key: Key
) -> ValueEquivalentState:
    keys = iter(jax.random.split(key, 8))
    obs = spaces.zeros(spec.observation, (1,))
    moments = normalization.empty((observation.vector_of(spec.observation, obs).shape[-1],))
    prepared = observation.prepare(spec.observation, obs, moments)
    variables: Any = nets.encoder.init(next(keys), prepared)
    tokens: Any = nets.encoder.apply(variables, prepared)
    latent = jnp.zeros((1, config.latent))
    action = spaces.encode_action(spec.action, spaces.zeros(spec.action, (1,)))
    members = jnp.broadcast_to(latent, (config.members, *latent.shape))
    weights = {
        "encoder": variables["params"],
        "latent": nets.latent.init(next(keys), tokens),
        "dynamics": nets.dynamics.init(next(keys), jnp.concatenate([latent, action], -1)),
        "policy": nets.policy.init(next(keys), latent),
        "value": nets.value.init(next(keys), members),
        "reward": nets.reward.init(next(keys), members),
        "projector": nets.projector.init(next(keys), latent),
        "guess": nets.guess.init(next(keys), latent),
    }
    return ValueEquivalentState(weights, moments)


def _max_value(config: ValueEquivalentConfig, discount: Array | float) -> float:
    if config.max_value:
        return config.max_value
    if isinstance(discount, Array) or discount >= 1.0:
        raise ValueError(
            f"max_value: got 0 with discount={discount}, expected the largest return that may "
            "occur; pass for example --model.max-value 1"
        )
    return config.max_reward / (1.0 - discount)


def value_equivalent(
    spec: EnvSpec,
    config: ValueEquivalentConfig = ValueEquivalentConfig(),
    discount: Array | float = 0.997,
) -> ValueEquivalent:
    """Build the model: representation, dynamics with reward, and prediction.

    Args:
      spec: spaces of the task: any observation, Discrete or bounded Box actions.
      config: sizes.
      discount: of the returns, per step; what `max_value` follows from where it is 0.

    Raises:
      ValueError: for a `max_value` of 0 with a discount of 1, or a traced one.

    Reference: MuZero, Schrittwieser et al. 2020 (arXiv:1911.08265).
    """
    reward_scale = scalar(config.max_reward, config.bins_per_unit)
    value_scale = scalar(_max_value(config, discount), config.bins_per_unit)
    num_latent = config.latent
    nets = _networks(spec, config, reward_scale, value_scale)

    def init(key: Key) -> ValueEquivalentState:
        return _init(spec, config, nets, key)

    def standardize(moments: Moments, obs: Any, mask: Array) -> Moments:
        return normalization.update(moments, observation.vector_of(spec.observation, obs), mask)

    def represent(state: ValueEquivalentState, obs: Any) -> Array:
        prepared = observation.prepare(spec.observation, obs, state.moments)
        tokens: Any = nets.encoder.apply({"params": state.weights["encoder"]}, prepared)
        return unit_range(nets.latent.apply(state.weights["latent"], tokens))

    def advance(weights: Params, latent: Array, action: Array) -> Array:
        encoded = spaces.encode_action(spec.action, action)
        change = nets.dynamics.apply(weights["dynamics"], jnp.concatenate([latent, encoded], -1))
        return unit_range(latent + change)

    def heads(head: Any, weights: Params, latent: Array) -> Array:
        return head.apply(weights, jnp.broadcast_to(latent, (config.members, *latent.shape)))

    def predict(weights: Params, latent: Array) -> tuple[Array, Array]:
        policy = nets.policy.apply(weights["policy"], latent)
        return policy, heads(nets.value, weights["value"], latent)

    def unroll(state: ValueEquivalentState, obs: Any, action: Array) -> Unrolled:
        weights = state.weights

        def step(latent: Array, action: Array) -> tuple[Array, Array]:
            latent = advance(weights, scale_gradient(latent, GRADIENT_SCALE), action)
            return latent, latent

        start = represent(state, obs)
        _, rest = jax.lax.scan(step, start, action)
        latent = jnp.concatenate([start[None], rest])
        # What does not depend on the order of steps is one product over all of them.
        rows = latent.reshape(-1, num_latent)
        policy, value = predict(weights, rows)
        reward = heads(nets.reward, weights["reward"], rows)
        projected = nets.projector.apply(weights["projector"], rows)
        guess = nets.guess.apply(weights["guess"], projected)

        def by_step(x: Array) -> Array:
            return x.reshape(*x.shape[:-2], *latent.shape[:-1], x.shape[-1])

        value, reward = (jnp.moveaxis(by_step(x), 0, 1) for x in (value, reward))
        return Unrolled(latent, by_step(policy), value, reward, by_step(guess))

    def project(state: ValueEquivalentState, obs: Any) -> Array:
        return nets.projector.apply(state.weights["projector"], represent(state, obs))

    def mdp_init(state: ValueEquivalentState, key: Key, obs: Any = None, batch: int = 1) -> Array:
        del key, batch
        if obs is None:
            raise ValueError(
                "a learned model has no start states of its own: pass obs, or wrap it in "
                "mbrl.mdp.with_resets(mdp, start_obs)"
            )
        return represent(state, obs)

    def mdp_step(
        state: ValueEquivalentState, key: Key, latent: Array, action: Array
    ) -> tuple[Array, Outcome]:
        del key
        latent = advance(state.weights, latent, action)
        reward = reward_scale.mean(heads(nets.reward, state.weights["reward"], latent))
        value = value_scale.mean(heads(nets.value, state.weights["value"], latent))
        # A value is a return: per step, a share 1 - discount of it.
        spread = jnp.sqrt(reward.var(0) + (1.0 - discount) ** 2 * value.var(0))
        return latent, Outcome(reward.mean(0), jnp.ones(latent.shape[0]), spread)

    def predictor(state: ValueEquivalentState, latent: Array) -> tuple[Array, Array]:
        policy, value = predict(state.weights, latent)
        if isinstance(spec.action, Box):
            policy = policies.Policy(spec.action, policy).gaussian()
        return policy, value_scale.mean(value).mean(0)

    seen = spec._replace(observation=spaces.box(0.0, 1.0, (num_latent,)))
    mdp = MDP(mdp_init, mdp_step, lambda state, latent: latent, seen)
    return ValueEquivalent(
        init, standardize, unroll, project, reward_scale, value_scale, Predictor(predictor), mdp
    )
