"""The one client of SGLang's HTTP protocol, for our embedded server and for SGLang itself."""

from __future__ import annotations

import asyncio
import logging
import random
import zlib
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Literal

import aiohttp
import numpy as np
import torch
from safetensors.torch import save as save_safetensors

from system.engine.checksum import combine, tensor_checksum
from system.engine.protocol import Chunk, EngineError, EngineInfo, Finish, GenerateRequest, Sampling
from system.engine.stream import CutGuard, EventSplitter, MalformedStream, StreamReader, version_number

log = logging.getLogger(__name__)

Bucket = Mapping[str, torch.Tensor]
_ABORT_DEADLINE_S = 5.0
_CLOSE_DEADLINE_S = 1.0
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.05, 2.0


class PushFailed(EngineError):
    """Some servers did not take new weights; ``failures`` says why, by URL.  The others serve them."""

    def __init__(self, failures: Mapping[str, EngineError]) -> None:
        super().__init__("; ".join(str(error) for error in failures.values()))
        self.failures = dict(failures)


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


class EngineClient:
    """Generates, controls and updates over HTTP.  Implements :class:`~system.engine.protocol.Engine`.

    Several ``urls`` are replicas: a route always goes to the same one while that one answers; control calls
    and weight updates go to all of them.  ``deadline_s`` bounds one ``generate`` call, ``stall_s`` the time
    without any answer after which a stream counts as broken (set it above the longest pause), ``retries`` the
    failures in a row that are mended by trying again.  Only what cannot duplicate a token is tried again: a
    request that never began, or the rest of one whose stream broke, with its tokens so far as part of the
    prompt.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        session: aiohttp.ClientSession | None = None,
        deadline_s: float = 120.0,
        stall_s: float = 60.0,
        connect_s: float = 5.0,
        control_deadline_s: float = 120.0,
        retries: int = 4,
    ):
        if not urls:
            raise ValueError("an engine client needs at least one URL")
        self.urls = tuple(url.rstrip("/") for url in urls)
        self._session = session
        self._owns_session = session is None
        self._deadline_s, self._stall_s, self._connect_s = deadline_s, stall_s, connect_s
        self._control_deadline_s = control_deadline_s
        self._retries = retries
        self._live: dict[str, _Progress] = {}
        self._aborts: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Finish pending aborts and close the connections (a session given from outside stays open)."""
        if self._aborts:
            _, late = await asyncio.wait(set(self._aborts), timeout=_CLOSE_DEADLINE_S)
            for task in late:
                task.cancel()
        if self._session is not None and self._owns_session:
            await self._session.close()
            self._session = None

    # Generation ----------------------------------------------------------------------------------

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
            await self._post(
                progress.url, "/abort_request", {"rid": progress.wire_rid}, self._control_deadline_s
            )

    async def _attempt(self, progress: _Progress, deadline: float) -> AsyncGenerator[Chunk]:
        """One HTTP call.  Raises ``_Broken`` for what another attempt may mend, ``EngineError`` for the
        rest.
        """
        reader, splitter = StreamReader(), EventSplitter()
        rid = progress.request.rid
        try:
            response = await self._open().post(
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
        return aiohttp.ClientTimeout(total=left, sock_connect=self._connect_s, sock_read=self._stall_s)

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
            await self._post(url, "/abort_request", {"rid": wire_rid}, _ABORT_DEADLINE_S)
        except EngineError as error:  # the server is gone, and with it the request
            log.debug("abort of %s: %s", wire_rid, error)

    # Control -------------------------------------------------------------------------------------

    async def pause(self, mode: Literal["abort", "retract", "in_place"] = "retract") -> None:
        """Stop generation at a token boundary.  New requests wait until :meth:`resume`."""
        await self._all("/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        await self._all("/continue_generation", {})

    async def abort_all(self) -> None:
        await self._all("/abort_request", {"abort_all": True})

    async def flush_cache(self) -> None:
        """Forget cached prefixes; refused (``EngineError``) while requests run."""
        await self._all("/flush_cache", {})

    async def healthy(self, generate: bool = False) -> bool:
        """Whether every server answers; with ``generate``, whether each can produce a token (not while
        paused).
        """
        path = "/health_generate" if generate else "/health"
        try:
            await asyncio.gather(
                *(self._get(url, path, self._connect_s + 20 * generate) for url in self.urls)
            )
        except EngineError:
            return False
        return True

    async def wait_ready(self, deadline_s: float) -> None:
        """Return once every server is healthy.  Raises :class:`EngineError` at the deadline."""
        until = asyncio.get_running_loop().time() + deadline_s
        while not await self.healthy():
            if asyncio.get_running_loop().time() >= until:
                raise EngineError(f"{', '.join(self.urls)}: not ready within {deadline_s} s")
            await asyncio.sleep(0.1)

    async def infos(self) -> list[EngineInfo]:
        """What each server says about itself, in the order of ``urls``."""
        return list(await asyncio.gather(*(self._info(url) for url in self.urls)))

    async def _info(self, url: str) -> EngineInfo:
        server = await self._get(url, "/get_server_info", self._control_deadline_s)
        model = await self._get(url, "/get_model_info", self._control_deadline_s)
        return EngineInfo(
            weight_version=version_number(model.get("weight_version", "default")),
            running=int(server.get("running", 0)),
            waiting=int(server.get("waiting", 0)),
            paused=bool(server.get("paused", False)),
            counters={str(k): float(v) for k, v in (server.get("counters") or {}).items()},
        )

    # Weights -------------------------------------------------------------------------------------

    async def push_weights(
        self,
        buckets: Iterable[Bucket] | AsyncIterable[Bucket],
        version: int,
        kv: Literal["recompute", "keep"] = "recompute",
    ) -> None:
        """Give every server new weights, named as in Hugging Face, while generation goes on.

        The buckets together must hold every tensor of the model.  They are staged one by one; only the swap,
        at a token boundary, interrupts generation.  Returns once every server serves ``version`` and has
        proved by checksum that it holds exactly what was sent.  A server that fails or refuses (it names the
        tensor and has changed nothing) does not keep the others from their weights, and ``buckets`` is read
        to its end in any case; :class:`PushFailed` then says which and why.
        """
        failures: dict[str, EngineError] = {}

        async def each(path: str, body: dict[str, Any] | bytes) -> dict[str, dict[str, Any]]:
            urls = [url for url in self.urls if url not in failures]
            calls = (self._post(url, path, body, self._control_deadline_s) for url in urls)
            answers = dict(zip(urls, await asyncio.gather(*calls, return_exceptions=True), strict=True))
            for url, answer in answers.items():
                if isinstance(answer, EngineError):
                    failures[url] = answer
                elif isinstance(answer, BaseException):
                    raise answer
            return {url: answer for url, answer in answers.items() if isinstance(answer, dict)}

        await each("/begin_weight_update", {})
        sums = []
        async for bucket in _each(buckets):
            data, checksum = await asyncio.to_thread(_pack, bucket)
            sums.append(checksum)
            await each("/update_weights_from_tensor", data)
        sent = str(combine(sums))
        for url, answer in (
            await each("/end_weight_update", {"weight_version": str(version), "kv": kv})
        ).items():
            held = answer.get("checksum")
            if held != sent:
                failures[url] = EngineError(f"{url}: holds weights with checksum {held}, sent {sent}")
        if failures:
            raise PushFailed(failures)

    async def update_weights_from_disk(self, path: str, version: int) -> None:
        """Every server loads a Hugging Face directory that it can read itself."""
        await self._all("/update_weights_from_disk", {"model_path": path, "weight_version": str(version)})

    async def weights_checksum(self) -> list[tuple[int, int]]:
        """(weight version, checksum of the weights held) of each server."""
        answers = await asyncio.gather(
            *(self._get(url, "/weights_checksum", self._control_deadline_s) for url in self.urls)
        )
        return [(int(answer["weight_version"]), int(answer["checksum"])) for answer in answers]

    # HTTP ----------------------------------------------------------------------------------------

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._connect_s)
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)
        return self._session

    async def _all(self, path: str, body: dict[str, Any] | bytes) -> list[dict[str, Any]]:
        calls = (self._post(url, path, body, self._control_deadline_s) for url in self.urls)
        return list(await asyncio.gather(*calls))

    async def _post(
        self, url: str, path: str, body: dict[str, Any] | bytes, limit_s: float
    ) -> dict[str, Any]:
        if isinstance(body, bytes):
            return await self._call(
                "POST", url, path, limit_s, data=body, headers={"Content-Type": "application/octet-stream"}
            )
        return await self._call("POST", url, path, limit_s, json=body)

    async def _get(self, url: str, path: str, limit_s: float) -> dict[str, Any]:
        return await self._call("GET", url, path, limit_s)

    async def _call(self, method: str, url: str, path: str, limit_s: float, **body: Any) -> dict[str, Any]:
        try:
            async with asyncio.timeout(limit_s), self._open().request(method, url + path, **body) as response:
                if response.status != 200:
                    raise EngineError(f"{url}{path}: {response.status} {await _message(response)}")
                if "json" not in response.content_type:
                    return {}
                answer = await response.json()
        except TimeoutError as error:
            raise EngineError(f"{url}{path}: no answer within {limit_s} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise EngineError(f"{url}{path}: {type(error).__name__}: {error}") from error
        return answer if isinstance(answer, dict) else {}


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
    message = await _message(response)
    if 400 <= response.status < 500:
        return EngineError(f"request {rid!r} refused: {message}")
    return _Broken(f"status {response.status}: {message}")


async def _message(response: aiohttp.ClientResponse) -> str:
    """The server's words, whatever their form."""
    text = (await response.content.read(65536)).decode(errors="replace")
    return text[:2000]


def _pack(bucket: Bucket) -> tuple[bytes, int]:
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in bucket.items()}
    return save_safetensors(tensors), combine(
        tensor_checksum(name, tensor) for name, tensor in tensors.items()
    )


async def _each(buckets: Iterable[Bucket] | AsyncIterable[Bucket]) -> AsyncIterator[Bucket]:
    if isinstance(buckets, AsyncIterable):
        async for bucket in buckets:
            yield bucket
    else:
        for bucket in buckets:
            yield bucket
