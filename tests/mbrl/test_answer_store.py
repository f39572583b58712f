"""Questions of text and what people say of them: in a file, and back as rankings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mbrl.text_rows import TextRow
from mbrl.training.answer_store import AnswerStore, Question
from mbrl.training.text_data import read_text, write_text

ROWS = [TextRow(f"p{i}", ("a", "b", "c"), id=f"q{i}") for i in range(4)]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    write_text(tmp_path / "q.jsonl", "questions", ROWS)
    return tmp_path / "q.jsonl"


def test_labels_become_rankings(questions: Path):
    store = AnswerStore(questions)
    assert store.queries() == ["00000000", "00000001", "00000002", "00000003"]
    assert store.read_query("00000002") == Question("00000002", "p2", ("a", "b", "c"))
    assert store.write_rankings() == 0
    store.add_label("00000003", [1, 0, 1], by="ada")
    store.add_label("00000000", [0, 1, 2], by="ada")
    store.add_label("00000001", None)
    store.add_label("00000002", [0, 0, 0])
    store.undo("00000002")
    again = AnswerStore(questions)  # another process
    assert again.write_rankings() == 2
    found = read_text(questions.parent / "q.labels" / "rankings.jsonl", "rankings").rows
    assert [(r.id, r.prompt, r.answers, r.rank) for r in found] == [
        ("q0", "p0", ("a", "b", "c"), (0, 1, 2)),
        ("q3", "p3", ("a", "b", "c"), (1, 0, 1)),
    ]


def test_a_label_is_not_given_twice_unless_asked_for(questions: Path):
    store = AnswerStore(questions)
    store.add_label("00000000", [0, 1, 2])
    with pytest.raises(ValueError, match="00000000 .* has a label already"):
        store.add_label("00000000", [2, 1, 0], replace=False)
    with pytest.raises(ValueError, match="rank: got .* expected 3 integers"):
        store.add_label("00000001", [0, 1])
    assert [label.rank for label in store.read_labels().labels] == [(0, 1, 2)]


def test_labels_of_other_questions_are_not_mixed_in(questions: Path):
    AnswerStore(questions).add_label("00000000", [0, 1, 2])
    write_text(questions, "questions", [ROWS[1], ROWS[0], *ROWS[2:]])
    with pytest.raises(ValueError, match=r"q.labels: its labels are those of other questions"):
        AnswerStore(questions)
    write_text(questions, "questions", ROWS)
    assert len(AnswerStore(questions).read_labels().labels) == 1


def test_questions_have_the_same_number_of_answers(questions: Path):
    with questions.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "p", "answers": ["a", "b"]}) + "\n")
    with pytest.raises(ValueError, match=r"q.jsonl, line 5: got 2 answers, expected 3"):
        AnswerStore(questions)
