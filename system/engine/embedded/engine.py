"""The embedded engine: the core, and an HTTP server for it in the caller's event loop."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from aiohttp import web

from system.config import EngineConfig
from system.engine.embedded.core import EngineCore
from system.engine.embedded.server import application

# The decoding thread gives up and retakes the interpreter lock around every torch operation.  At Python's
# default of 5 ms the HTTP thread would then hold it far longer than a whole decoding step of a small model
# takes.
_SWITCH_INTERVAL_S = 1e-4
STOP_S = 30.0  # for the decoding thread to end its step, and again for the server to close


class EmbeddedEngine(EngineCore):
    """Qwen2/Qwen3-class dense models behind SGLang's HTTP protocol, in this process.

    ``await start()`` serves until ``await stop()``; both belong to one event loop.
    """

    def __init__(
        self, config: EngineConfig, model_path: str | Path, *, dtype: str = "float32", seed: int | None = None
    ):
        super().__init__(config, model_path, dtype=dtype, seed=seed)
        self._runner: web.AppRunner | None = None
        self._switch_interval = sys.getswitchinterval()

    async def start(self, host: str | None = None, port: int = 0) -> str:
        """Start decoding and serving; returns the URL.  Port 0 picks a free one.

        Without a host it binds to loopback; any other address must be asked for by name.
        """
        host = "127.0.0.1" if host is None else host
        if not host:
            raise ValueError(
                "an empty host would listen on every interface; name the address (0.0.0.0 if you mean it)"
            )
        self._switch_interval = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        self.begin()
        runner = web.AppRunner(
            application(self), handler_cancellation=True, access_log=None, shutdown_timeout=2.0
        )
        self._runner = runner
        await runner.setup()
        site = web.TCPSite(runner, host, port)
        try:
            await site.start()
        except OSError:
            await self.stop()
            raise
        bound = runner.addresses[0][1]
        return f"http://{f'[{host}]' if ':' in host else host}:{bound}"

    async def stop(self) -> None:
        """Stop decoding (callers get an error) and serving."""
        sys.setswitchinterval(self._switch_interval)
        try:
            await asyncio.to_thread(self.loop.stop, STOP_S)
        finally:
            if self._runner is not None:
                async with asyncio.timeout(STOP_S):
                    await self._runner.cleanup()
                self._runner = None
