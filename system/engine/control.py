"""Control of generation servers over HTTP: what one says about itself, whether it is up, that it go on."""

from __future__ import annotations

import asyncio
from typing import Any, Self

from system.engine.protocol import EngineError, EngineInfo
from system.engine.stream import version_number
from system.http import HttpClient, HttpError

CONTROL_DEADLINE_S = 120.0  # of one call: it may wait for a step of a large model, or for weights to load
HEALTH_DEADLINE_S = 5.0  # of an answer that costs the server nothing
Body = dict[str, Any] | bytes  # JSON, or raw bytes


class Unreachable(EngineError):
    """Nobody listens at that address."""


class Http(HttpClient):
    """Connections to any number of generation servers; how many there may be is the caller's to bound."""

    async def post(
        self, url: str, path: str, body: Body, limit_s: float = CONTROL_DEADLINE_S
    ) -> dict[str, Any]:
        """The answer's JSON object.  Raises :class:`EngineError` for any failure, and after ``limit_s``."""
        return await self._call("POST", url + path, body, limit_s)

    async def get(self, url: str, path: str, limit_s: float = CONTROL_DEADLINE_S) -> dict[str, Any]:
        """As :meth:`post`."""
        return await self._call("GET", url + path, None, limit_s)

    async def _call(self, method: str, url: str, body: Body | None, limit_s: float) -> dict[str, Any]:
        try:
            return await self.request(method, url, body, limit_s)
        except HttpError as error:
            raise (Unreachable if error.refused else EngineError)(str(error)) from error


class EngineControl:
    """One server's control calls.  An async context manager, or :meth:`close` it."""

    def __init__(self, url: str, http: Http | None = None) -> None:
        """``http``: connections that the caller closes; None: its own."""
        self.url, self._http = url.rstrip("/"), http or Http()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.close()

    async def info(self, limit_s: float = CONTROL_DEADLINE_S) -> EngineInfo:
        """What the server says about itself.  Raises :class:`EngineError`, as every call here."""
        model, loads, ready = await asyncio.gather(
            self._http.get(self.url, "/model_info", limit_s),
            self._http.get(self.url, "/v1/loads", limit_s),
            self._answers("/ready", limit_s),  # SGLang's is 503 while it is paused
        )
        try:
            (load,) = loads["loads"]  # one data-parallel rank: replicas are servers of their own
            return EngineInfo(
                weight_version=version_number(model["weight_version"]),
                running=int(load["num_running_reqs"]),
                waiting=int(load["num_waiting_reqs"]),
                max_running=int(load["max_running_requests"]),
                paused=not ready,
                counters={k: float(v) for k, v in load.items() if isinstance(v, int | float)},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(f"{self.url}: unexpected /model_info or /v1/loads: {error!r}") from error

    async def healthy(self) -> bool:
        """Whether the server answers, paused or not."""
        return await self._answers("/health", HEALTH_DEADLINE_S)

    async def wait_ready(self, deadline_s: float) -> None:
        """Return once the server is healthy.  Raises :class:`EngineError` at the deadline."""
        until = asyncio.get_running_loop().time() + deadline_s
        while not await self.healthy():
            if asyncio.get_running_loop().time() >= until:
                raise EngineError(f"{self.url}: not ready within {deadline_s} s")
            await asyncio.sleep(0.1)

    async def resume(self) -> None:
        """Go on generating after a pause."""
        await self.post("/continue_generation")

    async def post(self, path: str, **body: object) -> None:
        """Any other control call of SGLang's protocol."""
        await self._http.post(self.url, path, body)

    async def _answers(self, path: str, limit_s: float) -> bool:
        try:
            await self._http.get(self.url, path, limit_s)
        except EngineError:
            return False
        return True
