"""HTTP to generation servers: every failure is an :class:`~system.engine.protocol.EngineError`."""

from __future__ import annotations

from typing import Any

from system.engine.protocol import EngineError
from system.http import HttpClient, HttpError

CONTROL_DEADLINE_S = 120.0  # of one call: it may wait for a step of a large model, or for weights to load
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
