"""The one client of SGLang's HTTP protocol, for our embedded server and for SGLang itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Literal

import aiohttp
import numpy as np
from numpy.typing import NDArray

from system.engine.entropy import TopEntropy
from system.engine.generation import Generation
from system.engine.http import Body, Http
from system.engine.protocol import Chunk, EngineError, EngineInfo, GenerateRequest
from system.engine.stream import version_number
from system.engine.weights.base import Buckets, Kv, PushReport, Transport


class EngineClient:
    """Generates, controls and updates over HTTP.  Implements :class:`~system.engine.protocol.Engine`.

    Several ``urls`` are replicas, among which :class:`~system.engine.router.Router` chooses for each request;
    control calls and weight updates go to all of them.  ``deadline_s`` bounds one ``generate`` call,
    ``stall_s`` the time without any answer after which a stream counts as broken (set it above the longest
    pause), ``retries`` the failures in a row that are mended by trying again.  Only what cannot duplicate a
    token is tried again: a request that never began, or the rest of one whose stream broke, with its tokens
    so far as part of the prompt.  ``in_flight`` bounds this client's requests at one server; more wait for
    their turn, first come, first served.  ``transport`` is how weights travel: over HTTP to the embedded
    engine unless given.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        session: aiohttp.ClientSession | None = None,
        transport: Transport | None = None,
        deadline_s: float = 120.0,
        stall_s: float = 60.0,
        connect_s: float = 5.0,
        control_deadline_s: float = 120.0,
        retries: int = 4,
        in_flight: int = 256,
        estimate: TopEntropy | None = None,
    ):
        if not urls:
            raise ValueError("an engine client needs at least one URL")
        self.urls = tuple(url.rstrip("/") for url in urls)
        self._http = Http(session, connect_s)
        self._transport = transport
        self._control_deadline_s = control_deadline_s
        self._generation = Generation(
            self._http,
            self.urls,
            self._info,
            deadline_s=deadline_s,
            stall_s=stall_s,
            control_deadline_s=control_deadline_s,
            retries=retries,
            in_flight=in_flight,
            estimate=estimate,
        )

    async def close(self) -> None:
        """Finish pending aborts and close the connections (a session given from outside stays open)."""
        await self._generation.close()
        await self._http.close()

    # Generation ----------------------------------------------------------------------------------

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk]:
        """Stream chunks until one carries ``finish``.  Closing the iterator early aborts the request.

        Raises :class:`EngineError` when the request is refused, or cannot be served after all retries or
        before the deadline.
        """
        return self._generation.generate(request)

    async def abort(self, rid: str) -> None:
        """End a running request of this client; its iterator then ends with an ``abort`` finish."""
        await self._generation.abort(rid)

    @property
    def counters(self) -> dict[str, float]:
        """Running totals of routing, cache hits, resumed streams and waits, for metrics."""
        return self._generation.counters

    async def score(self, input_ids: Sequence[int] | NDArray[np.int32]) -> NDArray[np.float32]:
        """[P - 1] log-probability of each token after the first, given those before it, at temperature 1.

        Asks the first server.  Raises :class:`EngineError`.
        """
        body = {
            "input_ids": np.asarray(input_ids).tolist(),
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        answer = await self._http.post(self.urls[0], "/generate", body, self._control_deadline_s)
        try:
            scored = answer["meta_info"]["input_token_logprobs"]
            return np.array([logprob for logprob, *_ in scored[1:]], np.float32)
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(f"{self.urls[0]}: no input_token_logprobs: {error!r}") from error

    # Control -------------------------------------------------------------------------------------

    async def pause(self, mode: Literal["abort", "retract", "in_place"] = "retract") -> None:
        """Stop generation at a token boundary.  New requests wait until :meth:`resume`."""
        await self._all("/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        await self._all("/continue_generation", {})

    async def abort_all(self) -> None:
        """End every request of every server, whoever sent it, and those of this client that still wait."""
        self._generation.abort_waiting()
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
                *(self._http.get(url, path, self._http.connect_s + 20 * generate) for url in self.urls)
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
        limit_s = self._control_deadline_s
        return list(await asyncio.gather(*(self._info(url, limit_s) for url in self.urls)))

    async def _info(self, url: str, limit_s: float) -> EngineInfo:
        model, loads, ready = await asyncio.gather(
            self._http.get(url, "/model_info", limit_s),
            self._http.get(url, "/v1/loads", limit_s),
            self._ready(url, limit_s),
        )
        try:
            (load,) = loads["loads"]  # one data-parallel rank: replicas are servers of their own
            return EngineInfo(
                weight_version=version_number(model["weight_version"]),
                running=int(load["num_running_reqs"]),
                waiting=int(load["num_waiting_reqs"]),
                max_running=int(load["max_running_requests"]),
                paused=not ready,
                counters={k: float(v) for k, v in load.items() if isinstance(v, int | float)},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(f"{url}: unexpected /model_info or /v1/loads: {error!r}") from error

    async def _ready(self, url: str, limit_s: float) -> bool:
        """Whether the server generates: SGLang's ``/ready`` is 503 while it is paused."""
        try:
            await self._http.get(url, "/ready", limit_s)
        except EngineError:
            return False
        return True

    # Weights -------------------------------------------------------------------------------------

    async def push_weights(
        self,
        buckets: Buckets,
        version: int,
        kv: Kv = "recompute",
    ) -> PushReport:
        """Give every server new weights, named as in Hugging Face, while generation goes on.

        The buckets together must hold every tensor of the model, and are read to their end in any case.
        Generation is interrupted only for the swap, at a token boundary.  Returns once every server serves
        ``version`` and has proved by checksum that it holds exactly what was sent.  A server that fails or
        refuses (it names the tensor) does not keep the others from their weights;
        :class:`~system.engine.weights.base.PushFailed` then says which and why.
        """
        if self._transport is None:
            from system.engine.weights.http import SafetensorsHttp  # needs PyTorch

            self._transport = SafetensorsHttp()
        return await self._transport.push(
            self._http, self.urls, buckets, version, kv, self._control_deadline_s
        )

    async def update_weights_from_disk(self, path: str, version: int) -> None:
        """Every server loads a Hugging Face directory that it can read itself."""
        await self._all("/update_weights_from_disk", {"model_path": path, "weight_version": str(version)})

    async def weights_checksum(self) -> list[tuple[int, int]]:
        """(weight version, checksum of the weights held) of each server."""
        answers = await asyncio.gather(
            *(self._http.get(url, "/weights_checksum", self._control_deadline_s) for url in self.urls)
        )
        return [(int(answer["weight_version"]), int(answer["checksum"])) for answer in answers]

    async def _all(self, path: str, body: Body) -> list[dict[str, Any]]:
        calls = (self._http.post(url, path, body, self._control_deadline_s) for url in self.urls)
        return list(await asyncio.gather(*calls))
