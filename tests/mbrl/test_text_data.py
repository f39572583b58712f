"""Data sets of text: every form that is read, every fault named or counted, nothing dropped."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any, get_args

import pytest

from mbrl.preferences import grammar
from mbrl.text_rows import TextRow, encode_rows
from mbrl.training.grammar_files import GrammarConfig, write_grammar
from mbrl.training.text_data import (
    MAX_LINE,
    Kind,
    parse_rows,
    plain_chat,
    read_dataset,
    read_text,
    write_text,
)
from mbrl.training.tokenizer_files import load_template, load_tokenizer

PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad"}
RANKING = {"prompt": "p", "answers": ["x", "y", "z"], "rank": [1, 0, 1]}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def only(kind: Kind, fields: dict[str, Any]) -> TextRow:
    [row] = parse_rows([fields], kind).rows
    return row._replace(where="")


TALK = "user: hi\nassistant: "
FORMS: list[tuple[Kind, dict[str, Any], TextRow]] = [
    ("prompts", {"prompt": "p"}, TextRow("p")),
    ("prompts", {"prompt": [user("hi")], "id": 7}, TextRow(TALK, id="7")),
    ("demonstrations", {"prompt": "p", "answer": "a"}, TextRow("p", ("a",), (0,))),
    ("demonstrations", {"prompt": "p", "completion": ""}, TextRow("p", ("",), (0,))),
    ("demonstrations", {"text": "t"}, TextRow("", ("t",), (0,))),
    ("demonstrations", {"messages": [user("hi"), said("ho")]}, TextRow(TALK, ("ho",), (0,))),
    ("unpaired", {"prompt": "p", "answer": "a", "label": True}, TextRow("p", ("a",), (0,))),
    ("unpaired", {"prompt": "p", "completion": "a", "label": False}, TextRow("p", ("a",), (1,))),
    ("rankings", PAIR, TextRow("p", ("good", "bad"), (0, 1))),
    ("rankings", PAIR | {"margin": 2, "tie": None}, TextRow("p", ("good", "bad"), (0, 1), 2.0)),
    ("rankings", PAIR | {"tie": True}, TextRow("p", ("good", "bad"), (0, 0))),
    ("rankings", PAIR | {"subset": "s"}, TextRow("p", ("good", "bad"), (0, 1), subset="s")),
    ("rankings", RANKING, TextRow("p", ("x", "y", "z"), (1, 0, 1))),
    ("questions", {"prompt": "p", "answers": ["x", "y"]}, TextRow("p", ("x", "y"))),
    # Conversations: only the answer, the whole of it, with the prompt as a string, without one.
    (
        "rankings",
        {"prompt": [user("hi")], "chosen": [said("a")], "rejected": [said("b")]},
        TextRow(TALK, ("a", "b"), (0, 1)),
    ),
    (
        "rankings",
        {"prompt": "hi", "chosen": [user("hi"), said("a")], "rejected": [user("hi"), said("b")]},
        TextRow(TALK, ("a", "b"), (0, 1)),
    ),
    (
        "rankings",
        {"chosen": [user("hi"), said("a")], "rejected": [user("hi"), said("a")]},
        TextRow(TALK, ("a", "a"), (0, 1)),
    ),
    (
        "rankings",
        {"prompt": [user("hi")], "answers": ["a", [said("b")]], "rank": [0, 1]},
        TextRow(TALK, ("a", "b"), (0, 1)),
    ),
    (
        "unpaired",
        {"prompt": [user("hi"), said("ho"), user("hi")], "answer": [said("a")], "label": True},
        TextRow("user: hi\nassistant: ho\nuser: hi\nassistant: ", ("a",), (0,)),
    ),
]


@pytest.mark.parametrize(("kind", "fields", "want"), FORMS)
def test_every_form_of_a_row_is_read(kind: Kind, fields: dict[str, Any], want: TextRow):
    assert only(kind, fields) == want


def test_what_is_written_is_read_again(tmp_path: Path):
    for kind in get_args(Kind):
        rows = [
            want._replace(prompt=f"{want.prompt} ä\n\u2028") for k, _, want in FORMS if k == kind
        ]
        write_text(tmp_path / "new" / "rows.jsonl", kind, rows)
        found = read_text(tmp_path / "new" / "rows.jsonl", kind)
        assert [row._replace(where="") for row in found.rows] == rows
        assert (found.bad, found.unused) == ({}, {})
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["rows.jsonl"]


FAULTS: dict[str, list[tuple[Kind, bytes | dict[str, Any], str]]] = {
    "json": [("prompts", b'{"prompt": "p"', "expected JSON"), ("prompts", b"", "expected JSON")],
    "encoding": [
        ("prompts", b'{"prompt": "\xff"}', "expected UTF-8"),
        ("prompts", b'{"prompt": "\\ud800"}', "expected Unicode text"),
    ],
    "long": [("prompts", b'{"prompt": "' + b"x" * MAX_LINE + b'"}', f"longer than {MAX_LINE}")],
    "fields": [
        ("prompts", {"text": "t"}, "field 'prompt' is missing"),
        ("prompts", b'["prompt"]', "expected an object"),
        ("prompts", b'{"prompt": "a", "prompt": "b"}', "a field appears twice"),
        ("rankings", {"prompt": "p", "chosen": "a"}, "field 'rejected' is missing"),
        ("rankings", {"chosen": "a", "rejected": "b"}, "field 'prompt' is missing"),
        ("rankings", {"prompt": "p", "answers": ["a", "b"]}, "field 'rank' is missing"),
        ("unpaired", {"prompt": "p", "answer": "a"}, "field 'label' is missing"),
        ("questions", {"prompt": "p"}, "field 'answers' is missing"),
        ("demonstrations", {"prompt": "p"}, r"\[\] are there, expected one of \['answer'"),
    ],
    "type": [
        ("prompts", {"prompt": 3}, "prompt: got 3, expected a string, or a list of messages"),
        ("prompts", {"prompt": []}, r"prompt: got \[\]"),
        ("prompts", {"prompt": [{"role": "user", "content": None}]}, "prompt: got"),
        ("rankings", PAIR | {"chosen": 1}, "answer: got 1"),
        ("rankings", PAIR | {"subset": 1}, "subset: got 1"),
    ],
    "answers": [
        ("rankings", RANKING | {"answers": ["x"]}, r"expected a list of 2 .. 9"),
        ("rankings", RANKING | {"answers": ["x"] * 10}, r"expected a list of 2 .. 9"),
    ],
    "rank": [
        ("rankings", RANKING | {"rank": rank}, "rank: got .* expected 3 integers of 0 .. 2")
        for rank in ([0, 1], [1, 2, 1], [0, 1, 3], [0.0, 1, 2], [True, 0, 1], "012")
    ],
    "margin": [
        ("rankings", PAIR | {"margin": margin}, "margin: got .* expected 0 or a finite number")
        for margin in (float("nan"), float("inf"), -1.0, "1", True)
    ]
    + [("rankings", PAIR | {"margin": 1.0, "tie": True}, "and 0 for a tie")],
    "tie": [("rankings", PAIR | {"tie": 1}, "tie: got 1, expected true or false")],
    "label": [("unpaired", {"prompt": "p", "answer": "a", "label": 1}, "label: got 1")],
    "text": [("demonstrations", {"prompt": "p", "text": "t"}, "no prompt beside it")],
    "messages": [("demonstrations", {"messages": "m"}, "messages: got 'm', expected a list")],
    "id": [("prompts", {"prompt": "p", "id": 1.5}, "expected a string or an integer")],
    "conversation": [
        ("demonstrations", {"messages": [user("hi"), user("ho")]}, "expected one of the assistant"),
        (
            "rankings",
            {"chosen": [user("a"), said("b")], "rejected": [user("c"), said("b")]},
            r"got messages of \['user', 'assistant'\] after the 0 of the prompt",
        ),
    ],
}  # fmt: skip
CASES = [(reason, *case) for reason, cases in FAULTS.items() for case in cases]
GOOD = {
    "prompts": {"prompt": "p"},
    "demonstrations": {"text": "t"},
    "unpaired": {"prompt": "p", "answer": "a", "label": True},
    "rankings": PAIR,
    "questions": {"prompt": "p", "answers": ["a", "b"]},
}


@pytest.mark.parametrize(("reason", "kind", "line", "message"), CASES)
def test_faults_are_named_with_their_line_or_counted(
    reason: str, kind: Kind, line: bytes | dict[str, Any], message: str, tmp_path: Path
):
    path = tmp_path / "data.jsonl"
    bad = line if isinstance(line, bytes) else json.dumps(line).encode()
    good = json.dumps(GOOD[kind]).encode()
    path.write_bytes(b"\n".join([good, bad, good]))
    with pytest.raises(ValueError, match=rf"data.jsonl, line 2: .*{message}.*on_error='skip'"):
        read_text(path, kind)
    found = read_text(path, kind, on_error="skip")
    assert found.bad == {reason: 1}
    assert [row.where for row in found.rows] == [f"{path}, line {n}" for n in (1, 3)]


def test_repeated_ids_are_found_within_a_subset(tmp_path: Path):
    rows = [PAIR | {"id": 1, "subset": s} for s in ("a", "b", "a")]
    with pytest.raises(ValueError, match="data, row 2: id: '1' comes again"):
        parse_rows(rows, "rankings")
    found = parse_rows(rows, "rankings", on_error="skip")
    assert (len(found.rows), found.bad) == (2, {"id": 1})


def test_fields_that_say_nothing_are_counted():
    rows = [PAIR | {"margins": 1.0}, PAIR | {"margins": 2.0, "source": "s"}, PAIR]
    assert parse_rows(rows, "rankings").unused == {"margins": 2, "source": 1}


def test_files_without_rows_and_unknown_words_are_refused(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    with pytest.raises(ValueError, match="data.jsonl: expected a file of JSON lines"):
        read_text(path, "prompts")
    path.write_text("{}\n", "utf-8")
    with pytest.raises(ValueError, match=r"no row that can be used \(left out: {'fields': 1}\)"):
        read_text(path, "prompts", on_error="skip")
    for words in ({"kind": "pairs"}, {"kind": "prompts", "on_error": "ignore"}):
        with pytest.raises(ValueError, match=f"^{list(words)[-1]}: got"):
            read_text(path, **words)


def test_conversations_are_rendered_by_the_template_that_is_given():
    def shout(messages: Any) -> str:
        if len(messages) > 1:
            raise ValueError("one message at most")
        return messages[0]["content"].upper()

    rows = [{"prompt": [user("hi")]}, {"prompt": "plain"}, {"prompt": [user("hi"), said("ho")]}]
    found = parse_rows(rows[:2], "prompts", template=shout)
    assert [row.prompt for row in found.rows] == ["HI", "plain"]
    with pytest.raises(ValueError, match="row 2: prompt: one message at most"):
        parse_rows(rows, "prompts", template=shout)
    assert plain_chat([user("hi")]) == "user: hi\nassistant: "


def test_data_sets_of_hugging_face_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # A stand-in with the two functions that are called; the real package is an extra.
    def load_from_disk(source: str) -> Any:
        return {"train": [PAIR, PAIR | {"margin": None}]}

    def load_dataset(source: str) -> Any:
        if source != "known":
            raise FileNotFoundError("no such data set")
        return [PAIR]

    stand_in = types.ModuleType("datasets")
    vars(stand_in).update(load_from_disk=load_from_disk, load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    (tmp_path / "dataset_dict.json").write_text("{}", "utf-8")
    assert len(read_dataset(str(tmp_path), "rankings").rows) == 2
    assert read_dataset("known", "rankings").rows[0].where == "known, row 0"
    with pytest.raises(ValueError, match="expected a data set with a split 'test'"):
        read_dataset(str(tmp_path), "rankings", split="test")
    with pytest.raises(ValueError, match="unknown: expected .*no such data set"):
        read_dataset("unknown", "rankings")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r'needs datasets: pip install "modelrl\[hf\]"'):
        read_dataset("known", "rankings")


CHATML = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}\n"
    "<|{{ m.role }}|>{{ m.content }}{{ eos_token }}\n"
    "{% endfor %}\n{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_chat_templates_of_models_are_rendered(tmp_path: Path):
    with pytest.raises(ValueError, match="expected a chat template, found none"):
        load_template(tmp_path)
    pytest.importorskip("jinja2")
    config = {"chat_template": CHATML, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    render = load_template(tmp_path)
    assert render([user("a<b"), said("c")]) == "<|user|>a<b</s>\n<|assistant|>c</s>\n<|assistant|>"
    with pytest.raises(ValueError, match="cannot write this conversation .*no tools"):
        render([{"role": "tool", "content": ""}])
    (tmp_path / "chat_template.jinja").write_text("{% if %}", "utf-8")
    with pytest.raises(ValueError, match="chat_template.jinja: expected a template"):
        load_template(tmp_path)


def test_a_missing_template_engine_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setitem(sys.modules, "jinja2.sandbox", None)
    (tmp_path / "chat_template.jinja").write_text("", "utf-8")
    with pytest.raises(ValueError, match=r'needs jinja2: pip install "modelrl\[hf\]"'):
        load_template(tmp_path)


def test_the_language_task_is_written_and_read(tmp_path: Path):
    counts = write_grammar(tmp_path, GrammarConfig(seed=1, options=3, demonstrations=2, rankings=1))
    assert len(counts) == 9
    tokenizer = load_tokenizer(tmp_path)
    seen: list[set[str]] = []
    for part, prompts in grammar.split_prompts(1)._asdict().items():
        for kind, copies in (("prompts", 1), ("demonstrations", 2), ("rankings", 1)):
            found = read_text(tmp_path / part / f"{kind}.jsonl", kind)
            assert [row.prompt for row in found.rows] == list(prompts) * copies
            assert counts[f"{part}/{kind}.jsonl"] == len(prompts) * copies
            encoded = encode_rows(tokenizer, found.rows, grammar.MAX_PROMPT, grammar.MAX_ANSWER)
            assert encoded.counts == {}
        seen.append(set(prompts))
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
