"""Rows and batches of text: what is written where, nothing lost, an order that resumes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mbrl.text_batches import (
    BatchConfig,
    Cursor,
    Loader,
    epoch,
    pack_rows,
    supervised_loader,
    text_loader,
)
from mbrl.text_rows import TextRow, TokenRow, encode_rows
from mbrl.tokenizers import byte_tokenizer, word_tokenizer

LETTERS = word_tokenizer(tuple("abcdefgh"))  # ids 0 .. 7, pad 8, eos 9
BYTES = byte_tokenizer()
EOS = LETTERS.eos


def ints(n: int, size: int = 1) -> list[TokenRow]:
    """Rows that are told apart by their prompt: row i is [i] * size, answered by [i, EOS]."""
    return [TokenRow(np.full(size, i), (np.array([i, 99]),), (0,)) for i in range(n)]


def walk(loader: Loader[Any], steps: int, at: tuple[int, int] = (0, 0)) -> tuple[list[Any], Cursor]:
    found, cursor = [], Cursor(*at)
    for _ in range(steps):
        batch, cursor = loader.get(cursor)
        found.append(batch)
    return found, cursor


def test_a_batch_written_out_by_hand():
    text = [
        TextRow("a b", ("c", "d e", ""), (1, 0, 1), margin=0.5),
        TextRow("f", ("g", "h"), (0, 1)),
    ]
    rows = encode_rows(LETTERS, text, 3, 4).rows
    [batch] = epoch(text_loader(rows, [(3, 4)], BatchConfig(2, shuffle=False)))
    E = EOS
    want = [
        [[0, 0, 1, 2, E, 0, 0], [0, 0, 1, 3, 4, E, 0], [0, 0, 1, E, 0, 0, 0]],
        [[0, 0, 5, 6, E, 0, 0], [0, 0, 5, 7, E, 0, 0], [0, 0, 5, 6, E, 0, 0]],
    ]
    real = [
        [[0, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0, 0]],
        [[0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0, 0]],
    ]
    np.testing.assert_array_equal(batch.tokens, want)
    np.testing.assert_array_equal(batch.mask, np.array(real, bool))
    np.testing.assert_array_equal(batch.response, batch.mask[..., 3:])
    np.testing.assert_array_equal(batch.rank, [[1, 0, 1], [0, 1, -1]])
    np.testing.assert_array_equal(batch.margin, [0.5, 0.0])
    assert (batch.tokens.dtype, batch.mask.dtype, batch.rank.dtype) == (np.int32, bool, np.int32)


def test_every_answer_ends_with_one_end_in_training_and_evaluation_alike():
    text = [TextRow("a", (answer,), (0,)) for answer in ("b", "", "b c d e f g h")]
    rows = encode_rows(LETTERS, text, 3, 8).rows
    for config in (BatchConfig(2, shuffle=True), BatchConfig(2, shuffle=False)):
        for batch in epoch(text_loader(rows, [(3, 8)], config)):
            ends = (batch.tokens == EOS) & batch.mask
            assert (ends.sum(-1) == 1).all()
            # The end is the last real token of its row.
            assert (
                ends.argmax(-1) == batch.mask.shape[-1] - 1 - batch.mask[..., ::-1].argmax(-1)
            ).all()
    [batch] = epoch(supervised_loader(rows, 30, BatchConfig(1)))
    assert ((batch.tokens == EOS) & batch.target).sum() == 3


def test_prompts_are_cut_from_the_left_and_counted():
    text = [TextRow("abcdef"), TextRow("ab")]
    encoded = encode_rows(BYTES, text, 4, 4)
    # The beginning stays where there is one; then the last words of the prompt.
    assert encoded.rows[0].prompt.tolist() == [BYTES.bos, *b"def"]
    assert encoded.rows[1].prompt.tolist() == [BYTES.bos, *b"ab"]
    assert encoded.counts == {"prompt cut": 1}
    [short] = encode_rows(LETTERS, [TextRow("a b c")], 2, 1).rows
    assert short.prompt.tolist() == [1, 2]


def test_a_beginning_is_not_written_twice():
    bos = BYTES._replace(encode=lambda text: [257, *text.encode()])
    assert encode_rows(bos, [TextRow("a")], 4, 4).rows[0].prompt.tolist() == [257, 97]


def test_long_answers_are_an_error_or_cut_or_left_out():
    text = [TextRow("a", ("b c d", "e"), (0, 1), where="pairs.jsonl, line 7"), TextRow("a", ("b",))]
    with pytest.raises(
        ValueError, match=r"^pairs.jsonl, line 7: answer: got 4 tokens with the end"
    ):
        encode_rows(LETTERS, text, 2, 3)
    cut = encode_rows(LETTERS, text, 2, 3, cut_answers=True)
    assert [a.tolist() for a in cut.rows[0].answers] == [[1, 2, 3], [4, EOS]]
    assert cut.counts == {"answer cut": 1}
    left = encode_rows(LETTERS, text, 2, 3, on_error="skip")
    assert left.source.tolist() == [1]
    assert left.counts == {"long answer": 1}
    whole = encode_rows(LETTERS, text, 2, 4)
    assert (whole.counts, whole.source.tolist()) == ({}, [0, 1])


def test_ends_in_the_text_are_one_at_its_end_or_none():
    spelled = BYTES._replace(encode=lambda text: [258 if c == "$" else ord(c) for c in text])
    rows = [TextRow("p", ("ab$$",), (0,))]
    assert encode_rows(spelled, rows, 4, 4).rows[0].answers[0].tolist() == [97, 98, 258]
    with pytest.raises(ValueError, match=r"^row 0: answer: got the token of the end"):
        encode_rows(spelled, [TextRow("p", ("a$b",), (0,))], 4, 4)


def test_rows_that_mean_nothing_are_named_or_counted():
    text = [TextRow("", ("a", "b"), (0, 1)), TextRow("zebra", id="z"), TextRow("", ("a",), (0,))]
    with pytest.raises(ValueError, match="row 0: prompt: got no token"):
        encode_rows(LETTERS, text, 2, 2)
    with pytest.raises(ValueError, match="row 0: prompt: text: got 'zebra'"):
        encode_rows(LETTERS, text[1:], 2, 2)
    encoded = encode_rows(LETTERS, text, 2, 2, on_error="skip")
    assert encoded.counts == {"empty prompt": 1, "unknown text": 1}
    assert encoded.source.tolist() == [2]  # text alone needs no prompt


@pytest.mark.parametrize("size", [1, 3, 7, 10, 16])
@pytest.mark.parametrize("shuffle", [False, True])
def test_padded_epochs_show_every_row_once(size: int, shuffle: bool):
    loader = text_loader(ints(10), [(1, 2)], BatchConfig(size, shuffle))
    assert (loader.batches, loader.left_out) == (-(-10 // size), 0)
    batches, cursor = walk(loader, loader.batches)
    row = np.concatenate([batch.row for batch in batches])
    assert sorted(row[row >= 0]) == list(range(10))
    assert cursor == Cursor(1, 0)
    for batch in batches:
        absent = batch.row < 0
        assert (batch.rank[absent] == -1).all() and (batch.rank[~absent] == 0).all()
        assert batch.mask.any(-1).all()  # attention over nothing would be NaN
        np.testing.assert_array_equal(batch.tokens[~absent][:, 0, 0], batch.row[~absent])


def test_dropped_rows_are_counted_and_others_in_every_epoch():
    loader = text_loader(ints(10), [(1, 2)], BatchConfig(4, last="drop"))
    assert (loader.batches, loader.left_out) == (2, 2)
    batches, _ = walk(loader, 2 * 40)
    row = np.stack([batch.row for batch in batches]).reshape(40, 8)
    assert all(len(set(one)) == 8 for one in row)
    missing = {i for one in row for i in set(range(10)) - set(one)}
    assert missing == set(range(10))


def test_a_resumed_cursor_goes_on_in_the_same_order():
    rows = [r for s in (1, 3) for r in ints(11, s)]
    for make in (
        lambda: text_loader(rows, [(1, 2), (4, 2)], BatchConfig(4, seed=3)),
        lambda: supervised_loader(rows, 9, BatchConfig(2, seed=3)),
    ):
        loader = make()
        whole, _ = walk(loader, 3 * loader.batches)
        for stop in (0, 1, loader.batches, 2 * loader.batches - 1):
            _, cursor = walk(make(), stop)
            saved = Cursor(*np.array(cursor))  # as a checkpoint gives it back
            rest, _ = walk(make(), len(whole) - stop, saved)
            for one, two in zip(whole[stop:], rest, strict=True):
                for a, b in zip(one, two, strict=True):
                    np.testing.assert_array_equal(a, b)


def test_epochs_and_seeds_differ_and_an_order_is_no_pattern():
    def order(seed: int, start: int) -> list[int]:
        loader = text_loader(ints(1000), [(1, 2)], BatchConfig(1000, seed=seed))
        return loader.get(Cursor(start))[0].row.tolist()

    orders = [order(seed, start) for seed in (0, 1) for start in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4
    for one in orders:  # correlation of independent orders is about 1 / sqrt(1000)
        assert abs(np.corrcoef(one, np.arange(1000))[0, 1]) < 0.12


def test_the_order_is_fixed_for_ever():
    # Written down, because a saved cursor must mean the same after every upgrade.
    loader = text_loader(ints(8), [(1, 2)], BatchConfig(8, seed=5))
    rows = [loader.get(Cursor(e))[0].row.tolist() for e in (0, 1)]
    assert rows == [[7, 6, 1, 5, 4, 2, 0, 3], [4, 1, 5, 3, 2, 0, 6, 7]]


def test_buckets_are_the_smallest_that_hold_a_row():
    rows = [TokenRow(np.zeros(p), (np.zeros(a),) * 2, (0, 1)) for p in (1, 4, 8) for a in (2, 6)]
    loader = text_loader(rows, [(4, 4), (4, 8), (8, 8)], BatchConfig(2, shuffle=False))
    shapes = {tuple(b.row.tolist()): (*b.tokens.shape, b.response.shape[-1]) for b in epoch(loader)}
    assert shapes == {
        (0, 2): (2, 2, 8, 4), (1, 3): (2, 2, 12, 8), (4, 5): (2, 2, 16, 8),
    }  # fmt: skip
    with pytest.raises(ValueError, match="row 4 has 8 . 2 tokens, expected at most those of a"):
        text_loader(rows, [(4, 8)], BatchConfig(2))


def test_prompts_alone_have_no_answers():
    rows = encode_rows(LETTERS, [TextRow("a b"), TextRow("c")], 3, 1).rows
    [batch] = epoch(text_loader(rows, [(3, 99)], BatchConfig(2, shuffle=False)))
    np.testing.assert_array_equal(batch.mask, np.array([[[0, 1, 1]], [[0, 0, 1]]], bool))
    assert batch.tokens.shape == (2, 1, 3)
    assert batch.response.shape == (2, 1, 0) and batch.rank.shape == (2, 0)


def test_kinds_of_rows_are_not_mixed():
    prompt, answered = TokenRow(np.zeros(1)), ints(1)[0]
    for rows, options in (([], None), ([prompt, answered], None), ([answered], 0)):
        with pytest.raises(ValueError, match="^rows: got"):
            text_loader(rows, [(4, 4)], options=options)


def test_packed_rows_by_hand():
    assert pack_rows(np.array([3, 4, 2, 1, 5]), 5) == [[0, 2], [1, 3], [4]]
    text = [TextRow("a b", ("c",), (0,)), TextRow("d", ("",), (0,)), TextRow("", ("e f",), (0,))]
    rows = encode_rows(LETTERS, text, 3, 3).rows
    [batch] = epoch(supervised_loader(rows, 8, BatchConfig(2, shuffle=False)))
    want = [[0, 1, 2, EOS, 3, EOS, 0, 0], [4, 5, EOS, 0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(batch.tokens, want)
    np.testing.assert_array_equal(batch.mask.sum(1), [6, 3])
    target = [[0, 0, 1, 1, 0, 1, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(batch.target, np.array(target, bool))


def test_packing_loses_no_token_and_splits_no_example():
    rng = np.random.default_rng(0)
    rows = [
        TokenRow(np.full(rng.integers(1, 9), i), (np.full(rng.integers(1, 9), i),), (0,))
        for i in range(60)
    ]
    for pack in (True, False):
        loader = supervised_loader(rows, 32, BatchConfig(7), pack=pack)
        batches = list(epoch(loader))
        # Rows that fill the last batch repeat others, and teach nothing.
        lines = [
            (t[m], g[m]) for batch in batches for t, m, g in zip(*batch, strict=True) if g.any()
        ]
        tokens = np.concatenate([t for t, _ in lines])
        want = np.concatenate([np.concatenate([r.prompt, *r.answers]) for r in rows])
        assert sorted(tokens) == sorted(want)
        assert all((np.diff(t) != 0).sum() == len(set(t)) - 1 for t, _ in lines)
        assert sum(g.sum() for _, g in lines) == sum(len(r.answers[0]) for r in rows)
        assert len(lines) == 60 if not pack else len(lines) < 60 / 2


def test_supervised_rows_must_fit():
    rows = ints(3)
    with pytest.raises(ValueError, match=r"row 0 with \[1, 2\] tokens .* at most 2 tokens"):
        supervised_loader(rows, 2)
    with pytest.raises(ValueError, match=r"row 0 with \[4\] tokens"):
        supervised_loader([TokenRow(np.zeros(4))], 8)
    with pytest.raises(ValueError, match="got no rows"):
        supervised_loader([], 8)


@pytest.mark.parametrize("fields", [{"batch_size": 0}, {"last": "wrap"}, {"seed": -1}])
def test_configurations_are_checked(fields: dict[str, Any]):
    with pytest.raises(ValueError, match=f"^{next(iter(fields))}: got"):
        BatchConfig(**fields)


def test_cursors_and_batches_that_cannot_be_are_refused():
    loader = text_loader(ints(10), [(1, 2)], BatchConfig(4))
    for cursor in (Cursor(0, 3), Cursor(-1, 0), Cursor(0, -1)):
        with pytest.raises(ValueError, match="^cursor: got"):
            loader.get(cursor)
    with pytest.raises(ValueError, match="^batch_size: got 11 for 10 rows"):
        text_loader(ints(10), [(1, 2)], BatchConfig(11, last="drop"))
