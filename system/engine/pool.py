"""A pool of servers that generates: streams that survive a broken connection without losing or
doubling a token.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

import numpy as np

from system.awake import AwakeTimeout, awake_s
from system.engine.answers import Answers, Broken, ChannelAnswers, HttpAnswers, refused
from system.engine.control import EngineControl, Http, Unreachable
from system.engine.entropy import TopEntropy
from system.engine.protocol import Chunk, EngineError, EngineLost, Finish, GenerateRequest
from system.engine.request import generate_body
from system.engine.router import Assignment, Router
from system.engine.routes import RouteFormat
from system.engine.stream import CutGuard, MalformedStream, StreamReader, WantedRoutes

log = logging.getLogger(__name__)

_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.05, 2.0
_REPORT_S, _REPORT_DEADLINE_S = 1.0, 5.0  # between the servers' reports of their load; of one report


class _Progress:
    """What one request has produced so far, over all its attempts."""

    def __init__(self, request: GenerateRequest):
        self.request = request
        self.tokens: list[int] = []
        self.guard = CutGuard(request.sampling.stop)
        if request.said:
            self.guard.feed(request.said)
            self.guard.cut()
        self.cached_tokens: int | None = None
        self.wire_rid = ""  # of the newest attempt
        self.place: Assignment | None = None  # while it is at a server

    @property
    def left(self) -> int:
        return self.request.sampling.max_new_tokens - len(self.tokens)

    @property
    def size(self) -> int:
        """Tokens of the next attempt's prompt."""
        return len(self.request.input_ids) + len(self.tokens)


class EnginePool:
    """Generates on the servers at ``urls``.  Implements :class:`~system.engine.protocol.Engine`.

    :class:`~system.engine.router.Router` chooses a server for each request.  ``deadline_s`` bounds one
    ``generate`` call (without standstills of this process, after which a stream may have to go on in another
    request), ``stall_s`` the time without any answer after which a stream counts as broken (set it
    above the longest pause), ``retries`` the failures in a row that are mended by trying again.  Only what
    cannot duplicate a token is tried again: a request that never began, or the rest of one whose stream
    broke, with its tokens so far as part of the prompt.  ``in_flight`` bounds this pool's requests at one
    server; more wait for their turn, first come, first served.  ``estimate``: what to make of the top
    log-probabilities of servers that give no entropies.  ``vocab``: tokens that the model knows; others are
    the server's error.  ``key``: what the servers want to be shown.  ``routes``: what a record of experts
    looks like; None: none can be asked for.  ``channel``: the servers are embedded engines, which carry all
    requests over one connection (:class:`~system.engine.answers.ChannelAnswers`).
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        deadline_s: float = 120.0,
        stall_s: float = 60.0,
        retries: int = 4,
        in_flight: int = 256,
        estimate: TopEntropy | None = None,
        vocab: int | None = None,
        key: str = "",
        routes: RouteFormat | None = None,
        channel: bool = False,
    ):
        if not urls:
            raise ValueError("a pool of engines needs at least one URL")
        self.urls = tuple(url.rstrip("/") for url in urls)
        self._http = Http(self.urls, key)
        self._answers: Answers = (ChannelAnswers if channel else HttpAnswers)(self._http, stall_s)
        self._deadline_s, self._retries = deadline_s, retries
        self._router = Router(self.urls)
        self._turns = {url: asyncio.Semaphore(in_flight) for url in self.urls}  # first come, first served
        self._live: dict[str, _Progress] = {}
        self._reporter: asyncio.Task[None] | None = None
        self._reported = asyncio.Event()  # once every server has been asked
        self._estimate, self._vocab, self._routes = estimate, vocab, routes
        self._counters = defaultdict[str, float](float, turn_wait_s=0.0)

    @property
    def counters(self) -> dict[str, float]:
        """Totals since the start: requests by routing decision (``route/…``), prompt tokens sent and how many
        of them the servers had in their caches, streams that broke and went on, waits for a turn.
        Where entropies are estimates: how many, and the sum of what each may be off.  Given tokens that were
        scored.
        """
        routes = {f"route/{kind}": float(count) for kind, count in self._router.counts.items()}
        return {**routes, **self._counters}

    async def close(self) -> None:
        """Stop asking for reports, close the connections."""
        if self._reporter is not None:
            self._reporter.cancel()
            await asyncio.gather(self._reporter, return_exceptions=True)
            self._reporter = None
        await self._answers.close()
        await self._http.close()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk]:
        """Stream chunks until one carries ``finish``.  Closing the iterator early aborts the request.

        Raises :class:`EngineError` when the request is refused, or cannot be served after all retries or
        before the deadline; :class:`EngineLost` when the servers were not there to serve it.
        """
        if request.rid in self._live:
            raise EngineError(f"request id {request.rid!r} is in use")
        await self._listen()
        loop = asyncio.get_running_loop()
        deadline = awake_s() + self._deadline_s
        progress = _Progress(request)
        self._live[request.rid] = progress
        attempt = failures = 0
        avoid: tuple[str, ...] = ()
        try:
            while True:
                # SGLang aborts by prefix: the closing slash keeps "a/1/" from being a prefix of any other id.
                # Never used twice: a server may still be ending an earlier request of the same id, and SGLang
                # would then refuse the new one, or send it the old one's last tokens.
                progress.wire_rid = f"{request.rid}/{attempt}/{secrets.token_hex(6)}/"
                before = len(progress.tokens)
                place = await self._take_turn(progress, attempt, avoid, deadline)
                try:
                    async with aclosing(self._attempt(progress, place, deadline)) as chunks:
                        async for chunk in chunks:
                            if chunk.finish is not None:
                                whole = chunk.finish.type != "abort" and request.score_from is None
                                self._router.end(place, whole)
                            yield chunk
                            if chunk.finish is not None:
                                return
                except Broken as error:
                    if awake_s() >= deadline:
                        raise self._too_late(request.rid) from error
                    failures = 1 if len(progress.tokens) > before else failures + 1
                    progress.guard.cut()
                    (self._router.lost if error.unreachable else self._router.failed)(place.url, loop.time())
                    avoid = (place.url,)
                    if failures > self._retries:
                        raise (EngineError if error.answered else EngineLost)(
                            f"request {request.rid!r}: gave up after {failures} failures in a row: {error}"
                        ) from error
                    self._counters["resumed" if progress.tokens else "retried"] += 1
                    log.info("request %s broke at token %d: %s", request.rid, len(progress.tokens), error)
                finally:
                    self._leave(progress)
                if progress.left <= 0:  # everything arrived except the message that says so
                    yield _last_chunk(Finish("length"), progress.cached_tokens or 0)
                    return
                attempt += 1
                await self._back_off(failures, deadline, request.rid)
        finally:
            del self._live[request.rid]

    # Routing

    async def _take_turn(
        self, progress: _Progress, attempt: int, avoid: Sequence[str], deadline: float
    ) -> Assignment:
        """A place at a server and a turn there.

        A server that fails while the request waits for it is left for another.
        """
        loop, request = asyncio.get_running_loop(), progress.request
        while True:
            place = self._router.place(
                request.rid,
                progress.size,
                loop.time(),
                tree=request.route,
                parent=request.rid if attempt else request.parent,
                avoid=avoid,
            )
            turns, began = self._turns[place.url], loop.time()
            waits = turns.locked()
            try:
                async with AwakeTimeout(deadline - awake_s()):
                    await turns.acquire()
            except BaseException as error:
                self._router.end(place)
                if isinstance(error, TimeoutError):
                    raise self._too_late(request.rid) from error
                raise
            finally:
                if waits:
                    self._counters["turn_waits"] += 1
                    self._counters["turn_wait_s"] += loop.time() - began
            progress.place = place
            if not waits or self._router.usable(place.url, loop.time()) or len(self.urls) == 1:
                self._router.sent(place, loop.time())
                return place
            avoid = (place.url,)
            self._leave(progress)

    def _leave(self, progress: _Progress) -> None:
        """The request is at no server any more."""
        if progress.place is not None:
            self._router.end(progress.place)
            self._turns[progress.place.url].release()
            progress.place = None

    async def _listen(self) -> None:
        """Keep asking the servers for their load, if there is a choice to make; the first decision waits for
        the first answers.  Raises what ended the asking.
        """
        if len(self.urls) == 1:
            return
        if self._reporter is None:
            self._reporter = asyncio.get_running_loop().create_task(self._report(), name="engine reports")
        if self._reporter.done():
            self._reporter.result()
        if not self._reported.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._reported.wait(), _REPORT_DEADLINE_S)

    async def _report(self) -> None:
        while True:
            await asyncio.gather(*(self._report_of(url) for url in self.urls))
            self._reported.set()
            await asyncio.sleep(_REPORT_S)

    async def _report_of(self, url: str) -> None:
        own = self._router.own(url)
        try:
            report = await EngineControl(url, self._http).info(_REPORT_DEADLINE_S)
        except Unreachable:
            self._router.lost(url, asyncio.get_running_loop().time())
        except EngineError as error:  # slow or starting: its requests will show
            log.debug("no report: %s", error)
        else:
            self._router.report(url, report, own)

    # One attempt

    async def _attempt(
        self, progress: _Progress, place: Assignment, deadline: float
    ) -> AsyncGenerator[Chunk]:
        """One server's answer.  Raises ``Broken`` for what another attempt may mend, ``EngineError`` for the
        rest.
        """
        asked = progress.request
        rid, scored, estimate = asked.rid, None, self._estimate
        if asked.score_from is not None:  # the one token that comes with the scores needs no entropy
            scored, estimate = asked.input_ids[asked.score_from :], None
        reader = StreamReader(estimate, self._vocab, scored, self._wanted(progress))
        # With a cut behind it, a stop string across the cut must be noticed at its own token.
        every_token, top = progress.guard.watching, estimate.k if estimate else 0
        body = generate_body(
            asked, progress.wire_rid, progress.tokens, every_token=every_token, top_logprobs=top
        )
        try:
            answer = self._answers.ask(place.url, progress.wire_rid, body, deadline - awake_s())
            async with aclosing(answer) as messages:
                async for message in messages:
                    if "error" in message:
                        raise refused(message, rid)
                    chunk, text = reader.read(message)
                    yield self._account(progress, place, chunk, text)
        finally:
            self._counters["entropy_estimates"] += reader.estimated
            if estimate:
                self._counters["entropy_error_nats"] += reader.error

    def _wanted(self, progress: _Progress) -> WantedRoutes | None:
        """The records that the next attempt asks for."""
        if (first := progress.request.routes_from) is None:
            return None
        if self._routes is None:
            raise EngineError(
                f"request {progress.request.rid!r}: experts of a model that has none, or unknown"
            )
        return WantedRoutes(self._routes, first, progress.size)

    def _account(self, progress: _Progress, place: Assignment, chunk: Chunk, text: str) -> Chunk:
        if chunk.tokens.size:
            if place.tokens == 0:
                self._counters["prompt_tokens"] += place.prompt
                self._counters["cached_tokens"] += chunk.cached_tokens
            now, version = asyncio.get_running_loop().time(), int(chunk.version[-1])
            self._router.streamed(place, chunk.tokens.size, chunk.cached_tokens, version, now)
        progress.tokens.extend(chunk.tokens.tolist())
        if progress.left < 0:
            raise MalformedStream("more tokens than were asked for")
        if progress.cached_tokens is None:
            progress.cached_tokens = chunk.cached_tokens
        finish = chunk.finish
        if chunk.scores is not None:
            self._counters["scored_tokens"] += chunk.scores.size
        if spanning := progress.guard.feed(text):
            finish = Finish("stop", matched=spanning)
        cached = progress.cached_tokens if finish else 0
        return replace(chunk, finish=finish, cached_tokens=cached)

    def _too_late(self, rid: str) -> EngineError:
        return EngineError(f"request {rid!r}: not done within {self._deadline_s} s")

    async def _back_off(self, failures: int, deadline: float, rid: str) -> None:
        longest = min(_LONGEST_BACKOFF_S, _FIRST_BACKOFF_S * 2 ** max(failures - 1, 0))
        wait = longest * random.uniform(0.5, 1.0)
        if awake_s() + wait >= deadline:
            raise self._too_late(rid)
        await asyncio.sleep(wait)


def _last_chunk(finish: Finish, cached_tokens: int) -> Chunk:
    numbers = np.zeros(0, np.float32)
    return Chunk(np.zeros(0, np.int32), numbers, numbers, np.zeros(0, np.int32), finish, cached_tokens)
