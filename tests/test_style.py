"""Budgets that keep the source readable, measured on its syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(
    file
    for package in ("mbrl", "agents", "envs", "scripts")
    for file in (ROOT / package).rglob("*.py")
)
NAMES = [str(file.relative_to(ROOT)) for file in FILES]
every_file = pytest.mark.parametrize("file", FILES, ids=NAMES)

MAX_BODY = 60
MAX_FACTORY = 100
MAX_FILE = {"agents": 350}
MAX_ARGUMENTS = 12
MAX_FIELDS = 25

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(file: Path) -> Iterator[Function]:
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, Function):
            yield node


def public(file: Path) -> Iterator[tuple[Function, bool]]:
    """Yield the public functions and methods, and whether they are declarations of a Protocol."""
    tree = ast.parse(file.read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, Function) and not node.name.startswith("_"):
            yield node, False
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            protocol = any("Protocol" in ast.unparse(base) for base in node.bases)
            for method in node.body:
                if isinstance(method, Function) and not method.name.startswith("_"):
                    yield method, protocol


def body_lines(node: Function) -> int:
    """Count the lines of a body, without its docstring."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    if not body:
        return 0
    assert body[-1].end_lineno is not None
    return body[-1].end_lineno - body[0].lineno + 1


def own_lines(node: Function) -> int:
    """Count the lines of a body without those of the functions that it defines."""
    inner = [n for child in node.body for n in ast.walk(child) if isinstance(n, Function)]
    nested = set()
    for function in inner:
        assert function.end_lineno is not None
        nested |= set(range(function.lineno, function.end_lineno + 1))
    return body_lines(node) - len(nested)


def arguments(node: Function) -> list[ast.arg]:
    spec = node.args
    star = [arg for arg in (spec.vararg, spec.kwarg) if arg is not None]
    return [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *star]


@every_file
def test_functions_fit_on_a_screen(file: Path) -> None:
    long = {f"{n.name}, line {n.lineno}": own_lines(n) for n in functions(file)}
    assert {name: lines for name, lines in long.items() if lines > MAX_BODY} == {}


@every_file
def test_factories_of_functions_stay_small(file: Path) -> None:
    # A bundle of closures is longer than a function, and must not become a program.
    long = {f"{n.name}, line {n.lineno}": body_lines(n) for n in functions(file)}
    assert {name: lines for name, lines in long.items() if lines > MAX_FACTORY} == {}


@every_file
def test_files_stay_small(file: Path) -> None:
    limit = MAX_FILE.get(file.relative_to(ROOT).parts[0], 400)
    assert len(file.read_text("utf-8").splitlines()) <= limit


@every_file
def test_functions_take_few_arguments(file: Path) -> None:
    many = {f"{n.name}, line {n.lineno}": len(arguments(n)) for n in functions(file)}
    assert {name: number for name, number in many.items() if number > MAX_ARGUMENTS} == {}


@every_file
def test_public_functions_are_documented(file: Path) -> None:
    silent = [
        f"{n.name}, line {n.lineno}"
        for n, protocol in public(file)
        if not protocol and not ast.get_docstring(n)
    ]
    assert silent == []


@every_file
def test_public_functions_are_annotated(file: Path) -> None:
    missing = []
    for node, _ in public(file):
        bare = [
            a.arg for a in arguments(node) if a.annotation is None and a.arg not in ("self", "cls")
        ]
        if bare or node.returns is None:
            missing.append(f"{node.name}, line {node.lineno}: {bare or 'return'}")
    assert missing == []


@every_file
def test_modules_and_public_classes_are_documented(file: Path) -> None:
    tree = ast.parse(file.read_text("utf-8"))
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]
    protocols = [n for n in classes if any("Protocol" in ast.unparse(b) for b in n.bases)]
    silent = [n.name for n in classes if n not in protocols and not ast.get_docstring(n)]
    assert silent == []
    assert ast.get_docstring(tree) or not tree.body


@every_file
def test_configurations_stay_small(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
            fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
            assert len(fields) <= MAX_FIELDS, f"{node.name} has {len(fields)} fields"
            assert any("frozen=True" in ast.unparse(d) for d in node.decorator_list), node.name


@every_file
def test_randomness_is_typed(file: Path) -> None:
    # Raw uint32 keys are accepted by jax.random, but can be added to and reused unnoticed.
    old = [
        f"line {node.lineno}"
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "PRNGKey"
    ]
    assert old == []
