"""Running an aiohttp application as a small server: embedded in a running loop, or as a program.

Every server here stands behind one guard.  Loopback is shared with all users of the machine and with the
pages in its browsers, so the guard asks for a key (a bearer token, for all but ``GET /health``), and takes
neither a foreign name for itself nor what a page can send without being asked:

=====  ==============================================================================================
 401   the key is missing or wrong (also a wrong one that is shown to ``/health``)
 415   a POST that is not declared as JSON, or as raw bytes where a handler takes those
 421   a ``Host`` that is no IP address, nor localhost, nor this machine's name, nor one of those
       that the server was told (DNS rebinding)
=====  ==============================================================================================
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import os
import random
import re
import signal
import socket
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

SHUTDOWN_S = 2.0
KEY_VARIABLE = "ESPALIER_KEY"  # environment of a server that is started by hand: what it wants to be shown
HEALTH = "/health"
JSON, BYTES = "application/json", "application/octet-stream"


@dataclass(frozen=True)
class AppServer:
    """A started server."""

    runner: web.AppRunner
    url: str

    async def close(self) -> None:
        """Stop it and run the application's clean-up."""
        await self.runner.cleanup()


async def serve(
    app: web.Application,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    key: str = "",
    names: Collection[str] = (),
    remedy: str = "send the address of this server, or localhost",
    free: Collection[str] = (HEALTH,),
) -> AppServer:
    """Start ``app`` in the running loop; port 0 takes a free one.  Raises what the application's start-up
    raises.

    ``key``: what a client must show; empty: nothing.  ``names``: further ones by which it may be asked for,
    without ports; ``remedy``: what a client is told that uses another.  ``free``: paths that may be got
    without the key.  A request whose client has gone away is cancelled.  An application has one server.
    """
    app.middlewares.insert(0, _guard(key, {host, *names}, remedy, free))
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=SHUTDOWN_S, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, reuse_address=True)
        await site.start()
    except BaseException:
        await runner.cleanup()
        raise
    bound_host, bound_port = runner.addresses[0][:2]
    shown = f"[{bound_host}]" if ":" in bound_host else bound_host
    return AppServer(runner, f"http://{shown}:{bound_port}")


async def serve_until_signal(app: web.Application, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM; prints the address.  The key, if any, is that of ``$ESPALIER_KEY``."""
    stop = stop_signals()
    server = await serve(app, host, port, key=os.environ.get(KEY_VARIABLE, ""))
    print(f"serving on {server.url}", flush=True)
    try:
        await stop.wait()
    finally:
        await server.close()


def stop_signals() -> asyncio.Event:
    """Set when SIGINT or SIGTERM comes."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


def _guard(key: str, own: Collection[str], remedy: str, unguarded: Collection[str]) -> Middleware:
    """What stands before every handler of a server with its ``own`` names."""
    names = {"localhost", os.uname().nodename.lower(), *(name.lower() for name in own)}
    expected = f"Bearer {key}".encode()

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not _names_us(request.host, names):
            told = {"message": f"Host: {request.host[:255]}: {remedy}", "code": "unknown_host"}
            raise web.HTTPMisdirectedRequest(text=json.dumps({"error": told}), content_type=JSON)
        # A page's browser asks first before it sends one of these types.  Without the header aiohttp assumes
        # bytes, which a page may send unasked: it must be there.
        declared = request.content_type if "Content-Type" in request.headers else ""
        if request.method not in ("GET", "HEAD") and declared not in (JSON, BYTES):
            raise web.HTTPUnsupportedMediaType(text=f"send {JSON}")
        shown = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        free = not key or (request.method == "GET" and request.path in unguarded and not shown)
        if not free and not hmac.compare_digest(shown, expected):
            raise web.HTTPUnauthorized(
                text="show this server's key: Authorization: Bearer …", headers={"WWW-Authenticate": "Bearer"}
            )
        return await handler(request)

    return guard


def _names_us(host: str, names: set[str]) -> bool:
    """Whether a ``Host`` header means a server that is known by its address or by ``names``."""
    match = re.fullmatch(r"\[([0-9a-fA-F:.]+)\](?::\d+)?|([\w.-]+)(?::\d+)?", host)
    name = (match[1] or match[2]).lower() if match else ""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in names
    return True


async def json_object(request: web.Request) -> dict[str, Any]:
    """The request's body.  Raises 415 unless it is declared as JSON, 400 unless it is a JSON object."""
    if request.content_type != JSON:
        raise web.HTTPUnsupportedMediaType(text=f"send {JSON}")
    try:
        body = await request.json()
    except ValueError as error:
        raise web.HTTPBadRequest(text=f"not JSON: {error}") from error
    if not isinstance(body, dict):
        raise web.HTTPBadRequest(text="send a JSON object")
    return body


def free_port(host: str = "127.0.0.1") -> int:
    """A port nobody listens on now.  Fixed for a run, so that a restarted server is found where it was.

    It is not one of those that the system hands out by itself, to connections and to servers that ask for
    any: between this look and the server's start another process would sooner or later be given it.
    """
    for port in random.sample(_ours(), 50):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind((host, port))
            return port
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _ours() -> range:
    """Above the ports of Ray's workers, below those that the system hands out."""
    try:
        lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        lowest = 32768
    return range(20_000, lowest) if lowest >= 20_100 else range(20_000, 32_768)
