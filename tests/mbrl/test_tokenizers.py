"""Tokenizers: nothing of a text is lost, specials say nothing, files of both kinds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mbrl.tokenizers import byte_tokenizer, word_tokenizer
from mbrl.training.tokenizer_files import load_tokenizer, save_words

TEXTS = ("", "plain", "tab\tnew\nline\r\0", "Grüße, 世界 👩‍🚀 e\u0301", "<|endoftext|> </s>")
WORDS = ("red", "blue", "and")


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_are_those_of_utf8_and_come_back(text: str):
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text)
    assert ids == list(text.encode("utf-8"))
    assert tokenizer.bos is not None
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos, tokenizer.pad]) == text


def test_specials_differ_and_no_text_contains_them():
    for tokenizer, text in ((byte_tokenizer(), TEXTS[3]), (word_tokenizer(WORDS), "red and blue")):
        specials = {tokenizer.eos, tokenizer.pad, tokenizer.bos} - {None}
        assert len(specials) == 2 + (tokenizer.bos is not None)
        assert not specials & set(tokenizer.encode(text))
        assert max(specials) == tokenizer.vocab - 1


def test_bytes_that_are_no_text_are_shown_as_such():
    assert byte_tokenizer().decode([0x61, 0xC3, 0x62]) == "a\ufffdb"


def test_words_are_numbered_in_their_order():
    tokenizer = word_tokenizer(WORDS)
    assert tokenizer.encode("  blue and\nred ") == [1, 2, 0]
    assert tokenizer.decode([1, 2, 0, tokenizer.eos, tokenizer.pad]) == "blue and red"
    assert tokenizer.vocab == 5


def test_what_cannot_be_encoded_or_decoded_is_named():
    with pytest.raises(ValueError, match="'green', expected words of the 3"):
        word_tokenizer(WORDS).encode("red green")
    with pytest.raises(ValueError, match="lone surrogates"):
        byte_tokenizer().encode("\ud800")
    for tokenizer in (byte_tokenizer(), word_tokenizer(WORDS)):
        for bad in (-1, tokenizer.vocab):
            with pytest.raises(ValueError, match=f"got {bad}, expected 0 .. {tokenizer.vocab - 1}"):
                tokenizer.decode([0, bad])


@pytest.mark.parametrize("words", [(), ("a", "a"), ("",), ("a b",), ("a\n",)])
def test_words_must_be_words(words: tuple[str, ...]):
    with pytest.raises(ValueError, match="^vocabulary: got"):
        word_tokenizer(words)


def test_words_are_saved_and_loaded(tmp_path: Path):
    save_words(tmp_path, WORDS)
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("and red") == [2, 0]
    assert (loaded.vocab, loaded.eos, loaded.pad) == (5, 4, 3)


def test_bad_folders_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"expected tokenizer.json \(or vocabulary.json\)"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocabulary.json").write_text("{", "utf-8")
    with pytest.raises(ValueError, match=r"vocabulary.json: expected a JSON file"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocabulary.json").write_text('{"a": 1}', "utf-8")
    with pytest.raises(ValueError, match="expected a list of words"):
        load_tokenizer(tmp_path)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "tokenizer.json").write_text("{}", "utf-8")
    with pytest.raises(ValueError, match=r'pip install "modelrl\[hf\]"'):
        load_tokenizer(tmp_path)


def hugging_face(folder: Path, **special: object) -> None:
    """Write a tokenizer of words as Hugging Face has it, with <s>, </s> and <pad>."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {"<unk>": 0, "red": 1, "blue": 2, "and": 3}
    table = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    table.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    table.add_special_tokens(["<s>", "</s>", "<pad>"])
    table.enable_truncation(2)
    table.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 4), ("</s>", 5)]
    )
    table.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(special), "utf-8")


def test_hugging_face_files_are_read_without_their_habits(tmp_path: Path):
    hugging_face(tmp_path, eos_token={"content": "</s>"}, bos_token="<s>", pad_token=None)
    loaded = load_tokenizer(tmp_path)
    # Neither cut to two tokens nor framed: batches do that, in one place.
    assert loaded.encode("red and blue") == [1, 3, 2]
    assert loaded.decode([4, 1, 3, 2, 5]) == "red and blue"
    assert (loaded.vocab, loaded.bos, loaded.eos, loaded.pad) == (7, 4, 5, 5)


def test_hugging_face_specials_come_from_the_files_beside(tmp_path: Path):
    hugging_face(tmp_path)
    with pytest.raises(ValueError, match="no file names the token that ends a text"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": [5, 6], "pad_token_id": 6}', "utf-8")
    loaded = load_tokenizer(tmp_path)
    assert (loaded.eos, loaded.pad, loaded.bos) == (5, 6, None)
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<end>"}', "utf-8")
    with pytest.raises(ValueError, match="'<end>', which tokenizer.json does not know"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", "utf-8")
    with pytest.raises(ValueError, match="expected a tokenizer of Hugging Face"):
        load_tokenizer(tmp_path)
