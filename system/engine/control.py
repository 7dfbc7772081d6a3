"""Control of one server: what it says about itself, whether it is up, and that it go on generating."""

from __future__ import annotations

import asyncio
from typing import Self

from system.engine.http import CONTROL_DEADLINE_S, Http
from system.engine.protocol import EngineError, EngineInfo
from system.engine.stream import version_number

HEALTH_DEADLINE_S = 5.0  # of an answer that costs the server nothing


class EngineControl:
    """One server's control calls over HTTP.  An async context manager, or :meth:`close` it."""

    def __init__(self, url: str) -> None:
        self.url, self._http = url.rstrip("/"), Http()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.close()

    async def info(self) -> EngineInfo:
        """What the server says about itself.  Raises :class:`EngineError`, as every call here."""
        return await info(self._http, self.url)

    async def healthy(self) -> bool:
        """Whether the server answers, paused or not."""
        return await _answers(self._http, self.url, "/health", HEALTH_DEADLINE_S)

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


async def info(http: Http, url: str, limit_s: float = CONTROL_DEADLINE_S) -> EngineInfo:
    """What the server at ``url`` says about itself, asked over ``http``."""
    model, loads, ready = await asyncio.gather(
        http.get(url, "/model_info", limit_s),
        http.get(url, "/v1/loads", limit_s),
        _answers(http, url, "/ready", limit_s),  # SGLang's is 503 while it is paused
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
        raise EngineError(f"{url}: unexpected /model_info or /v1/loads: {error!r}") from error


async def _answers(http: Http, url: str, path: str, limit_s: float) -> bool:
    try:
        await http.get(url, path, limit_s)
    except EngineError:
        return False
    return True
