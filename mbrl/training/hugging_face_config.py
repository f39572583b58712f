"""config.json of Hugging Face folders, to and from `TransformerConfig`.

What would change the logits and is not known here is refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mbrl.networks.transformer import FAMILIES, TransformerConfig, family_config

_ABSENT = object()

# Entries that change what is computed, and the values that they may have. Absent is as good as
# the first one.
_GPT2_FIXED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
}
_LLAMA_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "rope_scaling": (None,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (None,),
}
_ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def family_of(config: TransformerConfig) -> str:
    """Return the family of a configuration.

    Raises:
      ValueError: when none of them has such a block.
    """
    found = [
        family
        for family, fixed in FAMILIES.items()
        if all(getattr(config, name) == value for name, value in fixed.items())
    ]
    if not found:
        raise ValueError(
            f"config: got {config}, expected the block of one of {list(FAMILIES)}; make it with "
            "family_config"
        )
    if found == ["gpt2"] and (config.num_kv != config.heads or config.head_dim):
        raise ValueError(
            f"config: got kv_heads={config.kv_heads}, head_dim={config.head_dim}, expected 0 for "
            "both: GPT-2 has neither groups nor heads of their own width"
        )
    return found[0]


def read_config(entries: Mapping[str, Any], vocab: int | None = None) -> TransformerConfig:
    """Read the entries of a config.json.

    Args:
      entries: its content.
      vocab: tokens of the tokenizer, where the embedding has further rows; None = all rows.

    Returns:
      The configuration of the model.

    Raises:
      ValueError: naming an entry that is missing, or whose value means another computation.
    """
    family = entries.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type: got {family!r}, expected one of {list(FAMILIES)}")
    gpt2 = family == "gpt2"
    for name, allowed in (_GPT2_FIXED if gpt2 else _LLAMA_FIXED).items():
        _refuse_unless(name, entries.get(name, allowed[0]), allowed)
    rows = _need(entries, "vocab_size")
    if vocab is not None and not 1 <= vocab <= rows:
        raise ValueError(f"vocab: got {vocab}, expected 1 to {rows}, the rows of the embedding")
    sizes = (_gpt2_sizes if gpt2 else _llama_sizes)(entries)
    return family_config(
        family,
        vocab=vocab or rows,
        padding_rows=rows - (vocab or rows),
        tied=entries.get("tie_word_embeddings", gpt2),
        **sizes,
    )


def _gpt2_sizes(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "layers": _need(entries, "n_layer"),
        "width": _need(entries, "n_embd"),
        "heads": _need(entries, "n_head"),
        "mlp_width": entries.get("n_inner") or 0,
        "max_length": _need(entries, "n_positions"),
        "eps": entries.get("layer_norm_epsilon", 1e-5),
    }


def _llama_sizes(entries: Mapping[str, Any]) -> dict[str, Any]:
    rope = entries.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    _refuse_unless("rope_parameters.rope_type", kind, ("default",))
    _refuse_unless(
        "rope_parameters.partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), (1.0,)
    )
    for kind in entries.get("layer_types") or []:
        _refuse_unless("layer_types", kind, ("full_attention",))
    # Where transformers has another default than these, the entry must be there.
    llama, qwen3 = entries["model_type"] == "llama", entries["model_type"] == "qwen3"
    return {
        "layers": _need(entries, "num_hidden_layers"),
        "width": _need(entries, "hidden_size"),
        "heads": _need(entries, "num_attention_heads"),
        "kv_heads": (entries.get if llama else _getter(entries))("num_key_value_heads") or 0,
        "head_dim": (_getter(entries) if qwen3 else entries.get)("head_dim") or 0,
        "mlp_width": _need(entries, "intermediate_size"),
        "max_length": _need(entries, "max_position_embeddings"),
        "eps": entries.get("rms_norm_eps", 1e-6),
        "rope_theta": rope.get("rope_theta", entries.get("rope_theta", 10_000.0)),
    }


def _getter(entries: Mapping[str, Any]) -> Any:
    return lambda name: _need(entries, name)


def _need(entries: Mapping[str, Any], name: str) -> Any:
    value = entries.get(name, _ABSENT)
    if value is _ABSENT:
        raise ValueError(f"{name}: missing in config.json; write the folder with save_pretrained")
    return value


def _refuse_unless(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(
            f"{name}: got {value!r} in config.json, expected {' or '.join(map(repr, allowed))}; "
            "this model computes something else, which is not supported"
        )


def write_config(config: TransformerConfig, head: bool = False) -> dict[str, Any]:
    """Return the entries of a config.json that transformers reads.

    Args:
      config: of the model.
      head: whether it has a scalar head.

    Raises:
      ValueError: for a block that no family has.
    """
    family = family_of(config)
    name = _ARCHITECTURES[family]
    if head:
        name = name.replace("LMHeadModel", "ForSequenceClassification")
        name = name.replace("ForCausalLM", "ForSequenceClassification")
    entries: dict[str, Any] = {
        "model_type": family,
        "architectures": [name],
        "vocab_size": config.vocab + config.padding_rows,
        "tie_word_embeddings": config.tied,
        # The defaults of transformers mean tokens that this vocabulary may not have.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if head:
        entries |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    if family == "gpt2":
        return entries | {
            "n_layer": config.layers,
            "n_embd": config.width,
            "n_head": config.heads,
            "n_inner": config.mlp_width or None,
            "n_positions": config.max_length,
            "layer_norm_epsilon": config.eps,
            "activation_function": "gelu_new",
        }
    if config.head_dim or family == "qwen3":
        entries["head_dim"] = config.head
    return entries | {
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.num_kv,
        "intermediate_size": config.mlp,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
    }
