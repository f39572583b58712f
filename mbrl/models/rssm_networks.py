"""Networks and latents of the recurrent state-space model of `mbrl.models.rssm`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from mbrl import normalization, spaces
from mbrl.distributions import Categorical, Normal, unimix
from mbrl.networks import observation
from mbrl.networks.core import DOTS, INITIALIZERS, NORMS, ensemble, matmul, mlp, silu
from mbrl.networks.observation import Prepared
from mbrl.networks.recurrent import BlockGRU, scaled_init
from mbrl.types import Array, EnvSpec, Key, Params

NUM_BINS = 255


@dataclasses.dataclass(frozen=True)
class RSSMConfig:
    """Size and kind of the model; `rssm_size` has the published sizes."""

    deter: int = 512
    """Width of the recurrent state."""
    hidden: int = 64
    """Width of the layers of the dynamics."""
    units: int = 64
    """Width of the encoder, the decoder and the heads."""
    depth: int = 4
    """Unit of the channels of convolutions."""
    stoch: int = 32
    """Number of stochastic latents."""
    classes: int = 4
    """Categories of each; 0 makes them Gaussian."""
    blocks: int = 8
    """Blocks of the recurrent state."""
    unimix: float = 0.01
    """Share of the uniform distribution in the categorical latents."""
    free_nats: float = 1.0
    """Divergence per step below which nothing is learned from it."""
    discount: float = 1.0 - 1.0 / 333.0
    """Folded into the target of the survival head."""
    normalize: bool = True
    """Standardize vectors by their running moments (published: symlog alone)."""
    members: int = 0
    """Networks that predict the next latent and reward again, for uncertainty; 0 = none."""
    memory: bool = True
    """Carry a recurrent state; without, latents are inferred from their own observation alone, and
    predicted from the last of them and the action."""
    span: int = 0
    """Steps that the recurrent state is to remember from the start, 0 = as published: what it
    holds fades within about three, until it has been learned that it matters. A state with a
    longer memory moves little, and is read at unit scale."""
    dtype: str = "float32"
    """Of the matrix products, float32 or bfloat16."""


Size = Literal["1m", "12m", "25m", "50m", "100m", "200m"]
_DETER = {"1m": 512, "12m": 2048, "25m": 3072, "50m": 4096, "100m": 6144, "200m": 8192}


def rssm_size(size: Size, **changes: Any) -> RSSMConfig:
    """Return a published size, named by its number of parameters.

    Args:
      size: one of 1m, 12m, 25m, 50m, 100m, 200m.
      **changes: other fields of `RSSMConfig`.

    Raises:
      ValueError: for an unknown size.

    Reference: Mastering Diverse Domains through World Models (arXiv 2301.04104).
    """
    if size not in _DETER:
        raise ValueError(f"size: got {size!r}, expected one of {list(_DETER)}")
    deter = _DETER[size]
    width, unit = deter // 8, deter // 128
    config = RSSMConfig(deter, width, width, unit, classes=unit)
    return dataclasses.replace(config, **changes)


class Stochastic(NamedTuple):
    """The kind of the stochastic latents.

    Attributes:
      size: Z, width of a flat sample.
      num_outputs: O, numbers that parameterize the distribution.
      distribution: `(outputs [..., O]) -> Distribution` over [..., S].
      noise: `(key, shape) -> [*shape, S]` that `sample` consumes.
      sample: `(distribution, noise) -> [..., Z]`, with a gradient to the distribution; its mode
        where the noise is None.
      pack, unpack: samples [..., Z] to and from what replay stores of them.
    """

    size: int
    num_outputs: int
    distribution: Callable[[Array], Categorical | Normal]
    noise: Callable[[Key, tuple[int, ...]], Array]
    sample: Callable[[Any, Array | None], Array]
    pack: Callable[[Array], Array]
    unpack: Callable[[Array], Array]


def stochastic(config: RSSMConfig) -> Stochastic:
    """Build categorical latents with straight-through gradients, or Gaussian ones."""
    return _categorical(config) if config.classes else _gaussian(config)


def _categorical(config: RSSMConfig) -> Stochastic:
    shape, size = (config.stoch, config.classes), config.stoch * config.classes

    def distribution(outputs: Array) -> Categorical:
        return Categorical(unimix(outputs.reshape(*outputs.shape[:-1], *shape), config.unimix))

    def noise(key: Key, lead: tuple[int, ...]) -> Array:
        return jax.random.uniform(key, (*lead, config.stoch))

    def sample(law: Categorical, uniform: Array | None) -> Array:
        # One uniform number per latent against the cumulative distribution: a Gumbel
        # sample would draw one per category and take two logarithms of each.
        probs = law.probs
        if uniform is None:
            index = law.mode()
        else:
            index = jnp.sum(uniform[..., None] >= jnp.cumsum(probs, -1)[..., :-1], -1)
        hot = jax.nn.one_hot(index, config.classes)
        hot = hot + (probs - jax.lax.stop_gradient(probs))
        return hot.reshape(*hot.shape[:-2], size)

    def pack(stoch: Array) -> Array:
        return jnp.argmax(stoch.reshape(*stoch.shape[:-1], *shape), -1).astype(jnp.uint8)

    def unpack(stored: Array) -> Array:
        return jax.nn.one_hot(stored, config.classes).reshape(*stored.shape[:-1], size)

    return Stochastic(size, size, distribution, noise, sample, pack, unpack)


def _gaussian(config: RSSMConfig) -> Stochastic:
    def distribution(outputs: Array) -> Normal:
        mean, raw = jnp.split(outputs, 2, -1)
        return Normal(mean, jax.nn.softplus(raw) + 0.1)

    def noise(key: Key, lead: tuple[int, ...]) -> Array:
        return jax.random.normal(key, (*lead, config.stoch))

    def sample(law: Normal, noise: Array | None) -> Array:
        return law.mean if noise is None else law.mean + law.std * noise

    def same(stoch: Array) -> Array:
        return stoch

    return Stochastic(config.stoch, 2 * config.stoch, distribution, noise, sample, same, same)


class Posterior(nn.Module):
    """Distribution of the latents given recurrent state and tokens of the observation.

    `drive` is the share of the tokens, computed for a whole sequence outside of the
    recurrence.
    """

    hidden: int
    tokens: int
    deter: int
    outputs: int
    dtype: str

    def setup(self) -> None:
        """Declare the layers."""
        fan_in = self.tokens + self.deter
        self.from_tokens: Any = self.param(
            "from_tokens", scaled_init, (self.tokens, self.hidden), fan_in
        )
        self.from_deter: Any = self.param(
            "from_deter", scaled_init, (self.deter, self.hidden), fan_in
        )
        self.bias: Any = self.param("bias", nn.initializers.zeros_init(), (self.hidden,))
        self.norm = NORMS["rms"]()
        self.out = nn.Dense(
            self.outputs, kernel_init=INITIALIZERS["fan_in"], dot_general=DOTS[self.dtype]
        )

    def drive(self, tokens: Array) -> Array:
        """Return what tokens [..., F] contribute, [..., H]."""
        return self._dot(tokens, self.from_tokens) + self.bias

    def __call__(self, deter: Array, drive: Array) -> Array:
        """Return the outputs [B, O] of the distribution."""
        return self.out(silu(self.norm(self._dot(deter, self.from_deter) + drive)))

    def _dot(self, x: Array, kernel: Array) -> Array:
        return matmul(x, kernel, self.dtype)


class RSSMNetworks(NamedTuple):
    """The learned functions; each reads its own entry of the dict `weights`.

    Attributes:
      init: `(key) -> weights`.
      tokens: `(weights, Prepared) -> [B, F]` encoded observations.
      drive: `(weights, action [..., A]) -> [..., D]`, the share of encoded actions.
      core: `(weights, deter, stoch, drive) -> deter`, one step of the recurrence.
      evidence: `(weights, tokens [..., F]) -> [..., H]`, the share of the tokens.
      posterior: `(weights, deter, evidence) -> outputs`.
      prior: `(weights, deter) -> outputs`.
      decoder: `(weights, deter [B, D], stoch [B, Z]) -> Prepared`.
      reward: `(weights, feature) -> logits [..., NUM_BINS]`.
      survival: `(weights, feature) -> logit [...]`.
      members: `(weights, feature, action) -> [N, ..., Z + 1]` next sample and standardized reward.
    """

    init: Callable[[Key], Params]
    tokens: Callable[[Params, Prepared], Array]
    drive: Callable[[Params, Array], Array]
    core: Callable[[Params, Array, Array, Array], Array]
    evidence: Callable[[Params, Array], Array]
    posterior: Callable[[Params, Array, Array], Array]
    prior: Callable[[Params, Array], Array]
    decoder: Callable[[Params, Array, Array], Prepared]
    reward: Callable[[Params, Array], Array]
    survival: Callable[[Params, Array], Array]
    members: Callable[[Params, Array, Array], Array]


def rssm_networks(spec: EnvSpec, config: RSSMConfig, law: Stochastic) -> RSSMNetworks:
    """Build the networks of a task."""

    def head(layers: int, out: int, scale: float = 1.0) -> Any:
        return mlp((config.units,) * layers, out, "silu", "fan_in", config.dtype, "rms", scale)

    def example() -> Prepared:
        obs = spaces.zeros(spec.observation, (1,))
        size = observation.vector_of(spec.observation, obs).shape[-1]
        return observation.prepare(spec.observation, obs, normalization.empty((size,)))

    encoder = observation.Encoder(config.units, config.depth, config.dtype)
    tokens = jax.eval_shape(lambda k: encoder.init_with_output(k, example())[0], jax.random.key(0))
    core = BlockGRU(config.deter, config.hidden, config.blocks, config.dtype, config.span)
    posterior = Posterior(
        config.hidden, tokens.shape[-1], config.deter, law.num_outputs, config.dtype
    )
    prior = mlp((config.hidden,) * 2, law.num_outputs, "silu", "fan_in", config.dtype, "rms")
    decoder = observation.decoder_for(
        spec.observation, config.units, config.depth, config.blocks, config.dtype
    )
    # What the reward head predicts first is exactly 0.
    reward, survival = head(1, NUM_BINS, 0.0), head(1, 1)
    member = ensemble(head(2, law.size + 1), config.members) if config.members else None

    def init(key: Key) -> Params:
        keys = jax.random.split(key, 8)
        deter, stoch = jnp.zeros((1, config.deter)), jnp.zeros((1, law.size))
        action = jnp.zeros((1, spaces.flat_size(spec.action)))
        feature = jnp.concatenate([deter, stoch], -1)
        weights = {
            "encoder": encoder.init(keys[0], example())["params"],
            "core": nn.init(lambda m: m(deter, stoch, m.drive(action)), core)(keys[1])["params"],
            "posterior": nn.init(
                lambda m: m(deter, m.drive(jnp.zeros(tokens.shape))), posterior
            )(keys[2])["params"],
            "prior": prior.init(keys[3], deter),
            "decoder": decoder.init(keys[4], deter, stoch)["params"],
            "reward": reward.init(keys[5], feature),
            "survival": survival.init(keys[6], feature),
        }  # fmt: skip
        if member is not None:
            x = jnp.concatenate([feature, action], -1)
            x = jnp.broadcast_to(x, (config.members, *x.shape))
            weights["ensemble"] = member.init(keys[7], x)
        return weights

    def members(weights: Params, feature: Array, action: Array) -> Array:
        assert member is not None
        x = jnp.concatenate([feature, action], -1)
        x = jnp.broadcast_to(x, (config.members, *x.shape))
        return member.apply(weights["ensemble"], x)

    return RSSMNetworks(
        init,
        _apply(encoder, "encoder"),
        _apply(core, "core", "drive"),
        _apply(core, "core"),
        _apply(posterior, "posterior", "drive"),
        _apply(posterior, "posterior"),
        lambda weights, deter: prior.apply(weights["prior"], deter),
        _apply(decoder, "decoder"),
        lambda weights, feature: reward.apply(weights["reward"], feature),
        lambda weights, feature: survival.apply(weights["survival"], feature)[..., 0],
        members,
    )


def _apply(module: nn.Module, name: str, method: str | None = None) -> Callable[..., Any]:
    """Return `(weights, *args) -> module(*args)` with the parameters `weights[name]`."""

    def apply(weights: Params, *args: Any) -> Any:
        return module.apply({"params": weights[name]}, *args, method=method)

    return apply
