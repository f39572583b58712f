"""Models of transformers: the same logits, and nothing that is silently wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl.networks.transformer import transformer
from mbrl.training.hugging_face import load
from tests.mbrl.checkpoints import FAMILIES, family_entries, family_weights, golden, write_folder

every_family = pytest.mark.parametrize("family", FAMILIES)
GPT2 = {
    "model_type": "gpt2", "vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2,
    "n_positions": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {f: write_folder(root / f, family_entries(f), family_weights(f)) for f in FAMILIES}


def largest_error(got: Any, expected: np.ndarray, mask: np.ndarray) -> float:
    return float(np.abs(np.asarray(got) - expected)[mask.astype(bool)].max())


@every_family
def test_logits_are_those_of_transformers(folders: dict[str, Path], family: str) -> None:
    config, params, _ = load(folders[family])
    model, data = transformer(config), golden("transformers.npz")
    ids = jnp.asarray(data["ids"], jnp.int32)
    whole = jax.jit(lambda params, mask: model.logits(params, model.hidden(params, ids, mask)))
    for side in ("left", "right"):
        mask = data[f"{side}_mask"]
        got = whole(params, jnp.asarray(mask, bool))
        assert np.isfinite(got).all()
        assert largest_error(got, data[f"{family}/{side}"], mask) < 1e-5

    # A prompt of four tokens, then one after the other.
    extend = jax.jit(model.extend)
    mask = jnp.asarray(data["left_mask"], bool)
    store, parts = model.cache(2, 9), []
    for start, stop in ((0, 4), (4, 5), (5, 6), (6, 7)):
        hidden, store = extend(params, store, ids[:, start:stop], mask[:, start:stop])
        parts.append(hidden)
    got = model.logits(params, jnp.concatenate(parts, 1))
    assert largest_error(got, data[f"{family}/left"], data["left_mask"]) < 1e-5
