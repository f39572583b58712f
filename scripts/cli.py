"""The `mbrl` command: dispatch to a job, turn dataclasses into flags, report errors.

A job is a module of this package with `main(argv) -> int`. Jobs are imported when they are
asked for, so that `mbrl --help` and `mbrl doctor` work where jax does not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import io
import os
import re
import sys
import textwrap
import typing
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

if __name__ == "__main__":  # run as a file: imports start at the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

JOBS = {
    "train": "train an agent; the same command again resumes",
    "evaluate": "play a trained agent and print mean, std and IQM of its returns",
    "plan": "plan in a simulator, without learning",
    "report": "draw learning curves from metrics and print a table",
    "sweep": "run a grid of training commands",
    "collect": "write the records of a run to a file, to train on them offline",
    "label": "say on a page in the browser which of two clips, or of several answers, is better",
    "rlhf": "language models from human feedback: sft, reward, ppo, dpo, and all of them",
    "bench": "measure speed on this machine",
    "doctor": "print versions, devices and known clashes",
}
Config = TypeVar("Config")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mbrl <job> ...` and return the exit code.

    Args:
      argv: arguments after the program name; those of the process when None.

    Returns:
      0 on success, 2 for a command that was not understood, else what the job returns.
    """
    if argv is None:
        use_large_pages()
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_usage(), file=sys.stdout if args else sys.stderr)
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        print(f"modelrl {version()}")
        return 0
    name, rest = args[0], args[1:]
    if name not in JOBS:
        print(f"error: unknown job {name!r}{_nearest(name, JOBS)}", file=sys.stderr)
        print(_usage(), file=sys.stderr)
        return 2
    enable_compilation_cache()
    return run(importlib.import_module(f"scripts.{name}").main, rest)


def run(job: Callable[[list[str]], int], argv: Sequence[str] | None = None) -> int:
    """Call `job(argv)`, with bad input reported in one line.

    Args:
      job: takes the arguments after the job's name, returns an exit code.
      argv: those arguments; those of the process when None.

    Returns:
      The exit code of the job; 2 when it raised a `ValueError` (printed as one line, or
      with its traceback when `MBRL_TRACEBACK=1`); 130 when it was interrupted; 141 when
      whoever read its output has left.
    """
    enable_compilation_cache()
    try:
        try:
            return job(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # `| head`: nobody is there to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ValueError as error:
        if os.environ.get("MBRL_TRACEBACK") == "1":
            raise
        print("error: " + " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def parse(
    config_class: type[Config],
    argv: Sequence[str],
    prog: str,
    description: str | None = None,
    default: Config | None = None,
) -> Config:
    """Read a configuration from command-line flags.

    A field `learning_rate` becomes `--learning-rate`, a nested field
    `--planner.horizon`; `tyro.conf.Positional[...]` fields take no flag. The comment or
    docstring of a field is its help.

    Args:
      config_class: a dataclass, possibly with dataclasses as fields.
      argv: arguments to read.
      prog: name of the command, for messages.
      description: text of `--help`; the docstring of `config_class` when None.
      default: values of the flags that are not given, for presets.

    Returns:
      An instance of `config_class`.

    Raises:
      SystemExit: code 2 for a flag that does not exist (the message lists those that do)
        or a value that does not fit; code 0 after `--help`.
    """
    import tyro

    valid = flags(config_class)
    for arg in argv:
        name = arg.split("=", 1)[0].replace("_", "-")
        if name.startswith("--") and name not in ("--help", "--", *valid):
            print(f"error: {prog}: unknown flag {name}{_nearest(name, valid)}", file=sys.stderr)
            print(f"valid flags:\n{_filled(valid)}", file=sys.stderr)
            raise SystemExit(2)
    options: dict[str, Any] = {} if default is None else {"default": default}

    def read() -> Config:
        return tyro.cli(
            config_class, args=list(argv), prog=prog, description=description, **options
        )

    if "--help" in argv or "-h" in argv:
        return read()
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            return read()
    except SystemExit:
        print(f"error: {prog}: {_unframed(printed.getvalue())}", file=sys.stderr)
        raise


def _unframed(text: str) -> str:
    """Return a message of tyro, without its frame and title, as one line."""
    rows = [" ".join(re.sub(r"[─-╿]|-{5,}", " ", row).split()) for row in text.splitlines()]
    rows = [row for row in rows if row]
    return " ".join(rows[1:] or rows)


def flags(config_class: type, prefix: str = "") -> list[str]:
    """List the flags that `parse` accepts for a dataclass, in the order of its fields."""
    import tyro

    found: list[str] = []
    hints = typing.get_type_hints(config_class, include_extras=True)
    for field in dataclasses.fields(config_class):
        kind = hints[field.name]
        name = field.name.replace("_", "-")
        inner_prefix = f"{prefix}{name}."
        if typing.get_origin(kind) is Annotated:
            kind, *marks = typing.get_args(kind)
            if tyro.conf.Positional in marks:
                continue
            if any(getattr(mark, "name", None) == "" for mark in marks):
                inner_prefix = prefix  # tyro.conf.arg(name=""): the fields of the inner class
        nested = [k for k in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(k)]
        for inner in nested:
            found += flags(typing.cast(type, inner), inner_prefix)
        if not nested:
            found += [f"--{prefix}{name}"] + [f"--{prefix}no-{name}"] * (kind is bool)
    return found


def version() -> str:
    """Return the version of this library, from its metadata or from the checkout."""
    import importlib.metadata
    import tomllib

    try:
        return importlib.metadata.version("modelrl")
    except importlib.metadata.PackageNotFoundError:
        project = Path(__file__).resolve().parents[1] / "pyproject.toml"
        return tomllib.loads(project.read_text("utf-8"))["project"]["version"]


def use_large_pages() -> None:
    """Start this process again with a heap of large pages, where that makes a difference.

    XLA:CPU maps its temporaries anew at every call; on Linux with pages of 4 KiB the faults take
    10 to 20 % of an update. glibc reads its choice of pages as a process starts, and only there.
    A `GLIBC_TUNABLES` that is set already is respected; one that is empty turns this off.
    """
    name = "CS_GNU_LIBC_VERSION"
    if name not in getattr(os, "confstr_names", ()) or "GLIBC_TUNABLES" in os.environ:
        return
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"  # advice: the kernel may decline
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def enable_compilation_cache() -> Path | None:
    """Keep compiled programs between runs, also those that compile quickly.

    Respects `JAX_COMPILATION_CACHE_DIR`; `JAX_ENABLE_COMPILATION_CACHE=0` turns it off.

    Returns:
      The folder; None when there is none that can be written.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or Path(base) / "modelrl" / "jax")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        if name.upper() in os.environ:
            continue
        os.environ[name.upper()] = str(value)
        if "jax" in sys.modules:  # which has read the environment already
            sys.modules["jax"].config.update(name, value)
    _mend(folder)
    return folder


def _mend(folder: Path) -> None:
    """Delete a compiled program that cannot be read, so that it is written anew.

    A killed process may leave half an entry. jax neither uses nor replaces it, but
    compiles and warns in every later run; its warning is where it can be caught.
    """
    show = warnings.showwarning
    if getattr(show, "mends", None) == folder:
        return

    def mend(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        torn = re.match(
            r"Error reading persistent compilation cache entry for '(\w+)'", str(message)
        )
        if torn is None:
            return show(message, *args, **kwargs)
        for entry in folder.glob(f"{torn[1]}-*-cache"):
            entry.unlink(missing_ok=True)

    mend.mends = folder  # type: ignore[attr-defined]
    warnings.showwarning = mend


def _nearest(name: str, valid: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _filled(words: Sequence[str]) -> str:
    return textwrap.fill(
        " ".join(words),
        width=96,
        initial_indent="  ",
        subsequent_indent="  ",
        break_on_hyphens=False,
    )


def _usage() -> str:
    lines = [f"  {name:<10}{text}" for name, text in JOBS.items()]
    return "\n".join(
        ["usage: mbrl <job> [flags]   (mbrl <job> --help lists the flags)", "", *lines]
    )


if __name__ == "__main__":
    sys.exit(main())
