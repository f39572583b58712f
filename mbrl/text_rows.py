"""Rows of text and of token ids: a prompt, the answers to it, and how good they are.

One kind of row serves every data set, and the number of its answers tells which:

| K answers | rank | what it is |
|---|---|---|
| 0 | | a prompt |
| 1 | 0 | a demonstration, or an answer that was judged good |
| 1 | 1 | an answer that was judged bad |
| 2 .. 9 | 0 = best, equal = tie | a ranking; a pair is one of two |
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from mbrl.tokenizers import Tokenizer

MAX_OPTIONS = 9
"""Answers of a ranking."""


class TextRow(NamedTuple):
    """One row of a data set.

    Attributes:
      prompt: what is answered; empty = text without a prompt.
      answers: K of them, in any order.
      rank: K ranks, see the module.
      margin: by how much the best is better, in units of the score; 0 = not said.
      subset: group of an evaluation.
      id: name of the row, if it has one.
      where: file and line, for messages.
    """

    prompt: str
    answers: tuple[str, ...] = ()
    rank: tuple[int, ...] = ()
    margin: float = 0.0
    subset: str = ""
    id: str = ""
    where: str = ""


class TokenRow(NamedTuple):
    """One row as token ids.

    Attributes:
      prompt: int32 [p], begins with the token of the beginning where the tokenizer has one.
      answers: K arrays int32 [a]. Each ends with the token of the end, unless it was cut.
      rank: K ranks, see the module.
      margin: see `TextRow`.
    """

    prompt: np.ndarray
    answers: tuple[np.ndarray, ...] = ()
    rank: tuple[int, ...] = ()
    margin: float = 0.0


class Encoded(NamedTuple):
    """A data set as token ids.

    Attributes:
      rows: in the order of the text.
      source: int32 [n], which row of the text each of them is.
      counts: how many prompts and answers were cut ('prompt cut', 'answer cut'), and rows left
        out by reason ('long answer', 'special token', 'empty prompt', 'unknown text').
    """

    rows: list[TokenRow]
    source: np.ndarray
    counts: dict[str, int]


class _UnusableError(ValueError):
    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def encode_rows(
    tokenizer: Tokenizer,
    rows: Sequence[TextRow],
    max_prompt: int,
    max_answer: int,
    *,
    cut_answers: bool = False,
    on_error: Literal["raise", "skip"] = "raise",
) -> Encoded:
    """Turn text into token ids of bounded length; every answer gets the token of the end.

    A long prompt loses its beginning, and is counted. A long answer cannot be shortened without
    the loss of its end, which teaches a model not to stop: it is an error unless asked for.

    Args:
      tokenizer: of the model.
      rows: of text.
      max_prompt: tokens, with that of the beginning.
      max_answer: tokens, with that of the end.
      cut_answers: cut long answers, and count them.
      on_error: 'raise', or 'skip' rows that cannot be used, and count them by reason.

    Raises:
      ValueError: naming the row: for a long answer, special tokens within a text, text that the
        tokenizer does not know, or an empty prompt where nothing marks the beginning.
    """
    if min(max_prompt, max_answer) < 1:
        raise ValueError(
            f"max_prompt, max_answer: got {max_prompt}, {max_answer}, expected at least 1 token"
        )
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error: got {on_error!r:.60}, expected 'raise' or 'skip'")
    counts = collections.Counter[str]()
    found, source = [], []
    for index, row in enumerate(rows):
        cuts = collections.Counter[str]()
        try:
            prompt = _prompt(tokenizer, row, max_prompt, cuts)
            answers = tuple(
                _answer(tokenizer, answer, max_answer, cut_answers, cuts) for answer in row.answers
            )
        except _UnusableError as error:
            if on_error == "raise":
                raise ValueError(f"{row.where or f'row {index}'}: {error}") from None
            counts[error.reason] += 1
            continue
        counts.update(cuts)
        found.append(TokenRow(prompt, answers, row.rank, row.margin))
        source.append(index)
    return Encoded(found, np.array(source, np.int32), dict(counts))


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Encode a prompt, which begins with the token of the beginning once, if there is one."""
    ids = _encode(tokenizer, "prompt", prompt)
    if tokenizer.bos is not None and ids[:1] != [tokenizer.bos]:  # a chat template may write it
        ids = [tokenizer.bos, *ids]
    return ids


def _prompt(
    tokenizer: Tokenizer, row: TextRow, limit: int, cuts: collections.Counter[str]
) -> np.ndarray:
    ids = encode_prompt(tokenizer, row.prompt)
    if not ids:
        if not row.prompt and len(row.answers) == 1:  # text alone; its first token is not learned
            return np.zeros(0, np.int32)
        raise _UnusableError(
            "empty prompt",
            "prompt: got no token, expected at least one where the tokenizer has none for the "
            "beginning; write a prompt",
        )
    if len(ids) > limit:
        cuts["prompt cut"] += 1
        first = ids[: tokenizer.bos is not None]
        ids = [*first, *ids[len(ids) - limit + len(first) :]]
    return np.array(ids, np.int32)


def _answer(
    tokenizer: Tokenizer, answer: str, limit: int, cut: bool, cuts: collections.Counter[str]
) -> np.ndarray:
    ids = _encode(tokenizer, "answer", answer)
    while ids and ids[-1] == tokenizer.eos:  # the text may spell it out
        ids = ids[:-1]
    if tokenizer.eos in ids:
        raise _UnusableError(
            "special token",
            f"answer: got the token of the end ({tokenizer.eos}) before the end of {answer!r:.60}, "
            "expected it nowhere or at the end; remove it from the text",
        )
    ids = [*ids, tokenizer.eos]
    if len(ids) > limit:
        if not cut:
            raise _UnusableError(
                "long answer",
                f"answer: got {len(ids)} tokens with the end ({answer!r:.60}), expected at most "
                f"{limit}; raise max_answer, or ask for cut_answers=True or on_error='skip'",
            )
        cuts["answer cut"] += 1
    return np.array(ids[:limit], np.int32)


def _encode(tokenizer: Tokenizer, field: str, text: str) -> list[int]:
    try:
        return tokenizer.encode(text)
    except ValueError as error:
        raise _UnusableError("unknown text", f"{field}: {error}") from None
