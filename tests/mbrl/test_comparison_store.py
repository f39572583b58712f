"""Comparisons on disk: nothing is lost, and nothing is read half-written."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mbrl.spaces import box
from mbrl.training import comparison_files, comparison_labels
from mbrl.training.comparison_store import ComparisonStore, Schema
from mbrl.types import Box, Discrete, MultiDiscrete, Transition

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = Schema(box(-np.inf, np.inf, (3,)), Discrete(4), options=2, length=5)
LABEL = {"query": "00000000", "rank": [0, 1], "margin": 0.0, "by": "me", "time": 1.0}


def segments(seed: int = 0) -> Transition:
    random = np.random.default_rng(seed)
    return Transition(
        random.normal(size=(2, 5, 3)).astype(np.float32),
        random.integers(0, 4, (2, 5), dtype=np.int32),
        random.normal(size=(2, 5)).astype(np.float32),
        random.normal(size=(2, 5, 3)).astype(np.float32),
        random.random((2, 5)) < 0.5,
    )


def assert_equal(a: Any, b: Any) -> None:
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


@pytest.fixture
def store(tmp_path: Path) -> ComparisonStore:
    return ComparisonStore.create_or_open(tmp_path / "run" / "comparisons", SCHEMA)


def append(store: ComparisonStore, data: bytes | dict[str, Any]) -> None:
    if isinstance(data, dict):
        data = json.dumps(data).encode() + b"\n"
    with (store.path / "labels.jsonl").open("ab") as file:
        file.write(data)


def skipping(store: ComparisonStore) -> ComparisonStore:
    return ComparisonStore.open(store.path, on_bad="skip")


def test_queries_come_back_as_they_were_given(store):
    frames = np.arange(2 * 4 * 6 * 8 * 3).reshape(2, 4, 6, 8, 3).astype(np.uint8)
    assert store.add_query(segments(0), frames, ["<b>", "zwei"]) == "00000000"
    on_device = Transition(*(jnp.asarray(x) for x in segments(1)))
    assert store.add_query(on_device) == "00000001"
    assert store.queries() == ["00000000", "00000001"]
    again = ComparisonStore.open(store.path)
    first, second = again.read_query("00000000"), again.read_query("00000001")
    for got, seed in ((first, 0), (second, 1)):
        for a, b in zip(got.segments, segments(seed), strict=True):
            assert_equal(a, b)
    assert first.frames is not None
    assert_equal(first.frames, frames)
    assert first.captions == ("<b>", "zwei")
    assert second.frames is None and second.captions == ()


def test_spaces_of_every_kind_are_read_back(tmp_path):
    observation = {
        "image": box(0, 255, (4, 4, 3), np.uint8),
        "inner": {"box": MultiDiscrete((2, 5)), "which": Discrete(3)},
    }
    schema = Schema(observation, box([-1, -2], [1, np.inf]), options=3, length=2)
    store = ComparisonStore.create_or_open(tmp_path, schema)
    found = ComparisonStore.open(tmp_path).schema
    assert comparison_files.describe(found) == comparison_files.describe(schema)
    assert isinstance(found.observation["image"], Box)  # type: ignore[index]
    assert found.observation["inner"] == observation["inner"]  # type: ignore[index]

    lead = (3, 2)
    obs = {
        "image": np.full((*lead, 4, 4, 3), 7, np.uint8),
        "inner": {"box": np.ones((*lead, 2), np.int32), "which": np.full(lead, 2, np.int32)},
    }
    given = Transition(obs, np.zeros((*lead, 2)), np.zeros(lead), obs, np.zeros(lead, bool))  # type: ignore[arg-type]
    got = store.read_query(store.add_query(given)).segments
    assert_equal(got.next_obs["inner"]["which"], obs["inner"]["which"])
    assert_equal(got.obs["image"], obs["image"])
    assert got.action.dtype == np.float32
    with np.load(tmp_path / "queries" / "00000000.npz", allow_pickle=False) as file:
        assert set(file) == {
            "obs/image", "obs/inner/box", "obs/inner/which", "action", "reward", "is_terminal",
            "next_obs/image", "next_obs/inner/box", "next_obs/inner/which",
        }  # fmt: skip


def test_the_newest_label_counts_and_undo_takes_it_back(store):
    for seed in range(4):
        store.add_query(segments(seed))
    assert store.labels() == [] and len(store.pending()) == 4
    before = time.time()
    store.add_label("00000001", [0, 1], margin=np.float32(0.5), by="ä")
    store.add_label("00000002", np.array([0, 0]))
    store.add_label("00000001", [np.int64(1), 0])
    store.add_label("00000003", None)
    assert [(x.query, x.rank) for x in store.labels()] == [
        ("00000002", (0, 0)), ("00000001", (1, 0)), ("00000003", None),
    ]  # fmt: skip
    assert store.pending() == ["00000000"]
    store.undo("00000001")
    found = {x.query: x for x in store.labels()}
    assert found["00000001"].rank == (0, 1)
    assert (found["00000001"].margin, found["00000001"].by) == (0.5, "ä")
    assert before <= found["00000001"].time <= time.time()
    store.undo("00000001")
    store.undo("00000003", by="me")
    assert store.pending() == ["00000000", "00000001", "00000003"]
    with pytest.raises(ValueError, match="00000001.*no label to take back"):
        store.undo("00000001")
    with pytest.raises(ValueError, match="00000002.*has a label already"):
        store.add_label("00000002", [0, 1], replace=False)
    store.add_label("00000001", [1, 0], replace=False)
    assert len((store.path / "labels.jsonl").read_text().splitlines()) == 8


def test_training_reads_what_is_labelled(store):
    empty = store.load()
    assert empty.segments.obs.shape == (0, 2, 5, 3)
    assert empty.rank.shape == (0, 2)
    for seed in range(4):
        store.add_query(segments(seed), np.zeros((2, 1, 1, 1, 3), np.uint8))
    store.add_label("00000003", [1, 0], margin=2.0)
    store.add_label("00000001", [0, 0])
    store.add_label("00000002", None)
    found = store.load()
    assert found.queries == ["00000001", "00000003"] and found.bad == {}
    assert_equal(found.rank, np.array([[0, 0], [1, 0]], np.int32))
    assert_equal(found.margin, np.array([0.0, 2.0], np.float32))
    for name in Transition._fields:
        both = np.stack([getattr(segments(1), name), getattr(segments(3), name)])
        assert_equal(getattr(found.segments, name), both)
    assert store.load(["00000003", "00000001"]).margin.tolist() == [2.0, 0.0]
    for ids in (["00000000"], ["00000002"], ["00000001", "00000001"], ["../schema"]):
        with pytest.raises(ValueError, match="ids.*no label, or come twice"):
            store.load(ids)


def test_another_schema_is_refused_by_what_differs(store):
    assert ComparisonStore.create_or_open(store.path, SCHEMA).schema.options == 2
    other = Schema(box(-np.inf, np.inf, (4,)), Discrete(4), options=3, length=5)
    with pytest.raises(ValueError, match="other comparisons") as error:
        ComparisonStore.create_or_open(store.path, other)
    assert "options: 2 -> 3" in str(error.value)
    assert "spaces.observation.box: [3] -> [4]" in str(error.value)
    assert "length" not in str(error.value) and "action" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"options": 1}, "options: got 1"),
        ({"options": True}, "options: got True"),
        ({"length": 0}, "length: got 0"),
        ({"observation": {"a": {"b": Discrete(2)}, "a/b": Discrete(2)}}, "obs/a/b"),
        ({"observation": {"a\0b": Discrete(2)}}, "not printable"),
    ],
)
def test_schemas_that_no_store_can_have(change, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        ComparisonStore.create_or_open(tmp_path / "x", SCHEMA._replace(**change))
    assert not (tmp_path / "x").exists()


@pytest.mark.fault
@pytest.mark.parametrize(
    "text",
    [
        b"", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"version": 2, "kind": "segments"}',
        b'{"version": 1, "kind": "text"}', b'"options": "2"', b'"options": true', b'"options": 99',
        b'"length": 5.0', b'"box": [3, 1000000000]', b'"dtype": "O"', b'"discrete": -4',
        b'"extra": 1, "options": 2',
    ],
)  # fmt: skip
def test_damaged_schemas(text, store):
    path = store.path / "schema.json"
    field, _, value = text.decode("latin1").partition(": ")
    if text.startswith(b'"'):  # one field of a good one
        found = json.loads(path.read_text())
        target = found
        parts = found["spaces"]
        for part in (parts["observation"], parts["action"]):
            target = part if json.loads(field) in part else target
        target |= json.loads(b"{" + text + b"}")
        text = json.dumps(found).encode()
        assert value
    path.write_bytes(text)
    with pytest.raises(ValueError, match="schema.json: expected the schema"):
        ComparisonStore.open(store.path)


@pytest.mark.fault
def test_what_is_no_store(tmp_path):
    with pytest.raises(ValueError, match="no comparison store"):
        ComparisonStore.open(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="got a file"):
        ComparisonStore.create_or_open(tmp_path / "file", SCHEMA)
    with pytest.raises(ValueError, match="on_bad"):
        ComparisonStore.open(tmp_path, on_bad="ignore")  # type: ignore[arg-type]
    store = ComparisonStore.create_or_open(tmp_path / "store", SCHEMA)
    (store.path / "queries").rmdir()
    with pytest.raises(ValueError, match="no folder queries"):
        ComparisonStore.open(store.path)


BAD_LINES = {
    "json": [
        b"nonsense\n", b"\n", b'{"query": "00000000"\n', b"[" * 4000 + b"\n", b"[1, 2\n",
    ],
    "encoding": [b'{"query": "\xff"}\n', "é".encode("latin1") + b"\n"],
    "long": [b"x" * 4096 + b"\n", b" " * 3_000_000 + b"\n"],
    "fields": [
        b"3\n", b"null\n", b"{}\n", {k: v for k, v in LABEL.items() if k != "margin"},
        {**LABEL, "more": 1}, {**LABEL, "undo": True},
        json.dumps(LABEL).encode()[:-1] + b', "rank": [1, 0]}\n',
    ],
    "query": [
        {**LABEL, "query": "00000077"}, {**LABEL, "query": 0}, {**LABEL, "query": "../schema"},
        {**LABEL, "query": "0000000٠"},
    ],
    "rank": [
        {**LABEL, "rank": rank}
        for rank in ([0], [0, 1, 1], [0, 2], [0, -1], [1, 1], [0, True], [False, 1], [0.0, 1],
                     ["0", "1"], "01", 0, {}, [0, None], [])
    ],
    "margin": [
        {**LABEL, "margin": margin}
        for margin in (float("nan"), float("inf"), -1.0, True, "1", None, 1e300, 10**400)
    ],
    "by": [{**LABEL, "by": None}, {**LABEL, "by": 3}],
    "time": [{**LABEL, "time": "now"}, {**LABEL, "time": float("nan")}],
    "undo": [
        {"query": "00000001", "undo": True, "by": "", "time": 0},
        {"query": "00000000", "undo": False, "by": "", "time": 0},
        {"query": "00000000", "undo": 1, "by": "", "time": 0},
    ],
}  # fmt: skip


@pytest.mark.fault
@pytest.mark.parametrize("reason", BAD_LINES)
def test_bad_lines_are_named_or_counted(reason, store):
    for seed in range(2):
        store.add_query(segments(seed))
    for bad in BAD_LINES[reason]:
        (store.path / "labels.jsonl").unlink(missing_ok=True)
        append(store, LABEL)
        append(store, bad)
        with pytest.raises(ValueError, match=r"labels.jsonl, line 2: .*on_bad='skip'") as error:
            store.labels()
        assert len(str(error.value)) < 600
        with pytest.raises(ValueError, match="line 2"):
            store.load()
        append(store, {**LABEL, "query": "00000001"})
        found = skipping(store).read_labels()
        assert [x.query for x in found.labels] == ["00000000", "00000001"]
        assert found.bad == {reason: 1}
        assert skipping(store).load().bad == {reason: 1}
        with pytest.warns(UserWarning, match=f"lines not used: .*{reason}"):
            assert skipping(store).pending() == []


@pytest.mark.fault
def test_a_long_line_is_not_read_into_memory(store):
    import tracemalloc

    store.add_query(segments())
    append(store, LABEL)
    append(store, b"7" * 20_000_000 + b"\n")
    tracemalloc.start()
    assert skipping(store).read_labels().bad == {"long": 1}
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.fault
@pytest.mark.parametrize("kept", [1, 30, 1000])
def test_a_torn_line_is_reported_and_never_used(kept, store):
    for seed in range(2):
        store.add_query(segments(seed))
    append(store, LABEL)
    # Also a line of which only the newline is missing was not acknowledged.
    append(store, json.dumps({**LABEL, "rank": [1, 0]}).encode()[:kept])
    for reader in (store, skipping(store)):
        found = reader.read_labels()
        assert [x.rank for x in found.labels] == [(0, 1)]
        assert found.bad == {"torn": 1}
    store.add_label("00000001", [1, 0])
    found = store.read_labels()
    assert [(x.query, x.rank) for x in found.labels] == [("00000000", (0, 1)), ("00000001", (1, 0))]
    assert found.bad == {"torn": 1}
    with pytest.warns(UserWarning, match="torn"):
        store.labels()


@pytest.mark.fault
def test_a_full_disk_leaves_no_part_of_a_line(store, monkeypatch):
    store.add_query(segments())
    store.add_label("00000000", [0, 1])
    before = (store.path / "labels.jsonl").read_bytes()
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(comparison_labels.os, "write", lambda fd, data: write(fd, data[:10]))
        with pytest.raises(OSError, match="wrote 10 of"):
            store.add_label("00000000", [1, 0])
    assert (store.path / "labels.jsonl").read_bytes() == before


@pytest.mark.fault
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("00000005", [0, 1]), "query: there is no 00000005"),
        (("../schema", [0, 1]), "expected 8 digits"),
        ((0, [0, 1]), "expected 8 digits"),
        (("00000000", [0, 1, 1]), "rank"),
        (("00000000", [0, True]), "rank"),
        (("00000000", [0.0, 1.0]), "rank"),
        (("00000000", np.array([0.0, 1.0])), "rank"),
        (("00000000", [0, 1], float("nan")), "margin"),
        (("00000000", [0, 1], float("inf")), "margin"),
        (("00000000", [0, 1], 0.0, "x" * 5000), "by: got 5000 characters"),
        (("00000000", [0, 1], 0.0, None), "by"),
    ],
)
def test_bad_answers_are_not_written(arguments, words, store):
    store.add_query(segments())
    with pytest.raises(ValueError, match=words):
        store.add_label(*arguments)
    assert not (store.path / "labels.jsonl").exists()


@pytest.mark.fault
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"obs": np.zeros((2, 5, 4))}, r"obs: got shape \(2, 5, 4\), expected \(2, 5, 3\)"),
        ({"obs": np.zeros((1, 5, 3))}, "obs: got shape"),
        ({"obs": np.zeros((2, 5, 3), complex)}, "obs: got complex128"),
        ({"obs": np.full((2, 5, 3), "x")}, "obs: got <U1"),
        ({"obs": np.full((2, 5, 3), np.nan)}, r"obs\[0, 0, 0\] is nan"),
        ({"next_obs": np.full((2, 5, 3), 1e300)}, r"next_obs\[0, 0, 0\] is inf"),
        ({"obs": {"a": np.zeros((2, 5, 3))}}, r"\['obs'\] are missing and \['obs/a'\] unknown"),
        ({"action": np.full((2, 5), 4)}, r"action\[0, 0\] is 4, expected one of 0 .. 4 - 1"),
        ({"action": np.full((2, 5), 2**32)}, "action: numbers that do not fit int32"),
        ({"action": np.zeros((2, 5))}, "action: got float64, expected int32"),
        ({"is_terminal": np.zeros((2, 5))}, "is_terminal: got float64, expected bool"),
        ({"frames": np.zeros((2, 4, 8, 8, 4), np.uint8)}, "frames: got shape"),
        ({"frames": np.zeros((2, 0, 8, 8, 3), np.uint8)}, "frames: got shape"),
        ({"frames": np.zeros((2, 4, 8, 8, 3))}, "frames: got float64, expected uint8"),
        ({"captions": ["one"]}, "captions: got shape"),
        ({"captions": ["a", "b" * 2001]}, "captions: 16008 bytes"),
        ({"captions": ["a", "\ud800"]}, "surrogates"),
    ],
)
def test_bad_queries_are_not_written(change, words, store):
    shown = {name: change.pop(name) for name in ("frames", "captions") if name in change}
    with pytest.raises(ValueError, match=words):
        store.add_query(segments()._replace(**change), **shown)
    assert os.listdir(store.path / "queries") == []


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), allow_pickle=True)
    return file.getvalue()


def lying(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + b"\0" * 64


GOOD = {name: npy(array) for name, array in segments()._asdict().items()}
HOSTILE = {
    "pickled": ({"obs": npy(np.array([[print] * 5] * 2, object))}, "obs: got object"),
    "missing": ({"action": None}, r"arrays \['action'\] are missing"),
    "unknown": ({"more": npy(np.zeros(3))}, r"\[.'more.npy'.\] unknown"),
    "traversal": ({"../../evil": npy(np.zeros(3))}, "unknown"),
    "shape": ({"obs": npy(np.zeros((2, 5, 2), np.float32))}, "obs: got shape"),
    "wider": ({"obs": npy(np.zeros((2, 5, 3)))}, "obs: got float64, expected float32"),
    "big end first": ({"obs": npy(np.zeros((2, 5, 3), ">f4"))}, "obs: got >f4"),
    "fortran": ({"obs": npy(np.asfortranarray(segments().obs))}, "obs: .*order of C"),
    "nan": ({"reward": npy(np.full((2, 5), np.nan, np.float32))}, r"reward\[0, 0\] is nan"),
    "inf": ({"obs": npy(np.full((2, 5, 3), np.inf, np.float32))}, r"obs\[0, 0, 0\] is inf"),
    "no choice": ({"action": npy(np.full((2, 5), -1, np.int32))}, r"action\[0, 0\] is -1"),
    "no bool": ({"is_terminal": npy(np.full((2, 5), 7, np.uint8).view(bool))}, "true or false"),
    "terabytes": ({"obs": lying((10**6, 10**6))}, "obs: got shape"),
    "short": ({"obs": npy(np.zeros((2, 5, 3), np.float32))[:-4]}, "obs: 116 bytes, expected 120"),
    "longer": ({"obs": npy(np.zeros((2, 5, 3), np.float32)) + b"\0"}, "obs: 121 bytes"),
    "bomb": ({"obs": b"\0" * 300_000}, "obs: unpacks to 300000 bytes, expected at most 120"),
    "no npy": ({"obs": b"hello"}, "damaged"),
    "text": ({"captions": npy(np.array(["a"]))}, "captions: got shape"),
    "no text": ({"captions": npy(np.frombuffer(b"\xff" * 8, "<U1"))}, "damaged"),
    "film": ({"frames": npy(np.zeros((2, 3, 3), np.uint8))}, "frames: got shape"),
}


@pytest.mark.fault
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_queries(name, store):
    changes, words = HOSTILE[name]
    query = store.add_query(segments())
    store.add_label(query, [0, 1])
    store.add_label(store.add_query(segments(1)), [1, 0])
    path = store.path / "queries" / f"{query}.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for key, data in {**GOOD, **changes}.items():
            if data is not None:
                file.writestr(f"{key}.npy", data)
    with pytest.raises(ValueError, match=words) as error:
        store.read_query(query)
    assert str(path) in str(error.value)
    if name in ("text", "no text", "film"):  # only people look at these
        assert store.load().queries == [query, "00000001"]
        return
    with pytest.raises(ValueError, match=words):
        store.load()
    found = skipping(store).load()
    assert found.queries == ["00000001"] and sum(found.bad.values()) == 1
    assert_equal(found.segments.obs[0], segments(1).obs)
    assert found.rank.tolist() == [[1, 0]]


@pytest.mark.fault
def test_damaged_files_of_queries(store):
    query = store.add_query(segments())
    path = store.path / "queries" / f"{query}.npz"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[120] ^= 255
    double = io.BytesIO()
    with zipfile.ZipFile(double, "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for key, data in [*GOOD.items(), ("obs", GOOD["obs"])]:
            file.writestr(f"{key}.npy", data)
    damaged = [whole[: len(whole) // 2], whole[:-5], b"", b"PK", bytes(flipped), double.getvalue()]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=str(path)):
            store.read_query(query)
    with path.open("r+b") as sparse:  # 10 GiB that a directory of entries might fill
        sparse.truncate(10 * 2**30)
    with pytest.raises(ValueError, match="10737418240 bytes, expected at most"):
        store.read_query(query)
    with pytest.raises(ValueError, match="no such query"):
        store.read_query("00000009")


@pytest.mark.fault
def test_a_bomb_that_lies_about_its_size_is_not_unpacked(store):
    import tracemalloc

    query = store.add_query(segments())
    path = store.path / "queries" / f"{query}.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for key, data in {**GOOD, "obs": npy(np.zeros((50_000_000 // 4,), np.float32))}.items():
            file.writestr(f"{key}.npy", data)
    size = (50_000_000 + 128).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(size, (248).to_bytes(4, "little")))
    tracemalloc.start()
    with pytest.raises(ValueError, match=str(path)):
        store.read_query(query)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000


WRITER = """
import sys
from mbrl.training.comparison_store import ComparisonStore
store = ComparisonStore.open(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
"""


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER + code, *arguments],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def together(processes: list[subprocess.Popen[str]]) -> None:
    """Let them work at the same time, once all have been imported."""
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.stdout.close()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.close()


@pytest.mark.fault
def test_processes_that_write_at_once_lose_nothing(store):
    labels = """
for i in range(200):
    store.add_label("00000000", [0, 1], margin=float(i), by=sys.argv[2])
"""
    queries = """
import numpy as np
from mbrl.types import Transition
for i in range(25):
    x = np.full((2, 5), int(sys.argv[2]) + i, np.float32)
    obs = np.zeros((2, 5, 3))
    store.add_query(Transition(obs, np.zeros((2, 5), np.int32), x, obs, np.zeros((2, 5), bool)))
"""
    store.add_query(segments())
    processes = [start(labels, str(store.path), name) for name in ("a", "b")]
    processes += [start(queries, str(store.path), offset) for offset in ("100", "200")]
    together(processes)
    seen = []
    while any(process.poll() is None for process in processes):
        found = store.read_labels()  # no half line
        assert found.bad == {}
        for query in store.queries()[-3:]:
            store.read_query(query)  # no half query
        seen.append(len(found.labels))
        time.sleep(0.02)
    assert [process.wait() for process in processes] == [0] * 4
    assert len(seen) > 3
    lines = [json.loads(line) for line in (store.path / "labels.jsonl").read_text().splitlines()]
    for name in ("a", "b"):
        assert [x["margin"] for x in lines if x["by"] == name] == list(range(200))
    assert len(lines) == 400
    assert store.queries() == [f"{i:08d}" for i in range(51)]
    rewards = [float(store.read_query(q).segments.reward[0, 0]) for q in store.queries()[1:]]
    assert sorted(rewards) == [*range(100, 125), *range(200, 225)]
    assert [x for x in rewards if x < 200] == list(range(100, 125))


@pytest.mark.fault
def test_a_writer_that_is_killed_inside_a_line(store):
    half = """
import os, signal
write = os.write
def kill(descriptor, data):
    write(descriptor, data[:25])
    os.kill(os.getpid(), signal.SIGKILL)
os.write = kill
store.add_label("00000000", [1, 0])
"""
    store.add_query(segments())
    store.add_label("00000000", [0, 1], by="first")
    process = start(half, str(store.path))
    together([process])
    assert process.wait() == -signal.SIGKILL
    assert not (store.path / "labels.jsonl").read_bytes().endswith(b"\n")
    assert store.read_labels().bad == {"torn": 1}
    store.add_label("00000000", [0, 0], by="after")  # its lock is gone with it
    found = store.read_labels()
    assert [(x.rank, x.by) for x in found.labels] == [((0, 0), "after")]
    assert found.bad == {"torn": 1}


@pytest.mark.fault
def test_a_writer_that_is_killed_inside_a_query(store):
    half = """
import os, signal
import numpy as np
from mbrl.types import Transition
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
x = np.zeros((2, 5, 3))
store.add_query(Transition(x, np.zeros((2, 5), int), x[..., 0], x, x[..., 0] > 0))
"""
    process = start(half, str(store.path))
    together([process])
    assert process.wait() == -signal.SIGKILL
    assert len(os.listdir(store.path / "queries")) == 1  # what nobody takes for a query
    assert store.queries() == [] and store.pending() == []
    assert store.add_query(segments()) == "00000000"
    assert_equal(store.read_query("00000000").segments.obs, segments().obs)


@pytest.mark.fault
def test_two_that_make_a_store_at_once_get_the_same(tmp_path):
    schemas = [SCHEMA._replace(length=n) for n in (5, 6)] * 4
    outcomes: list[int | str] = []

    def make(schema: Schema) -> None:
        try:
            made = ComparisonStore.create_or_open(tmp_path / "store", schema)
            outcomes.append(made.schema.length)
        except ValueError as error:
            outcomes.append("length: " if "length: " in str(error) else str(error))

    threads = [threading.Thread(target=make, args=(schema,)) for schema in schemas]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winner = ComparisonStore.open(tmp_path / "store").schema.length
    assert sorted(map(str, outcomes)) == [str(winner)] * 4 + ["length: "] * 4


@pytest.mark.fault
def test_a_reader_waits_for_a_line_and_a_writer_for_a_writer(store):
    store.add_query(segments())
    line = json.dumps(LABEL).encode() + b"\n"
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(store.read_labels())),
        threading.Thread(target=store.add_label, args=("00000000", [1, 0])),
        threading.Thread(target=store.add_query, args=(segments(),)),
    ]
    labels, other = store.path / "labels.jsonl", store.path / "store.lock"
    with comparison_labels.locked(labels) as descriptor, comparison_labels.locked(other):
        os.write(descriptor, line[:20])
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        assert found == [] and labels.read_bytes() == line[:20]
        assert store.queries() == ["00000000"]
        os.write(descriptor, line[20:])
    for thread in threads:
        thread.join(10.0)
    assert found[0].bad == {} and found[0].labels != []
    assert store.labels()[0].rank == (1, 0)
    assert store.queries() == ["00000000", "00000001"]
