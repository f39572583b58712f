"""Language models from and to Hugging Face folders: config.json and safetensors.

Reading is strict. A tensor that is missing, that nobody asked for or that has another shape is
an error that names it, and nothing is allocated before all shapes have been compared.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mbrl.networks.transformer import TransformerConfig
from mbrl.training.hugging_face_config import read_config, write_config
from mbrl.training.hugging_face_names import (
    Place,
    base_of,
    flatten,
    fuse,
    tensor_places,
    unflatten,
    unfuse,
)
from mbrl.types import Array, Params

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SCORE = "score.weight"
_MAX_JSON = 2**26
# Constants that older versions of transformers stored beside the weights.
_BUFFERS = re.compile(r"(^|\.)(attn\.bias|attn\.masked_bias|rotary_emb\.inv_freq)$")
_FLOATS = ("F32", "F16", "BF16")


class Checkpoint(NamedTuple):
    """What a folder holds.

    Attributes:
      config: of the model.
      params: as `Transformer.init` makes them, float32.
      head: [D] kernel of the scalar head; None where none was asked for.
    """

    config: TransformerConfig
    params: Params
    head: Array | None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _MAX_JSON:
            raise ValueError(f"{file}: got more than {_MAX_JSON} bytes, expected a short text")
        found = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{file}: missing, expected a folder with {CONFIG} and {WEIGHTS} as save_pretrained "
            "writes it"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: not JSON ({error}); copy the folder again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: got {type(found).__name__}, expected a JSON object")
    return found


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        names = [WEIGHTS]
    else:
        where = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(x, str) for x in where.values()):
            raise ValueError(f"{folder / INDEX}: no weight_map of names to files; copy it again")
        names = sorted(set(where.values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{INDEX}: got the file {name!r}, expected one in the same folder")
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder / name}: missing; weights are read from safetensors only, write the "
                "folder with save_pretrained(safe_serialization=True)"
            )
    return [folder / name for name in names]


def _open(stack: ExitStack, folder: Path) -> dict[str, Any]:
    """Open all files, and return the one that holds each tensor."""
    found: dict[str, Any] = {}
    for file in _weight_files(folder):
        try:
            opened = stack.enter_context(safe_open(file, framework="numpy"))
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged ({error}); copy it again") from None
        for name in opened.keys():
            if name in found:
                raise ValueError(f"{name}: in two files of {folder}, expected in one")
            found[name] = opened
    return found


def _compare(folder: Path, found: Mapping[str, Any], places: Mapping[str, Place]) -> None:
    if missing := sorted(places.keys() - found.keys()):
        raise ValueError(
            f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}; a model is "
            "never completed with random weights, check that config.json belongs to the weights"
        )
    if extra := sorted(name for name in found.keys() - places.keys() if not _BUFFERS.search(name)):
        raise ValueError(
            f"{folder}: {len(extra)} tensors belong to no part of the model, the first is "
            f"{extra[0]}; " + _remedy(extra)
        )
    for name, place in places.items():
        entry = found[name].get_slice(name)
        if tuple(entry.get_shape()) != place.stored:
            raise ValueError(
                f"{name}: got shape {tuple(entry.get_shape())}, expected {place.stored} after "
                "config.json; check that the two belong together"
            )
        if entry.get_dtype() not in _FLOATS:
            raise ValueError(
                f"{name}: got the type {entry.get_dtype()}, expected one of {_FLOATS}; "
                "quantized weights are not read"
            )


def _remedy(extra: list[str]) -> str:
    if extra == [SCORE]:
        return "load it with head=True"
    return "check that config.json belongs to the weights"


def read_shape(folder: str | Path, vocab: int | None = None) -> TransformerConfig:
    """Read the configuration of a model alone; see `load`."""
    return read_config(_read_json(Path(folder) / CONFIG), vocab)


def load(folder: str | Path, head: bool = False, vocab: int | None = None) -> Checkpoint:
    """Load a GPT-2, Llama, Qwen2 or Qwen3 model.

    Args:
      folder: with config.json and model.safetensors, or its shards and their index.
      head: whether there is a scalar head, `score.weight` [1, D]. A folder of a reward model
        without an output layer then has none among the parameters either.
      vocab: tokens of the tokenizer, where the embedding has further rows; these never get a
        probability. None = all rows are tokens.

    Returns:
      A `Checkpoint`; weights of 16 bits are widened to float32.

    Raises:
      ValueError: naming the tensor that is missing, unknown or of another shape, the entry of
        config.json that is not supported, or the file that cannot be read.
    """
    folder = Path(folder)
    config = read_shape(folder, vocab)
    with ExitStack() as stack:
        found = _open(stack, folder)
        if config.layers > len(found):
            raise ValueError(
                f"num_hidden_layers: got {config.layers} in config.json for {len(found)} tensors; "
                "check that it belongs to the weights"
            )
        base = base_of(config)
        # The body alone, without an output layer, is saved without the first part of the names.
        places = tensor_places(config, base if any(n.startswith(base) for n in found) else "")
        if head:
            places[SCORE] = Place("score", None, (1, config.width), False)
            if "lm_head.weight" not in found:
                places.pop("lm_head.weight", None)
        tied = config.tied and "lm_head.weight" in found
        if tied:
            shape = (config.vocab + config.padding_rows, config.width)
            places["lm_head.weight"] = Place("head", None, shape, False)
        _compare(folder, found, places)
        flat = dict(_filled(config, found, places))
    if tied and not np.array_equal(flat.pop("head"), flat["embed"]):
        raise ValueError(
            "lm_head.weight: differs from the embedding, but config.json says "
            "tie_word_embeddings; correct one of them"
        )
    score = flat.pop("score", None)
    flat = unfuse(config, flat)
    params = unflatten({path: jnp.asarray(leaf) for path, leaf in flat.items()})
    return Checkpoint(config, params, None if score is None else jnp.asarray(score[0]))


def _filled(
    config: TransformerConfig, found: Mapping[str, Any], places: Mapping[str, Place]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the leaves, each read into its place."""
    leaves: dict[str, list[tuple[str, Place]]] = {}
    for name, place in places.items():
        leaves.setdefault(place.path, []).append((name, place))
    for path, parts in leaves.items():
        stacked = parts[0][1].layer is not None
        leaf = np.empty((config.layers,) * stacked + parts[0][1].shape, np.float32)
        for name, place in parts:
            tensor = found[name].get_tensor(name)
            leaf[place.layer if stacked else ...] = tensor.T if place.transposed else tensor
        yield path, leaf


def save(
    folder: str | Path,
    config: TransformerConfig,
    params: Params,
    head: Array | None = None,
    entries: Mapping[str, Any] | None = None,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Save a model so that `load` and transformers read it.

    The folder appears when all of it has been written.

    Args:
      folder: that does not exist yet.
      config: of the model, of one of the four families.
      params: its parameters, with LoRA adapters merged.
      head: [D] kernel of a scalar head: the folder is then one for sequence classification.
      entries: further entries of config.json, such as `eos_token_id`.
      shard_bytes: size above which the weights are cut into several files.

    Raises:
      ValueError: when the folder exists, for a block that no family has, and for parameters that
        are not those of `config`.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"folder: {folder} exists; choose a new one, or remove it")
    flat = {path: np.asarray(leaf, np.float32) for path, leaf in flatten(params).items()}
    flat, places = fuse(config, flat), tensor_places(config)
    if head is not None:
        flat["score"] = np.asarray(head, np.float32).reshape(1, -1)
        places[SCORE] = Place("score", None, (1, config.width), False)
        if "head" not in flat:
            places.pop("lm_head.weight", None)
    tensors = dict(_tensors(flat, places))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
        partial = Path(name) / "whole"
        partial.mkdir()
        _write_shards(partial, tensors, shard_bytes)
        text = json.dumps(write_config(config, head is not None) | dict(entries or {}), indent=2)
        (partial / CONFIG).write_text(text + "\n", "utf-8")
        os.replace(partial, folder)


def _tensors(
    flat: Mapping[str, np.ndarray], places: Mapping[str, Place]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of a file."""
    if differing := sorted(flat.keys() ^ {place.path for place in places.values()}):
        raise ValueError(
            f"params: {differing[0]} is in only one of the parameters and the config; expected "
            "what Transformer.init makes"
        )
    for name, place in places.items():
        leaf = flat[place.path]
        leaf = leaf if place.layer is None else leaf[place.layer]
        if leaf.shape != place.shape:
            raise ValueError(f"params: {place.path} got {leaf.shape}, expected {place.shape}")
        yield name, np.ascontiguousarray(leaf.T if place.transposed else leaf)


def _write_shards(folder: Path, tensors: Mapping[str, np.ndarray], shard_bytes: int) -> None:
    shards: list[dict[str, np.ndarray]] = [{}]
    room = shard_bytes
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    # transformers asks for this entry.
    about = {"format": "pt"}
    if len(shards) == 1:
        save_file(shards[0], folder / WEIGHTS, about)
        return
    where = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, about)
        where |= dict.fromkeys(shard, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
