"""The one HTTP client, for generation servers and tool servers: kept connections, deadlines, one error.

It follows no redirect, so a server cannot send it to another one, and shows each server the key that was
given for that server and no other.
"""

from __future__ import annotations

import ipaddress
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, Self
from urllib.parse import urlsplit

import aiohttp

from system.awake import AwakeTimeout
from system.errors import EspalierError

MAX_ANSWER_BYTES = 64 << 20
CONNECT_S = 5.0  # to open a connection
_PASSING = (408, 425, 429)  # refusals that a later attempt may not meet


class HttpError(EspalierError):
    """A call that brought no usable answer."""

    def __init__(
        self,
        message: str,
        *,
        refused: bool = False,
        passing: bool = True,
        status: int = 0,
        said: str = "",
        retry_after_s: float = 0.0,
    ) -> None:
        """``refused``: nobody listens there; ``passing``: the same call may succeed later; ``status``: of the
        answer, 0 without one, and ``said``, its text; ``retry_after_s``: how long it asks to be left alone.
        """
        super().__init__(message)
        self.refused, self.passing, self.status, self.said = refused, passing, status, said
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Keys:
    """What a run's servers want to be shown; empty: nothing.  Not in its ``repr``, so not in a log."""

    engines: str = field(default="", repr=False)
    tools: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)  # by the tool's name
    rewards: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)  # by their variable's name
    teacher: str = field(default="", repr=False)
    sessions: str = field(default="", repr=False)  # what agents that somebody else starts show us


class HttpClient:
    """A pool of connections to any number of servers, opened at the first call and kept for the next.

    An async context manager, or :meth:`close` it.
    """

    def __init__(self, connections: int = 0, keys: Mapping[str, str] | None = None) -> None:
        """``connections``: at most so many at once, to all servers together; 0: the caller bounds them.
        ``keys``: by URL, what each server wants to be shown (a bearer token); empty: nothing.
        """
        self._session: aiohttp.ClientSession | None = None
        self._connections = connections
        self._keys = {_server(url): key for url, key in (keys or {}).items() if key}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        """Made at the first call: it belongs to the event loop that is running then."""
        if self._session is None or self._session.closed:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._connections),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
            )
        return self._session

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def authorization(self, url: str) -> dict[str, str]:
        """The header that shows the server of ``url`` its key; none where it has none."""
        key = self._keys.get(_server(url))
        return {"Authorization": f"Bearer {key}"} if key else {}

    def hidden(self, url: str, text: str) -> str:
        """What the server of ``url`` says, without the key, which it may repeat."""
        key = self._keys.get(_server(url))
        return text.replace(key, "…") if key else text

    async def request(
        self,
        method: str,
        url: str,
        body: Mapping[str, Any] | bytes | None = None,
        limit_s: float | None = None,
    ) -> dict[str, Any]:
        """The JSON object that a server answers; empty when it answers something else than JSON.

        ``body``: sent as JSON, bytes as they are.  Raises :class:`HttpError` for any failure, and after
        ``limit_s`` seconds in which the event loop runs (None: the caller sets the deadline).
        """
        content: dict[str, Any] = {"json": body}
        headers: dict[str, str] = {}
        if isinstance(body, bytes):
            content, headers = {"data": body}, {"Content-Type": "application/octet-stream"}
        try:
            headers |= self.authorization(url)
            async with (
                AwakeTimeout(limit_s),
                self.session.request(
                    method, url, headers=headers, allow_redirects=False, **content
                ) as response,
            ):
                data = await _body(response)
        except aiohttp.ConnectionTimeoutError as error:  # a TimeoutError, too
            raise HttpError(f"no connection within {CONNECT_S:g} s at {url}") from error
        except TimeoutError as error:
            raise HttpError(f"no answer from {url} within {limit_s:g} s") from error
        except ValueError as error:  # aiohttp's InvalidURL is one
            raise HttpError(f"not a URL: {url!r}", passing=False) from error
        except (aiohttp.ClientError, OSError) as error:
            refused = isinstance(error, aiohttp.ClientConnectorError)
            raise HttpError(f"{_reason(error)} at {url}", refused=refused) from error
        if response.status != 200:
            passing = response.status >= 500 or response.status in _PASSING
            message = data[:2000].decode(errors="replace").strip()
            message = self.hidden(url, message)
            told = f"HTTP {response.status} at {url}: {message}"
            raise HttpError(
                told,
                passing=passing,
                status=response.status,
                said=message,
                retry_after_s=retry_after_s(response.headers.get("Retry-After", "")),
            )
        if "json" not in response.content_type:
            return {}
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
            raise HttpError(f"no JSON from {url}: {error}", passing=False) from error
        if not isinstance(answer, dict):
            raise HttpError(f"no JSON object from {url}", passing=False)
        return answer


def retry_after_s(header: str) -> float:
    """``Retry-After`` in seconds from now: a number of them, or a date (RFC 9110 §10.2.3); 0 for neither."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def is_loopback(host: str) -> bool:
    """Whether a host's name or address means this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _server(url: str) -> str:
    """``http://host:1/path`` -> ``http://host:1``.  Raises ValueError."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


async def _body(response: aiohttp.ClientResponse) -> bytes:
    """The whole body, unless a server sends more than any answer needs."""
    data = bytearray()
    async for chunk in response.content.iter_chunked(1 << 16):
        data += chunk
        if len(data) > MAX_ANSWER_BYTES:
            raise HttpError(f"more than {MAX_ANSWER_BYTES} bytes from {response.url}", passing=False)
    return bytes(data)


def _reason(error: Exception) -> str:
    """The short name of a connection failure."""
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, aiohttp.ServerDisconnectedError | ConnectionResetError):
        return "connection lost"
    return f"{type(error).__name__}: {error}"
