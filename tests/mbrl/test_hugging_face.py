"""Models of transformers: the same logits, and nothing that is silently wrong."""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from mbrl.networks.transformer import transformer
from mbrl.training.hugging_face import Checkpoint, load, save
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

    # One token after the other.
    extend = jax.jit(model.extend)
    mask = jnp.asarray(data["left_mask"], bool)
    store, parts = model.cache(2, 9), []
    for t in range(7):
        hidden, store = extend(params, store, ids[:, t : t + 1], mask[:, t : t + 1])
        parts.append(hidden)
    got = model.logits(params, jnp.concatenate(parts, 1))
    assert largest_error(got, data[f"{family}/left"], data["left_mask"]) < 1e-5


def test_both_sides_of_padding_in_a_model_of_another_hand() -> None:
    """Logits and rewards that an independent script has computed with torch."""
    data = golden("models.npz")
    for part, head in (("lm", False), ("rm", True)):
        weights = {k.removeprefix(part + "."): x for k, x in data.items() if k.startswith(part)}
        config, params, score = read(GPT2, weights, head)
        hidden = jax.jit(transformer(config).hidden)
        if not head:
            ids, mask = jnp.asarray(data["left_ids"], jnp.int32), data["left_ids"] != 1
            logits = transformer(config).logits(params, hidden(params, ids, jnp.asarray(mask)))
            assert largest_error(logits, data["left_logits"], mask) < 1e-6
        else:
            ids, mask = jnp.asarray(data["right_ids"], jnp.int32), data["right_ids"] != 1
            last = hidden(params, ids, jnp.asarray(mask))[jnp.arange(2), mask.sum(1) - 1]
            np.testing.assert_allclose(last @ score, data["right_score"], atol=1e-6)


def read(entries: dict[str, Any], weights: dict[str, np.ndarray], head: bool = False) -> Checkpoint:
    with tempfile.TemporaryDirectory() as root:
        return load(write_folder(Path(root) / "model", entries, weights), head)


def test_loading_saving_and_loading_changes_no_bit(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    for family in FAMILIES:
        config, params, _ = load(folders[family])
        score = jnp.arange(16.0)
        save(tmp_path / family, config, params, score, {"eos_token_id": 3})
        again = load(tmp_path / family, head=True)
        assert again.config == config
        jax.tree.map(np.testing.assert_array_equal, again.params, params)
        np.testing.assert_array_equal(again.head, score)
        entries = json.loads((tmp_path / family / "config.json").read_text())
        assert entries["eos_token_id"] == 3
        assert entries["architectures"][0].endswith("ForSequenceClassification")
        stored = written(tmp_path / family)
        expected = family_weights(family) | {"score.weight": np.arange(16.0)[None]}
        assert stored.keys() == expected.keys()
        for name, tensor in stored.items():
            np.testing.assert_array_equal(tensor, expected[name], name)


def written(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "numpy") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}
    return found


def test_shards_are_one_model(folders: dict[str, Path], tmp_path: Path) -> None:
    config, params, _ = load(folders["qwen3"])
    save(tmp_path / "model", config, params, shard_bytes=4000)
    files = sorted(file.name for file in (tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "model").params, params)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]

    (tmp_path / "model" / files[1]).unlink()
    with pytest.raises(ValueError, match=rf"{files[1]}: missing; weights are read from safeten"):
        load(tmp_path / "model")


def test_an_index_may_not_point_elsewhere(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(family_entries("qwen3")))
    weight_map = {"x": str(folders["qwen3"] / "model.safetensors")}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="expected one in the same folder"):
        load(tmp_path)
    for broken in ({}, {"weight_map": [1]}, {"weight_map": {"x": 1}}):
        index.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match="no weight_map of names to files"):
            load(tmp_path)


def test_an_output_layer_that_is_tied_may_be_there_but_not_differ() -> None:
    weights = family_weights("qwen2")
    alone = read(family_entries("qwen2"), weights)
    table = weights["model.embed_tokens.weight"]
    both = read(family_entries("qwen2"), weights | {"lm_head.weight": table})
    assert "head" not in both.params
    jax.tree.map(np.testing.assert_array_equal, both.params, alone.params)
    with pytest.raises(ValueError, match="lm_head.weight: differs from the embedding"):
        read(family_entries("qwen2"), weights | {"lm_head.weight": table + 1})


def test_buffers_and_names_without_a_prefix_are_known() -> None:
    weights = family_weights("gpt2")
    bare = {name.removeprefix("transformer."): x for name, x in weights.items()}
    bare |= {"h.0.attn.bias": np.ones((1, 1, 4, 4)), "h.1.attn.masked_bias": np.ones(())}
    got, expected = read(family_entries("gpt2"), bare), read(family_entries("gpt2"), weights)
    jax.tree.map(np.testing.assert_array_equal, got.params, expected.params)


def test_weights_of_16_bits_are_widened() -> None:
    weights = family_weights("llama")
    for kind in (np.float16, jnp.bfloat16):
        low = {name: x.astype(kind) for name, x in weights.items()}
        params = read(family_entries("llama"), low).params
        table = params["embed"]
        assert table.dtype == jnp.float32
        np.testing.assert_array_equal(table, low["model.embed_tokens.weight"].astype(np.float32))


def test_rows_beyond_the_tokens_are_kept_but_never_predicted(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    config, params, _ = load(folders["llama"], vocab=30)
    assert (config.vocab, config.padding_rows) == (30, 2)
    assert transformer(config).logits(params, jnp.zeros((1, 16))).shape == (1, 30)
    save(tmp_path / "model", config, params)
    assert load(tmp_path / "model").config.vocab == 32
    with pytest.raises(ValueError, match="vocab: got 33, expected 1 to 32"):
        load(folders["llama"], vocab=33)


def changed(**tensors: np.ndarray | None) -> dict[str, np.ndarray]:
    weights = family_weights("llama") | tensors
    return {name: x for name, x in weights.items() if x is not None}


FIRST = "model.layers.0.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("weights", "head", "message"),
    [
        (changed(**{FIRST: None}), False, f"1 tensors are missing, the first is {FIRST}"),
        (changed(**{"lm_head.weight": None}), False, "missing, the first is lm_head.weight"),
        (changed(), True, "missing, the first is score.weight"),
        (changed(**{"score.weight": np.ones((1, 16))}), False, "score.weight; load it with head=T"),
        (changed(**{"v_head.summary.bias": np.ones(1)}), False, "the first is v_head.summary.bias"),
        (changed(**{"score.weight": np.ones((2, 16))}), True, r"score.weight: got shape (2, 16), "),
        (changed(**{FIRST: np.ones((16, 8))}), False, f"{FIRST}: got shape (16, 8), expected (8, "),
        (changed(**{FIRST: np.ones((8, 16), np.int8)}), False, f"{FIRST}: got the type I8"),
    ],
)
def test_tensors_that_do_not_fit_are_named(weights: dict, head: bool, message: str) -> None:
    floats = {k: x if x.dtype == np.int8 else x.astype(np.float32) for k, x in weights.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        read(family_entries("llama"), floats, head)


@pytest.mark.parametrize(
    ("family", "entry", "value", "message"),
    [
        ("llama", "model_type", "mamba", "model_type: got 'mamba'"),
        ("llama", "hidden_act", "gelu", "hidden_act: got 'gelu'"),
        ("llama", "attention_bias", True, "attention_bias: got True"),
        ("llama", "rope_scaling", {"factor": 8.0}, "rope_scaling: got {'factor': 8.0}"),
        ("llama", "rope_parameters", {"rope_type": "yarn"}, "rope_parameters.rope_type: got 'yarn"),
        ("qwen2", "use_sliding_window", True, "use_sliding_window: got True"),
        ("qwen3", "layer_types", ["sliding_attention"], "layer_types: got 'sliding_attention'"),
        ("gpt2", "activation_function", "relu", "activation_function: got 'relu'"),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx: got T"),
        ("gpt2", "n_layer", 10**9, "num_hidden_layers: got 1000000000"),
        ("gpt2", "n_embd", 10**9, "ln_1.bias: got shape (16,), expected (1000000000,)"),
        ("gpt2", "n_head", "4", "heads must be at least 1, got 4"),
    ],
)
def test_what_would_change_the_logits_is_refused(
    family: str, entry: str, value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read(family_entries(family) | {entry: value}, family_weights(family))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config.json: missing, expected a folder"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not JSON"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="vocab_size: missing in config.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(family_entries("gpt2")))
    with pytest.raises(ValueError, match="model.safetensors: missing"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="model.safetensors: damaged"):
        load(tmp_path)


def test_saving_refuses_what_it_could_not_load(folders: dict[str, Path], tmp_path: Path) -> None:
    config, params, _ = load(folders["gpt2"])
    with pytest.raises(ValueError, match="exists; choose a new one"):
        save(folders["gpt2"], config, params)
    with pytest.raises(ValueError, match="params: positions is in only one of"):
        save(tmp_path / "a", config, {k: x for k, x in params.items() if k != "positions"})
    with pytest.raises(ValueError, match=r"params: embed got \(32, 8\), expected \(32, 16\)"):
        save(tmp_path / "a", config, params | {"embed": params["embed"][:, :8]})
    with pytest.raises(ValueError, match="expected the block of one of"):
        save(tmp_path / "a", dataclasses.replace(config, norm="rms"), params)
    assert list(tmp_path.iterdir()) == []
