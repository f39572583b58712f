"""What studies have in common: a file that says what was found, by which commit, where and when."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mbrl.training import run_directory
from scripts import results


def write_study(out: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Write what was found as JSON, with packages, machine, cores, commit and date.

    Args:
      out: file to write; its folder is made.
      found: settings and figures.

    Returns:
      What was written.
    """
    versions = run_directory.versions()
    written = {
        **found, **results.origin(versions), "commit": versions.get("commit", "unknown"),
        "date": time.strftime("%Y-%m-%d"), "cores": len(os.sched_getaffinity(0)),
    }  # fmt: skip
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps(written, indent=1) + "\n", "utf-8")
    return written


def spread(values: np.ndarray) -> dict[str, Any]:
    """Return mean and standard error over the leading axis, as lists; one value has no error."""
    values = np.asarray(values, float)
    error = values.std(0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0 * values[0]
    return {"mean": values.mean(0).tolist(), "error": np.asarray(error).tolist()}
