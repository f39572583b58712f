"""Make transformers.npz: tiny models of four families, and what transformers computes of them.

Run with an interpreter that has torch and transformers: `python make_transformers.py OUT.npz`.
Every weight is drawn, also those of norms and biases: initial ones and zeros would hide an error.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
import transformers

COMMON = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "attn_implementation": "eager",
}
CONFIGS = {
    "gpt2": transformers.GPT2Config(
        vocab_size=32, n_embd=16, n_layer=2, n_head=4, n_positions=16, attn_implementation="eager"
    ),
    "llama": transformers.LlamaConfig(**COMMON, rms_norm_eps=1e-5, tie_word_embeddings=False),
    "qwen2": transformers.Qwen2Config(**COMMON, rms_norm_eps=1e-6, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(
        **COMMON, head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    ),
}
IDS = [[1, 1, 1, 13, 19, 28, 6], [20, 14, 28, 10, 6, 18, 20]]
LEFT = [[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]
RIGHT = [[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]]


def logits(model: torch.nn.Module, mask: list[list[int]]) -> np.ndarray:
    """Return [2, 7, 32], with position ids counted over the mask."""
    seen = torch.tensor(mask)
    positions = (seen.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(torch.tensor(IDS), attention_mask=seen, position_ids=positions)
    return out.logits.numpy()


def main(path: str) -> None:
    """Write the file."""
    arrays = {"ids": IDS, "left_mask": LEFT, "right_mask": RIGHT}
    for family, config in CONFIGS.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for name, weight in model.named_parameters():
            centre = float(weight.dim() == 1 and name.endswith("weight"))
            torch.nn.init.normal_(weight, centre, 0.3)
        arrays[f"{family}/config"] = np.array(json.dumps(model.config.to_dict()))
        state = model.state_dict()
        if config.tie_word_embeddings:
            del state["lm_head.weight"]
        arrays |= {f"{family}/weights/{name}": x.numpy() for name, x in state.items()}
        arrays[f"{family}/left"] = logits(model, LEFT)
        arrays[f"{family}/right"] = logits(model, RIGHT)
    np.savez_compressed(path, **{name: np.asarray(x) for name, x in arrays.items()})


if __name__ == "__main__":
    main(sys.argv[1])
