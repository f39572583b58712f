"""Folders of models and of reward models, as the stages of RLHF hand them on."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mbrl.models.token_reward import TokenReward, TokenRewardState, token_reward
from mbrl.networks.transformer import Transformer, TransformerConfig, transformer
from mbrl.tokenizers import Tokenizer
from mbrl.training import checkpoint, hugging_face, run_directory
from mbrl.training.hugging_face_config import write_config
from mbrl.training.text_data import Template, plain_chat
from mbrl.training.tokenizer_files import (
    WORDS,
    has_template,
    load_template,
    load_tokenizer,
    read_json,
    token_entries,
)
from mbrl.types import Params
from scripts import config_json

MODEL, REWARD = "model", "reward"
"""What a stage leaves in its folder."""
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "chat_template.jinja", WORDS,
)  # fmt: skip
UPDATE = "modelrl_update"
"""Entry of a config.json: the update of its stage that a model was made after."""


class LanguageModel(NamedTuple):
    """A model with its parameters, its tokenizer and what writes conversations for it."""

    model: Transformer
    params: Params
    tokenizer: Tokenizer
    template: Template = plain_chat


class LoadedReward(NamedTuple):
    """A reward model with its parameters."""

    reward: TokenReward
    state: TokenRewardState
    tokenizer: Tokenizer
    template: Template = plain_chat


def load_model(folder: str, **changes: Any) -> LanguageModel:
    """Load a model in the format of Hugging Face, with a tokenizer beside it.

    Args:
      folder: of the model, or of the stage that has made it.
      **changes: fields of `TransformerConfig`, such as `dtype` and `remat`.

    Raises:
      ValueError: for a folder without a model, or files that do not fit together.
    """
    path = _found(folder, MODEL, hugging_face.CONFIG)
    tokenizer = load_tokenizer(path)
    rows = hugging_face.read_shape(path).vocab
    if tokenizer.vocab > rows:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.vocab} tokens and the model {rows}, expected no "
            "more of them; do these files belong together?"
        )
    # Rows of the table that no token has, as padded vocabularies have them, get no probability.
    loaded = hugging_face.load(path, vocab=tokenizer.vocab)
    config = dataclasses.replace(loaded.config, **changes)
    return LanguageModel(transformer(config), loaded.params, tokenizer, template_of(path))


def template_of(folder: Path) -> Template:
    """Return the chat template of a folder, or `plain_chat` where it has none.

    It is loaded for the first conversation: other data need no package for it.
    """
    if not has_template(folder):
        return plain_chat
    loaded = functools.cache(load_template)
    return lambda messages: loaded(folder)(messages)


def save_model(
    folder: Path, config: TransformerConfig, params: Params, source: Path, update: int = 0
) -> None:
    """Write a model, and the tokenizer that lies in `source`.

    One that was made after the same update is left alone, another one is replaced in one step.
    """
    about = folder / hugging_face.CONFIG
    if about.exists() and read_json(about).get(UPDATE, update) == update:
        copy_tokenizer(source, folder)
        return
    new, old = (folder.with_name(f".{folder.name}-{name}") for name in ("new", "old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    entries = token_entries(source) | {UPDATE: update}
    hugging_face.save(new, config, jax.device_get(params), entries=entries)
    copy_tokenizer(source, new)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def save_reward(
    folder: Path, config: TransformerConfig, kind: str, state: TokenRewardState, source: Path,
    update: int = 0,
) -> None:  # fmt: skip
    """Write a reward model, and the tokenizer that lies in `source`."""
    manifest = {
        "config": config_json.to_json(config), "kind": kind, "members": state.head.shape[0],
        "update": update,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    copy_tokenizer(source, folder)
    entries = write_config(config, head=True) | token_entries(source)
    run_directory.write_json(folder / hugging_face.CONFIG, entries)
    checkpoint.save(folder, 0, state, manifest)


def reward_update(folder: Path) -> int | None:
    """Return the update that a reward model was made after; None where none is known."""
    saved = checkpoint.read_manifest(folder)
    return None if saved is None else saved[1].get("update")


def load_reward(folder: str) -> LoadedReward:
    """Load what `save_reward` has written.

    Raises:
      ValueError: for a folder without a reward model, or a damaged one.
    """
    path = _found(folder, REWARD, "step_000000000")
    manifest = checkpoint.read_manifest(path)
    if manifest is None:
        raise ValueError(f"{path}: no intact reward model; make it again with mbrl rlhf reward")
    about = manifest[1]
    model = transformer(config_json.from_json(TransformerConfig, about["config"]))
    reward = token_reward(model, about["members"], about["kind"])
    like = jax.eval_shape(lambda: reward.init(jax.random.key(0), model.init(jax.random.key(0))))
    restored = checkpoint.restore(path, like)
    assert restored is not None
    return LoadedReward(reward, restored.tree, load_tokenizer(path), template_of(path))


def check_fit(language: LanguageModel, loaded: LoadedReward, folder: str) -> None:
    """Refuse a reward model that reads other tokens than a policy writes.

    Raises:
      ValueError: naming the folder of the reward model.
    """
    mine, its = language.tokenizer, loaded.tokenizer
    if (mine.vocab, mine.eos) != (its.vocab, its.eos):
        raise ValueError(
            f"reward: {folder} was trained with {its.vocab} tokens, the end being {its.eos}, "
            f"expected the {mine.vocab} of the model with the end {mine.eos}; train a reward model "
            "that begins with this model"
        )


def digest_of(tree: Any) -> str:
    """Return a digest of parameters, whatever files they come from."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaf = np.asarray(leaf)
        found.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape};".encode())
        found.update(np.ascontiguousarray(leaf).data)
    return found.hexdigest()[:16]


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer."""
    for name in _TOKENIZER:
        if (source / name).is_file() and not (folder / name).exists():
            shutil.copyfile(source / name, folder / name)


def model_path(folder: str) -> Path:
    """Return where the files of a model are."""
    return _found(folder, MODEL, hugging_face.CONFIG)


def _found(folder: str, inner: str, file: str) -> Path:
    """Find a model in a folder, or in that of the stage which has made it."""
    for path in (Path(folder) / inner, Path(folder)):
        if (path / file).exists():
            return path
    raise ValueError(
        f"{folder}: expected the folder of a {inner}, or of a finished stage that made one; there "
        f"is no {file} in it"
    )
