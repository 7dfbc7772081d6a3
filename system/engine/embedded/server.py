"""The embedded engine behind SGLang's HTTP protocol, as far as this system and its benchmarks speak it.

Beyond SGLang: ``/update_weights_from_tensor`` takes safetensors bytes (SGLang takes pickles, which a network
service must not), and ``/end_weight_update`` performs the swap and answers with the checksum of what is held.
Answers are always streams, and incremental (disjoint): SGLang's are with ``--incremental-streaming-output``.
``/generate_channel`` carries any number of requests over one connection.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from aiohttp import web
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from system.engine.answers import CHANNEL, MAX_REQUEST_BYTES
from system.engine.embedded.channel import RequestChannel, answer, job_of, serve_channels
from system.engine.embedded.core import EngineCore
from system.engine.embedded.job import BadRequest, Event
from system.engine.embedded.loop import EngineFailed
from system.engine.embedded.weights import WeightsError
from system.models.adapter import PROJECTIONS, Adapter
from system.models.directory import fast_tokenizer
from system.serving import JSON, AppServer, serve

MAX_BUCKET_BYTES = 8 << 30
CONTROL_DEADLINE_S = 60.0  # a control call waits for one step at most, which may take seconds
STOP_S = 30.0  # for the decoding thread to end its step, and again for the server to close

# The decoding thread gives up and retakes the interpreter lock around every torch operation.  At Python's
# default of 5 ms the HTTP thread would then hold it far longer than a whole decoding step of a small model
# takes.
_SWITCH_INTERVAL_S = 1e-4


class EmbeddedEngine(EngineCore):
    """Models behind SGLang's HTTP protocol, in this process.

    ``await start()`` serves until ``await stop()``; both belong to one event loop.
    """

    _server: AppServer | None = None
    _switch_interval = sys.getswitchinterval()

    async def start(self, host: str | None = None, port: int = 0, *, key: str = "") -> str:
        """Start decoding and serving; returns the URL.  Port 0 picks a free one.

        Without a host it binds to loopback; any other address must be asked for by name.  ``key``: what
        clients must show; empty: nothing.
        """
        host = "127.0.0.1" if host is None else host
        if not host:
            raise ValueError(
                "an empty host would listen on every interface; name the address (0.0.0.0 if you mean it)"
            )
        self._switch_interval = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        self.begin()
        try:
            self._server = await serve(_application(self), host, port, key=key)
        except OSError:
            await self.stop()
            raise
        return self._server.url

    async def stop(self) -> None:
        """Stop decoding (callers get an error) and serving."""
        sys.setswitchinterval(self._switch_interval)
        try:
            await asyncio.to_thread(self.loop.stop, STOP_S)
        finally:
            if self._server is not None:
                async with asyncio.timeout(STOP_S):
                    await self._server.close()
                self._server = None


def _application(engine: EngineCore) -> web.Application:
    """The server's routes, bound to one engine."""
    server = _Handlers(engine)
    app = web.Application(client_max_size=MAX_BUCKET_BYTES, middlewares=[_errors])
    serve_channels(app)
    app.add_routes(
        [
            web.post("/generate", server.generate),
            web.get(CHANNEL, server.channel),
            web.post("/abort_request", server.abort),
            web.post("/pause_generation", server.pause),
            web.post("/continue_generation", server.resume),
            web.post("/flush_cache", server.flush),
            web.post("/begin_weight_update", server.begin_update),
            web.post("/update_weights_from_tensor", server.stage),
            web.post("/end_weight_update", server.end_update),
            web.get("/health", server.health),
            web.get("/ready", server.ready),
            web.get("/v1/loads", server.loads),
            web.get("/model_info", server.model_info),
            web.get("/server_info", server.server_info),
            web.post("/detokenize", server.detokenize),
        ]
    )
    return app


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Say in JSON what was wrong: 400 for the caller's mistakes, 503 for ours."""
    try:
        return await handler(request)
    except (BadRequest, WeightsError) as error:
        return _error(400, str(error))
    except EngineFailed as error:
        return _error(503, f"engine failed: {error}")
    except TimeoutError:
        return _error(503, "the engine did not answer in time")


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message, "code": status}}, status=status)


class _Handlers:
    def __init__(self, engine: EngineCore):
        self._engine = engine
        self._updates = asyncio.Lock()  # staging and swapping happen one at a time

    # Generation ----------------------------------------------------------------------------------

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """A stream of tokens.  How long it may take to begin is its client's decision: it hangs up."""
        engine = self._engine
        job = job_of(engine, await _json(request))
        queue: asyncio.Queue[Event] = asyncio.Queue()
        job.deliver = queue.put_nowait
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        )
        last = False
        try:
            if not await _boundary(engine.loop.call(lambda scheduler: scheduler.submit(job))):
                raise BadRequest(f"rid: {job.rid!r} is already being generated")
            await response.prepare(request)
            while not last:
                event = await queue.get()
                last = bool(event.finish or event.error)
                body = orjson.dumps(answer(engine, job, event))
                await response.write(
                    b"data: " + body + b"\n\n" + (b"data: [DONE]\n\n" if event.finish else b"")
                )
            return response
        except ConnectionResetError:  # the client has hung up: there is nobody to be told
            return response
        finally:
            if not last:  # the connection has broken: free the row
                engine.loop.emit(lambda scheduler: scheduler.abort(lambda it: it is job, "client went away"))

    async def channel(self, request: web.Request) -> web.WebSocketResponse:
        """All of one client's requests over one connection (:mod:`.channel`)."""
        if "Origin" in request.headers:  # what a page opens, which a browser lets it, unlike a POST of JSON
            raise web.HTTPForbidden(text="not for pages")
        return await RequestChannel(self._engine).run(request)

    # Control -------------------------------------------------------------------------------------

    async def abort(self, request: web.Request) -> web.Response:
        rid = (await _json(request)).get("rid")
        if not (isinstance(rid, str) and rid):
            raise BadRequest("rid: expected a request id")
        ended = await _boundary(self._engine.loop.emit(lambda s: s.abort(lambda job: job.rid == rid)))
        return web.json_response({"success": True, "aborted": ended})

    async def pause(self, request: web.Request) -> web.Response:
        mode = (await _json(request)).get("mode", "abort")
        if mode not in ("abort", "retract", "in_place"):
            raise BadRequest(f"mode: {mode!r} is none of abort, retract, in_place")
        await _boundary(self._engine.loop.pause(mode))
        return web.json_response({"success": True})

    async def resume(self, request: web.Request) -> web.Response:
        await _boundary(self._engine.loop.resume())
        return web.json_response({"success": True})

    async def flush(self, request: web.Request) -> web.Response:
        if not await _boundary(self._engine.loop.call(lambda scheduler: scheduler.drop_cache())):
            return _error(400, "the cache cannot be flushed while requests run or wait")
        return web.json_response({"success": True})

    # Weights -------------------------------------------------------------------------------------

    async def begin_update(self, request: web.Request) -> web.Response:
        adapter = _adapter((await _json(request)).get("adapter"))
        async with self._updates:
            self._engine.begin_update(adapter)
        return web.json_response({"success": True})

    async def stage(self, request: web.Request) -> web.Response:
        if request.content_type != "application/octet-stream":
            raise BadRequest("Content-Type: expected application/octet-stream with a safetensors body")
        data = await request.read()
        async with self._updates:
            try:
                tensors = await asyncio.to_thread(load_safetensors, data)
            except (SafetensorError, ValueError, KeyError) as error:
                raise BadRequest(f"body: not safetensors: {error}") from error
            await asyncio.to_thread(self._engine.stage, tensors)
        return web.json_response({"success": True, "tensors": len(tensors)})

    async def end_update(self, request: web.Request) -> web.Response:
        """Serve the staged weights from the next token on; answers with the checksum of what is held then."""
        body = await _json(request)
        number = str(body.get("weight_version"))
        if not number.isdecimal() or int(number) >= 2**31:
            raise BadRequest("weight_version: expected an integer from 0 to 2^31 - 1")
        kv = body.get("kv", self._engine.config.kv_after_update)
        if kv not in ("recompute", "keep"):
            raise BadRequest(f"kv: {kv!r} is neither recompute nor keep")
        async with self._updates:
            weights = await asyncio.to_thread(self._engine.take_staged)
            await _boundary(self._engine.loop.emit(lambda s: s.swap(weights, int(number), kv)))
            version, checksum = await asyncio.to_thread(self._engine.checksum)
        # A string: JSON numbers above 2^53 do not survive every parser.
        return web.json_response({"success": True, "weight_version": str(version), "checksum": str(checksum)})

    # Questions -----------------------------------------------------------------------------------

    async def health(self, request: web.Request) -> web.Response:
        if not self._engine.loop.alive:
            return _error(503, f"engine failed: {self._engine.loop.failure}")
        return web.json_response({"status": "ok"})

    async def ready(self, request: web.Request) -> web.Response:
        """503 while paused, as SGLang."""
        if self._engine.loop.paused:
            return _error(503, "generation is paused")
        return await self.health(request)

    async def loads(self, request: web.Request) -> web.Response:
        return web.json_response({"loads": [self._engine.load_report()]})

    async def model_info(self, request: web.Request) -> web.Response:
        path, version = str(self._engine.path), str(self._engine.version)
        return web.json_response({"model_path": path, "is_generation": True, "weight_version": version})

    async def server_info(self, request: web.Request) -> web.Response:
        """As SGLang's: a prompt has fewer tokens than this."""
        return web.json_response({"max_req_input_len": self._engine.context})

    async def detokenize(self, request: web.Request) -> web.Response:
        """As SGLang's: the text of each list of tokens."""
        body = await _json(request)
        lists: Any = body.get("tokens")
        whole = self._engine.path / "tokenizer.json"
        if not isinstance(lists, list) or not all(
            isinstance(one, list) and all(type(token) is int and 0 <= token < 2**31 for token in one)
            for one in lists
        ):
            raise BadRequest("tokens: expected lists of tokens, whole numbers from 0 on")
        if not whole.is_file():
            raise BadRequest("the model directory has no tokenizer.json")
        tokenizer = await asyncio.to_thread(fast_tokenizer, whole)
        skip = bool(body.get("skip_special_tokens", True))
        return web.json_response({"text": [tokenizer.decode(one, skip_special_tokens=skip) for one in lists]})


def _adapter(given: Any) -> Adapter | None:
    """What kind of adapters an update brings; None: it brings all weights."""
    match given:
        case None:
            return None
        case {"rank": int(rank), "alpha": float(alpha), "parts": list(parts)} if (
            rank > 0 and parts and all(part in PROJECTIONS for part in parts)
        ):
            return Adapter(rank, alpha, tuple(parts))
        case _:
            raise BadRequest("adapter: expected a rank, an alpha and parts of " + ", ".join(PROJECTIONS))


async def _boundary(future: Any) -> Any:
    """Wait for a command that the decoding thread runs at its next token boundary."""
    async with asyncio.timeout(CONTROL_DEADLINE_S):
        return await asyncio.wrap_future(future)


async def _json(request: web.Request) -> dict[str, Any]:
    if request.content_type != JSON:
        raise web.HTTPUnsupportedMediaType(text=f"send {JSON}")
    if (size := request.content_length or 0) > MAX_REQUEST_BYTES:
        raise web.HTTPRequestEntityTooLarge(max_size=MAX_REQUEST_BYTES, actual_size=size)
    data = await request.read()
    try:
        body = orjson.loads(data) if data else {}
    except ValueError as error:
        raise BadRequest(f"body: not JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequest("body: expected a JSON object")
    return body
