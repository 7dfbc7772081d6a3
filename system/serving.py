"""Running an aiohttp application as a small server: embedded in a running loop, or as a program."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import dataclass
from typing import Any

from aiohttp import web

SHUTDOWN_S = 2.0


@dataclass(frozen=True)
class AppServer:
    """A started server."""

    runner: web.AppRunner
    url: str

    async def close(self) -> None:
        """Stop it and run the application's clean-up."""
        await self.runner.cleanup()


async def serve(app: web.Application, host: str = "127.0.0.1", port: int = 0) -> AppServer:
    """Start ``app`` in the running loop; port 0 takes a free one.  Raises what the application's start-up
    raises.

    A request whose client has gone away is cancelled.
    """
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
    """Serve until SIGINT or SIGTERM; prints the address."""
    stop = stop_signals()
    server = await serve(app, host, port)
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


async def json_object(request: web.Request) -> dict[str, Any]:
    """The request's body.  Raises 415 unless it is declared as JSON (which a web page cannot send across
    origins unasked), 400 unless it is a JSON object."""
    if request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType(text="send application/json")
    try:
        body = await request.json()
    except ValueError as error:
        raise web.HTTPBadRequest(text=f"not JSON: {error}") from error
    if not isinstance(body, dict):
        raise web.HTTPBadRequest(text="send a JSON object")
    return body
