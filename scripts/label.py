"""`mbrl label RUN`: a page in the browser on which people say which clip or answer is better."""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import importlib.util
import secrets
import socket
import sys
import threading
import webbrowser
from pathlib import Path

if __name__ == "__main__":  # run as a file: imports start at the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro

from mbrl.training.answer_store import AnswerStore
from mbrl.training.comparison_store import COMPARISONS, SCHEMA, ComparisonStore
from mbrl.training.run_directory import StopSignal
from scripts.cli import parse, run
from scripts.label_server import Session, make_server


@dataclasses.dataclass(frozen=True)
class LabelConfig:
    """Show the pending comparisons of a run on a page of this machine, and write the answers.

    Training may go on meanwhile: the page waits for the next question. Answers of a language
    model are ranked in the same way, and written to rankings.jsonl when this ends.
    """

    store: tyro.conf.Positional[str]
    """Folder of a run, or of a store of comparisons, or a file of JSON lines, each with a prompt
    and its answers; what is said of these goes to a folder beside it."""
    port: int = 0
    """Of the page; 0 = any that is free."""
    by: str = ""
    """Who answers, written beside every answer; the name of the user when empty."""
    open: bool = True
    """Open the page in the browser."""


def main(argv: list[str]) -> int:
    """Run the job."""
    config = parse(LabelConfig, argv, "mbrl label")
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'mbrl label needs {" and ".join(missing)}: pip install "modelrl[label]"')
    session = Session(find_store(Path(config.store)), config.by or _user())
    token = secrets.token_urlsafe(24)
    with contextlib.closing(listen(config.port)) as listener, StopSignal():
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/?token={token}"
        print(f"label at {url}\n(Ctrl-C ends; nobody else can open this page)", flush=True)
        if config.open:  # some browsers run in the terminal and do not return
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
        make_server(session, token).run(sockets=[listener])
    if isinstance(session.store, AnswerStore):
        session.store.write_rankings()
    print(f"{session.given} answers by {session.by!r} in this session, {session.store.path}")
    return 0


def find_store(path: Path) -> ComparisonStore | AnswerStore:
    """Open the store in a folder or that of a run, or the questions in a file.

    Raises:
      ValueError: when there is none, or the file holds anything else.
    """
    if path.is_file():
        return AnswerStore(path)
    for folder in (path, path / COMPARISONS):
        if (folder / SCHEMA).exists():
            return ComparisonStore.open(folder, on_bad="skip")
    raise ValueError(
        f"{path}: expected a store of comparisons, found no {SCHEMA} there or in "
        f"{path / COMPARISONS}; train with --preferences.labels 200 --preferences.teacher people "
        "first"
    )


def listen(port: int) -> socket.socket:
    """Take a port of this machine, which other machines cannot reach.

    Raises:
      ValueError: when somebody else has it.
    """
    if not 0 <= port < 65536:
        raise ValueError(f"--port: got {port}, expected 0 .. 65535")
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen(64)
    except OSError as error:
        listener.close()
        raise ValueError(
            f"--port: {port} cannot be used ({error.strerror}); name another, or leave it out"
        ) from error
    return listener


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container may not know its user
        return "somebody"


if __name__ == "__main__":
    sys.exit(run(main))
