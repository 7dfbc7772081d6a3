"""Control of generation servers over HTTP: what one says about itself, whether it is up, any other call."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from system.awake import AwakeTimeout
from system.engine.protocol import EngineError, EngineInfo
from system.engine.stream import version_number
from system.http import HttpClient, HttpError

CONTROL_DEADLINE_S = 120.0  # of one call: it may wait for a step of a large model, or for weights to load
HEALTH_DEADLINE_S = 5.0  # of an answer that costs the server nothing
Body = dict[str, Any] | bytes  # JSON, or raw bytes


class Silent(EngineError):
    """The server did not answer: it is gone, or hangs.  Any other error of a call is an answer."""


class Unreachable(Silent):
    """Nobody listens at that address."""


class Http(HttpClient):
    """Connections to any number of generation servers; how many there may be is the caller's to bound."""

    def __init__(self, urls: Iterable[str] = (), key: str = "") -> None:
        """``key``: what the servers at ``urls`` want to be shown."""
        super().__init__(keys=dict.fromkeys(urls, key))

    async def call(
        self, url: str, body: Body | None = None, limit_s: float = CONTROL_DEADLINE_S
    ) -> dict[str, Any]:
        """The JSON object that answers a POST of ``body``, or a GET without one.

        Raises :class:`EngineError` for any failure, also where SGLang reports it with status 200, and after
        ``limit_s``.
        """
        try:
            answer = await self.request("GET" if body is None else "POST", url, body, limit_s)
        except HttpError as error:
            kind = Unreachable if error.refused else EngineError if error.status else Silent
            raise kind(str(error)) from error
        if answer.get("success") is False:
            raise EngineError(f"{url}: {answer.get('message')}")
        return answer


@dataclass(slots=True)
class EngineControl:
    """One server's control calls."""

    url: str
    http: Http

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")

    async def info(self, limit_s: float = CONTROL_DEADLINE_S) -> EngineInfo:
        """What the server says about itself.  Raises :class:`EngineError`, as every call here."""
        model, loads, ready = await asyncio.gather(
            self.http.call(f"{self.url}/model_info", None, limit_s),
            self.http.call(f"{self.url}/v1/loads", None, limit_s),
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
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise EngineError(f"{self.url}: unexpected /model_info or /v1/loads: {error!r}") from error

    async def wait_ready(self, deadline_s: float) -> None:
        """Return once the server answers, paused or not.  Raises :class:`EngineError` at the deadline."""
        try:
            async with AwakeTimeout(deadline_s):
                while not await self._answers("/health", HEALTH_DEADLINE_S):  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
        except TimeoutError as error:
            raise EngineError(f"{self.url}: not ready within {deadline_s} s") from error

    async def post(self, path: str, *, limit_s: float = CONTROL_DEADLINE_S, **body: Any) -> dict[str, Any]:
        """Any other call of SGLang's protocol."""
        return await self.http.call(self.url + path, body, limit_s)

    async def _answers(self, path: str, limit_s: float) -> bool:
        try:
            await self.http.call(self.url + path, None, limit_s)
        except EngineError:
            return False
        return True
