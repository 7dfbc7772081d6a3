"""The server that other people's agents speak to: each session in the words of the provider they know.

A session's key is all that a client needs, and all that it may use: in the URL (``/s/KEY/v1/…``) or as the
API key.  It says nothing of what it opens.
"""

from __future__ import annotations

import hmac
import json
import logging
import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import aclosing
from functools import partial
from hashlib import sha256
from typing import Any, cast

from aiohttp import web
from aiohttp.typedefs import Handler

from system.agents.desk import SessionDesk
from system.agents.messages import ChatRequest, Refusal, valid
from system.agents.model import FROZEN, ServedModel
from system.agents.session import AgentSession
from system.agents.turn import AgentTurn
from system.agents.wire import Dialect
from system.agents.wire_anthropic import AnthropicWire
from system.agents.wire_chat import ChatWire
from system.agents.wire_responses import ResponsesWire
from system.config.agent import public_host
from system.serving import AppServer, serve
from system.text import described, one_line

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 << 20
KEEP_ALIVE_S = 10.0  # clients drop streams that are silent for longer than 20 s or so
CLOSED = 10_000  # closed sessions that are remembered, so that a late request is told why it is refused
LISTED = 200  # fields without effect that are told of
NAME = "espalier"  # of the trained model, where clients ask which there are
RETRIES = "x-stainless-retry-count"  # the official clients say so when they send a request again
UNKNOWN_HOST = "no name of this endpoint: set agent.public_url to the URL under which it is reached"
OTHER_HOST = (
    "no name of this endpoint, which is {} (agent.public_url), or its own address: the proxy before it must "
    "hand on the client's Host (nginx: proxy_set_header Host $host)"
)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # a half of a character, perhaps without its other half
# Neither official client then sends the request again, which it would for these.
FINAL = {409: {"x-should-retry": "false"}, 429: {"x-should-retry": "false"}}


class AgentEndpoint:
    """Serves sessions of one model."""

    def __init__(
        self,
        model: ServedModel,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        trained: Collection[str] = (),
        keep_alive_s: float = KEEP_ALIVE_S,
        desk: SessionDesk | None = None,
        public_url: str = "",
    ) -> None:
        """``trained``: model names under which a turn is trained on; none: all but :data:`FROZEN`.  ``desk``:
        where agents that somebody else starts get their sessions; ``public_url``: under which these reach it,
        if not by its address.
        """
        self._desk, self._public_url = desk, public_url.rstrip("/")
        self._model, self._host, self._port = model, host, port
        self._trained, self._keep_alive_s = tuple(trained), keep_alive_s
        self._sessions: dict[bytes, AgentSession] = {}  # by the digest of its key
        self._closed: dict[bytes, None] = {}  # likewise, the oldest first
        self._listed: set[str] = set()  # fields without effect that were listed
        self._server: AppServer | None = None

    async def start(self) -> str:
        """Serve; the URL."""
        names, remedy = list[str](), UNKNOWN_HOST
        if self._public_url:
            names = [public_host(self._public_url)]
            remedy = OTHER_HOST.format(names[0])
        self._server = await serve(self._app(), self._host, self._port, names=names, remedy=remedy)
        return self._server.url

    async def stop(self) -> None:
        """Serve no more."""
        if self._server is not None:
            await self._server.close()
            self._server = None

    async def open(
        self,
        prompt_id: str,
        seed: int,
        *,
        deadline_s: float,
        turns: int = 0,
        temperature: float | None = None,
    ) -> AgentSession:
        """A session for one run of an agent: :class:`AgentSession` says what the settings mean."""
        if self._server is None:
            raise RuntimeError("the endpoint is not started")
        session = AgentSession(
            self._model,
            self._server.url,
            prompt_id,
            seed,
            deadline_s=deadline_s,
            turns=turns,
            temperature=temperature,
            trained=self._trained,
        )
        self._sessions[_digest(session.key)] = session
        session.when_closed = lambda: self._forget(_digest(session.key))
        return session

    def _forget(self, digest: bytes) -> None:
        """What was said stays with the episode; here, only that there was such a session."""
        del self._sessions[digest]
        self._closed[digest] = None
        if len(self._closed) > CLOSED:
            del self._closed[next(iter(self._closed))]

    # Requests

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_shaped])
        paths = {"chat/completions": ChatWire(), "responses": ResponsesWire(), "messages": AnthropicWire()}
        for path, wire in paths.items():
            for root in ("", "/s/{key}"):
                app.router.add_post(f"{root}/v1/{path}", self._answering(wire))
        for root in ("", "/s/{key}"):
            app.router.add_post(f"{root}/v1/messages/count_tokens", self._count)
            app.router.add_get(f"{root}/v1/models", self._models)
            app.router.add_get(f"{root}/v1/models/{{name}}", self._models)
            app.router.add_post(f"{root}/reward", self._reward)
            app.router.add_post(f"{root}/done", self._done)
        if self._desk is not None:
            app.router.add_post("/sessions", partial(self._assign, self._desk))
        return app

    def _answering(self, wire: Dialect) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """The handler of requests in the words of ``wire``."""

        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                session = self._session(request)
                body, raw = await _body(request)
                asked = wire.asked(body)
                self._list(body.keys() - wire.known)
                digest = sha256(request.path.encode() + b"\n" + raw).digest()
                retry = request.headers.get(RETRIES, "0") not in ("", "0")
                turn = session.ask(asked, digest, retry)
            except Refusal as refusal:
                return _refused(wire, refusal)
            except RecursionError:
                return _refused(wire, _too_deep())
            except Exception as error:  # a fault of ours, or of a chat template: the client is told, too
                log.exception("a request to the endpoint failed")
                return _refused(wire, Refusal(500, f"the request failed: {described(error)}", code="failed"))
            if asked.stream:
                return await self._stream(request, wire, asked, turn)
            return await self._whole(request, wire, asked, turn)

        return handle

    async def _whole(
        self, request: web.Request, wire: Dialect, asked: ChatRequest, turn: AgentTurn
    ) -> web.StreamResponse:
        try:
            async with aclosing(turn.deltas(self._keep_alive_s)) as deltas:
                async for _ in deltas:
                    pass
        except Refusal as refusal:
            return _refused(wire, refusal)
        assert turn.answer is not None
        response = web.json_response(wire.whole(turn.answer, asked))
        with turn.handing_out():
            await response.prepare(request)
            await response.write_eof()
        return response

    async def _stream(
        self, request: web.Request, wire: Dialect, asked: ChatRequest, turn: AgentTurn
    ) -> web.StreamResponse:
        events = wire.events(turn.key, asked)
        headers = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
        response = web.StreamResponse(headers=headers)
        async with aclosing(turn.deltas(self._keep_alive_s)) as deltas:
            try:
                await response.prepare(request)
                await response.write(events.begin(turn.prompt_tokens))
                async for delta in deltas:
                    await response.write(events.alive() if delta is None else events.delta(delta))
            except Refusal as refusal:
                await response.write(events.failed(refusal))
                await response.write_eof()
                return response
        assert turn.answer is not None
        with turn.handing_out():
            await response.write(events.end(turn.answer))
            await response.write_eof()
        return response

    async def _count(self, request: web.Request) -> web.StreamResponse:
        wire = AnthropicWire()
        try:
            session = self._session(request)
            body, _ = await _body(request)
            return web.json_response({"input_tokens": session.count(wire.asked(body))})
        except Refusal as refusal:
            return _refused(wire, refusal)
        except RecursionError:
            return _refused(wire, _too_deep())

    async def _reward(self, request: web.Request) -> web.StreamResponse:
        try:
            session = self._session(request)
            body, _ = await _body(request)
            session.report(body)
        except Refusal as refusal:
            return _refused(ChatWire(), refusal)
        return web.json_response({"result": session.result})

    async def _done(self, request: web.Request) -> web.StreamResponse:
        try:
            session = self._session(request)
            body = (await _body(request))[0] if request.can_read_body else {}
            if not isinstance(failed := body.get("failed", ""), str):
                raise Refusal(400, "failed: expected a text, why it could not do its task", field="failed")
            session.finish(one_line(failed))
        except Refusal as refusal:
            return _refused(ChatWire(), refusal)
        return web.json_response({"done": True})

    async def _assign(self, desk: SessionDesk, request: web.Request) -> web.StreamResponse:
        """A session for an agent that somebody else has started, under the URL by which it knows us."""
        try:
            given = await desk.ask(request.headers.get("Authorization", ""))
        except Refusal as refusal:
            return _refused(ChatWire(), refusal)
        session, us = given.session, self._public_url or f"{request.scheme}://{request.host}"
        us += f"/s/{session.key}"
        told = {
            "openai_base_url": f"{us}/v1",
            "anthropic_base_url": us,
            "api_key": session.key,
            "model": self._trained[0] if self._trained else NAME,
            "task": {**given.task, "seed": session.seed},
        }
        return web.json_response(told, status=201)

    async def _models(self, request: web.Request) -> web.StreamResponse:
        try:
            self._session(request)
        except Refusal as refusal:
            return _refused(ChatWire(), refusal)
        names = [*(self._trained or (NAME,)), FROZEN]
        if asked := request.match_info.get("name"):
            return web.json_response(_model(asked))
        ends = {"has_more": False, "first_id": names[0], "last_id": names[-1]}
        return web.json_response({"object": "list", "data": [_model(name) for name in names], **ends})

    def _list(self, fields: Collection[str]) -> None:
        """Say once which fields of requests have no effect."""
        if new := sorted({one_line(name) for name in fields} - self._listed):
            if len(self._listed) < LISTED:
                log.info("fields of agents' requests without effect on what is trained: %s", ", ".join(new))
            self._listed.update(new[:LISTED])

    def _session(self, request: web.Request) -> AgentSession:
        """Whose key the request shows, in its path or else as an API key.  Raises :class:`Refusal`."""
        shown = request.match_info.get("key") or request.headers.get("x-api-key", "")
        if not shown:
            kind, _, shown = request.headers.get("Authorization", "").partition(" ")
            shown = shown.strip() if kind.lower() == "bearer" else ""
        digest = _digest(shown)
        if digest in self._closed:
            raise Refusal(409, "the session is closed", code="session_over")
        session = self._sessions.get(digest)
        if session is None or not hmac.compare_digest(session.key.encode(), shown.encode(errors="replace")):
            raise Refusal(
                401,
                "no open session has this key: send the session's key as the API key, or use its base URL",
                code="invalid_api_key",
            )
        return session


@web.middleware
async def _shaped(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A path or method that is not served, as the client knows errors."""
    try:
        return await handler(request)
    except (web.HTTPNotFound, web.HTTPMethodNotAllowed) as error:
        wire = AnthropicWire() if "anthropic-version" in request.headers else ChatWire()
        told = (
            f"{error.reason}: the base URL ends with /s/KEY/v1 for OpenAI's clients and with /s/KEY for "
            "Anthropic's; chat/completions, responses, messages, messages/count_tokens and models are served"
        )
        return _refused(wire, Refusal(error.status, told, code="not_found"))


def _model(name: str) -> dict[str, Any]:
    """A model as both providers' clients know models."""
    return {
        "id": name,
        "object": "model",
        "type": "model",
        "display_name": name,
        "created": 0,
        "created_at": "1970-01-01T00:00:00Z",
        "owned_by": NAME,
    }


def _digest(key: str) -> bytes:
    """Sessions are looked up by this: how long a look-up takes tells nothing of a key."""
    return sha256(key.encode(errors="replace")).digest()


async def _body(request: web.Request) -> tuple[Mapping[str, Any], bytes]:
    """The request's JSON object, and its bytes.  Raises :class:`Refusal`."""
    try:
        raw = await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise Refusal(413, f"the request is longer than {MAX_BODY_BYTES} bytes", code="too_large") from error
    except web.RequestPayloadError as error:
        raise Refusal(400, f"the body cannot be read: {error}") from error
    try:
        body = json.loads(raw.decode())  # of bytes, json.loads would let halves of characters pass
        if _SURROGATE.search(raw):
            body = valid(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise Refusal(400, "the body is no JSON object")
    return cast("dict[str, Any]", body), raw


def _too_deep() -> Refusal:
    return Refusal(400, "the body is nested too deeply: its messages or tools are no texts and plain schemas")


def _refused(wire: Dialect, refusal: Refusal) -> web.Response:
    headers = FINAL.get(refusal.status, {})
    return web.json_response(wire.error(refusal), status=refusal.status, headers=headers)
