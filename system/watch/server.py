"""The server of ``espalier watch``: the page's files to anyone, what stands in a run to who shows the key.

The address that is printed carries the key behind ``#``, which a browser sends nowhere; the page takes it
from there and shows it in a header, so that neither another page nor another user's server on this machine
gets it.  The guard of :mod:`system.serving` compares it in constant time and refuses a foreign ``Host``.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web
from aiohttp.typedefs import Handler

from system.errors import EspalierError
from system.observe.terminal import shown, visible
from system.serving import AppServer, serve
from system.text import described
from system.watch import views
from system.watch.query import TreeFilter
from system.watch.reader import MOST_TEXT, RunReader

REFRESH_S = 1.0  # between looks at a run's files
SLICE_S = 0.15  # of reading trees, before somebody else has a turn
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
RUNS = web.AppKey("runs", list[RunReader])


def page_files() -> dict[str, Path]:
    """The files of the page, by the path they are got at."""
    static = Path(str(resources.files("system.watch"))) / "static"
    found = {f"/static/{path.name}": path for path in static.iterdir() if path.suffix in TYPES}
    return {"/": static / "index.html", **found}


async def start(runs: Sequence[Path], host: str = "127.0.0.1", port: int = 0) -> tuple[AppServer, str]:
    """Serve the runs; returns the server and the address to open, key included.

    Raises :class:`RunDirError` for what is no run.
    """
    key, files = secrets.token_urlsafe(24), page_files()
    app = application(told_apart([RunReader(root) for root in runs]), files)
    server = await serve(app, host, port, key=key, free=files.keys())
    return server, f"{server.url}/#key={key}"


def told_apart(runs: list[RunReader]) -> list[RunReader]:
    """The same; those of one name are called by their directories from here on."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = visible(str(run.run_dir.root))
    return runs


def application(runs: list[RunReader], files: dict[str, Path]) -> web.Application:
    """All but the guard."""
    app = web.Application(middlewares=[_told])
    app[RUNS] = runs
    app.on_response_prepare.append(_with_headers)
    app.cleanup_ctx.append(_reading)
    for path, file in files.items():
        app.router.add_get(path, _file(file))
    app.router.add_get("/api/runs", _runs)
    for name, view in _VIEWS.items():
        app.router.add_get(f"/api/runs/{{run:\\d{{1,9}}}}/{name}", _json(view))
    return app


async def _with_headers(_: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)


@web.middleware
async def _told(request: web.Request, handler: Handler) -> web.StreamResponse:
    """What was asked wrongly, in a line."""
    try:
        return await handler(request)
    except EspalierError as error:
        return _answer({"error": str(error)}, status=404)


async def _reading(app: web.Application) -> AsyncGenerator[None]:
    task = asyncio.create_task(_read(app[RUNS]), name="reading runs")
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _read(runs: list[RunReader]) -> None:
    """Read on, in a thread, by small pieces while there is much, else every second."""
    while True:
        for run in runs:
            try:
                await asyncio.to_thread(run.refresh, SLICE_S)
                run.trouble = ""
            except Exception as error:  # a file server's, say: the others are read on, and this one again
                run.trouble = shown(f"it cannot be read on: {described(error)}")
        busy = any(run.index.waiting and not run.trouble for run in runs)
        await asyncio.sleep(0.01 if busy else REFRESH_S)


def _file(path: Path) -> Callable[[web.Request], Any]:
    async def handler(_: web.Request) -> web.Response:
        body = await asyncio.to_thread(path.read_bytes)
        return web.Response(body=body, content_type=TYPES[path.suffix], charset="utf-8")

    return handler


def _json(view: Callable[[RunReader, web.Request], Any]) -> Callable[[web.Request], Any]:
    async def handler(request: web.Request) -> web.Response:
        runs, number = request.app[RUNS], int(request.match_info["run"])
        if number >= len(runs):
            raise web.HTTPNotFound(text=f"no run {number}")
        return _answer(await asyncio.to_thread(view, runs[number], request))

    return handler


def _answer(value: Any, status: int = 200) -> web.Response:
    body = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)
    return web.Response(body=body, status=status, content_type="application/json")


async def _runs(request: web.Request) -> web.Response:
    return _answer([{"name": run.name} for run in request.app[RUNS]])


def _overview(run: RunReader, _: web.Request) -> Any:
    state = run.state()
    with run.still:
        return views.overview(run, state)


def _settings(run: RunReader, _: web.Request) -> Any:
    with run.still:
        return views.settings(run)


def _curves(run: RunReader, request: web.Request) -> Any:
    keys = [key for key in request.query.get("keys", "").split(",") if key]
    with run.still:
        return {"keys": run.records.names(), "curves": views.curves(run.records, keys)}


def _timeline(run: RunReader, _: web.Request) -> Any:
    with run.still:
        return views.timeline(run)


def _evaluation(run: RunReader, _: web.Request) -> Any:
    with run.still:
        return views.evaluation(run)


def _trees(run: RunReader, request: web.Request) -> Any:
    asked = dict(request.query)
    offset = _count(asked, "offset")
    asked.pop("offset", None)
    return views.tree_list(run, TreeFilter.of(asked), offset)


def _count(asked: dict[str, str], name: str, default: int = 0) -> int:
    value = asked.get(name, "")
    return int(value) if value.isdecimal() and len(value) < 10 else default


def _tree(run: RunReader, request: web.Request) -> Any:
    return run.draw(int(request.match_info["tree"]))


def _node(run: RunReader, request: web.Request) -> Any:
    asked, at = dict(request.query), request.match_info
    first, count = _count(asked, "first"), _count(asked, "count", MOST_TEXT)
    return run.node_text(int(at["tree"]), int(at["node"]), first, count)


_VIEWS: dict[str, Callable[[RunReader, web.Request], Any]] = {
    "overview": _overview,
    "settings": _settings,
    "curves": _curves,
    "trees": _trees,
    r"trees/{tree:\d{1,15}}": _tree,
    r"trees/{tree:\d{1,15}}/nodes/{node:\d{1,9}}": _node,
    "timeline": _timeline,
    "evaluation": _evaluation,
}
