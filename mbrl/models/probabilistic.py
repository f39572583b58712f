"""Probabilistic ensemble: learned dynamics, reward and termination as an `MDP` (PETS)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mbrl import normalization, spaces
from mbrl.losses.regression import bounded_variance, gaussian_nll
from mbrl.models.hallucination import hallucinated_mdp
from mbrl.models.propagation import (
    EnsembleState,
    Heads,
    Measure,
    Prediction,
    Propagation,
    Weights,
    ensemble_mdp,
)
from mbrl.models.termination import TerminationModel, termination_model
from mbrl.networks.core import ensemble, mlp
from mbrl.normalization import Moments
from mbrl.types import (
    MDP,
    Array,
    EnvSpec,
    Key,
    Metrics,
    Network,
    Transition,
)
from mbrl.uncertainty import (
    Uncertainty,
    UncertaintyKind,
    UncertaintyScale,
    reported_uncertainty,
    total_variance,
)

Target = Literal["delta", "absolute", "angle"]
"""How a dimension of the next observation is predicted: its change, itself, or as an
angle in radians (input as sine and cosine, change wrapped to [-pi, pi))."""


class ProbabilisticEnsemble(NamedTuple):
    """A model of observation change, reward and termination, learned from transitions.

    Attributes:
      init: `(key) -> EnsembleState`.
      standardize: `(state, transition [M, ...], mask [M]) -> state`, refits the moments.
      loss: `(weights, state, transition [N, B, ...]) -> [N]`, the members' own losses.
      error: `(weights, state, transition [B, ...], mask [B]) -> [N]`, held-out error in
        nats: the mean log of each row's error, which a few discontinuities (contacts,
        resets) cannot dominate.
      predict: `(state, obs, action [B, ...]) -> Prediction` with a leading [N].
      target: `(state, transition [B, ...]) -> [B, D + 1]`, what is to be predicted, in the same
        standardized units.
      survival: `(state, next_obs [B, ...]) -> [N, B]` probability of not terminating there.
      mdp: `(propagation, uncertainty, kind, scale, own_reward) -> MDP` whose parameters are
        `EnsembleState`; `uncertainty` says whether it is reported, the others how, see
        `mbrl.uncertainty.reported_uncertainty`. `own_reward` is False under `with_reward`.
      hallucinated: `(beta, kind, scale, own_reward) -> MDP`, see `mbrl.models.hallucination`.
      termination: the model behind `EnsembleState.termination`, to be fitted on its own.
      posterior: the `mbrl.models.posterior.Posterior` that the members are samples of, fitted in
        place of `loss`; None where each of them is fitted on its own.
    """

    init: Callable[[Key], EnsembleState]
    standardize: Callable[[EnsembleState, Transition, Array], EnsembleState]
    loss: Callable[[Weights, EnsembleState, Transition], tuple[Array, Metrics]]
    error: Callable[[Weights, EnsembleState, Transition, Array], Array]
    predict: Callable[[EnsembleState, Any, Array], Prediction]
    target: Callable[[EnsembleState, Transition], Array]
    survival: Callable[[EnsembleState, Any], Array]
    mdp: Callable[..., MDP]
    hallucinated: Callable[..., MDP]
    termination: TerminationModel
    posterior: Any = None


def predicted_variance(state: EnsembleState, out: Prediction) -> Uncertainty:
    """Split the variance of a prediction into noise and ignorance, in the units of the task.

    Args:
      state: parameters of the model that predicted.
      out: what `ProbabilisticEnsemble.predict` returns, [N, B, D + 1].

    Returns:
      `Uncertainty` of [B, D + 1]: variances of the next observation, and last of the reward.
    """
    spread = state.targets.std
    return total_variance(spread * out.mean, jnp.square(spread) * out.var)


def _measure(kind: UncertaintyKind, scale: UncertaintyScale, own_reward: bool) -> Measure:
    def measure(state: EnsembleState, members: Prediction) -> Array:
        spread = state.targets.std
        return reported_uncertainty(members.mean, members.var, spread, kind, scale, own_reward)

    return measure


def wrap_angle(x: Array) -> Array:
    """Map radians to [-pi, pi)."""
    return jnp.mod(x + jnp.pi, 2.0 * jnp.pi) - jnp.pi


def _targets(target: Target | Sequence[Target], size: int) -> list[Target]:
    targets: list[Target] = [target] if isinstance(target, str) else list(target)
    targets = targets * size if len(targets) == 1 else targets
    if len(targets) != size or not set(targets) <= {"delta", "absolute", "angle"}:
        raise ValueError(
            f"targets: got {target!r}, expected delta, absolute or angle, once or once for "
            f"each of the {size} dimensions of the flattened observation"
        )
    return targets


class Codec(NamedTuple):
    """How transitions become network inputs and targets, and predictions observations.

    Attributes:
      num_embedded: width of an embedded observation.
      num_inputs: width of the network input.
      num_targets: width of the targets, D + 1.
      embed: `(flat [..., D]) -> [..., num_embedded]`.
      features: `(flat, action) -> [..., num_inputs]`, raw.
      regression: `(transition) -> (features, targets [..., D + 1])`, raw.
      apply: `(flat, targets) -> (next flat, reward)`.
    """

    num_embedded: int
    num_inputs: int
    num_targets: int
    embed: Callable[[Array], Array]
    features: Callable[[Array, Array], Array]
    regression: Callable[[Transition], tuple[Array, Array]]
    apply: Callable[[Array, Array], tuple[Array, Array]]


def transition_codec(spec: EnvSpec, targets: Target | Sequence[Target]) -> Codec:
    """Build the conversions for the spaces of a task and the kinds of its dimensions."""
    size = spaces.flat_size(spec.observation)
    kinds = _targets(targets, size)
    relative = jnp.array([k != "absolute" for k in kinds])
    angles = np.array([i for i, k in enumerate(kinds) if k == "angle"], int)
    num_embedded = size + len(angles)

    def embed(flat: Array) -> Array:
        # An angle enters as its sine in place, its cosine behind.
        flat = jnp.asarray(flat)
        angle = flat[..., angles]
        return jnp.concatenate([flat.at[..., angles].set(jnp.sin(angle)), jnp.cos(angle)], -1)

    def wrap(flat: Array) -> Array:
        return flat.at[..., angles].set(wrap_angle(flat[..., angles]))

    def features(flat: Array, action: Array) -> Array:
        return jnp.concatenate([embed(flat), spaces.encode_action(spec.action, action)], -1)

    def regression(data: Transition) -> tuple[Array, Array]:
        obs = spaces.flatten(spec.observation, data.obs)
        delta = spaces.flatten(spec.observation, data.next_obs) - jnp.where(relative, obs, 0.0)
        target = jnp.concatenate([wrap(delta), data.reward[..., None]], -1)
        return features(obs, data.action), target

    def apply(flat: Array, target: Array) -> tuple[Array, Array]:
        change = target[..., :-1] + jnp.where(relative, flat, 0.0)
        return wrap(change), target[..., -1]

    num_inputs = num_embedded + spaces.flat_size(spec.action)
    return Codec(num_embedded, num_inputs, size + 1, embed, features, regression, apply)


def probabilistic_ensemble(
    spec: EnvSpec,
    num_members: int = 5,
    hidden: Sequence[int] = (200, 200, 200, 200),
    targets: Target | Sequence[Target] = "delta",
    num_elites: int | None = None,
    learn_bounds: bool = True,
    nll_beta: float = 0.0,
    network: Callable[[int], Network] | None = None,
    dtype: str = "float32",
) -> ProbabilisticEnsemble:
    """Build an ensemble of Gaussian networks over flattened observations.

    Change and reward share a network; termination has its own, with a fit of its own (see
    `mbrl.models.termination`).

    Reference: Chua et al. 2018 (arXiv:1805.12114).

    Args:
      spec: spaces of the task; any observation that `mbrl.spaces.flatten` accepts.
      num_members: N.
      hidden: widths of the default network (ignored with `network`).
      targets: how each dimension of the next observation is predicted.
      num_elites: predict with the best M members on held-out data; None = all.
      learn_bounds: learn the log-variance bounds, else keep them at -10 and 0.5.
      nll_beta: weight of a row's likelihood by its own variance to this power. Without it a
        contact, which is rare and predicted badly, is explained as noise and never learned.
      network: `(out) -> Network`, one member; Linen, Haiku, NNX or plain functions. Used
        for termination as well.
      dtype: of the matrix products in the default network.

    Raises:
      ValueError: for `num_elites` outside 1..N or unknown `targets`.
    """
    num_elites = num_members if num_elites is None else num_elites
    if not 1 <= num_elites <= num_members:
        raise ValueError(f"num_elites: got {num_elites}, expected 1 to num_members = {num_members}")
    codec = transition_codec(spec, targets)
    make = network or (lambda out: mlp(hidden, out, dtype=dtype))
    net = ensemble(make(2 * codec.num_targets), num_members)
    termination = termination_model(spec, num_members, codec.num_embedded, codec.embed, network)

    def init(key: Key) -> EnsembleState:
        def bounds(value: float) -> Array:
            return jnp.full((num_members, 1, codec.num_targets), value)

        net_key, termination_key = jax.random.split(key)
        weights = net.init(net_key, jnp.zeros((num_members, 1, codec.num_inputs)))
        return EnsembleState(
            Weights(weights, bounds(-10.0), bounds(0.5)),
            normalization.empty((codec.num_inputs,)),
            normalization.empty((codec.num_targets,)),
            jnp.arange(num_elites),
            termination.init(termination_key),
            jnp.ones(codec.num_targets),
        )

    def standardize(state: EnsembleState, data: Transition, mask: Array) -> EnsembleState:
        x, y = codec.regression(data)
        return state._replace(inputs=normalization.fit(x, mask), targets=normalization.fit(y, mask))

    def variance_bounds(weights: Weights) -> tuple[Array, Array]:
        bounds = weights.logvar_low, weights.logvar_high
        return bounds if learn_bounds else jax.lax.stop_gradient(bounds)

    def forward(weights: Weights, inputs: Moments, x: Array) -> Prediction:
        """Map raw features [N, R, F] to predictions [N, R, ...]."""
        out = net.apply(weights.network, normalization.normalize(inputs, x))
        mean, logvar = jnp.split(out, 2, -1)
        return Prediction(mean, bounded_variance(logvar, *variance_bounds(weights)))

    def loss(weights: Weights, state: EnsembleState, batch: Transition) -> tuple[Array, Metrics]:
        x, y = codec.regression(batch)
        out = forward(weights, state.inputs, x)
        nll = gaussian_nll(
            out.mean, jnp.log(out.var), normalization.normalize(state.targets, y), nll_beta
        )
        # Per dimension as the likelihood: a sum would outweigh the few rows that need a large
        # variance, and pull the upper bound below the lower one, for good.
        low, high = variance_bounds(weights)
        spread = jax.nn.relu(high - low).mean((1, 2))
        return nll.mean((1, 2)) + 0.01 * spread, {"model/nll": nll.mean()}

    def error(weights: Weights, state: EnsembleState, batch: Transition, mask: Array) -> Array:
        x, y = codec.regression(batch)
        out = forward(weights, state.inputs, jnp.broadcast_to(x, (num_members, *x.shape)))
        squared = jnp.mean((out.mean - normalization.normalize(state.targets, y)) ** 2, -1)
        weight = mask / jnp.maximum(mask.sum(), 1.0)
        return jnp.sum(0.5 * jnp.log(squared + 1e-8) * weight, 1)

    def recalibrated(state: EnsembleState, weights: Weights, x: Array) -> Prediction:
        out = forward(weights, state.inputs, x)
        return out._replace(var=state.scale**2 * out.var)

    def predict(state: EnsembleState, obs: Any, action: Array) -> Prediction:
        x = codec.features(spaces.flatten(spec.observation, obs), action)
        return recalibrated(state, state.weights, jnp.broadcast_to(x, (num_members, *x.shape)))

    def target(state: EnsembleState, data: Transition) -> Array:
        return normalization.normalize(state.targets, codec.regression(data)[1])

    def survival(state: EnsembleState, next_obs: Any) -> Array:
        flat = spaces.flatten(spec.observation, next_obs)
        flat = jnp.broadcast_to(flat, (num_members, *flat.shape))
        return termination.survival(state.termination, state.termination.weights, flat)

    def decode(state: EnsembleState, flat: Array, target: Array) -> tuple[Array, Array]:
        return codec.apply(flat, normalization.denormalize(state.targets, target))

    heads = Heads(codec.features, recalibrated, decode, termination.survival)

    def mdp(
        propagation: Propagation = "ts1",
        uncertainty: bool = True,
        kind: UncertaintyKind = "std",
        scale: UncertaintyScale = "reward",
        own_reward: bool = True,
    ) -> MDP:
        report = _measure(kind, scale, own_reward) if uncertainty else None
        return ensemble_mdp(spec, heads, num_members, num_elites, propagation, report)

    def hallucinated(
        beta: float | Array,
        kind: UncertaintyKind = "std",
        scale: UncertaintyScale = "reward",
        own_reward: bool = True,
    ) -> MDP:
        report = _measure(kind, scale, own_reward)
        return hallucinated_mdp(spec, heads, num_members, num_elites, beta, report)

    return ProbabilisticEnsemble(
        init, standardize, loss, error, predict, target, survival, mdp, hallucinated, termination
    )
