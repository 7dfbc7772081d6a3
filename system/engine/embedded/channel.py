"""Requests and their answers as JSON: what a call of ``/generate`` says, and a channel for many of them.

A channel is a WebSocket.  Each frame from the client is the body of a ``/generate`` call; each frame from
here a list of ``[rid, message]``, with all that is new since the last one.  A request that cannot be served
has one message, an error.  When the client goes away, so do its requests; ``/abort_request`` ends one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

import orjson
from aiohttp import WSCloseCode, WSMsgType, web

from system.engine.embedded.core import EngineCore
from system.engine.embedded.job import BadRequest, Event, Job, parse
from system.text import named

MAX_JSON_BYTES = 16 << 20


class RequestChannel:
    """One client's requests, served by ``engine`` on the event loop that runs."""

    def __init__(self, engine: EngineCore) -> None:
        self._engine = engine
        self._counts: dict[str, int] = {}  # tokens told so far, of each request under way
        self._news: list[tuple[str, dict[str, Any]]] = []
        self._some = asyncio.Event()
        self._asyncio = asyncio.get_running_loop()

    async def run(self, request: web.Request) -> web.WebSocketResponse:
        """Until the client goes away."""
        socket = web.WebSocketResponse(max_msg_size=MAX_JSON_BYTES, compress=False)
        await socket.prepare(request)
        open_sockets(request.app).add(socket)
        writer = self._asyncio.create_task(self._write(socket), name="engine channel")
        try:
            async for frame in socket:
                if frame.type in (WSMsgType.BINARY, WSMsgType.TEXT):
                    self._begin(frame.data)
        finally:
            open_sockets(request.app).discard(socket)
            if live := {*self._counts}:
                self._counts.clear()
                self._engine.loop.emit(lambda s: s.abort(lambda job: job.rid in live, "client went away"))
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)  # last: a handler is cancelled at any await
        return socket

    def _begin(self, data: bytes | str) -> None:
        body: Any = None
        try:
            body = orjson.loads(data)
            if not isinstance(body, dict):
                raise BadRequest("expected a JSON object")
            job = job_of(self._engine, body)
            if job.rid in self._counts:
                raise BadRequest(f"rid: {job.rid!r} is already being generated")
        except ValueError as error:  # a BadRequest, or no JSON
            self._refuse(str(body.get("rid")) if isinstance(body, dict) else "", 400, str(error))
            return
        rid = job.rid
        self._counts[rid] = 0
        job.deliver = lambda event: self._tell(job, event)

        def submitted(future: Future[bool]) -> None:  # in the decoding thread
            if error := future.exception():
                self._later(rid, 503, f"engine failed: {named(error)}")
            elif not future.result():
                self._later(rid, 400, f"rid: {rid!r} is already being generated")

        self._engine.loop.call(lambda scheduler: scheduler.submit(job)).add_done_callback(submitted)

    def _later(self, rid: str, code: int, why: str) -> None:
        def refuse() -> None:
            if self._counts.pop(rid, None) is not None:
                self._refuse(rid, code, why)

        if not self._asyncio.is_closed():
            self._asyncio.call_soon_threadsafe(refuse)

    def _refuse(self, rid: str, code: int, why: str) -> None:
        self._news.append((rid, {"error": {"message": why, "code": code}}))
        self._some.set()

    def _tell(self, job: Job, event: Event) -> None:
        """On the event loop."""
        if job.rid not in self._counts:
            return  # the client has gone
        self._counts[job.rid] += len(event.tokens)
        self._news.append((job.rid, answer(self._engine, job, event, self._counts[job.rid])))
        if event.finish or event.error:
            del self._counts[job.rid]
        self._some.set()

    async def _write(self, socket: web.WebSocketResponse) -> None:
        while True:
            await self._some.wait()
            self._some.clear()
            news, self._news = self._news, []
            try:
                await socket.send_bytes(orjson.dumps(news))
            except ConnectionResetError:  # the client has hung up, which the reader will find
                return


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


def answer(engine: EngineCore, job: Job, event: Event, count: int) -> dict[str, Any]:
    """What SGLang says of the new tokens in ``event``, which bring the output to ``count``."""
    if event.error:
        code = 500 if engine.loop.alive else 503  # the request's failure, or the engine's
        return {"error": {"message": event.error, "code": code}}
    tokens, version = event.tokens, str(event.version)
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
