"""Generation over HTTP: streams that survive a broken connection without losing or doubling a token."""

from __future__ import annotations

import asyncio
import logging
import random
import zlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import aiohttp
import numpy as np

from system.engine.http import Http, message_of
from system.engine.protocol import Chunk, EngineError, Finish, GenerateRequest, Sampling
from system.engine.stream import CutGuard, EventSplitter, MalformedStream, StreamReader

log = logging.getLogger(__name__)

_ABORT_DEADLINE_S = 5.0
_CLOSE_DEADLINE_S = 1.0
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.05, 2.0


class _Broken(Exception):
    """The stream broke or never began, through no fault of the request; it may go on elsewhere."""


class _Progress:
    """What one request has produced so far, over all its attempts."""

    def __init__(self, request: GenerateRequest):
        self.request = request
        self.tokens: list[int] = []
        self.guard = CutGuard(request.sampling.stop)
        self.cached_tokens: int | None = None
        self.wire_rid = ""
        self.url = ""

    @property
    def left(self) -> int:
        return self.request.sampling.max_new_tokens - len(self.tokens)


class Generation:
    """The streams of one client.  Its parameters are :class:`~system.engine.client.EngineClient`'s."""

    def __init__(
        self,
        http: Http,
        urls: Sequence[str],
        *,
        deadline_s: float,
        stall_s: float,
        control_deadline_s: float,
        retries: int,
    ):
        self._http, self.urls = http, tuple(urls)
        self._deadline_s, self._stall_s = deadline_s, stall_s
        self._control_deadline_s, self._retries = control_deadline_s, retries
        self._live: dict[str, _Progress] = {}
        self._aborts: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Wait a moment for aborts under way."""
        if self._aborts:
            _, late = await asyncio.wait(set(self._aborts), timeout=_CLOSE_DEADLINE_S)
            for task in late:
                task.cancel()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk]:
        """Stream chunks until one carries ``finish``.  Closing the iterator early aborts the request.

        Raises :class:`EngineError` when the request is refused, or cannot be served after all retries or
        before the deadline.
        """
        if request.rid in self._live:
            raise EngineError(f"request id {request.rid!r} is in use")
        deadline = asyncio.get_running_loop().time() + self._deadline_s
        progress = _Progress(request)
        self._live[request.rid] = progress
        attempt, failures, finished = 0, 0, False
        try:
            while True:
                progress.url = self._route(request, attempt)
                # SGLang aborts by prefix: the closing slash keeps "a/1/" from being a prefix of any other id.
                progress.wire_rid = f"{request.rid}/{attempt}/"
                before = len(progress.tokens)
                try:
                    async with aclosing(self._attempt(progress, deadline)) as chunks:
                        async for chunk in chunks:
                            finished = chunk.finish is not None
                            yield chunk
                            if finished:
                                return
                except _Broken as error:
                    failures = 1 if len(progress.tokens) > before else failures + 1
                    self._abort_later(progress)
                    progress.guard.cut()
                    if failures > self._retries:
                        raise EngineError(
                            f"request {request.rid!r}: gave up after {failures} failures in a row: {error}"
                        ) from error
                    log.info("request %s broke at token %d: %s", request.rid, len(progress.tokens), error)
                if progress.left <= 0:  # everything arrived except the message that says so
                    finished = True
                    yield _last_chunk(Finish("length"), progress.cached_tokens or 0)
                    return
                attempt += 1
                await self._back_off(failures, deadline, request.rid)
        finally:
            del self._live[request.rid]
            if not finished:
                self._abort_later(progress)

    async def abort(self, rid: str) -> None:
        """End a running request of this client; its iterator then ends with an ``abort`` finish."""
        if progress := self._live.get(rid):
            await self._http.post(
                progress.url, "/abort_request", {"rid": progress.wire_rid}, self._control_deadline_s
            )

    async def _attempt(self, progress: _Progress, deadline: float) -> AsyncGenerator[Chunk]:
        """One HTTP call.  Raises ``_Broken`` for what another attempt may mend, ``EngineError`` for the
        rest.
        """
        reader, splitter = StreamReader(), EventSplitter()
        rid = progress.request.rid
        try:
            response = await self._http.session.post(
                f"{progress.url}/generate", json=_body(progress), timeout=self._patience(deadline)
            )
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self._broken(error, deadline, rid) from error
        try:
            if response.status != 200:
                raise await _refusal(response, rid)
            while not splitter.done:
                data = await response.content.readany()
                if not data:
                    raise _Broken("the stream ended without a finish")
                for message in splitter.feed(data):
                    if "error" in message:
                        raise _Broken(str(message["error"]))
                    chunk, text = reader.read(message)
                    yield self._account(progress, chunk, text)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self._broken(error, deadline, rid) from error
        finally:
            response.close()

    def _account(self, progress: _Progress, chunk: Chunk, text: str) -> Chunk:
        progress.tokens.extend(chunk.tokens.tolist())
        if progress.left < 0:
            raise MalformedStream("more tokens than were asked for")
        if progress.cached_tokens is None:
            progress.cached_tokens = chunk.cached_tokens
        finish = chunk.finish
        if spanning := progress.guard.feed(text):
            finish = Finish("stop", matched=spanning)
            self._abort_later(progress)
        cached = progress.cached_tokens if finish else 0
        return Chunk(chunk.tokens, chunk.logprob, chunk.entropy, chunk.version, finish, cached)

    def _route(self, request: GenerateRequest, attempt: int) -> str:
        """Affinity by route; each further attempt tries the next replica."""
        home = zlib.crc32((request.route or request.rid).encode())
        return self.urls[(home + attempt) % len(self.urls)]

    def _patience(self, deadline: float) -> aiohttp.ClientTimeout:
        """Deadlines of one HTTP call: to connect, between two reads, and altogether."""
        left = max(deadline - asyncio.get_running_loop().time(), 1e-3)
        return aiohttp.ClientTimeout(total=left, sock_connect=self._http.connect_s, sock_read=self._stall_s)

    def _broken(self, error: Exception, deadline: float, rid: str) -> Exception:
        if asyncio.get_running_loop().time() >= deadline:
            return EngineError(f"request {rid!r}: not done within {self._deadline_s} s")
        return _Broken(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)

    async def _back_off(self, failures: int, deadline: float, rid: str) -> None:
        wait = min(_LONGEST_BACKOFF_S, _FIRST_BACKOFF_S * 2 ** max(failures - 1, 0)) * random.uniform(
            0.5, 1.0
        )
        if asyncio.get_running_loop().time() + wait >= deadline:
            raise EngineError(f"request {rid!r}: not done within {self._deadline_s} s")
        await asyncio.sleep(wait)

    def _abort_later(self, progress: _Progress) -> None:
        """Tell the server that nobody listens any more; at once, without waiting for the answer."""
        task = asyncio.get_running_loop().create_task(self._abort_quietly(progress.url, progress.wire_rid))
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    async def _abort_quietly(self, url: str, wire_rid: str) -> None:
        try:
            await self._http.post(url, "/abort_request", {"rid": wire_rid}, _ABORT_DEADLINE_S)
        except EngineError as error:  # the server is gone, and with it the request
            log.debug("abort of %s: %s", wire_rid, error)


def _body(progress: _Progress) -> dict[str, Any]:
    """The ``/generate`` body that asks for what is still missing."""
    request = progress.request
    sampling = _sampling(request.sampling, progress.left)
    if progress.guard.watching:
        sampling["stream_interval"] = 1  # so that a stop string across the cut is noticed at its own token
    truncated = request.sampling.temperature > 0 and (
        request.sampling.top_p < 1 or request.sampling.top_k > 0
    )
    return {
        "rid": progress.wire_rid,
        "input_ids": np.asarray(request.input_ids).tolist() + progress.tokens,
        "sampling_params": sampling,
        "stream": True,
        "return_logprob": True,
        **({"return_sampling_mask": True} if truncated else {}),
    }


def _sampling(sampling: Sampling, max_new_tokens: int) -> dict[str, Any]:
    body: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "ignore_eos": sampling.ignore_eos,
        "no_stop_trim": True,
        "skip_special_tokens": False,
    }
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.stop_token_ids:
        body["stop_token_ids"] = list(sampling.stop_token_ids)
    if sampling.seed is not None:
        body["sampling_seed"] = sampling.seed
    return body


def _last_chunk(finish: Finish, cached_tokens: int) -> Chunk:
    numbers = np.zeros(0, np.float32)
    return Chunk(np.zeros(0, np.int32), numbers, numbers, np.zeros(0, np.int32), finish, cached_tokens)


async def _refusal(response: aiohttp.ClientResponse, rid: str) -> Exception:
    """A 4xx is about the request and final; anything else is about the server."""
    message = await message_of(response)
    if 400 <= response.status < 500:
        return EngineError(f"request {rid!r} refused: {message}")
    return _Broken(f"status {response.status}: {message}")
