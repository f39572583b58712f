"""Data sets of text: JSON lines, or any rows with the same fields.

| kind | fields of a row |
|---|---|
| prompts | `prompt` |
| demonstrations | `prompt` and `answer`, or `text` alone |
| unpaired | `prompt`, `answer`, and `label`: true for a good one |
| rankings | `prompt`, `chosen`, `rejected`; `tie` true where neither is better |
| | or `prompt`, `answers` (2 to 9) and `rank`: 0 = best, equal = tie |
| questions | `prompt` and `answers`: rankings that nobody has given yet |

A row may have an `id`; rankings a `margin` (by how much the best is better) and a `subset` (group
of an evaluation, within which ids are unique). `completion` is another name of `answer`. A field
that is null is absent.

Prompts and answers are strings, or conversations: lists of messages with `role` and `content`. An
answer is then one message of the assistant; those before it may be repeated in it, and make up
the prompt where there is none. `messages` is such a conversation with its answer. The prompt
of a conversation is rendered by a template up to where the assistant begins to speak.
"""

from __future__ import annotations

import collections
import importlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, get_args

from mbrl.text_rows import MAX_OPTIONS, TextRow
from mbrl.training.json_lines import BadFileError, check_rank, is_number, parse, read_lines

Kind = Literal["prompts", "demonstrations", "unpaired", "rankings", "questions"]
MAX_LINE = 16 * 2**20
"""Bytes of a line."""


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


Template = Callable[[Sequence[Message]], str]
"""Writes a conversation as a prompt, up to where the assistant begins to speak."""


class TextData(NamedTuple):
    """A data set as it was read.

    Attributes:
      rows: those that can be used, in their order.
      bad: rows that were left out, counted by reason; empty unless they are skipped.
      unused: fields that say nothing to this kind of data, with the rows that had them.
    """

    rows: list[TextRow]
    bad: dict[str, int]
    unused: dict[str, int]


def plain_chat(messages: Sequence[Message]) -> str:
    """Write a conversation as lines of `role: content`; the last one is `assistant: `."""
    return "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant: "


def read_text(
    path: Path, kind: Kind, *, template: Template = plain_chat, on_error: str = "raise"
) -> TextData:
    """Read a file of JSON lines.

    Args:
      path: of the file, UTF-8.
      kind: of its rows, see the module.
      template: writes conversations.
      on_error: 'raise', or 'skip' rows that cannot be used and count them.

    Raises:
      ValueError: naming file and line, what is wrong and what is expected; also when no row
        can be used.
    """
    path = Path(path)

    def values() -> Iterator[tuple[str, Callable[[], Any]]]:
        try:
            for number, line in read_lines(path, MAX_LINE):
                yield f"{path}, line {number}", lambda line=line: parse(line, MAX_LINE)
        except OSError as error:
            raise ValueError(
                f"{path}: expected a file of JSON lines ({error.strerror}); name another"
            ) from None

    return _collect(values(), kind, template, on_error, str(path))


def parse_rows(
    rows: Iterable[Mapping[str, Any]],
    kind: Kind,
    *,
    template: Template = plain_chat,
    on_error: str = "raise",
    name: str = "data",
) -> TextData:
    """Read rows that are in memory, for example a `Dataset` of Hugging Face.

    Args:
      rows: mappings of fields.
      kind: of the rows, see the module.
      template: writes conversations.
      on_error: see `read_text`.
      name: of the data, for messages.

    Raises:
      ValueError: naming the row; see `read_text`.
    """
    values = ((f"{name}, row {i}", lambda row=row: row) for i, row in enumerate(rows))
    return _collect(values, kind, template, on_error, name)


def read_dataset(
    source: str,
    kind: Kind,
    *,
    split: str = "train",
    template: Template = plain_chat,
    on_error: str = "raise",
) -> TextData:
    """Read a data set with the package `datasets`.

    Args:
      source: folder that `save_to_disk` has written, or what `load_dataset` knows.
      kind: of the rows, see the module.
      split: of the data set.
      template: writes conversations.
      on_error: see `read_text`.

    Raises:
      ValueError: when the package is missing, or the data set or its split cannot be loaded;
        see also `read_text`.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise ValueError(f'{source} needs datasets: pip install "modelrl[hf]"') from None
    folder = Path(source)
    saved = any((folder / name).exists() for name in ("state.json", "dataset_dict.json"))
    try:
        found = datasets.load_from_disk(source) if saved else datasets.load_dataset(source)
        rows = found[split] if isinstance(found, dict) else found
    except Exception as error:  # of datasets, of file systems, of the network
        raise ValueError(
            f"{source}: expected a data set with a split {split!r} ({error!s:.200})"
        ) from error
    return parse_rows(rows, kind, template=template, on_error=on_error, name=source)


def write_text(path: Path, kind: Kind, rows: Sequence[TextRow]) -> None:
    """Write rows as JSON lines, in one step; `read_text` gives them back."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for row in rows:
                text = json.dumps(as_fields(kind, row), ensure_ascii=False, allow_nan=False)
                file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def as_fields(kind: Kind, row: TextRow) -> dict[str, Any]:
    """Return the fields of a row."""
    found: dict[str, Any] = {"id": row.id} if row.id else {}
    found["prompt"] = row.prompt
    match kind:
        case "demonstrations":
            found["answer"] = row.answers[0]
        case "unpaired":
            found |= {"answer": row.answers[0], "label": row.rank[0] == 0}
        case "rankings":
            found |= {"answers": list(row.answers), "rank": list(row.rank)}
            found |= {"margin": row.margin} if row.margin else {}
            found |= {"subset": row.subset} if row.subset else {}
        case "questions":
            found["answers"] = list(row.answers)
    return found


def _collect(
    values: Iterable[tuple[str, Callable[[], Any]]],
    kind: Kind,
    template: Template,
    on_error: str,
    name: str,
) -> TextData:
    if kind not in get_args(Kind):
        raise ValueError(f"kind: got {kind!r:.60}, expected one of {', '.join(get_args(Kind))}")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error: got {on_error!r:.60}, expected 'raise' or 'skip'")
    rows, ids = [], set()
    bad, unused = collections.Counter[str](), collections.Counter[str]()
    for where, value in values:
        try:
            row, rest = _row(value(), kind, template)
            if row.id and (row.subset, row.id) in ids:
                raise BadFileError("id", f"id: {row.id!r:.60} comes again, expected each once")
        except BadFileError as error:
            if on_error == "raise":
                raise BadFileError(
                    error.reason, f"{where}: {error}; mend or delete it, or read with "
                    "on_error='skip'"
                ) from None  # fmt: skip
            bad[error.reason] += 1
            continue
        ids.add((row.subset, row.id))
        unused.update(rest)
        rows.append(row._replace(where=where))
    if not rows:
        raise ValueError(
            f"{name}: expected {kind}, found no row that can be used (left out: {dict(bad)})"
        )
    return TextData(rows, dict(bad), dict(unused))


def _row(value: Any, kind: Kind, template: Template) -> tuple[TextRow, set[str]]:
    """Read one row; also name the fields that were not used."""
    if not isinstance(value, Mapping):
        raise BadFileError("fields", f"got {value!r:.60}, expected an object with fields")
    fields = {name: x for name, x in value.items() if x is not None}
    taken = fields.copy()  # what is used is taken out
    answers, rank = _answers(taken, kind)
    prompt, texts = _texts(taken, answers, template)
    margin, subset = 0.0, ""
    if kind == "rankings":
        subset = _string(taken, "subset", "")
        margin = taken.pop("margin", 0.0)
        if not is_number(margin) or margin < 0 or (margin and len(set(rank)) == 1):
            raise BadFileError(
                "margin", f"margin: got {margin!r:.60}, expected 0 or a finite number above it, "
                "and 0 for a tie",
            )  # fmt: skip
    name = taken.pop("id", "")
    if type(name) not in (str, int):
        raise BadFileError("id", f"id: got {name!r:.60}, expected a string or an integer")
    try:
        "".join((prompt, *texts)).encode()
    except UnicodeEncodeError as error:  # JSON can spell out half a character
        raise BadFileError("encoding", f"expected Unicode text ({error})") from None
    row = TextRow(prompt, texts, tuple(rank), float(margin), subset, str(name))
    return row, set(taken)


def _answers(taken: dict[str, Any], kind: Kind) -> tuple[list[Any], list[int]]:
    """Take the answers out of the fields of a row, as they are, and their ranks."""
    if kind == "prompts":
        return [], []
    if kind == "questions" or (kind == "rankings" and "answers" in taken):
        answers = _need(taken, "answers")
        if not isinstance(answers, list) or not 2 <= len(answers) <= MAX_OPTIONS:
            raise BadFileError(
                "answers", f"answers: got {answers!r:.60}, expected a list of 2 .. {MAX_OPTIONS}"
            )
        rank = [] if kind == "questions" else _need(taken, "rank")
        if kind == "rankings":
            check_rank(rank, len(answers))
        return answers, rank
    if kind == "rankings":
        answers, tie = [_need(taken, "chosen"), _need(taken, "rejected")], taken.pop("tie", False)
        return answers, [0, 0] if _is_true("tie", tie) else [0, 1]
    names = ["answer", "completion", *(["text", "messages"] if kind == "demonstrations" else [])]
    given = [name for name in names if name in taken]
    if len(given) != 1:
        raise BadFileError("fields", f"fields {given} are there, expected one of {names}")
    answer = taken.pop(given[0])
    if given[0] in ("text", "messages"):
        wanted = str if given[0] == "text" else list
        if "prompt" in taken or not isinstance(answer, wanted):
            raise BadFileError(
                given[0], f"{given[0]}: got {answer!r:.60}, expected a {wanted.__name__} and no "
                "prompt beside it",
            )  # fmt: skip
        if wanted is str:
            taken["prompt"] = ""
    good = kind == "demonstrations" or _is_true("label", _need(taken, "label"))
    return [answer], [0 if good else 1]


def _texts(
    taken: dict[str, Any], answers: list[Any], template: Template
) -> tuple[str, tuple[str, ...]]:
    """Take the prompt out, and turn it and the answers into text."""
    prompt = taken.pop("prompt", None)
    texts = [answer for answer in answers if isinstance(answer, str)]
    if prompt is None and (not answers or texts):
        raise BadFileError("fields", "field 'prompt' is missing")
    if isinstance(prompt, str) and len(texts) == len(answers):
        return prompt, tuple(texts)
    talks = [x if isinstance(x, str) else _messages("answer", x) for x in answers]
    if prompt is None:
        before = _shared([talk for talk in talks if not isinstance(talk, str)])
    elif isinstance(prompt, str):
        before = [Message(role="user", content=prompt)]
    else:
        before = _messages("prompt", prompt)
    texts = [talk if isinstance(talk, str) else _last(talk, before) for talk in talks]
    try:
        return template(before), tuple(texts)
    except ValueError as error:
        raise BadFileError("conversation", f"prompt: {error}") from None


def _messages(name: str, value: Any) -> list[Message]:
    good = isinstance(value, list) and all(
        isinstance(m, Mapping) and all(isinstance(m.get(key), str) for key in ("role", "content"))
        for m in value
    )
    if not good or not value:
        raise BadFileError(
            "type", f"{name}: got {value!r:.60}, expected a string, or a list of messages with "
            "role and content",
        )  # fmt: skip
    return [Message(role=m["role"], content=m["content"]) for m in value]


def _shared(talks: list[list[Message]]) -> list[Message]:
    """Return the messages with which all conversations begin, without their last ones."""
    count = 0
    while all(len(t) > count + 1 and t[count] == talks[0][count] for t in talks):
        count += 1
    return talks[0][:count]


def _last(talk: list[Message], before: list[Message]) -> str:
    """Return what the assistant says after the prompt."""
    rest = talk[len(before) :] if talk[: len(before)] == before else talk
    if len(rest) != 1 or rest[0]["role"] != "assistant":
        raise BadFileError(
            "conversation", f"answer: got messages of {[m['role'] for m in rest]!s:.80} after the "
            f"{len(before)} of the prompt, expected one of the assistant",
        )  # fmt: skip
    return rest[0]["content"]


def _need(taken: dict[str, Any], name: str) -> Any:
    if name not in taken:
        raise BadFileError("fields", f"field {name!r} is missing, there are {sorted(taken)!s:.100}")
    return taken.pop(name)


def _string(taken: dict[str, Any], name: str, default: str) -> str:
    value = taken.pop(name, default)
    if not isinstance(value, str):
        raise BadFileError("type", f"{name}: got {value!r:.60}, expected a string")
    return value


def _is_true(name: str, value: Any) -> bool:
    if type(value) is not bool:
        raise BadFileError(name, f"{name}: got {value!r:.60}, expected true or false")
    return value
