"""`mbrl doctor`: versions, devices, rendering, caches, and clashes with their fix."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # run as a file: imports start at the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.cli import enable_compilation_cache, parse, run, version

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "chex", "dm-haiku", "mctx", "orbax-checkpoint",
    "safetensors", "numpy", "gymnasium", "mujoco", "mujoco-mjx", "dm-control", "shimmy",
    "ale-py", "box2d", "brax", "gymnax", "minari", "gym", "mbrl", "tensorboardx", "wandb", "ray",
    "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "tyro", "rich", "matplotlib", "pip",
)  # fmt: skip


@dataclass(frozen=True)
class DoctorConfig:
    """Print versions, devices, rendering, caches, and clashes with their fix."""

    json: bool = False  # print one JSON object instead of tables


class Finding(NamedTuple):
    """Something known about this combination of packages.

    Attributes:
      clash: it breaks the library; otherwise it is worth knowing.
      problem: what is wrong.
      fix: a command or setting.
    """

    clash: bool
    problem: str
    fix: str


def main(argv: list[str]) -> int:
    """Print the report; return 1 when a clash was found."""
    config = parse(DoctorConfig, argv, "mbrl doctor")
    report = diagnose()
    if config.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return 1 if any(finding["clash"] for finding in report["findings"]) else 0


def diagnose() -> dict[str, Any]:
    """Examine this process's Python and return a JSON-serializable report."""
    versions = installed(PACKAGES)
    cache = enable_compilation_cache()
    device = _devices()
    findings = [
        *clashes(versions, sys.version_info[:2]),
        *unmet_requirements(),
        *_shadowed(),
        *_hardware(device, versions),
    ]
    return {
        "modelrl": version(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": f"{platform.platform()}, {os.cpu_count()} cores",
        "packages": versions,
        "devices": device,
        "gl": _gl(versions),
        "compilation_cache": None if cache is None else str(cache),
        "findings": [finding._asdict() for finding in findings],
    }


def installed(names: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of those distributions that are installed, without importing them."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def clashes(versions: Mapping[str, str], python: tuple[int, int]) -> list[Finding]:
    """List what is known to go wrong with a set of packages.

    Args:
      versions: distribution name to version, for those installed.
      python: (major, minor).
    """

    def at_least(name: str, *bound: int) -> bool:
        return name in versions and release(versions[name]) >= bound

    found = []
    if python < (3, 11):
        found.append(Finding(True, "Python is older than 3.11", "install Python 3.11 or newer"))
    if at_least("mujoco", 4) and "dm-control" in versions:
        problem = f"dm_control {versions['dm-control']} does not run on mujoco {versions['mujoco']}"
        found.append(Finding(True, problem, "pip install 'mujoco<4'"))
    if "mbrl" in versions:
        problem = (
            f"mbrl-lib {versions['mbrl']} installs the import name 'mbrl', as this library does"
        )
        found.append(Finding(True, problem, "pip uninstall mbrl, or one environment for each"))
    if {"jax", "jaxlib"} <= versions.keys():
        jax, jaxlib = release(versions["jax"])[:2], release(versions["jaxlib"])[:2]
        if jax != jaxlib:
            problem = f"jax {versions['jax']} does not fit jaxlib {versions['jaxlib']}"
            found.append(Finding(True, problem, f"pip install 'jaxlib=={versions['jax']}'"))
    for plugin in ("jax-cuda12-plugin", "jax-cuda13-plugin"):
        if plugin in versions and versions[plugin] != versions.get("jaxlib", versions[plugin]):
            problem = f"{plugin} {versions[plugin]} does not fit jaxlib {versions['jaxlib']}"
            extra = plugin.split("-")[1]
            fix = f"pip install 'jax[{extra}]=={versions['jax']}'"
            found.append(Finding(True, problem, fix))
    if "gymnax" in versions and at_least("jax", 0, 12):
        problem = f"gymnax {versions['gymnax']} does not admit jax {versions['jax']}"
        found.append(Finding(True, problem, "pip install 'jax<0.12'"))
    if "brax" in versions and at_least("jax", 0, 10):
        problem = "the trainers of brax need a function removed in jax 0.10; its environments work"
        found.append(Finding(False, problem, "train brax environments with this library"))
    if "gym" in versions and at_least("numpy", 2):
        problem = f"gym {versions['gym']} (unmaintained) does not support numpy 2"
        found.append(Finding(False, problem, "port the environment to gymnasium"))
    return found


def release(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version, `'4.0.0rc1'` -> `(4, 0)`."""
    numbers = []
    for part in text.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def unmet_requirements() -> list[Finding]:
    """List the requirements of this library that the environment does not meet."""
    from packaging.requirements import Requirement

    try:
        wanted = importlib.metadata.requires("modelrl") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return []
    found = []
    for requirement in map(Requirement, wanted):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        have = installed((requirement.name,)).get(requirement.name)
        if have is None or not requirement.specifier.contains(have, prereleases=True):
            problem = f"{requirement} is required, found {have or 'none'}"
            found.append(Finding(True, problem, f"pip install '{requirement}'"))
    return found


def _shadowed() -> list[Finding]:
    home = Path(__file__).resolve().parents[1]
    found = []
    for name in ("mbrl", "agents", "envs"):
        spec = importlib.util.find_spec(name)
        places = [] if spec is None else list(spec.submodule_search_locations or [spec.origin])
        if not any(Path(str(place)).resolve().parent == home for place in places):
            problem = f"import {name} finds {places or 'nothing'}, not the package beside {home}"
            found.append(Finding(True, problem, "rename or remove the other package of this name"))
    return found


def _devices() -> dict[str, Any]:
    try:
        import jax

        devices = jax.devices()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "backend": jax.default_backend(),
        "devices": [str(device) for device in devices],
        "kind": devices[0].device_kind,
    }


def _hardware(device: Mapping[str, Any], versions: Mapping[str, str]) -> list[Finding]:
    if "error" in device:
        return [
            Finding(True, f"jax finds no device: {device['error']}", "reinstall jax and jaxlib")
        ]
    found = []
    if device["backend"] == "cpu" and shutil.which("nvidia-smi") and Path("/dev/nvidia0").exists():
        problem = "there is an NVIDIA GPU, but jax computes on the CPU"
        found.append(Finding(False, problem, "pip install 'modelrl[cuda13]'"))
    if "mujoco" in versions and _gl(versions)["MUJOCO_GL"] is None and not _display():
        problem = "mujoco cannot render to the screen of a machine without one"
        found.append(Finding(False, problem, "export MUJOCO_GL=egl"))
    return found


def _display() -> bool:
    on_desktop = sys.platform in ("win32", "darwin")
    return on_desktop or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _gl(versions: Mapping[str, str]) -> dict[str, Any]:
    return {"MUJOCO_GL": os.environ.get("MUJOCO_GL"), "display": _display()}


def _print(report: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    device = report["devices"]
    rows = {
        "modelrl": report["modelrl"],
        "python": f"{report['python']} ({report['executable']})",
        "platform": report["platform"],
        "devices": device.get("error") or f"{', '.join(device['devices'])} ({device['kind']})",
        "GL backend": f"MUJOCO_GL={report['gl']['MUJOCO_GL'] or 'unset'}, "
        f"display: {'yes' if report['gl']['display'] else 'no'}",
        "compiled programs": report["compilation_cache"] or "not kept (no writable folder)",
        "packages": "  ".join(f"{name} {value}" for name, value in report["packages"].items()),
    }
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/bold]", escape(value))
    console.print(table)
    for finding in report["findings"]:
        mark = (
            "[bold red]clash[/bold red]" if finding["clash"] else "[bold yellow]note[/bold yellow]"
        )
        console.print(f"{mark}  {escape(finding['problem'])}\n       fix: {escape(finding['fix'])}")
    if not any(finding["clash"] for finding in report["findings"]):
        console.print("[bold green]no clash found[/bold green]")


if __name__ == "__main__":
    sys.exit(run(main))
