"""Settings that every test shares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Compilation dominates the fast tests: programs compiled once are read back, also by the
# processes that tests start. Set in the environment because jax reads it when imported.
_CACHE = Path(__file__).resolve().parents[1] / ".jax_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Tests run each program a few times: compiling it without optimization takes half the time.
# `make learning` sets the flags to nothing.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# No window opens and no sound device is looked for, whatever the machine has.
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(scope="module")
def same_versions() -> Iterator[None]:
    """Hold the versions still: the commit of a checkout may change while tests run."""
    from mbrl.training import run_directory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_directory, "versions", lambda: {"python": "3"})
        yield
