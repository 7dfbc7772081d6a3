"""How a request's answer comes from a server, message by message: over an HTTP call of its own, or over a
channel that it shares with all other requests to that server.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import suppress
from typing import Any, Protocol

import aiohttp
import orjson

from system.engine.control import Http
from system.engine.protocol import EngineError
from system.engine.stream import MAX_MESSAGE_BYTES, EventSplitter
from system.errors import EspalierError
from system.http import CONNECT_S

log = logging.getLogger(__name__)

CHANNEL = "/generate_channel"
MAX_REQUEST_BYTES = 16 << 20  # that an embedded engine takes at once
_READ_OUT_S = 1.0  # for a server to close a stream after its finish
_ABORT_S = 5.0
_CLOSE_S = 1.0

Message = dict[str, Any]


class Broken(EspalierError):
    """The stream broke or never began, through no fault of the request; it may go on elsewhere."""

    def __init__(self, error: Exception | str, *, answered: bool = False) -> None:
        """``answered``: the server is there, and says that it failed at this request."""
        name = error if isinstance(error, str) else type(error).__name__
        told = "" if isinstance(error, str) else str(error)
        super().__init__(f"{name}: {told}" if told else name)
        self.unreachable = isinstance(error, aiohttp.ClientConnectorError)  # nobody listens there
        self.answered = answered


class Answers(Protocol):
    """Of the ``/generate`` protocol's requests and messages, whatever carries them."""

    def ask(self, url: str, rid: str, body: bytes, limit_s: float) -> AsyncGenerator[Message]:
        """The messages that answer ``body``, the JSON of a request with the id ``rid``, within ``limit_s``
        seconds.  The caller stops at the one that ends the answer; when it stops before, or the messages do,
        the server is told to end the request.

        Raises :class:`Broken` when they end before, and :class:`EngineError` when the server refuses the
        request.
        """
        ...

    async def close(self) -> None:
        """Let go of all connections; requests under way break."""
        ...


class _LastWords:
    """What is still to be said or read of requests that have ended.  It raises nothing."""

    def __init__(self) -> None:
        self._endings: set[asyncio.Task[None]] = set()

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)

    async def close(self) -> None:
        """Wait for it, but not for long."""
        if self._endings:
            _, late = await asyncio.wait(self._endings, timeout=_CLOSE_S)
            for task in late:
                task.cancel()


class HttpAnswers(_LastWords):
    """A call of ``/generate`` for each request, as SGLang wants it."""

    def __init__(self, http: Http, stall_s: float) -> None:
        """``stall_s``: seconds without any news after which a stream counts as broken."""
        super().__init__()
        self._http, self._stall_s = http, stall_s

    async def ask(self, url: str, rid: str, body: bytes, limit_s: float) -> AsyncGenerator[Message]:
        splitter, complete = EventSplitter(), False
        response: aiohttp.ClientResponse | None = None
        patience = aiohttp.ClientTimeout(
            total=max(limit_s, 1e-3), sock_connect=CONNECT_S, sock_read=self._stall_s
        )
        try:
            response = await self._http.session.post(
                f"{url}/generate",
                data=body,
                headers={"Content-Type": "application/json"} | self._http.authorization(url),
                allow_redirects=False,
                timeout=patience,
            )
            if response.status != 200:
                message = (await response.content.read(2000)).decode(errors="replace")
                raise refusal(response.status, self._http.hidden(url, message), rid)
            while not splitter.done:
                data = await response.content.readany()
                if not data:
                    raise Broken("the stream ended without a finish")
                for message in splitter.feed(data):
                    complete = ends(message)
                    yield message
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Broken(error) from error
        finally:
            if response is not None and complete and not response.content.at_eof():
                self._in_background(_read_out(response))
            elif response is not None:
                response.close()
            if not complete:
                self._in_background(self._abort(url, rid))

    async def _abort(self, url: str, rid: str) -> None:
        try:
            await self._http.call(f"{url}/abort_request", {"rid": rid}, _ABORT_S)
        except EngineError as error:  # the server is gone, and with it the request
            log.debug("abort of %s: %s", rid, error)


class ChannelAnswers(_LastWords):
    """One WebSocket to each server, for all requests: what is new of any of them comes in one frame.

    For a small model on the same machine the work of HTTP for each request, on both sides, costs as much as
    its tokens.  A frame from here is the JSON of one request, or ``{"abort": rid}``, which comes after
    its request; a frame from there a JSON list of ``[rid, message]``.
    """

    def __init__(self, http: Http, stall_s: float) -> None:
        """``stall_s``: seconds without news of a request after which it counts as broken."""
        super().__init__()
        self._http, self._stall_s = http, stall_s
        self._links: dict[str, asyncio.Task[_Link]] = {}  # open, or about to be
        self._retired: set[_Link] = set()

    async def ask(self, url: str, rid: str, body: bytes, limit_s: float) -> AsyncGenerator[Message]:
        if len(body) > MAX_REQUEST_BYTES:  # it would cost all requests their channel
            raise EngineError(f"request {rid!r} has {len(body)} bytes, of at most {MAX_REQUEST_BYTES}")
        loop = asyncio.get_running_loop()
        deadline, complete = loop.time() + limit_s, False
        link = await self._link(url, rid, deadline)
        news = link.news[rid] = asyncio.Queue()
        try:
            # It waits where the server reads nothing.
            async with asyncio.timeout_at(self._patience(deadline)):
                await link.socket.send_bytes(body)
            while True:
                if news.empty():
                    async with asyncio.timeout_at(self._patience(deadline)):
                        message = await news.get()
                else:
                    message = news.get_nowait()
                if message is None:
                    raise Broken("the channel was closed")
                complete = ends(message)
                yield message
        except TimeoutError as error:
            if loop.time() < deadline:  # silent: the next request tries another connection
                self._retire(url, link)
            raise Broken(error) from error
        except (aiohttp.ClientError, OSError) as error:
            raise Broken(error) from error
        finally:
            if not complete:
                self._in_background(link.abort(rid))
            link.leave(rid)

    async def close(self) -> None:
        await super().close()
        tasks, self._links = [*self._links.values()], {}
        for task in tasks:
            task.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        links = {link for link in found if isinstance(link, _Link)} | self._retired
        await asyncio.gather(*(link.close() for link in links))

    def _patience(self, deadline: float) -> float:
        """Until when to wait for the next sign of life."""
        return min(deadline, asyncio.get_running_loop().time() + self._stall_s)

    async def _link(self, url: str, rid: str, deadline: float) -> _Link:
        """The open channel to a server; opened for whoever comes first."""
        opening = self._links.get(url)
        if opening is None or (opening.done() and (opening.exception() or opening.result().closed)):
            opening = self._links[url] = asyncio.get_running_loop().create_task(self._open(url))
            opening.add_done_callback(_seen)
        if not opening.done():
            await asyncio.wait([opening], timeout=max(0.0, deadline - asyncio.get_running_loop().time()))
        if not opening.done():
            raise Broken("no channel in time")
        if opening.cancelled():  # by close
            raise Broken("the channel was closed")
        try:
            return opening.result()
        except aiohttp.WSServerHandshakeError as error:
            raise refusal(error.status, f"HTTP {error.status} at {url}{CHANNEL}", rid) from error
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Broken(error) from error

    async def _open(self, url: str) -> _Link:
        async with asyncio.timeout(CONNECT_S):
            socket = await self._http.session.ws_connect(
                url + CHANNEL,
                headers=self._http.authorization(url),
                max_msg_size=MAX_MESSAGE_BYTES,
                timeout=aiohttp.ClientWSTimeout(ws_close=_CLOSE_S),  # pyright: ignore[reportCallIssue] (attrs)
            )
        return _Link(socket)

    def _retire(self, url: str, link: _Link) -> None:
        opening = self._links.get(url)
        if opening is not None and opening.done() and not opening.exception() and opening.result() is link:
            del self._links[url]
            self._retired.add(link)
            link.reader.add_done_callback(lambda _: self._retired.discard(link))
            link.retired = True


class _Link:
    """An open channel, and who waits for news over it."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.news: dict[str, asyncio.Queue[Message | None]] = {}
        self.retired = False  # it closes with its last request
        self.reader = asyncio.get_running_loop().create_task(self._read(), name="engine channel")

    @property
    def closed(self) -> bool:
        return self.reader.done() or self.socket.closed

    async def abort(self, rid: str) -> None:
        """Ask the server to end this request."""
        with suppress(aiohttp.ClientError, OSError, TimeoutError):  # with the channel it has ended
            async with asyncio.timeout(_ABORT_S):
                await self.socket.send_bytes(orjson.dumps({"abort": rid}))

    async def close(self) -> None:
        self.reader.cancel()
        await asyncio.gather(self.reader, return_exceptions=True)

    def leave(self, rid: str) -> None:
        """This request wants no more news."""
        self.news.pop(rid, None)
        if self.retired and not self.news:
            self.reader.cancel()

    async def _read(self) -> None:
        try:
            async for frame in self.socket:
                for rid, message in orjson.loads(frame.data):
                    if not isinstance(message, dict):
                        raise TypeError(f"{message!r:.80} in place of a message")
                    if (queue := self.news.get(rid)) is not None:  # or its request has been given up
                        queue.put_nowait(message)
        except (ValueError, TypeError) as error:
            log.warning("a channel's frame is no list of messages: %s", error)
        finally:
            for queue in self.news.values():
                queue.put_nowait(None)
            await self.socket.close()


def _seen(task: asyncio.Task[Any]) -> None:
    """Its failure is told to whoever waits for it; nobody may do so any more."""
    if not task.cancelled():
        task.exception()


def ends(message: Message) -> bool:
    """Whether an answer ends with this message."""
    meta = message.get("meta_info")
    return isinstance(meta, dict) and bool(meta.get("finish_reason"))


def refusal(status: Any, message: str, rid: str) -> Exception:
    """A 4xx is about the request and final; anything else is about the server, a 500 about both."""
    if isinstance(status, int) and 400 <= status < 500:
        return EngineError(f"request {rid!r} refused: {message}")
    return Broken(f"status {status}: {message}", answered=status == 500)


def refused(message: Message, rid: str) -> Exception:
    """What a server reports inside a stream that has begun."""
    error = message["error"]
    if isinstance(error, dict):
        return refusal(error.get("code"), str(error.get("message")), rid)
    return refusal(None, str(error), rid)


async def _read_out(response: aiohttp.ClientResponse) -> None:
    """Read past the finish to the stream's end, so that the connection serves the next request, too."""
    try:
        async with asyncio.timeout(_READ_OUT_S):
            while await response.content.readany():
                pass
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        log.debug("a stream that finished did not end: %s", error)
    finally:
        response.close()
