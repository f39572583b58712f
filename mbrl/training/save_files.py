"""Files of one save: Orbax arrays of known layout, checksums, sealed JSON, fsync.

Arrays are stored uncompressed and in one piece, and small ones share an array. Hence the
size of every file follows from the tree to restore, and nothing that a file claims about
itself can make a reader allocate more. A file is the bytes of its array: a reader maps it,
and a replay that is larger than the memory can be read as well.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mbrl.training.leaves import Leaf, as_bytes, sha256

MANIFEST = "manifest.json"
ARRAYS = "arrays"
PACKED = "packed"
SMALL = 2**20
"""Leaves below this many bytes share one array: a file per scalar costs an fsync each."""
_MAX_TEXT = 2**20
_MAX_FILES_OF_ORBAX = 16

T = TypeVar("T")
U = TypeVar("U")


class DamagedError(Exception):
    """A file of a save is not what was written."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(f"{file} {reason}")


class _Uncopied(np.ndarray):
    """An array that Orbax does not copy before it writes: `save` waits for the write."""

    def __deepcopy__(self, memo: Any) -> _Uncopied:
        return self


class Stored(NamedTuple):
    """Shape and dtype of one stored array."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the array, and of its file."""
        return math.prod(self.shape) * self.dtype.itemsize


class Layout(NamedTuple):
    """Where leaves are stored.

    Attributes:
      arrays: the stored arrays by name.
      places: (name, offset in bytes) of each leaf; the offset is 0 outside `PACKED`.
    """

    arrays: dict[str, Stored]
    places: list[tuple[str, int]]


def layout_of(leaves: list[Leaf]) -> Layout:
    """Decide where each leaf is stored; saving and restoring must agree on it."""
    arrays, places, packed = {}, [], 0
    for number, leaf in enumerate(leaves):
        stored = Stored(leaf.shape, np.dtype(leaf.dtype))
        if stored.nbytes < SMALL:
            places.append((PACKED, packed))
            packed += stored.nbytes
        else:
            name = f"leaf_{number:05d}"
            arrays[name] = stored
            places.append((name, 0))
    # Orbax refuses arrays without elements: one byte more than needed.
    return Layout({**arrays, PACKED: Stored((packed + 1,), np.dtype(np.uint8))}, places)


def write_arrays(folder: Path, layout: Layout, leaves: list[np.ndarray]) -> None:
    """Write the leaves as an Orbax checkpoint and check that its layout is as expected."""
    packed = np.zeros(layout.arrays[PACKED].shape, np.uint8)
    stored = {PACKED: packed}
    for leaf, (name, offset) in zip(leaves, layout.places, strict=True):
        if name == PACKED:
            packed[offset : offset + leaf.nbytes] = as_bytes(leaf)
        else:
            stored[name] = leaf.view(_Uncopied)
    import orbax.checkpoint as ocp

    with _quiet_orbax(), ocp.Checkpointer(_handler()) as checkpointer:
        checkpointer.save(folder / ARRAYS, args=ocp.args.PyTreeSave(stored))
    check_arrays(folder, layout)


def read_arrays(folder: Path, layout: Layout, leaves: list[Leaf]) -> list[np.ndarray]:
    """Read the leaves of a folder whose files and metadata have been checked.

    Large leaves are private maps of their files: memory is taken for what is read, given
    back where it is short, and written on without touching the save.
    """
    stored = {
        name: np.asarray(np.memmap(folder / _chunk(name, kind), kind.dtype, "c", shape=kind.shape))
        for name, kind in layout.arrays.items()
    }
    found = []
    for leaf, (name, offset) in zip(leaves, layout.places, strict=True):
        if name == PACKED:
            want = Stored(leaf.shape, np.dtype(leaf.dtype))
            piece = stored[PACKED][offset : offset + want.nbytes].copy()
            found.append(piece.view(want.dtype).reshape(want.shape))
        else:
            found.append(stored[name])
    return found


def _chunk(name: str, stored: Stored) -> str:
    """Return the file that holds all bytes of a stored array, relative to the save."""
    return f"{ARRAYS}/{name}/{'.'.join('0' * len(stored.shape))}"


def check_arrays(folder: Path, layout: Layout) -> None:
    """Check all that Orbax will allocate or open, before it does.

    Raises:
      DamagedError: naming the file that claims another name, shape, dtype, chunk or filter.
    """
    tree = _read_json(folder, f"{ARRAYS}/_METADATA").get("tree_metadata", {})
    claimed = {x["key_metadata"][0]["key"]: x for x in tree.values()}
    plain = all(
        x["value_metadata"]["value_type"] == "np.ndarray" and len(x["key_metadata"]) == 1
        for x in tree.values()
    )
    if claimed.keys() != layout.arrays.keys() or len(tree) != len(claimed) or not plain:
        raise DamagedError(
            f"{ARRAYS}/_METADATA", f"lists other arrays than {sorted(layout.arrays)}"
        )
    for name, (shape, dtype) in layout.arrays.items():
        file = f"{ARRAYS}/{name}/.zarray"
        claims = _read_json(folder, file)
        wanted = {"shape": list(shape), "chunks": list(shape), "order": "C", "zarr_format": 2}
        wanted |= {"compressor": None, "filters": None}
        for field, value in wanted.items():
            if claims.get(field, "nothing") != value:
                raise DamagedError(file, f"says {field} = {claims.get(field)}, expected {value}")
        if claims.get("dtype") not in (dtype.str, dtype.name):
            raise DamagedError(file, f"says dtype = {claims.get('dtype')}, expected {dtype.name}")


def check_files(folder: Path, files: Mapping[str, tuple[int, str]], layout: Layout) -> None:
    """Check names, kinds, sizes and then checksums of all files beside the manifest.

    Args:
      folder: one save.
      files: (size, sha256) by name relative to `folder`.
      layout: decides the size of array files; all others must be small.

    Raises:
      DamagedError: naming the first file that is wrong.
    """
    chunks = {_chunk(name, stored): stored.nbytes for name, stored in layout.arrays.items()}
    for name, (size, _) in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or str(path) != name:
            raise DamagedError(MANIFEST, f"lists the unsafe name {name!r}")
        if size != chunks.get(name, size) or size > chunks.get(name, _MAX_TEXT):
            raise DamagedError(name, f"is listed with {size} bytes, more than its leaves need")
    if missing := chunks.keys() - files.keys():
        raise DamagedError(min(missing), "is not in the manifest")
    if len(files) > 2 * len(chunks) + _MAX_FILES_OF_ORBAX:
        raise DamagedError(MANIFEST, f"lists {len(files)} files for {len(chunks)} arrays")
    on_disk = set()
    for name, size in list_files(folder):
        on_disk.add(name)
        if name not in files and name != MANIFEST:
            raise DamagedError(name, "is not in the manifest")
        if name in files and size != files[name][0]:
            raise DamagedError(name, f"has {size} bytes, expected {files[name][0]}")
    if missing := files.keys() - on_disk:
        raise DamagedError(min(missing), "is missing")
    for name, found in zip(files, parallel(hash_file, [folder / x for x in files]), strict=True):
        if found != files[name][1]:
            raise DamagedError(name, "does not match its checksum")


def list_files(folder: Path, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield (name relative to the save, size) of all files below `folder`.

    Raises:
      DamagedError: at a link, a pipe or another special file.
    """
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        status = entry.stat(follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            yield from list_files(Path(entry.path), f"{prefix}{entry.name}/")
        elif stat.S_ISREG(status.st_mode):
            yield prefix + entry.name, status.st_size
        else:
            raise DamagedError(prefix + entry.name, "is a link or a special file")


def seal(body: Mapping[str, Any]) -> str:
    """Return the text of a manifest: its body, and the checksum of the body."""
    text = json.dumps(body, separators=(",", ":"), allow_nan=False)
    checksum = hashlib.sha256(text.encode("ascii")).hexdigest()
    return json.dumps({"checksum": checksum, "body": body}, indent=1) + "\n"


def unseal(text: str) -> dict[str, Any]:
    """Return the body of a sealed manifest.

    Raises:
      DamagedError: unless every character of `text` is as `seal` wrote it.
    """
    try:
        body = json.loads(text)["body"]
        sealed = seal(body)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DamagedError(MANIFEST, f"is no JSON of ours ({error})") from error
    if text != sealed:
        raise DamagedError(MANIFEST, "does not match its checksum")
    return body


def hash_file(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until a folder and all below it are on the disk, files first."""
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    parallel(sync, [folder / name for name, _ in list_files(folder)])
    parallel(sync, folders)


def parallel(function: Callable[[T], U], items: Iterable[T]) -> list[U]:
    """Map in threads: hashing and fsync release the interpreter."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(function, items))


def hash_leaves(leaves: list[np.ndarray]) -> list[str]:
    """Return the checksum of each leaf."""
    return parallel(sha256, leaves)


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        path = folder / name
        if path.stat().st_size > _MAX_TEXT:
            raise DamagedError(name, "is too large")
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DamagedError(name, f"is no JSON of Orbax ({error})") from error


def _handler() -> Any:
    import orbax.checkpoint as ocp

    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False, use_compression=False)


@contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Drop two kinds of log lines of Orbax while it writes.

    One complains, at every save, that the format not in use has no files. The others are
    tracebacks of background threads, whose error reaches the caller anyway.
    """

    def keep(record: logging.LogRecord) -> bool:
        return "Skipping merge of OCDBT" not in str(record.msg) and not record.exc_info

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
