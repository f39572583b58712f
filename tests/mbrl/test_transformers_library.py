"""A round trip with the library that writes such folders, where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl.models.generation import generate
from mbrl.models.token import token_log_probs
from mbrl.networks.lora import lora
from mbrl.networks.transformer import transformer
from mbrl.training.hugging_face import load, save

torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

PROMPTS = np.array([[0, 0, 13, 9], [4, 14, 8, 10]])
MASK = np.array([[0, 0, 1, 1], [1, 1, 1, 1]])


def random_model(family: str) -> Any:
    """Make a model of transformers with weights that tell tokens apart."""
    configs = {
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        ),
        "qwen3": lambda: transformers.Qwen3Config(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=32,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        ),
    }  # fmt: skip
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(configs[family]()).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, float(weight.dim() == 1), 0.3)
    return model


def outputs(kind: Any, folder: Path, tokens: jax.Array, mask: jax.Array) -> np.ndarray:
    """Compute what transformers makes of one of our folders."""
    model = kind.from_pretrained(folder).eval()
    inputs = {
        "input_ids": tokens,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clip(0),
    }
    with torch.no_grad():
        out = model(**{k: torch.tensor(np.array(x, np.int64)) for k, x in inputs.items()})
    return out.logits.numpy()


def round_trip(family: str, folder: Path) -> dict[str, float]:
    """Load a model of transformers, generate, fine-tune, save, and load it there again."""
    theirs = random_model(family)
    theirs.save_pretrained(folder / "theirs", max_shard_size="10KB")
    config, params, _ = load(folder / "theirs")
    model = transformer(config)

    length, prompts, mask = 8, jnp.asarray(PROMPTS, jnp.int32), jnp.asarray(MASK, bool)
    key = jax.random.key(0)
    out = jax.jit(lambda p: generate(model, p, key, prompts, mask, length, 0.0, eos=2))(params)
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor(PROMPTS), attention_mask=torch.tensor(MASK), max_new_tokens=length,
            do_sample=False,
        ).numpy()  # fmt: skip
    width = expected.shape[1]
    same = np.array_equal(out.tokens[:, :width], expected) and not out.mask[:, width:].any()

    adapter = lora(rank=2, alpha=4.0)
    adapters = adapter.init(jax.random.key(1), params)
    tokens = jnp.pad(prompts, ((0, 0), (0, length)), constant_values=5)
    real = jnp.pad(mask, ((0, 0), (0, length)), constant_values=True)

    def loss(adapters: Any) -> jax.Array:
        return -token_log_probs(model, adapter.merge(params, adapters), tokens, real, length).mean()

    value_and_slope = jax.jit(jax.value_and_grad(loss))
    before, slope = value_and_slope(adapters)
    adapters = jax.tree.map(lambda x, g: x - 0.05 * g, adapters, slope)
    after, _ = value_and_slope(adapters)
    merged = adapter.merge(params, adapters)
    save(folder / "ours", config, merged, entries={"eos_token_id": 2, "pad_token_id": 0})

    head = jax.random.normal(key, (config.width,))
    save(folder / "reward", config, merged, head, {"pad_token_id": 0})

    hidden = jax.jit(model.hidden)(merged, tokens, real)
    logits = outputs(transformers.AutoModelForCausalLM, folder / "ours", tokens, real)
    scores = outputs(
        transformers.AutoModelForSequenceClassification, folder / "reward", tokens, real
    )
    error = np.abs(np.asarray(model.logits(merged, hidden)) - logits)[np.asarray(real)].max()
    return {
        "same_tokens": float(same),
        "tokens": float(out.mask[:, 4:].sum()),
        "loss_before": float(before),
        "loss_after": float(after),
        "largest_logit": float(np.abs(logits).max()),
        "logit_error": float(error),
        "score_error": float(np.abs(scores[:, 0] - hidden[:, -1] @ head).max()),
    }


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_a_folder_goes_there_and_back(family: str, tmp_path: Path) -> None:
    found = round_trip(family, tmp_path)
    assert found["same_tokens"] == 1.0
    assert found["loss_after"] < found["loss_before"]
    assert found["logit_error"] < 1e-4
    assert found["score_error"] < 1e-4
