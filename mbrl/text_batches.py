"""Batches of text with static shapes, in an order that resumes exactly.

A `Loader` maps a `Cursor` to a batch and to the next cursor, and keeps nothing else: a saved
cursor goes on where it stopped. The order depends on the seed and the epoch alone.

Prompts are padded on the left to P tokens and answers on the right to L, so that every answer
begins at column P. Rows fall into buckets, and a bucket is one shape (P, L): as many programs are
compiled as buckets are used.

Supervised rows are filled from the left with whole examples, one after the other as in
pre-training: an example sees those before it in its row, after a token of the end that says that
they are over. Without packing there is one example in each row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np

from mbrl.text_rows import TokenRow


class Cursor(NamedTuple):
    """Where in a data set the next batch is.

    Attributes:
      epoch: passes that are over.
      position: batches of this pass that are over.
    """

    epoch: int = 0
    position: int = 0


class TextBatch(NamedTuple):
    """Prompts with K answers each; arrays are numpy's, and jax's within a
    compiled step.

    Attributes:
      tokens: int32 [B, K, P + L]; [B, 1, P] for rows without answers.
      mask: bool like `tokens`, where a token is real.
      response: bool [B, K, L], the tokens of the answers, their end included: the last columns
        of `mask`.
      rank: int32 [B, K], see `mbrl.text_rows`; -1 where there is no answer. The tokens there are
        those of the first answer, so that nothing that is computed of them is NaN.
      margin: float32 [B].
      row: int32 [B], index of the row in the data; -1 where the batch was filled up.
    """

    tokens: Any
    mask: Any
    response: Any
    rank: Any
    margin: Any
    row: Any


class SupervisedBatch(NamedTuple):
    """Rows for supervised learning, padded on the right; arrays are numpy's, and jax's within a
    compiled step.

    Attributes:
      tokens: int32 [B, T].
      mask: bool [B, T], where a token is real.
      target: bool [B, T], tokens to be predicted: those of answers, with their ends. Never the
        first of a row.
    """

    tokens: Any
    mask: Any
    target: Any


B = TypeVar("B")


class Loader(NamedTuple, Generic[B]):
    """A data set as a function of a cursor.

    Attributes:
      batches: in one epoch.
      left_out: rows (of packed ones: all that they hold counts as one) that an epoch does not
        show, since no full batch is left for them (`last="drop"`); others in every epoch where
        rows are shuffled.
      get: `(cursor) -> (batch, next cursor)`.
    """

    batches: int
    left_out: int
    get: Callable[[Cursor], tuple[B, Cursor]]


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """How rows become batches."""

    batch_size: int = 32
    """Rows of a batch."""
    shuffle: bool = True
    """Another order in every epoch; otherwise that of the data, bucket by bucket."""
    last: Literal["pad", "drop"] = "pad"
    """The rows that do not fill a batch: 'pad' = it is filled up with absent ones, 'drop' = they
    are left out of this epoch."""
    seed: int = 0
    """Of the order."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning.

        Raises:
          ValueError: naming the field.
        """
        if self.batch_size < 1:
            raise ValueError(f"batch_size: got {self.batch_size}, expected at least 1 row")
        if self.last not in ("pad", "drop"):
            raise ValueError(f"last: got {self.last!r:.60}, expected 'pad' or 'drop'")
        if self.seed < 0:
            raise ValueError(f"seed: got {self.seed}, expected 0 or more")


def epoch(loader: Loader[B]) -> Iterator[B]:
    """Yield the batches of the first epoch: one pass, as an evaluation makes it."""
    for position in range(loader.batches):
        yield loader.get(Cursor(0, position))[0]


def text_loader(
    rows: Sequence[TokenRow],
    buckets: Sequence[tuple[int, int]],
    config: BatchConfig = BatchConfig(),
    *,
    options: int | None = None,
) -> Loader[TextBatch]:
    """Batch prompts with their answers.

    Args:
      rows: all with answers, or all without.
      buckets: shapes (P, L) in tokens, the smallest first; a row goes to the first that holds
        it. L is of no account for rows without answers.
      config: of the batches.
      options: K; None = as many as the longest ranking has.

    Returns:
      The loader of `TextBatch`.

    Raises:
      ValueError: when there are no rows, some have answers and some have none, or one fits no
        bucket or has more than `options` answers.
    """
    most = max((len(row.answers) for row in rows), default=0)
    least = min((len(row.answers) for row in rows), default=0)
    options = most if options is None else options
    if not rows or (most > 0 and least == 0) or most > options or not buckets:
        raise ValueError(
            f"rows: got {len(rows)} with {least} .. {most} answers and {len(buckets)} buckets, "
            f"expected at least one bucket and one row, each with 1 .. {options} answers or none "
            "with any; separate the kinds, or raise options"
        )
    sizes = np.array([
        (len(row.prompt), max((len(answer) for answer in row.answers), default=0)) for row in rows
    ])  # fmt: skip
    fits = np.stack([(sizes <= (P, L if most else 0)).all(1) for P, L in buckets], 1)
    if not fits.any(1).all():
        bad = int(np.argmin(fits.any(1)))
        raise ValueError(
            f"rows: row {bad} has {sizes[bad, 0]} + {sizes[bad, 1]} tokens, expected at most those "
            f"of a bucket, {list(buckets)}; bound both with encode_rows, or add a bucket"
        )
    bucket = fits.argmax(1)
    plan, batches, left_out = _planned(bucket, config)

    def get(cursor: Cursor) -> tuple[TextBatch, Cursor]:
        index, cursor = _at(plan, batches, cursor)
        P, L = buckets[bucket[index[0]]]
        return _assemble(rows, index, P, L if most else 0, options), cursor

    return Loader(batches, left_out, get)


def supervised_loader(
    rows: Sequence[TokenRow], length: int, config: BatchConfig = BatchConfig(), *, pack: bool = True
) -> Loader[SupervisedBatch]:
    """Batch demonstrations, several short ones in a row.

    What is packed together is drawn once; rows are shuffled in every epoch.

    Args:
      rows: each with one answer.
      length: T tokens of a row of the batch.
      config: of the batches.
      pack: fill rows with several demonstrations; see the module.

    Returns:
      The loader of `SupervisedBatch`.

    Raises:
      ValueError: when there are no rows, or one is longer than `length` or has not one answer.
    """
    bad = [
        i for i, row in enumerate(rows)
        if len(row.answers) != 1 or len(row.prompt) + len(row.answers[0]) > length
    ]  # fmt: skip
    if bad or not rows:
        what = "no rows"
        if bad:
            row = rows[bad[0]]
            tokens = [len(row.prompt), *(len(answer) for answer in row.answers)]
            what = f"row {bad[0]} with {tokens} tokens of prompt and answers"
        raise ValueError(
            f"rows: got {what}, expected demonstrations, each a prompt and one answer of at most "
            f"{length} tokens together; bound them with encode_rows, or raise length"
        )
    order = _shuffled(len(rows), config.seed, 0) if config.shuffle else np.arange(len(rows))
    sizes = np.array([len(row.prompt) + len(row.answers[0]) for row in rows])
    groups = pack_rows(sizes[order], length) if pack else [[i] for i in range(len(rows))]
    filled = [_fill([rows[order[i]] for i in group], length) for group in groups]
    plan, batches, left_out = _planned(np.zeros(len(groups), np.int64), config)

    def get(cursor: Cursor) -> tuple[SupervisedBatch, Cursor]:
        index, cursor = _at(plan, batches, cursor)
        parts = [filled[i if i >= 0 else index[0]] for i in index]
        tokens, mask, target = (np.stack(part) for part in zip(*parts, strict=True))
        return SupervisedBatch(tokens, mask, target & (index >= 0)[:, None]), cursor

    return Loader(batches, left_out, get)


def pack_rows(sizes: np.ndarray, length: int) -> list[list[int]]:
    """Put items of `sizes` into rows of `length`, each into the first where it fits.

    Args:
      sizes: int [n], at most `length` each.
      length: of a row.

    Returns:
      Indices of the items of every row, in their order.
    """
    room = np.zeros(len(sizes), np.int64)
    groups: list[list[int]] = []
    for item, size in enumerate(sizes):
        fits = room[: len(groups)] >= size
        row = int(fits.argmax()) if fits.any() else len(groups)
        if row == len(groups):
            groups.append([])
            room[row] = length
        groups[row].append(item)
        room[row] -= size
    return groups


def _fill(rows: Sequence[TokenRow], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Write demonstrations into one row: tokens, mask and target, each [T]."""
    tokens = np.concatenate([part for row in rows for part in (row.prompt, *row.answers)])
    target = np.concatenate([
        np.full(len(part), learn)
        for row in rows
        for part, learn in ((row.prompt, False), (row.answers[0], True))
    ])  # fmt: skip
    target[0] = False  # nothing comes before it
    pad = (0, length - len(tokens))
    mask = np.arange(length) < len(tokens)
    return np.pad(tokens, pad).astype(np.int32), mask, np.pad(target, pad)


def _assemble(
    rows: Sequence[TokenRow], index: np.ndarray, P: int, L: int, options: int
) -> TextBatch:
    """Write the rows of a batch; absent ones are copies of the first without a rank."""
    shape = (len(index), max(options, 1), P + L)
    tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    rank = np.full((len(index), options), -1, np.int32)
    margin = np.zeros(len(index), np.float32)
    for b, i in enumerate(index):
        row = rows[i if i >= 0 else index[0]]
        start = P - len(row.prompt)
        tokens[b, :, start:P], mask[b, :, start:P] = row.prompt, True
        for k in range(options):
            answer = row.answers[k] if k < len(row.answers) else row.answers[0]
            tokens[b, k, P : P + len(answer)] = answer
            mask[b, k, P : P + len(answer)] = True
        if i >= 0:
            rank[b, : len(row.rank)], margin[b] = row.rank, row.margin
    return TextBatch(tokens, mask, mask[..., P:], rank, margin, index.astype(np.int32))


def _planned(
    bucket: np.ndarray, config: BatchConfig
) -> tuple[Callable[[int], list[np.ndarray]], int, int]:
    """Plan epochs: `(epoch) -> [B] indices of every batch`, their number, and rows left out."""
    size = config.batch_size
    counts = np.bincount(bucket)
    left = int((counts % size).sum()) if config.last == "drop" else 0
    batches = int(sum(n // size if config.last == "drop" else -(-n // size) for n in counts))
    if not batches:
        raise ValueError(
            f"batch_size: got {size} for {counts.sum()} rows and last='drop', expected at least "
            "one full batch; use last='pad' or smaller batches"
        )

    @functools.lru_cache(maxsize=2)
    def plan(epoch: int) -> list[np.ndarray]:
        n = len(bucket)
        order = _shuffled(n, config.seed, 2 * epoch + 1) if config.shuffle else np.arange(n)
        found = []
        for b in range(len(counts)):
            chosen = order[bucket[order] == b]
            for start in range(0, len(chosen), size):
                part = chosen[start : start + size]
                if len(part) == size or config.last == "pad":
                    found.append(np.pad(part, (0, size - len(part)), constant_values=-1))
        if config.shuffle:
            found = [found[i] for i in _shuffled(len(found), config.seed, 2 * epoch + 2)]
        return found

    return plan, batches, left


def _at(
    plan: Callable[[int], list[np.ndarray]], batches: int, cursor: Cursor
) -> tuple[np.ndarray, Cursor]:
    """Find the rows of the batch at a cursor, and the next cursor."""
    at, position = int(cursor.epoch), int(cursor.position)
    if at < 0 or not 0 <= position < batches:
        raise ValueError(
            f"cursor: got epoch {at}, position {position}, expected a position of 0 .. "
            f"{batches - 1}; was it saved with other data or another batch size?"
        )
    following = Cursor(at, position + 1) if position + 1 < batches else Cursor(at + 1, 0)
    return plan(at)[position], following


def _shuffled(n: int, seed: int, stream: int) -> np.ndarray:
    """Permute 0 .. n - 1. numpy promises the raw bits for ever, and not what it makes of them."""
    bits = np.random.PCG64(np.random.SeedSequence((seed, stream))).random_raw(n)
    return np.argsort(bits, kind="stable")
