"""Decoder-only transformers: GPT-2, Llama, Qwen2 and Qwen3 from one block.

Tokens are int32 [B, T] and `mask` bool [B, T] says which of them are real. Padding may be on
either side, may hold any token, and is seen by nobody; its own outputs are finite and mean
nothing. There is no dropout: a policy must give the same probability twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from mbrl.networks import attention
from mbrl.networks.attention import KeyValues, attend, rotate
from mbrl.networks.core import ACTIVATIONS, DOTS, matmul
from mbrl.settings import check_whole, check_within
from mbrl.types import Array, Key, Params


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape of a transformer; `family_config` fills in what is particular to a family."""

    vocab: int = 256
    """Tokens that have a probability."""
    padding_rows: int = 0
    """Rows of the embedding beyond the vocabulary; they never have a probability."""
    layers: int = 4
    """Blocks."""
    width: int = 256
    """Numbers per token between the blocks."""
    heads: int = 4
    """Heads that ask."""
    kv_heads: int = 0
    """Heads of keys and values, a divisor of `heads`; 0 = as many."""
    head_dim: int = 0
    """Width of a head; 0 = width / heads."""
    mlp_width: int = 0
    """Width of the hidden layer; 0 = 4 width."""
    max_length: int = 1024
    """Longest sequence, in tokens."""
    norm: str = "layer"
    """'layer' or 'rms', before attention, before the MLP and at the end."""
    eps: float = 1e-5
    """Added to the variance by the norms."""
    positions: str = "learned"
    """'learned' (added to the embedding) or 'rotary'."""
    rope_theta: float = 10_000.0
    """Base of the wavelengths of rotary positions."""
    activation: str = "gelu"
    """'gelu' (its tanh form), or 'silu' with a gate: SwiGLU."""
    bias: bool = True
    """Biases in all dense layers."""
    qkv_bias: bool = True
    """Biases of queries, keys and values."""
    qk_norm: bool = False
    """RMSNorm of every query and key, per head."""
    tied: bool = True
    """The output layer is the embedding."""
    dtype: str = "float32"
    """Of the inputs of matrix products, float32 or bfloat16; parameters are float32."""
    remat: bool = False
    """Recompute each block in the backward pass: less memory, a third more work."""
    unroll: int = 4
    """Blocks per iteration of the loop over layers: 1 compiles fastest, more run faster."""

    def __post_init__(self) -> None:
        check_whole(self, "vocab", "layers", "width", "heads", "max_length", "unroll")
        check_whole(self, "padding_rows", "kv_heads", "head_dim", "mlp_width", least=0)
        check_within(self, "eps", 0, ends="(]")
        check_within(self, "rope_theta", 0, ends="(]")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {choices}")
        if self.heads % self.num_kv:
            raise ValueError(
                f"kv_heads: got {self.kv_heads} for {self.heads} heads, expected a divisor of them"
            )
        if not self.head_dim and self.width % self.heads:
            raise ValueError(
                f"width: got {self.width}, expected a multiple of the {self.heads} heads; or set "
                "head_dim"
            )
        if self.positions == "rotary" and self.head % 2:
            raise ValueError(
                f"head_dim: got {self.head}, expected an even number: rotary positions turn pairs"
            )

    @property
    def num_kv(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.head_dim or self.width // self.heads

    @property
    def mlp(self) -> int:
        """Width of the hidden layer."""
        return self.mlp_width or 4 * self.width


_CHOICES = {
    "norm": ("layer", "rms"),
    "positions": ("learned", "rotary"),
    "activation": ("gelu", "silu"),
    "dtype": tuple(DOTS),
}
_LLAMA: dict[str, Any] = {
    "norm": "rms",
    "positions": "rotary",
    "activation": "silu",
    "bias": False,
    "qkv_bias": False,
    "qk_norm": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "norm": "layer",
        "positions": "learned",
        "activation": "gelu",
        "bias": True,
        "qkv_bias": True,
        "qk_norm": False,
    },
    "llama": _LLAMA,
    "qwen2": _LLAMA | {"qkv_bias": True},
    "qwen3": _LLAMA | {"qk_norm": True},
}
"""What makes a family, whatever its size."""


def family_config(family: str, **sizes: Any) -> TransformerConfig:
    """Make the configuration of a family.

    Args:
      family: key of `FAMILIES`.
      **sizes: other fields of `TransformerConfig`.

    Raises:
      ValueError: for an unknown family, or fields that contradict it or each other.
    """
    if family not in FAMILIES:
        raise ValueError(f"family: got {family!r}, expected one of {list(FAMILIES)}")
    if fixed := sorted(FAMILIES[family].keys() & sizes.keys()):
        raise ValueError(
            f"{', '.join(fixed)}: set by the family {family}; make a TransformerConfig for others"
        )
    defaults = {} if family == "gpt2" else {"tied": False, "eps": 1e-6}
    return TransformerConfig(**(FAMILIES[family] | defaults | sizes))


class Cache(NamedTuple):
    """Keys and values of the tokens so far, in `S` slots.

    Attributes:
      layers: [B, K, S, hd] each; one pair of arrays per layer, because XLA copies an array that
        a loop updates in slices of layers.
      mask: bool [B, S], slots that hold a real token.
      filled: int32 scalar, slots in use, padding included; the same for all rows.
    """

    layers: tuple[KeyValues, ...]
    mask: Array
    filled: Array


class Transformer(NamedTuple):
    """A decoder as pure functions.

    Attributes:
      config: its shape.
      init: `(key) -> params`, nested dicts of float32; leaves of "blocks" are [layers, ...].
      hidden: `(params, tokens [B, T], mask [B, T]) -> [B, T, D]`, after the final norm.
      logits: `(params, hidden [..., D]) -> [..., vocab]` float32, of the token that follows.
      cache: `(batch, length) -> Cache` without a token in it.
      extend: `(params, cache, tokens [B, L], mask [B, L]) -> (hidden [B, L, D], cache)`: reads
        L further tokens, the whole prompt or a single one.
    """

    config: TransformerConfig
    init: Callable[[Key], Params]
    hidden: Callable[[Params, Array, Array], Array]
    logits: Callable[[Params, Array], Array]
    cache: Callable[[int, int], Cache]
    extend: Callable[[Params, Cache, Array, Array], tuple[Array, Cache]]


def unstack(params: Params) -> Params:
    """Return parameters whose blocks are a tuple, one entry per layer.

    `Transformer.extend` takes them too. A loop that calls it with stacked ones copies every layer
    out of the stack for every token.
    """
    blocks = params["blocks"]
    if isinstance(blocks, tuple):
        return params
    layers = range(len(jax.tree.leaves(blocks)[0]))
    return params | {"blocks": tuple(jax.tree.map(itemgetter(i), blocks) for i in layers)}


class Block(nn.Module):
    """Attention and MLP with residual connections, over rows [B * T, D]."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: Array, visible: Array, turn: Any, past: KeyValues | None, filled: Any
    ) -> tuple[Array, KeyValues]:
        """Return the rows of the next block, and keys and values of all tokens so far."""
        config = self.config
        batch, time, size = visible.shape[0], visible.shape[1], config.head
        # Rows, not [B, T]: XLA:CPU takes twice as long for the gradient of a product over two.
        plain = nn.initializers.normal(0.02)
        # What each of the 2 * layers branches adds is scaled so that their sum has deviation 0.02.
        last = nn.initializers.normal(0.02 / (2 * config.layers) ** 0.5)
        dense = partial(nn.Dense, dot_general=DOTS[config.dtype], use_bias=config.bias)
        qkv = partial(dense, use_bias=config.qkv_bias, kernel_init=plain)

        def heads(name: str, number: int, norm: bool) -> Array:
            y = qkv(number * size, name=name)(y_in).reshape(batch, time, number, size)
            y = _norm("rms", config.eps, f"{name}_norm")(y) if norm else y
            return y.swapaxes(1, 2)

        y_in = _norm(config.norm, config.eps, "attention_norm")(x)
        q = heads("query", config.heads, config.qk_norm)
        k = heads("key", config.num_kv, config.qk_norm)
        v = heads("value", config.num_kv, False)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        low = jnp.bfloat16 if config.dtype == "bfloat16" else jnp.float32
        q, new = q.astype(low), KeyValues(k.astype(low), v.astype(low))
        if past is not None:
            place = partial(jax.lax.dynamic_update_slice_in_dim, start_index=filled, axis=2)
            new = KeyValues(*(place(old, x) for old, x in zip(past, new, strict=True)))
        y = attend(q, new, visible).swapaxes(1, 2).reshape(batch * time, -1)
        x = x + dense(config.width, kernel_init=last, name="out")(y)
        y = _norm(config.norm, config.eps, "mlp_norm")(x)
        up = dense(config.mlp, kernel_init=plain, name="up")(y)
        if config.activation == "silu":
            gate = dense(config.mlp, kernel_init=plain, name="gate")(y)
            y = ACTIVATIONS["silu"](gate) * up
        else:
            y = ACTIVATIONS["gelu"](up)
        return x + dense(config.width, kernel_init=last, name="down")(y), new


def _norm(kind: str, eps: float, name: str) -> nn.Module:
    if kind == "rms":
        return nn.RMSNorm(epsilon=eps, name=name)
    # The fast variance, E[x^2] - E[x]^2, cancels where the mean is large.
    return nn.LayerNorm(epsilon=eps, use_fast_variance=False, name=name)


def transformer(config: TransformerConfig) -> Transformer:
    """Build a transformer.

    Args:
      config: see `TransformerConfig` and `family_config`.

    Returns:
      A `Transformer`. Its functions raise a `ValueError` for more tokens than `max_length` or
      than the cache has slots, where that can be told from the shapes.

    Reference: Radford et al. 2019 (GPT-2); Touvron et al. 2023 (arXiv:2302.13971); Yang et al.
    2024 (arXiv:2407.10671) and 2025 (arXiv:2505.09388).
    """
    block, final = Block(config), _norm(config.norm, config.eps, "final")
    rows = config.vocab + config.padding_rows

    def init(key: Key) -> Params:
        keys = jax.random.split(key, config.layers + 4)
        x, visible = jnp.zeros((1, config.width)), jnp.ones((1, 1, 1), bool)

        def one(key: Key) -> Params:
            turn = turn_of(jnp.zeros((1, 1), jnp.int32))
            return block.init(key, x, visible, turn, None, None)["params"]

        params = {
            "embed": 0.02 * jax.random.normal(keys[0], (rows, config.width)),
            "blocks": jax.vmap(one)(keys[4:]),
            "final_norm": final.init(keys[1], x)["params"],
        }
        if config.positions == "learned":
            shape = config.max_length, config.width
            params["positions"] = 0.02 * jax.random.normal(keys[2], shape)
        if not config.tied:
            params["head"] = 0.02 * jax.random.normal(keys[3], (rows, config.width))
        return params

    def turn_of(positions: Array) -> tuple[Array, Array] | None:
        if config.positions == "learned":
            return None
        return attention.rotation(positions, config.head, config.rope_theta)

    def embed(params: Params, tokens: Array, positions: Array) -> Array:
        x = params["embed"][tokens]
        x = x + params["positions"][positions] if config.positions == "learned" else x
        return x.reshape(-1, config.width)

    def hidden(params: Params, tokens: Array, mask: Array) -> Array:
        _check_length(tokens.shape[1], config.max_length)
        positions, visible = attention.positions_of(mask), attention.causal(mask)
        turn = turn_of(positions)

        def one(x: Array, layer: Params) -> tuple[Array, None]:
            return block.apply({"params": layer}, x, visible, turn, None, None)[0], None

        x = embed(params, tokens, positions)
        body = jax.checkpoint(one) if config.remat else one
        x, _ = jax.lax.scan(body, x, params["blocks"], unroll=min(config.unroll, config.layers))
        return finish(params, x, tokens.shape)

    def finish(params: Params, x: Array, shape: tuple[int, ...]) -> Array:
        y: Any = final.apply({"params": params["final_norm"]}, x)
        return y.reshape(*shape, -1)

    def logits(params: Params, hidden: Array) -> Array:
        if not config.tied and "head" not in params:
            raise ValueError(
                "params: no output layer, as in a reward model; expected the parameters of a "
                "language model"
            )
        table = params["embed" if config.tied else "head"][: config.vocab]
        y = matmul(hidden.reshape(-1, config.width), table.T, config.dtype)
        return y.reshape(*hidden.shape[:-1], config.vocab)

    def cache(batch: int, length: int) -> Cache:
        _check_length(length, config.max_length)
        low = jnp.bfloat16 if config.dtype == "bfloat16" else jnp.float32
        empty = jnp.zeros((batch, config.num_kv, length, config.head), low)
        layers = tuple(KeyValues(empty, empty) for _ in range(config.layers))
        return Cache(layers, jnp.zeros((batch, length), bool), jnp.zeros((), jnp.int32))

    def extend(params: Params, cache: Cache, tokens: Array, mask: Array) -> tuple[Array, Cache]:
        time, slots = tokens.shape[1], cache.mask.shape[1]
        _check_length(time, slots)
        start = cache.filled
        seen = jax.lax.dynamic_update_slice_in_dim(cache.mask, mask, start, 1)
        positions = attention.positions_of(seen)
        positions = jax.lax.dynamic_slice_in_dim(positions, start, time, 1)
        order = jnp.arange(slots) <= start + jnp.arange(time)[:, None]
        visible, turn = order & seen[:, None], turn_of(positions)
        x, layers = embed(params, tokens, positions), []
        for layer, past in zip(unstack(params)["blocks"], cache.layers, strict=True):
            x, past = block.apply({"params": layer}, x, visible, turn, past, start)
            layers.append(past)
        return finish(params, x, tokens.shape), Cache(tuple(layers), seen, start + time)

    return Transformer(config, init, hidden, logits, cache, extend)


def _check_length(length: int, most: int) -> None:
    if length > most:
        raise ValueError(
            f"tokens: got a length of {length}, expected at most {most}; shorten the sequences, or "
            "raise max_length or the length of the cache"
        )
