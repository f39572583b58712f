"""Tokenizers: text to token ids and back, as pairs of functions.

The ids of special tokens (padding, end of a sequence, beginning) belong to no text: `encode` never
yields one of a built-in tokenizer, and `decode` passes over them. Whoever makes batches puts them
where they belong (`mbrl/text_batches.py`), in training and in evaluation alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Tokenizer(NamedTuple):
    """Text as a list of integers.

    Attributes:
      encode: `(text) -> ids`, without special tokens.
      decode: `(ids) -> text`; special tokens say nothing.
      vocab: V, ids are `0 .. V - 1`.
      eos: id that ends a sequence.
      pad: id that fills rows. It may be that of `eos`, since masks say what is real.
      bos: id that begins a prompt; None = prompts begin with their text.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    vocab: int
    eos: int
    pad: int
    bos: int | None = None


def byte_tokenizer() -> Tokenizer:
    """Make a tokenizer of the bytes of UTF-8: ids 0 .. 255, then padding, beginning and end.

    It knows every text and loses nothing of it. Bytes that are no UTF-8, as a model may write
    them, are decoded to U+FFFD.
    """
    pad, bos, eos = 256, 257, 258

    def encode(text: str) -> list[int]:
        try:
            return list(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text: got a character without UTF-8 ({error}), expected Unicode text; remove "
                "lone surrogates"
            ) from None

    def decode(ids: Sequence[int]) -> str:
        checked = _known(ids, 259)
        return bytes(i for i in checked if i < 256).decode("utf-8", errors="replace")

    return Tokenizer(encode, decode, 259, eos, pad, bos)


def word_tokenizer(vocabulary: Sequence[str]) -> Tokenizer:
    """Make a tokenizer of whole words: id i is word i, then padding and end; no beginning.

    Text is split at white space and joined with single spaces.

    Args:
      vocabulary: words without white space, each once.

    Returns:
      A tokenizer whose `encode` refuses other words, with a ValueError.

    Raises:
      ValueError: when a word is empty, contains white space or comes twice.
    """
    words = tuple(vocabulary)
    ids = {word: i for i, word in enumerate(words)}
    bad = [w for w in words if not isinstance(w, str) or w.split() != [w] or words.count(w) > 1]
    if bad or not words:
        raise ValueError(
            f"vocabulary: got {bad[0] if bad else words!r:.40}, expected at least one word, each "
            "of them once and without white space"
        )

    def encode(text: str) -> list[int]:
        try:
            return [ids[word] for word in text.split()]
        except KeyError as error:
            raise ValueError(
                f"text: got {error.args[0]!r:.40}, expected words of the {len(words)} that this "
                "tokenizer knows; use byte_tokenizer() for free text"
            ) from None

    def decode(tokens: Sequence[int]) -> str:
        checked = _known(tokens, len(words) + 2)
        return " ".join(words[i] for i in checked if i < len(words))

    return Tokenizer(encode, decode, len(words) + 2, eos=len(words) + 1, pad=len(words))


def _known(ids: Sequence[int], vocab: int) -> list[int]:
    found = [int(i) for i in ids]
    if any(not 0 <= i < vocab for i in found):
        bad = next(i for i in found if not 0 <= i < vocab)
        raise ValueError(
            f"ids: got {bad}, expected 0 .. {vocab - 1}; was this made with another tokenizer?"
        )
    return found
