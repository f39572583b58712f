"""Names of tensors in Hugging Face files, and where they belong in our parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mbrl.networks.transformer import TransformerConfig, transformer
from mbrl.training.hugging_face_config import family_of
from mbrl.types import Array, Key, Params

_QKV = ("query", "key", "value")


class _Names(NamedTuple):
    """How a family names its tensors: ours by path, those of a block after its number."""

    base: str
    blocks: str
    top: dict[str, str]
    block: dict[str, str]
    transposed: bool


def _pairs(ours: str, theirs: str, norm: bool = False) -> dict[str, str]:
    kernel = "scale" if norm else "kernel"
    return {f"{ours}/{kernel}": f"{theirs}.weight", f"{ours}/bias": f"{theirs}.bias"}


# The kernels of GPT-2 are [in, out] as ours; the others are [out, in].
_GPT2 = _Names(
    "transformer.",
    "h",
    {"embed": "wte.weight", "positions": "wpe.weight"} | _pairs("final_norm", "ln_f", True),
    _pairs("attention_norm", "ln_1", True)
    | _pairs("qkv", "attn.c_attn")
    | _pairs("out", "attn.c_proj")
    | _pairs("mlp_norm", "ln_2", True)
    | _pairs("up", "mlp.c_fc")
    | _pairs("down", "mlp.c_proj"),
    False,
)
_LLAMA = _Names(
    "model.",
    "layers",
    {"embed": "embed_tokens.weight"} | _pairs("final_norm", "norm", True),
    _pairs("attention_norm", "input_layernorm", True)
    | _pairs("query", "self_attn.q_proj")
    | _pairs("key", "self_attn.k_proj")
    | _pairs("value", "self_attn.v_proj")
    | _pairs("query_norm", "self_attn.q_norm", True)
    | _pairs("key_norm", "self_attn.k_norm", True)
    | _pairs("out", "self_attn.o_proj")
    | _pairs("mlp_norm", "post_attention_layernorm", True)
    | _pairs("gate", "mlp.gate_proj")
    | _pairs("up", "mlp.up_proj")
    | _pairs("down", "mlp.down_proj"),
    True,
)


def _names(config: TransformerConfig) -> _Names:
    return _GPT2 if family_of(config) == "gpt2" else _LLAMA


def base_of(config: TransformerConfig) -> str:
    """Return the first part of the names in a file of a model with a head."""
    return _names(config).base


class Place(NamedTuple):
    """Where a tensor of a file belongs.

    Attributes:
      path: of the leaf of our parameters.
      layer: its row; None where the tensor is the whole leaf.
      shape: of the leaf or its row.
      transposed: whether the file has it the other way round.
    """

    path: str
    layer: int | None
    shape: tuple[int, ...]
    transposed: bool

    @property
    def stored(self) -> tuple[int, ...]:
        """Shape in the file."""
        return self.shape[::-1] if self.transposed else self.shape


def flatten(params: Params) -> dict[str, Any]:
    """Name the leaves of nested dicts by path."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {"/".join(str(entry.key) for entry in path): leaf for path, leaf in leaves}


def unflatten(flat: Mapping[str, Any]) -> Params:
    """Invert `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        here = tree
        for folder in folders:
            here = here.setdefault(folder, {})
        here[name] = leaf
    return tree


def fuse(config: TransformerConfig, flat: dict[str, Any], xp: Any = np) -> dict[str, Any]:
    """Join queries, keys and values where the family stores them as one matrix."""
    if family_of(config) != "gpt2":
        return flat
    flat = dict(flat)
    for kind in ("kernel", "bias"):
        parts = [flat.pop(f"blocks/{name}/{kind}") for name in _QKV]
        flat[f"blocks/qkv/{kind}"] = xp.concatenate(parts, -1)
    return flat


def unfuse(config: TransformerConfig, flat: dict[str, Any]) -> dict[str, Any]:
    """Invert `fuse`."""
    if family_of(config) != "gpt2":
        return flat
    flat = dict(flat)
    for kind in ("kernel", "bias"):
        parts = np.split(flat.pop(f"blocks/qkv/{kind}"), 3, -1)
        flat |= {f"blocks/{name}/{kind}": x for name, x in zip(_QKV, parts, strict=True)}
    return flat


def _shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every leaf, with those of GPT-2 fused."""

    def stored(key: Key) -> dict[str, Array]:
        return fuse(config, flatten(transformer(config).init(key)), jnp)

    return {path: leaf.shape for path, leaf in jax.eval_shape(stored, jax.random.key(0)).items()}


def tensor_places(config: TransformerConfig, base: str | None = None) -> dict[str, Place]:
    """Return the tensors that a file of this model has, by name.

    Args:
      config: of the model.
      base: first part of the names; None = as written by a model with a head.
    """
    names = _names(config)
    base = names.base if base is None else base
    found = {}
    for path, shape in _shapes(config).items():
        folder, _, rest = path.partition("/")
        if path == "head":
            found["lm_head.weight"] = Place(path, None, shape, False)
        elif folder == "blocks":
            turned = names.transposed and rest.endswith("kernel")
            for layer in range(config.layers):
                name = f"{base}{names.blocks}.{layer}.{names.block[rest]}"
                found[name] = Place(path, layer, shape[1:], turned)
        else:
            found[base + names.top[path]] = Place(path, None, shape, False)
    return found
