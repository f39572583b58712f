"""Who may import whom, read from the source; and what importing must not do."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mbrl", "agents", "envs", "scripts")
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
NAMES = [str(file.relative_to(ROOT)) for file in FILES]

FORBIDDEN = {
    "mbrl": {"agents", "envs", "scripts", "gymnasium", "mujoco", "tyro", "rich", "argparse"},
    "agents": {"envs", "scripts", "gymnasium"},
    "envs": {"agents", "scripts"},
    "scripts": set(),
}
# Unsafe to load from, a second array library, or a nightly build behind a thin wrapper.
NOWHERE = {
    "pickle", "cloudpickle", "dill", "joblib", "torch", "tensorflow", "tensorflow_probability",
    "distrax", "rlax", "clu", "gym",
}  # fmt: skip
# Within mbrl: a layer imports none of those named. `mbrl.types` imports nothing of ours.
LAYERS = {
    "mbrl.types": ("mbrl",),
    "mbrl.networks": ("mbrl.losses", "mbrl.models", "mbrl.mdp", "mbrl.planning"),
    "mbrl.losses": ("mbrl.models", "mbrl.mdp", "mbrl.planning", "mbrl.preferences"),
    "mbrl.models": ("mbrl.planning", "mbrl.preferences"),
    "mbrl.mdp": ("mbrl.models", "mbrl.planning", "mbrl.networks"),
    "mbrl.planning": ("mbrl.models", "mbrl.networks", "mbrl.preferences"),
    "mbrl.preferences": ("mbrl.planning", "mbrl.mdp", "mbrl.networks"),
}


def imported(file: Path) -> Iterator[str]:
    """Yield the full dotted name of every import, also those inside functions."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}, line {node.lineno}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


COMPONENTS = [
    file
    for file in FILES
    if within(module_name(file), "mbrl") and not within(module_name(file), "mbrl.training")
]


def test_the_packages_are_found() -> None:
    assert {name.split(os.sep)[0] for name in NAMES} == set(PACKAGES)


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_imports_point_in_one_direction(file: Path) -> None:
    package = file.relative_to(ROOT).parts[0]
    roots = {name.split(".")[0] for name in imported(file)}
    assert not roots & (FORBIDDEN[package] | NOWHERE)


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_of_mbrl(layer: str) -> None:
    files = [file for file in FILES if within(module_name(file), layer)]
    assert files
    upward = [
        f"{module_name(file)} imports {name}"
        for file in files
        for name in imported(file)
        if any(within(name, above) for above in LAYERS[layer])
    ]
    assert not upward


def test_only_training_is_about_training() -> None:
    assert not [f for f in COMPONENTS for n in imported(f) if within(n, "mbrl.training")]


def test_modules_form_no_cycle() -> None:
    modules = {module_name(file): file for file in FILES}
    edges = {
        name: {m for i in imported(file) for m in (i, i.rpartition(".")[0]) if m in modules}
        - {name}
        for name, file in modules.items()
    }
    # A package whose __init__ re-exports its modules is imported by them on the way in.
    for name, targets in edges.items():
        targets -= {target for target in targets if within(name, target)}
    while free := [name for name, targets in edges.items() if not targets & edges.keys()]:
        for name in free:
            del edges[name]
    assert not edges


@pytest.mark.parametrize("file", COMPONENTS, ids=map(module_name, COMPONENTS))
def test_components_neither_read_nor_print(file: Path) -> None:
    calls = [
        f"line {node.lineno}: {node.func.id}"
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("open", "print", "input", "exec", "eval")
    ]
    assert not calls


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_contracts_are_light_to_import() -> None:
    heavy = ("orbax", "matplotlib", "flax", "haiku", "optax", "gymnasium", "tyro", "rich", "mctx")
    code = f"import sys, mbrl.types; print([n for n in {heavy} if n in sys.modules])"
    done = run_python(code, JAX_PLATFORMS="absent")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_no_module_computes_when_imported() -> None:
    # The first array would start a backend, and there is none of this name. Whoever
    # imports the library decides on platforms and devices afterwards.
    names = sorted(
        {module_name(file) for file in FILES if not module_name(file).startswith("scripts")}
    )
    done = run_python(f"import {', '.join(names)}", JAX_PLATFORMS="absent")
    assert done.returncode == 0, done.stderr
    touched = run_python("import jax.numpy as jnp; jnp.zeros(1)", JAX_PLATFORMS="absent")
    assert touched.returncode != 0
