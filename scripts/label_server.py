"""The server of `mbrl label`: a page for one person of this machine, and what it asks for."""

from __future__ import annotations

import io
import json
import math
import secrets
import sys
import threading
import urllib.parse
from pathlib import Path
from typing import Any

import numpy as np

from mbrl.training.answer_store import AnswerStore, Question
from mbrl.training.comparison_files import named
from mbrl.training.comparison_store import ComparisonStore, Query

PAGE = Path(__file__).with_name("label_page.html")
MAX_LINES = 24
"""Dimensions that are drawn where there are no frames."""
_HOSTS = ("localhost", "127.0.0.1")
_MAX_BODY = 4096
_HEADERS = (
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class RefusedError(Exception):
    """A request that is not answered.

    Attributes:
      status: of HTTP.
    """

    def __init__(self, status: int, text: str) -> None:
        """Keep the status beside the message."""
        super().__init__(text)
        self.status = status


class Session:
    """The questions that one person is asked, one at a time; several threads may use it.

    Attributes:
      store: of the questions.
      by: name of the person.
      given: answers so far, without those that were taken back.
    """

    def __init__(self, store: ComparisonStore | AnswerStore, by: str) -> None:
        """Ask the pending queries of a store, oldest first."""
        self.store, self.by, self.given = store, by, 0
        text = isinstance(store, AnswerStore)
        self._options = store.options if text else store.schema.options
        self._lock = threading.Lock()
        self._shown: Query | Question | None = None
        self._damaged: set[str] = set()

    def state(self) -> dict[str, Any]:
        """Say which query is shown (None while there is none to answer), and the progress."""
        with self._lock:
            return self._state()

    def _state(self) -> dict[str, Any]:
        labels, bad = self.store.read_labels()
        answered = {label.query for label in labels}
        queries = self.store.queries()
        if self._shown is None or self._shown.id in answered:
            self._shown = self._next([query for query in queries if query not in answered])
        return {
            "query": self._shown.id if self._shown else None,
            "options": self._options,
            "answered": len(answered),
            "skipped": sum(label.rank is None for label in labels),
            "total": len(queries),
            "bad_lines": sum(bad.values()),
            "damaged": len(self._damaged),
            "by": self.by,
            "store": str(self.store.path).encode("utf-8", "replace").decode(),
        }

    def _next(self, pending: list[str]) -> Query | Question | None:
        for query in pending:
            if query not in self._damaged:
                try:
                    return self.store.read_query(query)
                except ValueError as error:
                    self._damaged.add(query)
                    print(f"warning: not shown: {error}", file=sys.stderr)
        return None

    def answer(self, query: Any, rank: Any) -> dict[str, Any]:
        """Write the answer to the query that is shown; it is on the disk when this returns.

        Args:
          query: id of what was answered.
          rank: K ranks, None = skipped.

        Returns:
          See `state`, with the next query.

        Raises:
          RefusedError: for another query than the shown one, one that has been answered
            meanwhile, or a rank that does not fit.
        """
        with self._lock:
            if self._shown is None or query != self._shown.id:
                raise RefusedError(409, f"query {query!r:.40} is not the one that is shown")
            if rank is not None and not isinstance(rank, list):
                raise RefusedError(400, f"rank: got {rank!r:.60}, expected a list or null")
            labelled = query in {label.query for label in self.store.read_labels().labels}
            try:
                self.store.add_label(query, rank, by=self.by, replace=False)
            except ValueError as error:
                raise RefusedError(409 if labelled else 400, str(error)) from None
            self.given += 1
            return self._state()

    def undo(self) -> dict[str, Any]:
        """Take the last answer of this person back, and show its query again.

        Raises:
          RefusedError: when there is none.
        """
        with self._lock:
            mine = [x.query for x in self.store.read_labels().labels if x.by == self.by]
            if not mine:
                raise RefusedError(409, "there is no answer of yours to take back")
            shown = self.store.read_query(mine[-1])
            self.store.undo(mine[-1], self.by)
            self._shown, self.given = shown, max(self.given - 1, 0)
            return self._state()

    def shown(self, query: str) -> Query | Question:
        """Return the query that is shown.

        Raises:
          RefusedError: when it is another one than `query`.
        """
        found = self._shown
        if found is None or found.id != query:
            raise RefusedError(404, f"query {query!r:.40} is not the one that is shown")
        return found


def view(query: Query | Question) -> dict[str, Any]:
    """Describe a query for the page: text, frames, or lines of the observations over time."""
    if isinstance(query, Question):
        return {"query": query.id, "prompt": query.prompt, "captions": query.answers}
    frames = frames_of(query)
    found: dict[str, Any] = {"query": query.id, "captions": query.captions}
    if frames is not None:
        _, count, height, width, _ = frames.shape
        sizes = {"count": count, "height": height, "width": width}
        return {**found, "frames": {**sizes, "columns": _columns(count, height, width)}}
    lines = []
    for name, array in _observations(query).items():
        columns = np.asarray(array, np.float64).reshape(*array.shape[:2], -1)
        single = columns.shape[-1] == 1
        lines += [
            {"name": name if single else f"{name}[{i}]", "values": columns[..., i].tolist()}
            for i in range(columns.shape[-1])
        ]
    return {**found, "lines": lines[:MAX_LINES], "hidden": len(lines[MAX_LINES:])}


def frames_of(query: Query) -> np.ndarray | None:
    """Return frames [K, T, H, W, 3] to show: those of the query, or observations that are some."""
    if query.frames is not None:
        return query.frames
    for array in _observations(query).values():
        if array.dtype == np.uint8 and array.ndim == 5 and array.shape[-1] in (1, 3):
            return np.broadcast_to(array, (*array.shape[:-1], 3))
    return None


def film(query: Query | Question, option: int) -> bytes:
    """Return the frames of one option as one PNG, in rows of the number that `view` tells."""
    frames = None if isinstance(query, Question) else frames_of(query)
    if frames is None or not 0 <= option < len(frames):
        raise RefusedError(404, f"query {query.id} has no film {option}")
    from PIL import Image

    count, height, width, _ = frames[option].shape
    columns = _columns(count, height, width)
    rows = math.ceil(count / columns)
    sheet = np.zeros((rows * columns, height, width, 3), np.uint8)
    sheet[:count] = frames[option]
    sheet = sheet.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    file = io.BytesIO()
    image = Image.fromarray(sheet.reshape(rows * height, columns * width, 3))
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _columns(count: int, height: int, width: int) -> int:
    """Make the sheet about square: browsers limit the sides of an image."""
    return min(max(math.ceil(math.sqrt(count * height / width)), 1), count)


def _observations(query: Query) -> dict[str, np.ndarray]:
    arrays = named(query.segments)
    return {
        name.removeprefix("obs/"): array
        for name, array in arrays.items()
        if name == "obs" or name.startswith("obs/")
    }


def make_app(session: Session, token: str) -> Any:
    """Build the page and what it asks for, as an ASGI application."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    async def page(request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
            "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'"
        )
        text = PAGE.read_text("utf-8").replace("NONCE", nonce)
        return HTMLResponse(text, headers={"content-security-policy": policy})

    async def state(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(session.state))

    async def query(request: Request) -> Response:
        shown = session.shown(request.query_params.get("query", ""))
        return JSONResponse(await run_in_threadpool(view, shown))

    async def clip(request: Request) -> Response:
        shown = session.shown(request.query_params.get("query", ""))
        option = request.query_params.get("option", "")
        if not (option.isascii() and option.isdigit() and len(option) < 4):
            raise RefusedError(404, f"option: got {option!r:.40}, expected a number")
        data = await run_in_threadpool(film, shown, int(option))
        return Response(data, media_type="image/png")

    async def answer(request: Request) -> Response:
        body = await _body(request)
        if not isinstance(body, dict) or body.keys() != {"query", "rank"}:
            raise RefusedError(400, "expected a JSON object with query and rank")
        done = await run_in_threadpool(session.answer, body["query"], body["rank"])
        return JSONResponse(done)

    async def undo(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(session.undo))

    def refused(request: Request, error: Exception) -> Response:
        status = error.status if isinstance(error, RefusedError) else 500
        return JSONResponse({"error": str(error)}, status)

    routes = [
        Route("/", page), Route("/api/state", state), Route("/api/query", query),
        Route("/clip", clip), Route("/api/answer", answer, methods=["POST"]),
        Route("/api/undo", undo, methods=["POST"]),
    ]  # fmt: skip
    errors: dict[Any, Any] = {RefusedError: refused, ValueError: refused, OSError: refused}
    return _guarded(Starlette(routes=routes, exception_handlers=errors), token)


async def _body(request: Any) -> Any:
    """Read a short JSON body."""
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > _MAX_BODY:
            raise RefusedError(413, f"expected at most {_MAX_BODY} bytes")
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise RefusedError(400, "expected JSON") from None


def _guarded(app: Any, token: str) -> Any:
    """Let only requests through that know the token and ask for this machine by its name."""

    async def guard(scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import PlainTextResponse

        if scope["type"] != "http":
            return

        async def hardened(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *_HEADERS]}
            await send(message)

        hosts = [value.decode("latin1") for name, value in scope["headers"] if name == b"host"]
        given = urllib.parse.parse_qs(scope["query_string"].decode("latin1")).get("token", [])
        # A page of another site may make its name point here, but the browser sends that name.
        if len(hosts) != 1 or hosts[0].partition(":")[0].lower() not in _HOSTS:
            refusal = "403: open this page as 127.0.0.1"
        elif len(given) != 1 or not secrets.compare_digest(given[0].encode(), token.encode()):
            refusal = "403: the address lacks the token that `mbrl label` has printed"
        else:
            return await app(scope, receive, hardened)
        await PlainTextResponse(refusal, 403)(scope, receive, hardened)

    return guard


def make_server(session: Session, token: str) -> Any:
    """Build the server; it runs until a signal comes or `should_exit` is set."""
    import uvicorn

    config = uvicorn.Config(
        make_app(session, token), http="h11", ws="none", loop="asyncio", lifespan="off",
        log_level="error", access_log=False, server_header=False, proxy_headers=False,
        timeout_graceful_shutdown=2,
    )  # fmt: skip
    return uvicorn.Server(config)
