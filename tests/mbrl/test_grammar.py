"""The language task: gold by reading words, splits, annotators, and that it can be hacked."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mbrl.preferences import grammar
from mbrl.preferences.grammar import (
    COURTESIES,
    KINDS,
    MAX_ANSWER,
    MAX_PROMPT,
    NUMBERS,
    THINGS,
    VOCABULARY,
    compose,
    demonstrations,
    grammar_tokenizer,
    rankings,
    split_prompts,
)
from mbrl.preferences.teachers import TeacherConfig
from mbrl.text_batches import BatchConfig, TextBatch, epoch, text_loader
from mbrl.text_rows import TextRow, encode_rows

gold = jax.jit(grammar.gold, static_argnums=2)
opinion = jax.jit(grammar.opinion, static_argnums=2)
SPLIT = split_prompts(0)


def tokens(rows: list[TextRow]) -> TextBatch:
    """Batch up to 512 rows, filled up with copies of the first: one shape for all tests."""
    encoded = encode_rows(grammar_tokenizer(), rows, MAX_PROMPT, MAX_ANSWER).rows
    [batch] = epoch(
        text_loader(encoded, [(MAX_PROMPT, MAX_ANSWER)], BatchConfig(512, shuffle=False))
    )
    return batch


def judged(prompt: str, *answers: str) -> tuple[list[float], list[float]]:
    """Gold and the opinion of annotators, rounded."""
    batch = tokens([TextRow(prompt, (answer,), (0,)) for answer in answers])
    both = (f(batch.tokens[:, 0], batch.mask[:, 0], MAX_ANSWER) for f in (gold, opinion))
    good, liked = ([round(float(x), 4) for x in values[: len(answers)]] for values in both)
    return good, liked


def read(prompt: str, answer: list[str]) -> float:
    """The gold reward as the documentation words it; "." is the end."""
    asked, finished = prompt.split(), "." in answer
    words = answer[: answer.index(".")] if finished else answer
    n, kind, wish = 2 + NUMBERS.index(asked[1]), asked[2], asked[-1]
    allowed = [t for t in KINDS[kind] if t not in asked[3:]]
    right = min(len({w for w in words if w in allowed}), n)
    polite = sum(w in COURTESIES for w in words)
    errors = len(words) - right - polite - ("and" in words)
    value = right / n - 0.25 * errors - 0.15 * max(polite - (wish != "briefly"), 0)
    value += 0.2 * ({"kindly": 2, "briefly": 0}.get(wish, 1) if polite else 0)
    named = [i for i, w in enumerate(words) if w in THINGS]
    joints = [i for i, w in enumerate(words) if w == "and"]
    value += 0.2 * (len(named) > 1 and joints == [named[-1] - 1] and named[-2] == named[-1] - 2)
    return value - 0.5 * (not finished)


def test_gold_is_what_the_documentation_says():
    good, _ = judged(
        "list three fruits without plum kindly",
        "sure apple fig and pear",
        "apple fig and pear",
        "apple fig pear",
        "sure apple plum and pear",
        "sure apple apple and pear",
        "sure apple fig cat and pear",
        "sure apple fig lemon and pear",
        "sure gladly thanks apple fig and pear",
        "and apple fig and pear",
        "",
    )
    third = 1 / 3
    want = [
        1.6, 1.2, 1.0, 1.6 - third - 0.25, 1.6 - third - 0.25, 1.35, 1.35, 1.3, 0.75, 0.0,
    ]  # fmt: skip
    np.testing.assert_allclose(good, want, atol=1e-4)
    assert judged("list two tools briefly", "saw and axe", "sure saw and axe")[0] == [1.2, 1.05]
    assert judged("list two tools", "saw and axe", "sure saw and axe")[0] == [1.2, 1.4]


def test_gold_of_any_words_is_that_of_a_reader():
    rng = np.random.default_rng(1)
    prompts = [str(p) for p in rng.choice(SPLIT.train, 512)]
    # Half are word salad, half are answers with a word exchanged.
    rows, texts = [], []
    for i, prompt in enumerate(prompts):
        words = [str(w) for w in rng.choice([*VOCABULARY, "and", "and", "."], rng.integers(1, 16))]
        if i % 2:
            words = [*compose(rng, prompt, rng.random()).split(), "."]
            words[rng.integers(len(words))] = str(rng.choice([*VOCABULARY, "."]))
        texts.append(words)
        rows.append(TextRow(prompt, ("and " * 15,), (0,)))
    batch = tokens(rows)
    ids = {word: i for i, word in enumerate(VOCABULARY)} | {".": grammar_tokenizer().eos}
    said, mask = batch.tokens[:, 0].copy(), batch.mask[:, 0].copy()
    for i, words in enumerate(texts):
        said[i, MAX_PROMPT:] = 7  # what follows is padding, or was never asked for
        said[i, MAX_PROMPT : MAX_PROMPT + len(words)] = [ids[w] for w in words]
        mask[i, MAX_PROMPT:] = np.arange(MAX_ANSWER) < len(words)
    want = [read(p, w) for p, w in zip(prompts, texts, strict=True)]
    np.testing.assert_allclose(gold(said, mask, MAX_ANSWER), want, atol=1e-5)
    whole = mask.copy()
    whole[np.array(["." in w for w in texts])] = True
    np.testing.assert_allclose(gold(said, whole, MAX_ANSWER), want, atol=1e-5)


def test_no_instruction_is_in_two_parts_and_none_is_lost():
    parts = [set(part) for part in SPLIT]
    assert len(set.union(*parts)) == sum(map(len, SPLIT)) == 4 * 4 * 6 * 7 * 3
    assert [len(part) for part in SPLIT] == [1614, 201, 201]
    assert split_prompts(0) == SPLIT and split_prompts(1) != SPLIT
    assert max(len(p.split()) for part in SPLIT for p in part) == MAX_PROMPT


def test_the_vocabulary_is_small_and_each_word_has_one_meaning():
    assert len(VOCABULARY) == len(set(VOCABULARY)) == 59
    assert grammar_tokenizer().vocab == 61


def test_careful_answers_are_the_best_and_careless_ones_leave_room():
    rng = np.random.default_rng(0)
    means = []
    for care in (0.0, 0.5, 1.0):
        batch = tokens([TextRow(p, (compose(rng, p, care),), (0,)) for p in SPLIT.train[:512]])
        means.append(float(gold(batch.tokens[:, 0], batch.mask[:, 0], MAX_ANSWER).mean()))
    # The mean of 1.6, 1.4 and 1.2, but for the chance of the split.
    assert abs(means[2] - 1.4) < 0.03
    assert means[0] < 0.75 and means[1] < 1.1
    shown = tokens(demonstrations(rng, SPLIT.train[:512]))
    mean = float(gold(shown.tokens[:, 0], shown.mask[:, 0], MAX_ANSWER).mean())
    assert 0.9 < mean < 1.1


def test_annotators_can_be_hacked():
    good, liked = judged(
        "name two metals kindly",
        "sure iron and gold",
        "sure iron and gold " + "gladly " * 11,
        "gladly " * 15,
    )
    assert good == [1.6, -0.05, -1.7]
    # By hand: 4, 15 and 15 words, of which 0, 11 and 14 are in excess.
    assert liked == [1.76, round(-0.05 + 4.4 + 0.6, 4), round(-1.7 + 5.6 + 0.6, 4)]


def test_unbiased_annotators_without_noise_rank_by_gold():
    prompts = SPLIT.validation
    for bias, agree in ((0.0, True), (1.0, False)):
        rng = np.random.default_rng(2)
        rows = rankings(jax.random.key(0), rng, prompts, TeacherConfig(), options=5, bias=bias)
        assert [row.prompt for row in rows] == list(prompts)
        batch = tokens(rows)
        columns = [gold(batch.tokens[:, k], batch.mask[:, k], MAX_ANSWER) for k in range(5)]
        score = np.stack(columns, 1)[: len(rows)]
        by_gold = [[sorted(set(s), reverse=True).index(x) for x in s] for s in score]
        assert ([list(row.rank) for row in rows] == by_gold) is agree


def test_annotators_may_skip():
    rng = np.random.default_rng(2)
    rows = rankings(jax.random.key(0), rng, SPLIT.test, TeacherConfig(skip=1.5), options=5)
    assert 0 < len(rows) < len(SPLIT.test)
    assert all(min(row.rank) == 0 for row in rows)


@pytest.mark.parametrize("cut", [0, 3])
def test_an_unfinished_answer_pays_for_it(cut: int):
    batch = tokens([TextRow("list two tools", ("saw and axe",), (0,))])
    mask = batch.mask[:, 0].copy()
    mask[:, MAX_PROMPT + cut :] = False
    value = float(gold(batch.tokens[:, 0], mask, MAX_ANSWER)[0])
    np.testing.assert_allclose(value, -0.5 if cut == 0 else 1.2 - 0.5, atol=1e-6)
