"""The python tool as an HTTP server: POST /run {"code", "deadline_s"?}, GET /health.

    python -m system.tools.python_server --port 8102

A reply to /run is {"status": "ok" | "error" | "timeout", "text"} and the other fields of
:class:`system.tools.sandbox.result.SandboxResult`; 400 for a malformed request, 503 when the sandbox itself
is broken.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict

from aiohttp import web

from system.config import ToolsConfig
from system.serving import json_object, serve_until_signal
from system.tools.sandbox.sandbox import PRELOADED, Sandbox, SandboxLimits, SandboxUnavailable

SANDBOX = web.AppKey("sandbox", Sandbox)


def create_app(sandbox: Sandbox) -> web.Application:
    """It starts ``sandbox``, which raises SandboxUnavailable where programs cannot be confined."""
    app = web.Application(client_max_size=2 << 20)
    app[SANDBOX] = sandbox
    app.cleanup_ctx.append(_sandbox_running)
    app.router.add_post("/run", _run)
    app.router.add_get("/health", _health)
    return app


async def _sandbox_running(app: web.Application) -> AsyncIterator[None]:
    await app[SANDBOX].start()
    yield
    await app[SANDBOX].close()


async def _run(request: web.Request) -> web.Response:
    body = await json_object(request)
    code, deadline_s = body.get("code"), body.get("deadline_s")
    if not isinstance(code, str):
        raise web.HTTPBadRequest(text="'code' must be a string")
    if deadline_s is not None and (isinstance(deadline_s, bool) or not isinstance(deadline_s, int | float)):
        raise web.HTTPBadRequest(text="'deadline_s' must be a number of seconds")
    try:
        result = await request.app[SANDBOX].run(code, deadline_s=deadline_s)
    except SandboxUnavailable as error:
        raise web.HTTPServiceUnavailable(text=str(error)) from error
    return web.json_response(asdict(result) | {"text": result.text})


async def _health(request: web.Request) -> web.Response:
    sandbox = request.app[SANDBOX]
    return web.json_response(
        {
            "ok": True,
            "tool": "python",
            "pid": sandbox.pid,
            "confined_by": sandbox.mechanisms,
            "modules": sorted(sandbox.packages.modules),
        }
    )


def main() -> None:
    defaults = SandboxLimits()
    parser = argparse.ArgumentParser(description="Run model-written Python in a sandbox, over HTTP.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--concurrency", type=int, default=16, help="programs at once")
    parser.add_argument("--wall-s", type=float, default=defaults.wall_s)
    parser.add_argument("--cpu-s", type=float, default=defaults.cpu_s)
    parser.add_argument("--memory-mb", type=int, default=defaults.memory_mb)
    parser.add_argument("--output-chars", type=int, default=defaults.output_chars)
    parser.add_argument(
        "--package", action="append", help="installed package to offer (default: numpy, sympy)"
    )
    parser.add_argument("--path", action="append", default=[], help="directory of packages to offer")
    parser.add_argument("--preload", action="append", default=[], help="module to import only once")
    args = parser.parse_args()
    limits = SandboxLimits(args.wall_s, args.cpu_s, args.memory_mb, args.output_chars)
    preload = (*PRELOADED, *args.preload)
    packages = ToolsConfig().python_packages if args.package is None else args.package
    sandbox = Sandbox(
        limits, concurrency=args.concurrency, packages=packages, paths=args.path, preload=preload
    )
    try:
        asyncio.run(serve_until_signal(create_app(sandbox), args.host, args.port))
    except SandboxUnavailable as error:
        raise SystemExit(f"python_server: {error}") from error


if __name__ == "__main__":
    main()
