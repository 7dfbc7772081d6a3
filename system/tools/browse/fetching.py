"""Fetches a document from the web: only from where it is allowed, politely, and never more than wanted.

Every redirect and every address that a name resolves to is checked; no cookie is kept, no key is shown.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
import zlib
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from system.errors import EspalierError
from system.http import CONNECT_S, retry_after_s
from system.urls import Allowed, UrlRefused

MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_ACCEPT = "text/html,application/xhtml+xml,application/pdf,text/plain;q=0.9,*/*;q=0.5"
_FIRST_PAUSE_S = 0.5  # before the first further attempt, doubling
_MAX_HOSTS = 4096  # whose last fetch is remembered


class FetchFailed(EspalierError):
    """No document; the message is for the model.  ``passing``: it may be there later."""

    def __init__(self, message: str, *, passing: bool = False, retry_after_s: float = 0.0):
        super().__init__(message)
        self.passing, self.retry_after_s = passing, retry_after_s


@dataclass(frozen=True, slots=True)
class Fetched:
    """The bytes of a document and what its server says of them; ``cut``: there was more."""

    url: str
    content_type: str
    charset: str
    data: bytes
    cut: bool


class AllowedResolver(AbstractResolver):
    """Resolves names to the addresses that may be reached: a connection goes to what was checked here."""

    def __init__(self, allowed: Allowed):
        self._allowed, self._inner = allowed, aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        results = await self._inner.resolve(host, port, family)
        reached = [
            one
            for one in results
            if self._allowed.address(host, ipaddress.ip_address(one["host"].split("%")[0]))
        ]
        if results and not reached:
            raise _PrivateAddress(
                f"{host!r} is at a private address, which tools.browse_private does not name"
            )
        return reached

    async def close(self) -> None:
        await self._inner.close()


class _PrivateAddress(OSError):
    """A name that leads where nobody may go."""


class Fetcher:
    """Fetches for the tasks of one event loop; ``close`` it."""

    def __init__(self, allowed: Allowed, *, agent: str, most_bytes: int, rate_per_s: float, retries: int):
        self._allowed, self._most, self._retries = allowed, most_bytes, retries
        self._headers = {"User-Agent": agent, "Accept": _ACCEPT, "Accept-Encoding": "gzip, deflate"}
        self._pause_s = 1 / rate_per_s if rate_per_s > 0 else 0.0
        self._free: dict[str, float] = {}  # host -> when the next fetch may begin
        self._session: aiohttp.ClientSession | None = None

    async def fetch(self, url: URL, until: float) -> Fetched:
        """The document at ``url``, which is allowed; tried again, before ``until`` (of time.monotonic), when
        its server asks for patience or breaks.  Raises :class:`FetchFailed` and :class:`.UrlRefused`."""
        for attempt in range(self._retries + 1):
            try:
                return await self._followed(url, until)
            except FetchFailed as error:
                pause = max(error.retry_after_s, _FIRST_PAUSE_S * 2**attempt)
                if not error.passing or attempt == self._retries or time.monotonic() + pause >= until:
                    raise
                await asyncio.sleep(pause)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _followed(self, url: URL, until: float) -> Fetched:
        """The document where ``url`` leads, by redirects to allowed places."""
        for _ in range(MAX_REDIRECTS + 1):
            found = await self._one(url, until)
            if isinstance(found, Fetched):
                return found
            try:
                url = self._allowed.url(str(url.join(URL(found))))
            except UrlRefused as error:
                raise UrlRefused(f"{url} leads elsewhere: {error}") from error
            except ValueError as error:
                raise FetchFailed(f"{url} leads to what is no URL") from error
        raise FetchFailed(f"more than {MAX_REDIRECTS} redirects")

    async def _one(self, url: URL, until: float) -> Fetched | str:
        """The document at ``url`` itself, or where its server says that it is."""
        await self._turn(url, until)
        try:
            async with self._opened.get(url, headers=self._headers, allow_redirects=False) as response:
                if response.status in _REDIRECTS and (location := response.headers.get("Location")):
                    return location
                if response.status != 200:
                    self._told(url, response)
                data, cut = await self._body(response)
                plain = response.content_type if "Content-Type" in response.headers else ""
                return Fetched(str(url), plain.lower(), response.charset or "", data, cut)
        except _PrivateAddress as error:
            raise UrlRefused(str(error)) from error
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.os_error, _PrivateAddress):
                raise UrlRefused(str(error.os_error)) from error
            raise FetchFailed(
                f"{url.host} cannot be reached ({_reason(error.os_error)})", passing=True
            ) from error
        except (aiohttp.ClientError, OSError, ValueError, zlib.error) as error:
            passing = isinstance(error, aiohttp.ClientConnectionError | ConnectionError)
            raise FetchFailed(
                f"{url.host} gave no usable answer ({_reason(error)})", passing=passing
            ) from error

    @property
    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    resolver=AllowedResolver(self._allowed), use_dns_cache=False, limit=256, limit_per_host=16
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
                auto_decompress=False,  # here, by pieces: see Inflated
            )
        return self._session

    async def _turn(self, url: URL, until: float) -> None:
        """Wait until the host may be asked again.  Raises :class:`FetchFailed` if that is after ``until``."""
        host, now = url.raw_host or "", time.monotonic()
        begin = max(now, self._free.get(host, 0.0))
        if begin > now and begin >= until:
            raise FetchFailed(f"{host} wants to be left alone for {begin - now:.0f} s")
        self._free[host] = begin + self._pause_s
        if len(self._free) > _MAX_HOSTS:
            self._free = {one: when for one, when in self._free.items() if when > now}
        if begin > now:
            await asyncio.sleep(begin - now)

    def _told(self, url: URL, response: aiohttp.ClientResponse) -> None:
        """Raises :class:`FetchFailed` for an answer that is no document."""
        wait = retry_after_s(response.headers.get("Retry-After", ""))
        if wait and response.status in (429, 503):  # for everybody who asks this host
            host = url.raw_host or ""
            self._free[host] = max(self._free.get(host, 0.0), time.monotonic() + min(wait, 3600.0))
        passing = response.status in _PASSING
        raise FetchFailed(f"HTTP {response.status} at {url}", passing=passing, retry_after_s=wait)

    async def _body(self, response: aiohttp.ClientResponse) -> tuple[bytes, bool]:
        """At most ``most_bytes`` of the body, inflated, and whether there was more."""
        body = Inflated(response.headers.get("Content-Encoding", ""), self._most)
        async for chunk in response.content.iter_chunked(1 << 16):
            if body.full(chunk):
                return bytes(body.data[: self._most]), True
        return bytes(body.data), False


class Inflated:
    """A body as it arrives, never much more than ``most`` bytes of it: a few may inflate to gigabytes."""

    def __init__(self, encoding: str, most: int):
        self.data, self._most = bytearray(), most
        encoding = encoding.strip().lower()
        if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise ValueError(f"Content-Encoding {encoding[:40]!r}, which was not asked for")
        self._inflate: Any = None
        if encoding not in ("", "identity"):
            self._inflate = zlib.decompressobj(zlib.MAX_WBITS | 32)  # by its header: gzip or zlib

    def full(self, chunk: bytes) -> bool:
        """Take ``chunk``; whether there is more than is wanted."""
        if self._inflate is not None:
            chunk = self._inflate.decompress(chunk, self._most - len(self.data) + 1)
        self.data += chunk
        return len(self.data) > self._most


def _reason(error: BaseException) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    return str(error)[:100] or type(error).__name__
