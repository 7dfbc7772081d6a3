"""HTTP to generation servers: one pool of kept connections, a deadline on every call, one kind of error."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp

from system.engine.protocol import EngineError

Body = dict[str, Any] | bytes  # JSON, or raw bytes


class Unreachable(EngineError):
    """Nobody listens at that address."""


class Http:
    """A pool of connections to any number of servers, opened at the first call.

    Connections are kept and used again; how many there may be is the caller's to bound.
    """

    def __init__(self, session: aiohttp.ClientSession | None = None, connect_s: float = 5.0) -> None:
        """``session``: one from outside, which then stays open on :meth:`close`."""
        self._session = session
        self._owns_session = session is None
        self.connect_s = connect_s

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=self.connect_s)
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)
        return self._session

    async def close(self) -> None:
        if self._session is not None and self._owns_session:
            await self._session.close()
            self._session = None

    async def post(self, url: str, path: str, body: Body, limit_s: float) -> dict[str, Any]:
        """The answer's JSON object.  Raises :class:`EngineError` for any failure, and after ``limit_s``."""
        if isinstance(body, bytes):
            return await self._call(
                "POST", url, path, limit_s, data=body, headers={"Content-Type": "application/octet-stream"}
            )
        return await self._call("POST", url, path, limit_s, json=body)

    async def get(self, url: str, path: str, limit_s: float) -> dict[str, Any]:
        """As :meth:`post`."""
        return await self._call("GET", url, path, limit_s)

    async def _call(self, method: str, url: str, path: str, limit_s: float, **body: Any) -> dict[str, Any]:
        try:
            async with asyncio.timeout(limit_s), self.session.request(method, url + path, **body) as response:
                if response.status != 200:
                    raise EngineError(f"{url}{path}: {response.status} {await message_of(response)}")
                if "json" not in response.content_type:
                    return {}
                answer = await response.json()
        except TimeoutError as error:
            raise EngineError(f"{url}{path}: no answer within {limit_s} s") from error
        except aiohttp.ClientConnectorError as error:
            raise Unreachable(f"{url}{path}: {error}") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise EngineError(f"{url}{path}: {type(error).__name__}: {error}") from error
        return answer if isinstance(answer, dict) else {}


async def message_of(response: aiohttp.ClientResponse) -> str:
    """The server's words, whatever their form."""
    text = (await response.content.read(65536)).decode(errors="replace")
    return text[:2000]
