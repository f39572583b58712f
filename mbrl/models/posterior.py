"""Bayesian networks in place of an ensemble: the members are samples of one network's posterior.

All of them are fitted as one network and leave ordinary weights behind, with the axis [N] of
members that every other part of a model knows. A sample is drawn when the model is fitted and is
part of its parameters: it cannot change along an imagined trajectory, nor within a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from mbrl import normalization
from mbrl.models.probabilistic import Target, probabilistic_ensemble, transition_codec
from mbrl.models.propagation import EnsembleState, Weights
from mbrl.networks import bayesian
from mbrl.networks.core import mlp
from mbrl.types import Array, EnvSpec, Key, Metrics, Network, Params, Transition

PosteriorKind = Literal["ensemble", "variational", "dropout", "laplace"]

DROPOUT_RATE = 0.1
"""Share of hidden units that a sample lacks."""

INITIAL_SHARE = 0.5
"""Standard deviation of weights before the first fit, relative to that of their prior. Weights that
begin nearly certain stay so where data say nothing: a fit ends long before they have widened."""


class Posterior(NamedTuple):
    """Fits one network, and draws members from the distribution of its weights.

    Attributes:
      init: `(key) -> Weights` with a leading [1]: what is trained.
      loss: `(weights, state, transition [1, B, ...], key, num_rows) -> ([1], metrics)`, the loss of
        a `ProbabilisticEnsemble` of one, under noise; `num_rows` is the size of the data set.
      error: `(weights, state, transition [B, ...], mask [B]) -> [1]`, without noise.
      sample: `(weights, state, transition [M, ...], mask [M], key) -> Weights` [N, ...].
    """

    init: Callable[[Key], Weights]
    loss: Callable[..., tuple[Array, Metrics]]
    error: Callable[[Weights, EnsembleState, Transition, Array], Array]
    sample: Callable[[Weights, EnsembleState, Transition, Array, Key], Weights]


class _Law(NamedTuple):
    """A distribution over the weights of `mlp`; its parameters are a dict.

    Attributes:
      network: `(hidden, out, dtype) -> Network`, with noise where its parameters hold a `key`.
      cost: `(params) -> []` nats per data set, beside the likelihood of the data.
      draw: `(params, key) -> params of mlp`, one sample.
    """

    network: Callable[[Sequence[int], int, str], Network]
    cost: Callable[[Params], Array]
    draw: Callable[[Params, Key], Params]


def _free(params: Params) -> Array:
    del params
    return jnp.zeros(())


def _dropout() -> _Law:
    def network(hidden: Sequence[int], out: int, dtype: str) -> Network:
        plain = mlp(hidden, out, dtype=dtype)

        def apply(params: Params, x: Array) -> Array:
            if "key" not in params:
                return plain.apply(params["mean"], x)
            return bayesian.dropout_apply(params["mean"], params["key"], x, DROPOUT_RATE, dtype)

        return Network(lambda key, x: {"mean": plain.init(key, x)}, apply)

    def draw(params: Params, key: Key) -> Params:
        return bayesian.drop_units(params["mean"], key, DROPOUT_RATE)

    return _Law(network, _free, draw)


def _variational() -> _Law:
    def network(hidden: Sequence[int], out: int, dtype: str) -> Network:
        plain = mlp(hidden, out, dtype=dtype)

        def init(key: Key, x: Array) -> Params:
            mean = plain.init(key, x)
            start = jax.tree.map(
                lambda prior: prior + 2.0 * jnp.log(INITIAL_SHARE), bayesian.prior_logvar(mean)
            )
            return {"mean": mean, "logvar": start}

        def apply(params: Params, x: Array) -> Array:
            if "key" not in params:
                return plain.apply(params["mean"], x)
            return bayesian.local_apply(params["mean"], params["logvar"], params["key"], x, dtype)

        return Network(init, apply)

    def cost(params: Params) -> Array:
        return bayesian.prior_divergence(params["mean"], params["logvar"])

    def draw(params: Params, key: Key) -> Params:
        return bayesian.sample_weights(params["mean"], params["logvar"], key)

    return _Law(network, cost, draw)


def _point() -> _Law:
    def network(hidden: Sequence[int], out: int, dtype: str) -> Network:
        plain = mlp(hidden, out, dtype=dtype)
        return Network(
            lambda key, x: {"mean": plain.init(key, x)},
            lambda params, x: plain.apply(params["mean"], x),
        )

    return _Law(network, _free, lambda params, key: params["mean"])


LAWS = {"variational": _variational, "dropout": _dropout, "laplace": _point}


def posterior(
    kind: PosteriorKind,
    spec: EnvSpec,
    num_samples: int = 5,
    hidden: Sequence[int] = (200, 200, 200, 200),
    targets: Target | Sequence[Target] = "delta",
    learn_bounds: bool = True,
    nll_beta: float = 0.0,
    dtype: str = "float32",
) -> Posterior:
    """Build a Bayesian network of the shape of a member of `probabilistic_ensemble`.

    'variational' = independent Gaussians over all weights, trained by the evidence lower bound;
    'dropout' = units dropped in training, and other ones for good in every sample; 'laplace' = an
    ordinary fit, and a Gaussian over the weights of the last layer that predict means, from the
    curvature of the likelihood there.

    Reference: Weight Uncertainty in Neural Networks (arXiv 1505.05424), with local
    reparameterization (arXiv 1506.02557); Dropout as a Bayesian Approximation (arXiv 1506.02142);
    Laplace Redux (arXiv 2106.14806).

    Args:
      kind: 'variational', 'dropout' or 'laplace'.
      spec: spaces of the task.
      num_samples: N.
      hidden: widths of the network.
      targets: as in `probabilistic_ensemble`, like the rest.
      learn_bounds: see there.
      nll_beta: see there.
      dtype: of the matrix products.

    Raises:
      ValueError: for another kind, or a network without hidden layers.
    """
    if kind not in LAWS:
        raise ValueError(
            f"posterior: got {kind!r}, expected one of {list(LAWS)}; an 'ensemble' is fitted as "
            "it is"
        )
    if not hidden:
        raise ValueError("hidden: got no layers, expected at least one; pass for example (128,)")
    law, codec = LAWS[kind](), transition_codec(spec, targets)
    one = probabilistic_ensemble(
        spec, 1, hidden, targets, None, learn_bounds, nll_beta,
        lambda out: law.network(hidden, out, dtype),
    )  # fmt: skip

    def init(key: Key) -> Weights:
        return one.init(key).weights

    def loss(
        weights: Weights, state: EnsembleState, rows: Transition, key: Key, num_rows: Array
    ) -> tuple[Array, Metrics]:
        noisy = weights._replace(network=weights.network | {"key": key[None]})
        losses, metrics = one.loss(noisy, state, rows)
        # Per row and target, as the likelihood is.
        share = jnp.maximum(num_rows, 1) * codec.num_targets
        return losses + jax.vmap(law.cost)(weights.network) / share, metrics

    def sample(
        weights: Weights, state: EnsembleState, data: Transition, mask: Array, key: Key
    ) -> Weights:
        trained = jax.tree.map(lambda x: x[0], weights.network)
        key, last_key = jax.random.split(key)
        drawn = jax.vmap(lambda key: law.draw(trained, key))(jax.random.split(key, num_samples))
        if kind == "laplace":
            x = normalization.normalize(state.inputs, codec.regression(data)[0])
            features = bayesian.hidden_features(trained["mean"], x)
            # Noise as it was fitted: a scale would be that of an earlier fit, and of intervals.
            fitted = state._replace(weights=weights, scale=jnp.ones_like(state.scale))
            out = one.predict(fitted, data.obs, data.action)
            last = bayesian.layer_names(drawn)[-1]
            drawn[last] = last_layer_samples(drawn[last], features, out.var[0], mask, last_key)
        bounds = weights.logvar_low, weights.logvar_high
        return Weights(drawn, *(jnp.repeat(x, num_samples, 0) for x in bounds))

    return Posterior(init, loss, one.error, sample)


def last_layer_samples(
    layer: Params, features: Array, variance: Array, mask: Array, key: Key
) -> Params:
    """Draw the weights behind the predicted means from the Laplace approximation around them.

    Per output, the precision is that of Bayesian linear regression on the features with the
    predicted noise, which is the generalized Gauss-Newton matrix of the likelihood, plus that of a
    prior; the prior's is chosen by the evidence (MacKay 1992). Weights of log-variances stay.

    Args:
      layer: `kernel` [N, H, 2 K] and `bias` [N, 2 K], N times the same; means come first.
      features: [M, H] inputs of the layer.
      variance: [M, K] predicted variances.
      mask: bool [M], rows that were learned from.
      key: consumed.

    Returns:
      A layer of the same shapes, with the first K outputs of every [N] drawn anew.

    Reference: Laplace Redux (arXiv 2106.14806).
    """
    num_samples, size = layer["kernel"].shape[0], variance.shape[1]
    x = jnp.concatenate([features, jnp.ones_like(features[:, :1])], 1)
    # A row that is not finite has taught nothing either. Rows of zeros make the matrix tall.
    good = mask & jnp.isfinite(x).all(1) & jnp.isfinite(variance).all(1)
    whitened = jnp.where(good[:, None], x, 0.0)
    center = jnp.concatenate([layer["kernel"][0], layer["bias"][0][None]])[:, :size]

    def draw(inputs: tuple[Array, Array, Key]) -> Array:
        weights, var, key = inputs
        rows = whitened / jnp.sqrt(jnp.where(good, var, 1.0))[:, None]
        # Singular values of the rows, not eigenvalues of their product: in float32 those below
        # 1e-7 of the largest would be noise, and they say where nothing is known.
        rows = jnp.pad(rows, ((0, rows.shape[1]), (0, 0)))
        _, singular, basis = jnp.linalg.svd(jnp.linalg.qr(rows, mode="r"))
        known = jnp.square(singular)

        def reestimate(_: Any, prior: Array) -> Array:
            determined = jnp.sum(known / (known + prior))
            return jnp.clip(determined / jnp.sum(jnp.square(weights)), 1e-2, 1e4)

        prior = jax.lax.fori_loop(0, 10, reestimate, jnp.ones(()))
        noise = jax.random.normal(key, (num_samples, known.shape[0]))
        return weights + (noise / jnp.sqrt(known + prior)) @ basis

    # One output after the other: the rows of all of them at once would not fit for long.
    drawn = jax.lax.map(draw, (center.T, variance.T, jax.random.split(key, size)))
    drawn = jnp.moveaxis(drawn, 0, -1)  # [N, H + 1, K]
    return {
        "kernel": layer["kernel"].at[..., :size].set(drawn[:, :-1]),
        "bias": layer["bias"].at[..., :size].set(drawn[:, -1]),
    }
