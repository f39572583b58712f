"""Tokenizers in folders: `tokenizer.json` of Hugging Face, or the words of our own."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mbrl.tokenizers import Tokenizer, byte_tokenizer, word_tokenizer
from mbrl.training.run_directory import write_json

WORDS = "vocabulary.json"
"""The words of a `word_tokenizer`, a JSON list; or "bytes" for the `byte_tokenizer`."""
BYTES = "bytes"
_MAX_FILE = 256 * 2**20


def save_words(folder: Path, vocabulary: Sequence[str]) -> None:
    """Write the vocabulary of a `word_tokenizer`, for `load_tokenizer`."""
    word_tokenizer(vocabulary)
    write_json(Path(folder) / WORDS, list(vocabulary))


def save_bytes(folder: Path) -> None:
    """Say that the tokenizer of a folder is `byte_tokenizer`, for `load_tokenizer`."""
    write_json(Path(folder) / WORDS, BYTES)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a folder: `tokenizer.json`, or else `vocabulary.json`.

    The special tokens of a `tokenizer.json` are those that `tokenizer_config.json`,
    `special_tokens_map.json` or `config.json` beside it names. Where none is for padding, that of
    the end serves, which no mask can confuse. Its `encode` reads special tokens that are spelled
    out in a text, as chat templates need it: text of strangers should not contain them.

    Args:
      folder: of a pretrained model, or one that `save_words` or `save_bytes` has written to.

    Raises:
      ValueError: naming the file when it is missing, damaged or names no token for the end, or
        when the package `tokenizers` is needed and missing.
    """
    folder = Path(folder)
    if (folder / WORDS).exists() and not (folder / "tokenizer.json").exists():
        words = read_json(folder / WORDS)
        if words == BYTES:
            return byte_tokenizer()
        if not isinstance(words, list):
            raise ValueError(f"{folder / WORDS}: got {words!r:.60}, expected a list of words")
        return word_tokenizer(words)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{folder}: expected tokenizer.json (or {WORDS}), found neither; copy it from the model"
        )
    try:
        tokenizers = importlib.import_module("tokenizers")
    except ImportError:
        raise ValueError(f'{path} needs tokenizers: pip install "modelrl[hf]"') from None
    try:
        table = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more specific
        raise ValueError(f"{path}: expected a tokenizer of Hugging Face ({error!s:.200})") from None
    table.no_truncation()
    table.no_padding()
    eos, pad, bos = (_special(folder, table, name) for name in ("eos", "pad", "bos"))
    if eos is None:
        raise ValueError(
            f"{folder}: no file names the token that ends a text; add for example "
            '{"eos_token": "</s>"} as special_tokens_map.json'
        )

    def encode(text: str) -> list[int]:
        return table.encode(text, add_special_tokens=False).ids

    def decode(ids: Sequence[int]) -> str:
        return table.decode([int(i) for i in ids], skip_special_tokens=True)

    vocab = max(table.get_vocab(with_added_tokens=True).values()) + 1
    return Tokenizer(encode, decode, vocab, eos, eos if pad is None else pad, bos)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
      ValueError: naming the file, when it cannot be read.
    """
    try:
        if (size := path.stat().st_size) > _MAX_FILE:
            raise ValueError(f"{size} bytes, expected at most {_MAX_FILE}")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON file ({error!s:.200})") from None


def special_token(folder: Path, name: str) -> str | None:
    """Find how a special token is spelled: 'eos', 'pad' or 'bos'.

    Raises:
      ValueError: naming a file that cannot be read.
    """
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / file
        found = read_json(path) if path.is_file() else {}
        token = found.get(f"{name}_token") if isinstance(found, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return None


def _special(folder: Path, table: Any, name: str) -> int | None:
    token = special_token(folder, name)
    if token is not None:
        if (found := table.token_to_id(token)) is None:
            raise ValueError(
                f"{folder}: {name}_token is {token!r}, which tokenizer.json does not know; do "
                "these files belong together?"
            )
        return found
    path = folder / "config.json"
    found = read_json(path) if path.is_file() else {}
    found = found.get(f"{name}_token_id") if isinstance(found, dict) else None
    found = found[0] if isinstance(found, list) and found else found  # Llama 3 names several
    return found if type(found) is int else None


def token_entries(folder: Path) -> dict[str, Any]:
    """Return the entries of a config.json that name the special tokens of a folder's tokenizer.

    Those that its config.json has are handed on as they are: it may name several ends.
    """
    folder = Path(folder)
    tokenizer = load_tokenizer(folder)
    found = {
        "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad, "bos_token_id": tokenizer.bos,
    }  # fmt: skip
    path = folder / "config.json"
    given = read_json(path) if path.is_file() else {}
    given = given if isinstance(given, dict) else {}
    return found | {name: given[name] for name in found if given.get(name) is not None}


def has_template(folder: Path) -> bool:
    """Tell whether a folder has a chat template."""
    return _template_text(Path(folder))[1] is not None


def load_template(folder: Path) -> Callable[[Sequence[Mapping[str, object]]], str]:
    """Load the chat template of a folder: `chat_template.jinja`, or that of the configuration.

    Returns:
      A function that writes messages as a prompt, up to where the assistant begins to speak.

    Raises:
      ValueError: when there is none or it cannot be read, or the package `jinja2` is missing.
    """
    folder = Path(folder)
    path, text = _template_text(folder)
    if text is None:
        raise ValueError(
            f"{folder}: expected a chat template, found none in chat_template.jinja or "
            "tokenizer_config.json; write conversations as text, or use plain_chat"
        )
    try:
        sandbox = importlib.import_module("jinja2.sandbox")
    except ImportError:
        raise ValueError(f'{path} needs jinja2: pip install "modelrl[hf]"') from None
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda x: json.dumps(x, ensure_ascii=False)
    environment.globals["raise_exception"] = _refuse
    names = {f"{name}_token": special_token(folder, name) or "" for name in ("bos", "eos", "pad")}
    try:
        template = environment.from_string(text)
    except Exception as error:  # jinja2 is not imported by name
        raise ValueError(f"{path}: expected a template of jinja2 ({error!s:.200})") from None

    def render(messages: Sequence[Mapping[str, object]]) -> str:
        try:
            return template.render(messages=messages, add_generation_prompt=True, **names)
        except Exception as error:
            raise ValueError(f"{path}: cannot write this conversation ({error!s:.200})") from None

    return render


def _template_text(folder: Path) -> tuple[Path, str | None]:
    """Find the chat template of a folder, and the file that it is in."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path, path.read_text("utf-8")
    path = folder / "tokenizer_config.json"
    found = read_json(path) if path.is_file() else {}
    text = found.get("chat_template") if isinstance(found, dict) else None
    if isinstance(text, list):  # several, by name
        text = {item.get("name"): item.get("template") for item in text}.get("default")
    return path, text if isinstance(text, str) else None


def _refuse(text: str) -> None:
    raise ValueError(text)
