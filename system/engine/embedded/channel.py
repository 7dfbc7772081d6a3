"""Requests and their answers as JSON: what a call of ``/generate`` says, and a channel for many of them.

A channel is a WebSocket.  Each frame from the client is the body of a ``/generate`` call, or
``{"abort": rid}``, which ends that one; each frame from here a list of ``[rid, message]``, with what is new
since the last one.  A request that cannot be served has one message, an error.  When the client goes away, so
do its requests.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

import orjson
from aiohttp import WSCloseCode, WSMsgType, web

from system.engine.answers import MAX_REQUEST_BYTES
from system.engine.embedded.core import EngineCore
from system.engine.embedded.job import BadRequest, Event, Job, parse
from system.text import named

log = logging.getLogger(__name__)

_FRAME_BYTES = 8 << 20  # of a list of messages, below what a client takes


class RequestChannel:
    """One client's requests, served by ``engine`` on the event loop that runs."""

    def __init__(self, engine: EngineCore) -> None:
        self._engine = engine
        self._jobs: dict[str, Job] = {}  # under way
        self._news: list[tuple[str, dict[str, Any]]] = []
        self._some = asyncio.Event()
        self._asyncio = asyncio.get_running_loop()

    async def run(self, request: web.Request) -> web.WebSocketResponse:
        """Until the client goes away."""
        socket = web.WebSocketResponse(max_msg_size=MAX_REQUEST_BYTES + 1, compress=False)  # less is taken
        await socket.prepare(request)
        open_sockets(request.app).add(socket)
        writer = self._asyncio.create_task(self._write(socket), name="engine channel")
        try:
            async for frame in socket:
                if frame.type in (WSMsgType.BINARY, WSMsgType.TEXT):
                    self._take(frame.data)
        finally:
            open_sockets(request.app).discard(socket)
            live, self._jobs = {*self._jobs.values()}, {}
            if live:
                self._abort(live, "client went away")
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)  # last: a handler is cancelled at any await
        return socket

    def _take(self, data: bytes | str) -> None:
        body: Any = None
        try:
            body = orjson.loads(data)
            if not isinstance(body, dict):
                raise BadRequest("expected a JSON object")
            if "abort" in body:
                if job := self._jobs.get(str(body["abort"])):  # or it has ended
                    self._abort({job}, "aborted")
                return
            job = job_of(self._engine, body)
            if job.rid in self._jobs:
                raise BadRequest(f"rid: {job.rid!r} is already being generated")
        except ValueError as error:  # a BadRequest, or no JSON
            self._refuse(str(body.get("rid")) if isinstance(body, dict) else "", 400, str(error))
            return
        self._jobs[job.rid] = job
        job.deliver = lambda event: self._tell(job, event)

        def submitted(future: Future[bool]) -> None:  # in the decoding thread
            if error := future.exception():
                later(503, f"engine failed: {named(error)}")
            elif not future.result():
                later(400, f"rid: {job.rid!r} is already being generated")

        def later(code: int, why: str) -> None:
            if not self._asyncio.is_closed():
                self._asyncio.call_soon_threadsafe(self._fail, job, code, why)

        self._engine.loop.call(lambda scheduler: scheduler.submit(job)).add_done_callback(submitted)

    def _abort(self, jobs: set[Job], why: str) -> None:
        """These alone: another request may have, or get, the same id."""
        self._engine.loop.emit(lambda scheduler: scheduler.abort(lambda job: job in jobs, why))

    def _fail(self, job: Job, code: int, why: str) -> None:
        if self._jobs.get(job.rid) is job:
            del self._jobs[job.rid]
            self._refuse(job.rid, code, why)

    def _refuse(self, rid: str, code: int, why: str) -> None:
        self._news.append((rid, {"error": {"message": why, "code": code}}))
        self._some.set()

    def _tell(self, job: Job, event: Event) -> None:
        """On the event loop."""
        if self._jobs.get(job.rid) is not job:
            return  # the client has gone, or knows that it failed
        try:
            message = answer(self._engine, job, event)
        except Exception as error:  # of this request; others have news at the same time
            log.exception("an answer of the engine could not be written")
            self._fail(job, 500, named(error))
            self._abort({job}, "failed")
            return
        if event.finish or event.error:
            del self._jobs[job.rid]
        self._news.append((job.rid, message))
        self._some.set()

    async def _write(self, socket: web.WebSocketResponse) -> None:
        try:
            while True:
                await self._some.wait()
                self._some.clear()
                news, self._news = self._news, []
                for frame in _frames(news):
                    await socket.send_bytes(frame)
        except ConnectionResetError:  # the client has hung up, which the reader will find
            return
        except Exception:
            log.exception("an engine's channel cannot be written to")
            await socket.close(code=WSCloseCode.INTERNAL_ERROR)  # or its client would wait for ever


def _frames(news: list[tuple[str, dict[str, Any]]]) -> Iterator[bytes]:
    """As lists of at most ``_FRAME_BYTES``; a message that is larger stands alone."""
    frame = orjson.dumps(news)
    if len(frame) <= _FRAME_BYTES or len(news) == 1:
        yield frame
    else:
        yield from _frames(news[: len(news) // 2])
        yield from _frames(news[len(news) // 2 :])


def open_sockets(app: web.Application) -> set[web.WebSocketResponse]:
    """Those that a server closes when it ends: it would wait for their clients."""
    return app[_SOCKETS]


_SOCKETS = web.AppKey("sockets", set[web.WebSocketResponse])


def serve_channels(app: web.Application) -> None:
    """Prepare an application that has channels."""
    app[_SOCKETS] = set()

    async def close(app: web.Application) -> None:
        sockets = [*open_sockets(app)]
        await asyncio.gather(*(socket.close(code=WSCloseCode.GOING_AWAY) for socket in sockets))

    app.on_shutdown.append(close)


def job_of(engine: EngineCore, body: Mapping[str, Any]) -> Job:
    """The job that a ``/generate`` body asks for.  Raises :class:`BadRequest`."""
    return parse(
        body,
        vocab=engine.shape.vocab,
        context=engine.context,
        vocabulary=engine.vocabulary,
        draw_seed=engine.draw_seed,
        experts=engine.shape.experts is not None,
    )


def answer(engine: EngineCore, job: Job, event: Event) -> dict[str, Any]:
    """What SGLang says of the new tokens in ``event``, the next one of ``job``."""
    if event.error:
        code = 500 if engine.loop.alive else 503  # the request's failure, or the engine's
        return {"error": {"message": event.error, "code": code}}
    tokens, version = event.tokens, str(event.version)
    job.told = count = job.told + len(tokens)
    meta: dict[str, Any] = {
        "id": job.rid,
        "finish_reason": {**asdict(event.finish), "length": count} if event.finish else None,
        "prompt_tokens": job.prompt.size,
        "completion_tokens": count,
        "cached_tokens": event.cached_tokens,
        "weight_version": version,
        "weight_versions": [{"version": version, "start": count - len(tokens), "end": count}],
        "output_token_logprobs": [
            [value, token, None] for value, token in zip(event.logprob, tokens, strict=True)
        ],
        "entropy": event.entropy,
    }
    if job.top_p < 1 or job.top_k > 0:
        meta["output_token_sampling_logprobs"] = event.kept_logprob
    if (start := job.score_from) is not None:
        given = job.prompt[start - 1 :].tolist()
        meta["input_token_logprobs"] = [
            [value, token, None] for value, token in zip([None, *job.scores], given, strict=True)
        ]
    if event.routes is not None and (known := engine.routes) is not None:
        meta["routed_experts"] = known.write(event.routes)
    vocabulary = engine.vocabulary
    return {
        "text": vocabulary.text(tokens) if vocabulary else "",
        "output_ids": tokens,
        "meta_info": meta,
    }
