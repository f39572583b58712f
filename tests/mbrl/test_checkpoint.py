"""Saves under every fault that a disk, a signal or an attacker can cause."""

import errno
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
import tracemalloc
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl.training import checkpoint, save_files
from mbrl.training.checkpoint import CheckpointWarning, digest, read_manifest, restore, save

ROOT = Path(__file__).resolve().parents[2]


class Nested(NamedTuple):
    weights: Any
    names: dict[str, Any]


def make_tree(step: int = 3) -> Any:
    key = jax.random.key(step)
    return {
        "state": Nested(
            (jax.random.normal(key, (5, 7)), jnp.arange(step, step + 4, dtype=jnp.int32)),
            {"half": jnp.full((3, 2), step + 0.5, jnp.bfloat16), "flag": jnp.array([True, False])},
        ),
        "key": jax.random.key(step),
        "seeds": jax.random.split(jax.random.key(step, impl="rbg"), 3),
        "host": [np.arange(step, step + 3, dtype=np.int64), np.float32(step), np.zeros((0, 4))],
        "weak": jnp.asarray(float(step)),
        "weak_vector": jnp.full((3,), float(step)),
        "image": jnp.full((2, 4, 4), step, jnp.uint8),
        "python": {"int": step, "float": step / 3, "bool": step % 2 == 0},
        "nothing": None,
    }


def shapes(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x, tree
    )


def small_tree(step: int) -> dict[str, np.ndarray]:
    return {"a": np.full(300, step, np.int64), "b": np.full((4, 5), step, np.float32)}


def assert_identical(got: Any, expected: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert type(x) is type(y)
        if isinstance(x, jax.Array):
            assert x.aval == y.aval  # shape, dtype, weak type, key implementation
            assert x.sharding == y.sharding
    assert digest(got) == digest(expected)


def restore_quietly(directory: Path, like: Any) -> tuple[checkpoint.Restored | None, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = restore(directory, like)
    assert all(issubclass(w.category, CheckpointWarning) for w in caught)
    return found, [str(w.message) for w in caught]


def all_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_every_kind_of_leaf_returns_with_its_bits_and_its_type(tmp_path, caplog):
    tree = make_tree()
    manifest = {"config": {"lr": 0.1, "größe": [1, 2]}, "counter": 2**60}
    folder = save(tmp_path / "späce run", 12, tree, manifest)
    assert folder == tmp_path / "späce run" / "step_000000012"
    found = restore(tmp_path / "späce run", make_tree(4))
    assert found is not None
    assert (found.step, found.manifest) == (12, manifest)
    assert_identical(found.tree, tree)
    assert found.tree["host"][0].flags.writeable
    assert caplog.text == ""  # nothing to scare a user with at every save


def test_shapes_are_enough_to_restore(tmp_path):
    tree = make_tree()
    save(tmp_path, 0, tree, {})
    found = restore(tmp_path, shapes(tree))
    assert found is not None
    assert digest(found.tree) == digest(tree)
    np.testing.assert_array_equal(
        jax.random.normal(found.tree["key"], (3,)), jax.random.normal(tree["key"], (3,))
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8", "bool", "int64", "int4"])
def test_large_leaves_are_stored_as_arrays_of_their_own(dtype, tmp_path):
    large = (np.arange(2**20 + 8) % 7).reshape(-1, 4, 3).astype(jnp.dtype(dtype))
    tree = {"large": np.asfortranarray(large), "small": np.arange(3), "more": np.float64(2)}
    folder = save(tmp_path, 0, tree, {})
    assert (folder / "arrays" / "leaf_00000" / "0.0.0").stat().st_size == large.nbytes
    found = restore(tmp_path, tree)
    assert found is not None
    assert found.tree["large"].dtype == large.dtype
    assert found.tree["large"].tobytes() == large.tobytes()
    assert found.tree["more"] == 2.0


def test_large_leaves_are_written_and_read_without_a_copy(tmp_path):
    size = 2**25
    tree = {"large": np.full(size, 3, np.uint8), "small": np.arange(3)}
    save(tmp_path, 0, {"small": np.arange(3)}, {})  # what is imported for the first save
    tracemalloc.start()
    try:
        save(tmp_path, 1, tree, {})
        found = restore(tmp_path, tree)
        assert tracemalloc.get_traced_memory()[1] < size / 2
    finally:
        tracemalloc.stop()
    assert found is not None
    assert_identical(found.tree, tree)
    found.tree["large"][:] = 4  # belongs to the reader alone
    again = restore(tmp_path, tree)
    assert again is not None
    assert_identical(again.tree, tree)


def test_an_empty_tree_and_a_single_array_are_trees(tmp_path):
    save(tmp_path, 0, (), {})
    assert restore(tmp_path, ()) == ((), {}, 0)
    save(tmp_path, 1, jnp.arange(3), {})
    found = restore(tmp_path, jnp.zeros(3, jnp.int32))
    assert found is not None
    np.testing.assert_array_equal(found.tree, [0, 1, 2])


def test_digest_changes_with_every_bit_and_type():
    tree = make_tree()
    different = [
        tree,
        {**tree, "weak": jnp.nextafter(tree["weak"], 4.0)},
        {**tree, "python": {**tree["python"], "int": 4}},
        {**tree, "key": jax.random.key(4)},
        {**tree, "host": [tree["host"][0], np.float64(3), tree["host"][2]]},
        {**tree, "host": [tree["host"][0].reshape(3, 1), *tree["host"][1:]]},
        {**tree, "extra": jnp.zeros(0)},
    ]
    assert len({digest(x) for x in different}) == len(different)
    assert digest(jnp.float32(0.0)) != digest(jnp.float32(-0.0))
    assert digest(make_tree()) == digest(tree)


def test_the_newest_saves_are_kept(tmp_path):
    for step in (5, 10, 1_000_000_000):
        save(tmp_path, step, small_tree(step), {"at": step})
    assert names(tmp_path) == ["step_000000010", "step_1000000000"]
    found = restore(tmp_path, small_tree(0))
    assert found is not None
    assert (found.step, found.manifest) == (1_000_000_000, {"at": 1_000_000_000})
    save(tmp_path, 1_000_000_001, small_tree(1), {}, keep=1)
    assert names(tmp_path) == ["step_1000000001"]


def test_a_damaged_save_does_not_count_as_one_to_keep(tmp_path):
    save(tmp_path, 1, small_tree(1), {})
    save(tmp_path, 2, small_tree(2), {})
    (tmp_path / "step_000000002" / "arrays" / "packed" / "0").write_bytes(b"")
    save(tmp_path, 3, small_tree(3), {})
    assert names(tmp_path) == ["step_000000001", "step_000000003"]


def test_saves_of_later_steps_are_left_alone(tmp_path):
    save(tmp_path, 100, small_tree(100), {})
    for step in (10, 20, 30):
        save(tmp_path, step, small_tree(step), {})
    assert names(tmp_path) == ["step_000000020", "step_000000030", "step_000000100"]


def test_a_step_can_be_saved_again(tmp_path):
    save(tmp_path, 7, small_tree(1), {"round": 1})
    save(tmp_path, 7, small_tree(2), {"round": 2})
    assert names(tmp_path) == ["step_000000007"]
    found = restore(tmp_path, small_tree(0))
    assert found is not None
    assert found.manifest == {"round": 2}
    assert_identical(found.tree, small_tree(2))


def test_no_instant_of_a_replacement_is_without_a_save(tmp_path):
    # A kill between the two renames leaves the old save aside and its name free.
    save(tmp_path, 7, small_tree(1), {})
    os.rename(tmp_path / "step_000000007", tmp_path / ".replaced-step_000000007")
    (tmp_path / ".tmp-step_000000007-1-abc").mkdir()
    found = restore(tmp_path, small_tree(0))
    assert found is not None
    assert_identical(found.tree, small_tree(1))
    save(tmp_path, 8, small_tree(2), {})
    assert names(tmp_path) == ["step_000000007", "step_000000008"]
    save(tmp_path, 9, small_tree(3), {}, keep=1)
    assert names(tmp_path) == ["step_000000009"]


@pytest.mark.fault
def test_a_replacement_that_fails_half_way_is_undone(tmp_path, monkeypatch):
    save(tmp_path, 7, small_tree(1), {})
    rename = os.rename

    def fail_once_aside(old: Any, new: Any) -> None:
        if Path(old).name.startswith(".tmp-"):
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail_once_aside)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 7, small_tree(2), {})
    assert names(tmp_path) == ["step_000000007"]
    found = restore(tmp_path, small_tree(0))
    assert found is not None
    assert_identical(found.tree, small_tree(1))


def test_no_save_is_no_error(tmp_path):
    assert restore(tmp_path, small_tree(0)) is None
    assert restore(tmp_path / "absent", small_tree(0)) is None
    assert read_manifest(tmp_path) is None
    (tmp_path / "step_7").mkdir()  # not a name of ours
    (tmp_path / "notes.txt").write_text("step_000000001")
    assert restore(tmp_path, small_tree(0)) is None


def test_the_first_leaf_that_differs_is_named(tmp_path):
    save(tmp_path, 1, make_tree(), {})
    tree = make_tree()
    swapped = {**tree, "image": jnp.zeros((2, 4, 5), jnp.uint8), "key": 3}
    for like, match in (
        (
            {**tree, "image": jnp.zeros((2, 4, 5), jnp.uint8)},
            r"\['image'\]: uint8 \(2, 4, 4\), exp",
        ),
        ({**tree, "weak": jnp.int32(0)}, r"\['weak'\]: float32 \(\), expected was .* int32 \(\)"),
        ({**tree, "key": jax.random.key(0, impl="rbg")}, r"key threefry2x32.*\['key'\].*key rbg"),
        ({**tree, "a": 1}, r"saved is leaf \['host'\]\[0\].*expected was \['a'\]: int64"),
        ({**tree, "zzz": 1}, r"15 leaves are saved, 16 were expected; .*\['zzz'\]"),
        ({**tree, "python": {"int": jnp.int32(1)}}, r"\['python'\]\['bool'\]: bool"),
        (swapped, r"saved is leaf \['image'\]"),
    ):
        with pytest.raises(ValueError, match=match):
            restore(tmp_path, like)


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path):
    for tree, match in (
        ({"name": "text"}, r"tree\['name'\]: expected an array or a number, got str"),
        ([np.array(["text"])], r"tree\[0\]: expected an array of numbers"),
        ([np.array([None])], r"tree\[0\]: expected an array of numbers"),
        ([np.zeros(2, "i4,f4")], r"tree\[0\]: expected an array of numbers"),
    ):
        with pytest.raises(ValueError, match=match):
            save(tmp_path / "run", 1, tree, {})
    for manifest in ({"x": float("nan")}, {"x": object()}, {"x": float("inf")}):
        with pytest.raises(ValueError, match="manifest: expected what JSON can hold"):
            save(tmp_path / "run", 1, {}, manifest)
    with pytest.raises(ValueError, match="step >= 0 and keep >= 1, got step=-1, keep=2"):
        save(tmp_path / "run", -1, {}, {})
    assert names(tmp_path) == []


def test_64_bit_arrays_are_never_narrowed(tmp_path):
    save(tmp_path, 1, {"big": np.array([2**40])}, {})
    with pytest.raises(ValueError, match="int64 needs jax_enable_x64"):
        restore(tmp_path, {"big": jax.ShapeDtypeStruct((1,), np.int64)})


@pytest.mark.fault
def test_every_flipped_bit_is_found(tmp_path):
    tree = {"a": np.arange(40.0), "large": np.zeros(2**18, np.float32), "k": jax.random.key(1)}
    folder = save(tmp_path, 1, tree, {"seed": 12345, "note": "abc"})
    before = digest(tree)
    files = all_files(folder)
    rng = np.random.default_rng(0)
    flips = [(file, place) for file in files for place in (0, file.stat().st_size - 1)]
    while len(flips) < 300:
        file = files[int(rng.integers(len(files)))]
        flips.append((file, int(rng.integers(file.stat().st_size))))
    for file, place in flips:
        with file.open("r+b") as stream:
            stream.seek(place)
            old = stream.read(1)
            stream.seek(place)
            stream.write(bytes([old[0] ^ (1 << int(rng.integers(8)))]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointWarning)
            with pytest.raises(ValueError, match="no intact save") as error:
                restore(tmp_path, tree)
        # No bit of a save is without meaning, and each is attributed to its file.
        assert str(file.relative_to(folder)) in str(error.value)
        with file.open("r+b") as stream:
            stream.seek(place)
            stream.write(old)
    found = restore(tmp_path, tree)
    assert found is not None
    assert digest(found.tree) == before


@pytest.mark.fault
@pytest.mark.parametrize("fault", ["flip", "truncate", "empty", "delete"])
def test_a_damaged_file_is_named_and_the_save_before_is_used(fault, tmp_path):
    save(tmp_path, 1, small_tree(1), {"at": 1})
    folder = save(tmp_path, 2, small_tree(2), {"at": 2})
    for file in all_files(folder):
        content = file.read_bytes()
        if fault == "flip":
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        elif fault == "truncate":
            file.write_bytes(content[:-1])
        elif fault == "empty":
            file.write_bytes(b"")
        else:
            file.unlink()
        found, messages = restore_quietly(tmp_path, small_tree(0))
        assert found is not None
        assert (found.step, found.manifest) == (1, {"at": 1})
        assert_identical(found.tree, small_tree(1))
        assert len(messages) == 1
        assert str(file.relative_to(folder)) in messages[0]
        assert str(folder) in messages[0]
        if fault == "truncate" and file.name != "manifest.json":
            assert f"has {len(content) - 1} bytes, expected {len(content)}" in messages[0]
        file.write_bytes(content)
    found = restore(tmp_path, small_tree(0))
    assert found is not None
    assert found.step == 2


def test_saves_without_one_intact_are_an_error_that_names_all(tmp_path):
    for folder in [save(tmp_path, step, small_tree(step), {}) for step in (1, 2)]:
        (folder / "manifest.json").write_bytes(b"")
    with (
        pytest.warns(CheckpointWarning, match="manifest.json has 0 bytes"),
        pytest.raises(ValueError, match=r"no intact save .*000002: .*000001: "),
    ):
        restore(tmp_path, small_tree(0))
    assert read_manifest(tmp_path) is None


def test_read_manifest_needs_no_tree(tmp_path):
    save(tmp_path, 1, small_tree(1), {"config": {"lr": 1.0}})
    folder = save(tmp_path, 2, small_tree(1), {"config": {"lr": 2.0}})
    assert read_manifest(tmp_path) == (2, {"config": {"lr": 2.0}})
    (folder / "manifest.json").unlink()
    assert read_manifest(tmp_path) == (1, {"config": {"lr": 1.0}})


def reseal(folder: Path, change: Any) -> None:
    """Rewrite a manifest as an attacker would, with a valid checksum."""
    body = json.loads((folder / "manifest.json").read_text())["body"]
    change(body)
    checksum = hashlib.sha256(json.dumps(body, separators=(",", ":")).encode()).hexdigest()
    text = json.dumps({"checksum": checksum, "body": body}, indent=1) + "\n"
    (folder / "manifest.json").write_text(text)


def reseal_file(folder: Path, name: str, content: bytes) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    reseal(folder, lambda body: body["files"].update({name: entry}))


@pytest.fixture
def crafted(tmp_path):
    return save(tmp_path / "run", 1, small_tree(1), {})


def refused(folder: Path) -> str:
    with pytest.warns(CheckpointWarning), pytest.raises(ValueError, match="no intact") as error:
        restore(folder.parent, small_tree(0))
    return str(error.value)


@pytest.mark.fault
@pytest.mark.parametrize(
    "name", ["/etc/hostname", "../secret", "arrays/../../secret", "a\\b", "./x"]
)
def test_names_that_leave_the_folder_are_refused(name, crafted):
    secret = b"outside"
    (crafted.parent / "secret").write_bytes(secret)
    entry = {"size": len(secret), "sha256": hashlib.sha256(secret).hexdigest()}
    reseal(crafted, lambda body: body["files"].update({name: entry}))
    assert "unsafe name" in refused(crafted)


@pytest.mark.fault
def test_links_and_extra_files_are_refused(crafted, tmp_path):
    packed = crafted / "arrays" / "packed" / "0"
    content = packed.read_bytes()
    (tmp_path / "elsewhere").write_bytes(content)
    packed.unlink()
    packed.symlink_to(tmp_path / "elsewhere")
    assert "arrays/packed/0 is a link" in refused(crafted)
    packed.unlink()
    packed.write_bytes(content)
    assert restore(crafted.parent, small_tree(0)) is not None
    (crafted / "arrays" / "payload.pkl").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    assert "payload.pkl is not in the manifest" in refused(crafted)
    (crafted / "arrays" / "payload.pkl").unlink()
    shutil.move(crafted, tmp_path / "moved")
    crafted.symlink_to(tmp_path / "moved")
    assert "is not a folder" in refused(crafted)


@pytest.mark.fault
def test_metadata_cannot_make_a_reader_allocate(crafted, monkeypatch):
    def never(*_: Any) -> Any:
        raise AssertionError("arrays must not be read")

    monkeypatch.setattr(save_files, "read_arrays", never)
    zarray = json.loads((crafted / "arrays" / "packed" / ".zarray").read_text())
    claims = (
        ("shape", [10**15]),
        ("chunks", [10**15]),
        ("dtype", "<V1000000"),
        ("compressor", {"id": "zstd", "level": 1}),
        ("filters", [{"id": "delta"}]),
    )
    for field, value in claims:
        bomb = json.dumps({**zarray, field: value}).encode()
        reseal_file(crafted, "arrays/packed/.zarray", bomb)
        assert f"says {field}" in refused(crafted)
    reseal_file(crafted, "arrays/packed/.zarray", json.dumps(zarray).encode())
    tree = json.loads((crafted / "arrays" / "_METADATA").read_text())
    entry = next(iter(tree["tree_metadata"].values()))
    for name, bad in (("../../secret", entry), ("packed", {**entry, "value_metadata": {}})):
        key = {"key_metadata": [{"key": name, "key_type": 2}]}
        text = json.dumps({**tree, "tree_metadata": {f"('{name}',)": {**bad, **key}}})
        reseal_file(crafted, "arrays/_METADATA", text.encode())
        assert "METADATA" in (message := refused(crafted)) or "metadata" in message
    reseal_file(crafted, "arrays/_METADATA", b"[" * 10_000)
    assert "_METADATA" in refused(crafted)


@pytest.mark.fault
def test_sizes_are_bounded_by_the_tree_to_restore(crafted):
    def lie(size: int) -> Any:
        return lambda body: body["files"]["arrays/packed/0"].update(size=size)

    reseal(crafted, lie(10**15))
    assert "more than its leaves need" in refused(crafted)
    reseal(crafted, lie(len(small_tree(0)["a"].tobytes()) + 81))
    reseal_file(crafted, "arrays/_METADATA", b" " * (2**20 + 1))
    assert "_METADATA is listed with 1048577 bytes" in refused(crafted)
    with (crafted / "manifest.json").open("wb") as file:
        file.truncate(2**40)  # sparse: a tebibyte that takes no room
    assert "manifest.json has 1099511627776 bytes" in refused(crafted)
    (crafted / "manifest.json").write_bytes(b"[" * 100_000)
    assert "manifest.json is no JSON of ours" in refused(crafted)


@pytest.mark.fault
def test_a_manifest_of_other_content_is_refused(crafted):
    for change, match in (
        (lambda body: body.update(step=2), "step 2; expected format 1, step 1"),
        (lambda body: body.update(format=2), "of format 2"),
        (lambda body: body.pop("files"), "lacks what a manifest has"),
        (lambda body: body.update(files={}), "is not in the manifest"),
        (lambda body: body["leaves"][0].update(sha256="0" * 64), r"other values at leaf ['a']"),
    ):
        text = (crafted / "manifest.json").read_text()
        reseal(crafted, change)
        assert match in refused(crafted)
        (crafted / "manifest.json").write_text(text)
    assert restore(crafted.parent, small_tree(0)) is not None


def test_a_manifest_larger_than_the_tree_is_a_structure_error(crafted):
    reseal(crafted, lambda body: body["leaves"][0].update(shape=[10**15]))
    with pytest.raises(ValueError, match=r"\['a'\]: int64 \(1000000000000000,\), expected"):
        restore(crafted.parent, small_tree(0))


@pytest.mark.fault
@pytest.mark.parametrize("writer", ["orbax", "manifest", "rename", "sync"])
def test_a_failed_save_raises_oserror_and_leaves_the_old_ones(writer, tmp_path, monkeypatch):
    save(tmp_path, 1, small_tree(1), {})

    def full(*_: Any, **__: Any) -> Any:
        if writer == "orbax":  # Orbax and tensorstore report a full disk in their own ways
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device")
        raise OSError(errno.ENOSPC, "No space left on device")

    owner, attribute = {
        "orbax": (save_files, "check_arrays"),
        "manifest": (Path, "write_text"),
        "rename": (os, "rename"),
        "sync": (os, "fsync"),
    }[writer]
    for step in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(owner, attribute, full)
            with pytest.raises(OSError, match="No space left"):
                save(tmp_path, step, small_tree(2), {})
        assert names(tmp_path) == ["step_000000001"]
        found = restore(tmp_path, small_tree(0))
        assert found is not None
        assert_identical(found.tree, small_tree(1))
    save(tmp_path, 2, small_tree(2), {})
    assert names(tmp_path) == ["step_000000001", "step_000000002"]


# Orbax leaves an event loop behind in which its failed write is still pending.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.fault
def test_a_quota_that_really_refuses_bytes_raises_oserror(tmp_path, caplog):
    tree = {"large": np.ones(2**19, np.float32)}
    save(tmp_path, 1, tree, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(
            OSError, match=r"(?s)could not write the save of step 2.*File too large"
        ):
            save(tmp_path, 2, tree, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step_000000001"]
    assert "Traceback" not in caplog.text
    assert restore(tmp_path, tree) is not None
    save(tmp_path, 2, tree, {})
    assert names(tmp_path) == ["step_000000001", "step_000000002"]


@pytest.mark.fault
def test_impossible_directories_and_full_disks_raise_oserror(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        save(tmp_path / "file" / "run", 1, small_tree(1), {})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"needs 0.0 MiB, only 0.0 MiB are free") as error:
        save(tmp_path / "run", 1, small_tree(1), {})
    assert error.value.errno == errno.ENOSPC
    assert names(tmp_path / "run") == []


def test_an_old_save_that_cannot_be_deleted_is_a_warning(tmp_path, monkeypatch):
    save(tmp_path, 1, small_tree(1), {})
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.warns(CheckpointWarning, match="could not delete"):
            save(tmp_path, 2, small_tree(2), {}, keep=1)
    found = restore(tmp_path, small_tree(0))
    assert found is not None
    assert found.step == 2
    save(tmp_path, 3, small_tree(3), {}, keep=1)
    assert names(tmp_path) == ["step_000000003"]


# Imports once, then forks a child per trial that saves until it is killed.
KILLED = """
    import os, signal, sys, time
    from pathlib import Path
    import jax
    import numpy as np
    import orbax.checkpoint
    from mbrl.training.checkpoint import save
    directory = Path(sys.argv[1])
    last = 0
    for line in sys.stdin:
        delay, first = float(line), last + 1
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            jax.devices()  # the backend starts before the clock of the kill
            os.write(send, b"\\0" * 8)
            for step in range(first, first + 10_000):
                tree = {"a": np.full(3, step), "b": np.full(200_000, step), "c": step}
                save(directory, step, tree, {"at": step})
                os.write(send, step.to_bytes(8, "big"))
        os.close(send)
        os.read(receive, 8)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(receive, "rb") as pipe:
            done = pipe.read()[-8:]
        last = int.from_bytes(done, "big") if done else last
        print(last, flush=True)
        last = max([last, *(int(p.name[5:]) for p in directory.glob("step_*"))])
"""


@pytest.mark.fault
def test_sigkill_at_any_instant_leaves_a_complete_save(tmp_path):
    rng = np.random.default_rng(0)
    like = {"a": np.zeros(3, int), "b": np.zeros(200_000, int), "c": 0}
    unfinished, newest = 0, 0
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(KILLED), str(tmp_path)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as zygote:
        assert zygote.stdin is not None
        assert zygote.stdout is not None
        for _ in range(20):
            print(rng.uniform(0.0, 0.6), file=zygote.stdin, flush=True)
            acknowledged = int(zygote.stdout.readline())
            unfinished += any(tmp_path.glob(".tmp-*"))
            found, messages = restore_quietly(tmp_path, like)
            assert not messages
            if found is None:
                assert acknowledged == 0
                continue
            assert found.step >= max(acknowledged, newest)  # never backwards
            newest = found.step
            assert found.manifest == {"at": newest}
            for value in jax.tree.leaves(found.tree):
                assert np.all(np.asarray(value) == newest)
        zygote.stdin.close()
    assert newest >= 2
    assert unfinished >= 2  # the kills did land inside saves


def test_the_module_is_light_to_import():
    code = (
        "import sys, mbrl.training.checkpoint, mbrl.training.metrics, mbrl.training.run_directory;"
        "print([n for n in ('orbax', 'tensorstore', 'tensorboardX', 'wandb', 'flax')"
        " if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
