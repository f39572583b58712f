"""`mbrl label`: who may ask, what is written, and what is said when it cannot work."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from mbrl.spaces import box
from mbrl.training import comparison_labels
from mbrl.training.answer_store import AnswerStore
from mbrl.training.comparison_store import ComparisonStore, Query, Schema
from mbrl.training.text_data import read_text
from mbrl.types import Discrete, Space, Transition
from scripts import cli, label, label_server

pytest.importorskip("starlette", reason='needs the extra "label"')
pytest.importorskip("uvicorn", reason='needs the extra "label"')

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "right-token"
POSITION = {"position": box(-1, 1, (2,))}


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Page(NamedTuple):
    """A server in a thread, and the store behind it."""

    store: ComparisonStore | AnswerStore
    port: int

    def get(self, path: str, token: str | None = TOKEN, **options: Any) -> Reply:
        return self.ask("GET", path, token, **options)

    def post(self, path: str, body: Any, token: str | None = TOKEN, **options: Any) -> Reply:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", path, token, data, **options)

    def ask(
        self, method: str, path: str, token: str | None, body: bytes | None = None, host: str = ""
    ) -> Reply:
        if token is not None:
            path += ("&" if "?" in path else "?") + f"token={token}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.putrequest(method, path, skip_host=True)
            connection.putheader("Host", host or f"127.0.0.1:{self.port}")
            if body is not None:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            got = connection.getresponse()
            return Reply(got.status, {k.lower(): v for k, v in got.getheaders()}, got.read())
        finally:
            connection.close()

    def lines(self) -> list[dict[str, Any]]:
        file = self.store.path / "labels.jsonl"
        return [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []


def segments(seed: int = 0, options: int = 2, space: Space = POSITION) -> Transition:
    random = np.random.default_rng(seed)
    lead = (options, 20)
    names = [*space] if isinstance(space, dict) else []
    walks = np.cumsum(random.normal(size=(*lead, 2)), 1) * 0.1
    obs = {name: walks + i for i, name in enumerate(names)}
    zeros = np.zeros(lead, np.float32)
    return Transition(obs, zeros.astype(int), zeros, obs, zeros > 0)  # type: ignore[arg-type]


def make_store(path: Path, options: int = 2, space: Space = POSITION) -> ComparisonStore:
    return ComparisonStore.create_or_open(path, Schema(space, Discrete(2), options, 20))


@contextlib.contextmanager
def serve(store: ComparisonStore | AnswerStore, by: str = "ada") -> Iterator[Page]:
    """Run the server in a thread."""
    if isinstance(store, ComparisonStore):
        store = ComparisonStore.open(store.path, on_bad="skip")
    session = label_server.Session(store, by)
    server = label_server.make_server(session, TOKEN)
    with label.listen(0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield Page(store, listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(10.0)
        assert not thread.is_alive()


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    store = make_store(tmp_path / "store")
    for seed in range(3):
        store.add_query(segments(seed))
    with serve(store) as served:
        yield served


def test_the_page_loads_nothing_from_elsewhere_and_shows_text_as_text(page):
    got = page.get("/")
    text = got.body.decode()
    assert got.status == 200 and "<canvas" not in text
    assert re.findall(r"https?://|//[a-z]+\.|@import|url\(", text) == []
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text) == []
    policy = got.headers["content-security-policy"]
    nonce = re.findall(r"'nonce-([\w-]{16,})'", policy)
    assert len(nonce) == 2 and set(nonce) == set(re.findall(r'nonce="([^"]+)"', text))
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert nonce[0] not in page.get("/").headers["content-security-policy"]
    for reply in (got, page.get("/api/state"), page.get("/nothing"), page.get("/", "wrong")):
        assert reply.headers["cache-control"] == "no-store"
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["referrer-policy"] == "no-referrer"


PATHS = [
    "/",
    "/api/state",
    "/api/query?query=00000000",
    "/clip?query=00000000&option=0",
    "/nothing",
]


@pytest.mark.parametrize(
    "token", [None, "", "wrong", TOKEN + "x", TOKEN[:-1], TOKEN.upper(), f"{TOKEN}&token={TOKEN}",
              "%ff%00", f"{TOKEN}&token="]
)  # fmt: skip
def test_only_the_token_opens_it(token, page):
    for path in PATHS:
        got = page.get(path, token)
        # An empty second token is none.
        assert (got.status == 403) == (token != f"{TOKEN}&token="), path
    if token != f"{TOKEN}&token=":
        assert page.post("/api/answer", {"query": "00000000", "rank": [0, 1]}, token).status == 403
        assert page.post("/api/undo", {}, token).status == 403
        assert b"00000000" not in page.get("/api/state", token).body
    assert page.lines() == []


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("localhost:8000", 200), ("127.0.0.1", 200), ("LOCALHOST:1", 200),
        ("evil.example", 403), ("evil.example:80", 403), ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403), ("evil.example:127.0.0.1", 403), ("[::1]", 403),
        ("0.0.0.0", 403), ("127.0.0.1@evil.example", 403), ("evil@127.0.0.1", 403),
    ],
)  # fmt: skip
def test_only_this_machine_is_a_host(host, status, page):
    page.get("/api/state")  # shows the first query
    assert page.get("/", host=host).status == status
    assert page.get("/api/state", host=host).status == status
    answer = {"query": "00000000", "rank": [0, 1]}
    assert page.post("/api/answer", answer, host=host).status == status
    assert len(page.lines()) == (status == 200)


def test_other_machines_cannot_reach_it():
    with label.listen(0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_an_answer_is_on_the_disk_before_it_is_acknowledged(page):
    state = page.get("/api/state").json
    assert (state["query"], state["total"], state["answered"]) == ("00000000", 3, 0)
    before = time.time()
    done = page.post("/api/answer", {"query": "00000000", "rank": [1, 0]})
    [line] = page.lines()
    assert before <= line.pop("time") <= time.time()
    assert line == {"query": "00000000", "rank": [1, 0], "margin": 0.0, "by": "ada"}
    assert (done.json["query"], done.json["answered"]) == ("00000001", 1)
    assert page.post("/api/answer", {"query": "00000001", "rank": None}).json["skipped"] == 1
    done = page.post("/api/answer", {"query": "00000002", "rank": [0, 0]}).json
    assert done["query"] is None and done["answered"] == 3
    assert page.get("/api/query?query=00000002").status == 404

    page.store.add_query(segments(3))  # training goes on
    assert page.get("/api/state").json["query"] == "00000003"
    for query in ("00000002", "00000001", "00000000"):
        assert page.post("/api/undo", {}).json["query"] == query
    assert page.post("/api/undo", {}).status == 409
    assert page.get("/api/state").json["answered"] == 0
    assert page.store.labels() == []


def test_undo_leaves_the_answers_of_others(page):
    page.store.add_label("00000001", [0, 1], by="bob")
    assert page.post("/api/undo", {}).status == 409
    assert page.store.labels()[0].by == "bob"


@pytest.mark.fault
def test_answers_to_what_is_not_shown_are_refused(page):
    answer = {"query": "00000000", "rank": [0, 1]}
    assert page.post("/api/answer", answer).status == 409  # nothing has been shown
    page.get("/api/state")
    assert page.post("/api/answer", {**answer, "query": "00000001"}).status == 409
    assert page.post("/api/answer", {**answer, "query": 0}).status == 409
    assert page.lines() == []
    assert page.post("/api/answer", answer).status == 200
    again = page.post("/api/answer", answer)  # a double click
    assert again.status == 409 and "is not the one that is shown" in again.json["error"]
    assert len(page.lines()) == 1

    page.store.add_label("00000001", [0, 1], by="bob")  # while it is shown here
    late = page.post("/api/answer", {"query": "00000001", "rank": [1, 0]})
    assert late.status == 409 and "has a label already" in late.json["error"]
    assert page.get("/api/state").json["query"] == "00000002"
    assert [x["by"] for x in page.lines()] == ["ada", "bob"]


@pytest.mark.fault
@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400), (b"nonsense", 400), (b"[]", 400), (b"\xff", 400), (b"[" * 4000, 400),
        ({"query": "00000000"}, 400), ({"query": "00000000", "rank": [0, 1], "by": "eve"}, 400),
        (b" " * 5000, 413),
        *(({"query": "00000000", "rank": rank}, 400)
          for rank in ([0], [0, 1, 2], [1, 1], [0, True], [0, -1], "01", 0, {}, [0, "1"], [0.5, 0])
          ),
    ],
)  # fmt: skip
def test_bad_answers_are_refused(body, status, page):
    page.get("/api/state")
    got = page.post("/api/answer", body)
    assert got.status == status and got.json["error"]
    assert page.lines() == []
    assert page.get("/api/answer").status == 405


@pytest.mark.fault
def test_a_full_disk_is_said_and_the_question_stays(page, monkeypatch):
    page.get("/api/state")
    write = os.write

    def part(descriptor: int, data: bytes) -> int:
        return write(descriptor, data[:3] if b"rank" in data else data)

    with monkeypatch.context() as patch:
        patch.setattr(comparison_labels.os, "write", part)
        got = page.post("/api/answer", {"query": "00000000", "rank": [0, 1]})
    assert got.status == 500 and "wrote 3 of" in got.json["error"]
    assert page.lines() == []
    assert page.get("/api/state").json["query"] == "00000000"


@pytest.mark.fault
def test_what_is_damaged_is_counted_and_passed_over(page):
    (page.store.path / "queries" / "00000000.npz").write_bytes(b"PK")
    (page.store.path / "labels.jsonl").write_bytes(b'nonsense\n{"query": "0000')
    state = page.get("/api/state").json
    assert (state["query"], state["damaged"], state["bad_lines"]) == ("00000001", 1, 2)
    assert page.post("/api/answer", {"query": "00000001", "rank": [0, 1]}).status == 200
    assert page.store.path.joinpath("labels.jsonl").read_bytes().count(b"\n") == 3


def test_two_people_share_a_store(page):
    with serve(page.store, "bob") as other:
        page.get("/api/state")
        other.get("/api/state")
        assert page.post("/api/answer", {"query": "00000000", "rank": [0, 1]}).status == 200
        assert other.post("/api/answer", {"query": "00000000", "rank": [0, 1]}).status == 409
        assert other.get("/api/state").json["query"] == "00000001"


def test_films_come_back_frame_by_frame(page):
    from PIL import Image

    frames = np.random.default_rng(0).integers(0, 256, (2, 7, 6, 4, 3)).astype(np.uint8)
    for query in page.store.queries():
        page.store.add_label(query, None)
    page.store.add_query(segments(), frames, ["first", "second"])
    assert page.get("/api/state").json["query"] == "00000003"
    shown = page.get("/api/query?query=00000003").json
    assert shown["captions"] == ["first", "second"]
    columns = shown["frames"].pop("columns")
    assert shown["frames"] == {"count": 7, "height": 6, "width": 4}
    for option in range(2):
        got = page.get(f"/clip?query=00000003&option={option}")
        assert got.headers["content-type"] == "image/png"
        sheet = np.asarray(Image.open(io.BytesIO(got.body)))
        for t in range(7):
            y, x = 6 * (t // columns), 4 * (t % columns)
            np.testing.assert_array_equal(sheet[y : y + 6, x : x + 4], frames[option, t])
    for rest in ("query=00000003&option=2", "query=00000003&option=x", "query=00000000&option=0"):
        assert page.get(f"/clip?{rest}").status == 404


def test_lines_are_those_of_the_observations(page):
    page.get("/api/state")
    shown = page.get("/api/query?query=00000000").json
    assert [line["name"] for line in shown["lines"]] == ["position[0]", "position[1]"]
    found = np.array([line["values"] for line in shown["lines"]])
    expected = page.store.read_query("00000000").segments.obs["position"]
    np.testing.assert_array_equal(found, np.moveaxis(expected, -1, 0))
    assert page.get("/clip?query=00000000&option=0").status == 404


def test_many_dimensions_are_counted_and_images_are_films():
    wide = segments()._replace(obs=np.zeros((2, 20, 40)))
    shown = label_server.view(Query("0", wide, None, ()))
    assert (len(shown["lines"]), shown["hidden"]) == (24, 16)
    gray = np.random.default_rng(0).integers(0, 256, (2, 20, 8, 8, 1)).astype(np.uint8)
    film = label_server.frames_of(Query("0", segments()._replace(obs=gray), None, ()))
    assert film is not None and film.shape == (2, 20, 8, 8, 3)
    np.testing.assert_array_equal(film[..., 2], gray[..., 0])


QUESTIONS = [{"prompt": f"list {i}", "answers": [f"{i} a", f"{i} b", f"{i} c"]} for i in range(3)]


def write_questions(path: Path) -> Path:
    path.write_text("".join(json.dumps(x) + "\n" for x in QUESTIONS), "utf-8")
    return path


def test_answers_of_a_language_model_are_ranked(tmp_path):
    store = AnswerStore(write_questions(tmp_path / "questions.jsonl"))
    with serve(store) as page:
        state = page.get("/api/state").json
        assert (state["query"], state["options"], state["total"]) == ("00000000", 3, 3)
        shown = page.get("/api/query?query=00000000").json
        assert shown == {
            "query": "00000000", "prompt": "list 0", "captions": ["0 a", "0 b", "0 c"]
        }  # fmt: skip
        assert page.get("/clip?query=00000000&option=0").status == 404
        answer = {"query": "00000000", "rank": [1, 0, 1]}
        assert page.post("/api/answer", answer).json["query"] == "00000001"
        assert page.post("/api/answer", answer).status == 409
        assert page.post("/api/answer", {"query": "00000001", "rank": [0, 1]}).status == 400
        assert page.post("/api/answer", {"query": "00000001", "rank": None}).status == 200
        assert page.post("/api/undo", {}).json["query"] == "00000001"


@pytest.mark.fault
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nothing"], ["nothing", "schema.json", "comparisons"]),
        (["STORE", "--port", "TAKEN"], ["--port", "cannot be used", "in use"]),
        (["STORE", "--port", "70000"], ["--port", "65535"]),
    ],
)
def test_what_cannot_work_is_said_in_one_line(argv, words, tmp_path, capsys):
    make_store(tmp_path / "run" / "comparisons")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {"STORE": str(tmp_path / "run"), "TAKEN": str(taken.getsockname()[1])}
        argv = [names.get(word, word) for word in argv]
        assert cli.run(label.main, [*argv, "--no-open"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in words)


@pytest.mark.fault
def test_a_missing_extra_is_named(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name)
    )
    assert cli.run(label.main, [str(tmp_path)]) == 2
    assert 'needs uvicorn: pip install "modelrl[label]"' in capsys.readouterr().err


@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_the_number_of_answers(number, tmp_path):
    store = make_store(tmp_path / "run" / "comparisons")
    store.add_query(segments())
    command = [sys.executable, "scripts/label.py", str(tmp_path / "run"), "--no-open", "--by", "ö"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/\?token=([\w-]{32})\n", first)
        assert found is not None, first
        page, token = Page(store, int(found[1])), found[2]
        assert page.get("/", token + "x").status == 403
        assert page.get("/api/state", token).json["query"] == "00000000"
        answer = {"query": "00000000", "rank": [0, 1]}
        assert page.post("/api/answer", answer, token).status == 200
        process.send_signal(number)
        rest = process.stdout.read()
        assert process.stderr.read() == ""
        assert process.wait(20) == 0
    assert "1 answers by 'ö'" in rest
    assert store.labels()[0].by == "ö"


@pytest.mark.fault
def test_rankings_are_written_when_it_ends(tmp_path):
    questions = write_questions(tmp_path / "questions.jsonl")
    AnswerStore(questions).add_label("00000002", [0, 0, 1], by="bob")
    command = [sys.executable, "scripts/label.py", str(questions), "--no-open"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8") as process:
        assert process.stdout is not None
        found = re.search(r":(\d+)/\?token=([\w-]{32})\n", process.stdout.readline())
        assert found is not None
        page = Page(AnswerStore(questions), int(found[1]))
        page.get("/api/state", found[2])
        answer = {"query": "00000000", "rank": [2, 1, 0]}
        assert page.post("/api/answer", answer, found[2]).status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    rows = read_text(tmp_path / "questions.labels" / "rankings.jsonl", "rankings").rows
    assert [(row.prompt, row.rank) for row in rows] == [
        ("list 0", (2, 1, 0)), ("list 2", (0, 0, 1)),
    ]  # fmt: skip
