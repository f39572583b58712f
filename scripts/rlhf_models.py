"""Folders of models and of reward models, as the stages of RLHF hand them on."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mbrl.models.token_reward import TokenReward, TokenRewardState, token_reward
from mbrl.networks.transformer import Transformer, TransformerConfig, transformer
from mbrl.tokenizers import Tokenizer
from mbrl.training import checkpoint, hugging_face
from mbrl.training.tokenizer_files import WORDS, load_tokenizer
from mbrl.types import Params
from scripts import config_json

MODEL, REWARD = "model", "reward"
"""What a stage leaves in its folder."""
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    WORDS,
)  # fmt: skip


class LanguageModel(NamedTuple):
    """A model with its parameters and its tokenizer."""

    model: Transformer
    params: Params
    tokenizer: Tokenizer


class LoadedReward(NamedTuple):
    """A reward model with its parameters."""

    reward: TokenReward
    state: TokenRewardState
    tokenizer: Tokenizer


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
    return LanguageModel(transformer(config), loaded.params, tokenizer)


def save_model(folder: Path, config: TransformerConfig, params: Params, source: Path) -> None:
    """Write a model, and the tokenizer that lies in `source`; one that is there is left alone."""
    if not folder.exists():
        hugging_face.save(folder, config, jax.device_get(params))
    copy_tokenizer(source, folder)


def save_reward(
    folder: Path, config: TransformerConfig, kind: str, state: TokenRewardState, source: Path
) -> None:
    """Write a reward model, and the tokenizer that lies in `source`."""
    manifest = {
        "config": config_json.to_json(config), "kind": kind, "members": state.head.shape[0],
    }  # fmt: skip
    checkpoint.save(folder, 0, state, manifest)
    copy_tokenizer(source, folder)


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
    return LoadedReward(reward, restored.tree, load_tokenizer(path))


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
