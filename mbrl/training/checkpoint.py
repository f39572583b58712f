"""Whole-state saves: arrays by Orbax, a manifest with checksums, one atomic rename.

A save is a folder `step_000000123` with `arrays/` (an Orbax checkpoint) and
`manifest.json`. Nothing in it is trusted before it is checked: every file is listed with
its size and sha256, the manifest carries its own checksum, and what the arrays are said to
be must be what the tree to restore needs. Arrays are stored uncompressed, so that every
size is known beforehand.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mbrl.training import save_files
from mbrl.training.leaves import Leaf, describe, from_host, to_host
from mbrl.training.leaves import digest as digest
from mbrl.training.save_files import MANIFEST, DamagedError

_FORMAT = 1
_MAX_MANIFEST = 2**26
_PACKAGES = ("modelrl", "jax", "jaxlib", "numpy", "orbax-checkpoint")


class CheckpointWarning(UserWarning):
    """A save is damaged and an older one is used, or an old one could not be deleted."""


class Restored(NamedTuple):
    """What `restore` found: the tree, the manifest given to `save`, and the step."""

    tree: Any
    manifest: dict[str, Any]
    step: int


class _Body(NamedTuple):
    user: dict[str, Any]
    leaves: list[Leaf]
    digests: list[str]
    files: dict[str, tuple[int, str]]


def save(directory: Path, step: int, tree: Any, manifest: Mapping[str, Any], keep: int = 2) -> Path:
    """Write one complete save, then delete older ones.

    The save appears under its name only when all of it is on the disk: a kill at any
    instant leaves the saves before it as they were.

    Args:
      directory: folder of all saves of a run; made when missing.
      step: names the save; one of the same step is replaced.
      tree: pytree of arrays, typed PRNG keys and Python numbers.
      manifest: what else must be known to resume, as JSON: config, counters, versions.
      keep: complete saves to keep, this one included. Saves of later steps, left by a run
        that could not read them, are neither counted nor deleted.

    Returns:
      The folder of the save.

    Raises:
      ValueError: when `tree` holds something else than numbers, or `manifest` is not JSON.
      OSError: when it cannot be written (disk full, read-only, quota); older saves are
        intact and nothing is left behind.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"expected step >= 0 and keep >= 1, got step={step}, keep={keep}")
    described = describe(tree)
    user = _as_json(manifest)
    arrays = [to_host(leaf) for leaf in jax.tree.leaves(tree)]
    directory = Path(directory).absolute()
    name = _folder_name(step)
    temporary = directory / f".tmp-{name}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _check_space(directory, sum(array.nbytes for array in arrays))
        temporary.mkdir()
        _write(temporary, step, user, described, arrays)
        _publish(temporary, directory / name)
    except OSError:
        raise
    except Exception as error:  # Orbax reports a full disk as ValueError or worse.
        raise OSError(f"{directory}: could not write the save of step {step}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _clean(directory, step, keep)
    return directory / name


def restore(directory: Path, like: Any) -> Restored | None:
    """Read the newest intact save.

    A damaged save is named in a `CheckpointWarning`, and the one before it is used.

    Args:
      directory: folder given to `save`.
      like: pytree of arrays or `jax.ShapeDtypeStruct`s of the structure to restore; its
        leaves decide between jax and numpy, and the sharding.

    Returns:
      The tree with the bits that were saved, or None when there is no save.

    Raises:
      ValueError: naming the first leaf whose path, shape or dtype differs from `like`, or
        when saves exist and none is intact.
    """
    wanted, structure = describe(like), jax.tree.structure(like)
    failures = []
    for step, folder in _saves(Path(directory).absolute()):
        try:
            body = _read_manifest(folder, step)
            _check_structure(folder, body.leaves, wanted)
            arrays = _read(folder, body)
        except (DamagedError, OSError) as fault:
            failures.append(f"{folder}: {fault}")
            warnings.warn(
                f"damaged save {folder}: {fault}; using the save before it",
                CheckpointWarning,
                stacklevel=2,
            )
            continue
        values = map(from_host, arrays, jax.tree.leaves(like))
        return Restored(jax.tree.unflatten(structure, values), body.user, step)
    if failures:
        raise ValueError(
            "no intact save among " + "; ".join(failures) + "; delete the folder to start afresh"
        )
    return None


def read_manifest(directory: Path) -> tuple[int, dict[str, Any]] | None:
    """Return `(step, manifest)` of the newest save whose manifest is intact, else None.

    For checks that come before a tree like the saved one can be built. The arrays are not
    read: `restore` may still fall back to an older save.
    """
    for step, folder in _saves(Path(directory).absolute()):
        try:
            return step, _read_manifest(folder, step).user
        except (DamagedError, OSError):
            continue
    return None


def _write(
    folder: Path, step: int, user: Any, described: list[Leaf], arrays: list[np.ndarray]
) -> None:
    save_files.write_arrays(folder, save_files.layout_of(described), arrays)
    names, sizes = zip(*save_files.list_files(folder), strict=True)
    sums = save_files.parallel(save_files.hash_file, [folder / name for name in names])
    digests = save_files.hash_leaves(arrays)
    body = {
        "format": _FORMAT,
        "step": step,
        "manifest": user,
        "versions": {name: _version(name) for name in _PACKAGES},
        "leaves": [
            {**leaf._asdict(), "sha256": sha} for leaf, sha in zip(described, digests, strict=True)
        ],
        "files": {
            name: {"size": size, "sha256": sha}
            for name, size, sha in zip(names, sizes, sums, strict=True)
        },
    }
    (folder / MANIFEST).write_text(save_files.seal(body), "ascii")
    save_files.sync_tree(folder)


def _publish(temporary: Path, final: Path) -> None:
    """Rename the finished save to its name; one of the same step steps aside first."""
    aside = _aside(final)
    if final.exists():
        # `_saves` counts the folder put aside while the name is free: no instant is empty.
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(final, aside)
    try:
        os.rename(temporary, final)
    except OSError:
        if aside.exists():
            os.rename(aside, final)
        raise
    save_files.sync(final.parent)
    save_files.sync(final.parent.parent)


def _clean(directory: Path, step: int, keep: int) -> None:
    """Delete temporary folders, and all saves up to `step` but the `keep` newest complete."""
    doomed = list(directory.glob(".tmp-step_*"))
    for aside in directory.glob(".replaced-step_*"):
        final = aside.with_name(aside.name.removeprefix(".replaced-"))
        if final.exists():
            doomed.append(aside)
        else:  # A kill came between the two renames of `_publish`.
            with contextlib.suppress(OSError):
                os.rename(aside, final)
    kept = 0
    for at, folder in _saves(directory):
        if at > step:
            continue
        if kept < keep and (at == step or _looks_complete(folder, at)):
            kept += 1
        else:
            # Under its own name a half-deleted save would look like a damaged one.
            hidden = directory / f".tmp-{folder.name}-old-{secrets.token_hex(4)}"
            try:
                os.rename(folder, hidden)
            except OSError:
                hidden = folder
            doomed.append(hidden)
    for path in doomed:
        shutil.rmtree(path, ignore_errors=True)
        if path.exists():
            warnings.warn(f"could not delete {path}", CheckpointWarning, stacklevel=3)


def _saves(directory: Path) -> list[tuple[int, Path]]:
    """List (step, folder) of all saves, newest first."""
    found = {}
    for prefix in (".replaced-", ""):  # A save under its own name comes before one aside.
        for path in directory.glob(f"{prefix}step_*"):
            match = re.fullmatch(r"step_(\d{9,})", path.name.removeprefix(prefix))
            if match and path.name == prefix + _folder_name(int(match[1])):
                found[int(match[1])] = path
    return sorted(found.items(), reverse=True)


def _read_manifest(folder: Path, step: int) -> _Body:
    """Return the manifest when it is the one that was written."""
    if folder.is_symlink() or not folder.is_dir():
        raise DamagedError("the save", "is not a folder")
    file = folder / MANIFEST
    if file.is_symlink() or not file.is_file():
        raise DamagedError(MANIFEST, "is missing: the save is incomplete")
    if not 0 < file.stat().st_size <= _MAX_MANIFEST:
        raise DamagedError(MANIFEST, f"has {file.stat().st_size} bytes: the save is incomplete")
    body = save_files.unseal(file.read_bytes().decode("ascii", "replace"))
    try:
        if body["format"] != _FORMAT or body["step"] != step:
            found = f"format {body['format']}, step {body['step']}"
            raise DamagedError(MANIFEST, f"is of {found}; expected format {_FORMAT}, step {step}")
        return _Body(
            dict(body["manifest"]),
            [Leaf(x["path"], tuple(x["shape"]), x["dtype"], x["kind"]) for x in body["leaves"]],
            [str(x["sha256"]) for x in body["leaves"]],
            {name: (int(x["size"]), str(x["sha256"])) for name, x in body["files"].items()},
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedError(MANIFEST, f"lacks what a manifest has ({error!r})") from error


def _read(folder: Path, body: _Body) -> list[np.ndarray]:
    """Return the leaves; their description has been compared with the tree to restore."""
    layout = save_files.layout_of(body.leaves)
    save_files.check_files(folder, body.files, layout)
    try:
        save_files.check_arrays(folder, layout)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise DamagedError(
            save_files.ARRAYS, f"has metadata of another kind ({error!r})"
        ) from error
    arrays = save_files.read_arrays(folder, layout, body.leaves)
    for leaf, old, new in zip(
        body.leaves, body.digests, save_files.hash_leaves(arrays), strict=True
    ):
        if old != new:
            raise DamagedError(save_files.ARRAYS, f"has other values at leaf {leaf.path}")
    return arrays


def _check_structure(folder: Path, saved: list[Leaf], wanted: list[Leaf]) -> None:
    for old, new in zip(saved, wanted, strict=False):
        if old != new:
            raise ValueError(
                f"{folder} does not fit `like`: saved is leaf {_leaf_text(old)}, expected was "
                f"{_leaf_text(new)}; restore with the configuration of the run that saved it"
            )
    if len(saved) != len(wanted):
        longer, shorter = (saved, wanted) if len(saved) > len(wanted) else (wanted, saved)
        first = longer[len(shorter)]
        raise ValueError(
            f"{folder} does not fit `like`: {len(saved)} leaves are saved, {len(wanted)} were "
            f"expected; the first that has no partner is {_leaf_text(first)}"
        )


def _leaf_text(leaf: Leaf) -> str:
    kind = "" if leaf.kind == "array" else f" ({leaf.kind})"
    return f"{leaf.path or 'the root'}: {leaf.dtype} {leaf.shape}{kind}"


def _looks_complete(folder: Path, step: int) -> bool:
    """Tell whether all files are there in their sizes, without reading them."""
    try:
        files = _read_manifest(folder, step).files
        sizes = dict(save_files.list_files(folder))
    except (DamagedError, OSError):
        return False
    del sizes[MANIFEST]
    return sizes == {name: size for name, (size, _) in files.items()}


def _as_json(manifest: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(manifest), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"manifest: expected what JSON can hold, without NaN or infinity: {error}"
        ) from error


def _check_space(directory: Path, need: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < need + 2**20:
        reason = f"needs {need / 2**20:.1f} MiB, only {free / 2**20:.1f} MiB are free"
        raise OSError(errno.ENOSPC, reason, str(directory))


def _folder_name(step: int) -> str:
    return f"step_{step:09d}"


def _aside(final: Path) -> Path:
    return final.with_name(f".replaced-{final.name}")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
