"""Folders of tiny language models, written from the golden files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FAMILIES = ("gpt2", "llama", "qwen2", "qwen3")


def golden(name: str) -> dict[str, np.ndarray]:
    """Return the arrays of a golden file."""
    with np.load(GOLDEN / name) as file:
        return dict(file)


def family_entries(family: str) -> dict[str, Any]:
    """Return the config.json of a golden model."""
    return json.loads(str(golden("transformers.npz")[f"{family}/config"]))


def family_weights(family: str) -> dict[str, np.ndarray]:
    """Return its tensors under the names of transformers."""
    prefix = f"{family}/weights/"
    found = golden("transformers.npz")
    return {name.removeprefix(prefix): x for name, x in found.items() if name.startswith(prefix)}


def write_folder(folder: Path, entries: dict[str, Any], weights: dict[str, np.ndarray]) -> Path:
    """Write a folder as transformers would."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(entries))
    save_file(
        {k: np.ascontiguousarray(x) for k, x in weights.items()}, folder / "model.safetensors"
    )
    return folder
