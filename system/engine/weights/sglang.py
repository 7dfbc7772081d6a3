"""Weights into SGLang servers: stage, pause, load, prove, go on.

SGLang loads into the very tensors it computes with, so every way of sending needs a pause.  Whatever can be
done before it is done before it: gathering, converting, checking, hashing, writing files, copying into shared
memory, joining a process group.  Inside the pause stands only the load itself and its proof; all servers
pause at once, so that one delivery can serve them all.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from system.config.precision import FROM_FLOAT8, REQUANTISES
from system.engine.control import EngineControl, Http, Silent
from system.engine.embedded.weights import WeightsError, check, check_complete
from system.engine.protocol import EngineError
from system.engine.weights.base import Bucket, Buckets, Kv, PushReport, each, outcomes, size
from system.engine.weights.digest import Digests
from system.engine.weights.layout import ShardError
from system.models.files import DTYPES
from system.models.float8 import Float8
from system.models.reading import UnsupportedModel
from system.models.shape import ModelShape

# recompute: running requests give up their keys and values, and are prefilled again under the new weights.
_PAUSE_MODES: dict[Kv, str] = {"recompute": "retract", "keep": "in_place"}
Kind = tuple[int, str, bool]  # (ranks, device, quantised): servers whose digests of one model are alike
LOOK_DEADLINE_S = 30.0  # for a server to say what it is, which it asks its scheduler
PAUSE_DEADLINE_S = 30.0  # it pauses between two steps


@dataclass(slots=True)
class PushTarget(EngineControl):
    """One SGLang server as a transport sees it."""

    tp: int
    device: str  # cpu | cuda
    incarnation: str  # another one after each start of the server
    quantised: bool = False  # makes float8 numbers of the weights that it is sent

    @property
    def kind(self) -> Kind:
        return self.tp, self.device, self.quantised


class Carrier:
    """How staged tensors get from this process into servers: what differs between the ways.

    Here: into every server by itself, all of them at once, bucket after bucket within one of SGLang's weight
    update sessions.
    """

    on_gpu = False  # takes buckets where they were gathered; else on CPU

    def __init__(self) -> None:
        self._staged: list[Any] = []

    def stage(self, bucket: Bucket) -> None:
        """Keep a bucket until :meth:`clear`.  Runs in a worker thread, while generation goes on."""
        self._staged.append(bucket)

    async def connect(self, servers: Sequence[PushTarget]) -> dict[str, str]:
        """Whatever must stand before tensors can flow; all buckets are staged, the servers still generate.

        Returns the servers that cannot be reached this way (URL -> why).
        """
        return {}

    async def deliver(self, servers: Sequence[PushTarget], flush_cache: bool) -> dict[str, str]:
        """Load everything staged into paused servers.

        Cached prefixes are dropped with the last bucket where ``flush_cache`` says so.  Returns the servers
        that failed (URL -> why), which may hold a part of the new weights.
        """
        _, failures = await outcomes({s.url: self.deliver_to(s, flush_cache) for s in servers})
        return failures

    async def deliver_to(self, server: PushTarget, flush_cache: bool) -> None:
        """Load everything staged into one server.  Raises :class:`EngineError`."""
        await open_session(server)
        for number, bucket in enumerate(self._staged, 1):
            await self.load(server, bucket, flush_cache and number == len(self._staged))
        await server.post("/end_weight_update")

    async def load(self, server: PushTarget, bucket: Any, flush_cache: bool) -> None:
        """Load one bucket, as :meth:`stage` kept it."""
        raise NotImplementedError

    def clear(self) -> None:
        """Drop what is staged."""
        self._staged = []


async def open_session(server: PushTarget) -> None:
    """Begin one of SGLang's weight update sessions.  Raises :class:`EngineError`."""
    try:
        await server.post("/begin_weight_update")
    except Silent:
        raise
    except EngineError:  # a push that failed has left a session open
        await server.post("/end_weight_update")
        await server.post("/begin_weight_update")


class SGLangTransport:
    """The order of one update, by whatever :class:`Carrier`.

    Implements :class:`~system.engine.weights.base.Transport`.  The weight version is raised only after the
    proof: a server never stamps tokens with a version whose weights it does not hold.
    """

    def __init__(self, carrier: Carrier, model_path: str | Path, dtype: str) -> None:
        """For servers of the model in ``model_path`` that hold it in ``dtype``.

        Raises :class:`UnsupportedModel` for a float8 checkpoint: a server that was started from it computes
        with its codes, and weights that are sent have none.
        """
        if Float8.of_directory(model_path):
            raise UnsupportedModel(f"model.path: {model_path} has {FROM_FLOAT8}")
        self.carrier = carrier
        self._shape, self._dtype = ModelShape.from_directory(model_path), DTYPES[dtype]

    @property
    def on_gpu(self) -> bool:
        return self.carrier.on_gpu

    async def push(
        self, http: Http, urls: Sequence[str], buckets: Buckets, version: int, kv: Kv
    ) -> PushReport:
        began = time.perf_counter()
        servers, digests, failures = await self._look(http, urls, kv)
        refused, sent_bytes = await self._stage(buckets, list(digests.values()))
        pauses: dict[str, float] = {}
        try:
            if refused is None:
                failures |= await self.carrier.connect(servers)
            else:
                failures |= {url: f"{url}: not sent: {refused}" for url in urls}
            staged_s = time.perf_counter() - began
            left = [server for server in servers if server.url not in failures]
            if left:
                pauses, failed = await self._swap(left, version, kv, digests)
                failures |= failed
        finally:
            await asyncio.to_thread(self.carrier.clear)
        return PushReport(sent_bytes, staged_s, pauses, failures)

    # Before the pause ----------------------------------------------------------------------------

    async def _look(
        self, http: Http, urls: Sequence[str], kv: Kv
    ) -> tuple[list[PushTarget], dict[Kind, Digests], dict[str, str]]:
        """What the servers are, empty digests for every kind of them, and why some cannot be updated."""
        digests: dict[Kind, Digests] = {}

        async def look(url: str) -> PushTarget:
            server, info = await look_at(http, url)
            if kv == "keep" and not has_plugin(info):
                raise EngineError(
                    f"{url}: engine.kv_after_update=keep needs Espalier's plug-in in the server, without "
                    "which prefixes of the old weights would be served as new ones"
                )
            if (codes := info.get("quantization")) and not server.quantised:
                raise EngineError(
                    f"{url}: started with quantization={codes}, into which SGLang takes no new weights; "
                    f"start it with --quantization fp8 --load-format {REQUANTISES}, or without"
                )
            if server.quantised and not has_plugin(info):
                raise EngineError(
                    f"{url}: --load-format {REQUANTISES} needs Espalier's plug-in in the server, without "
                    "which nothing proves what it made its weights of"
                )
            try:
                digests.setdefault(server.kind, Digests(self._shape, *server.kind))
            except ShardError as error:
                raise EngineError(f"{url}: {error}") from error
            return server

        found, failures = await outcomes({url: look(url) for url in urls})
        return list(found.values()), digests, failures

    async def _stage(self, buckets: Buckets, digests: Sequence[Digests]) -> tuple[WeightsError | None, int]:
        """Read all buckets; (why they must not be sent, bytes).

        SGLang dies of a tensor of the wrong shape and rounds one of the wrong dtype without a word, so both
        are looked at here.
        """
        refused: WeightsError | None = None
        seen: set[str] = set()
        sent_bytes = 0

        def take(bucket: Bucket) -> None:
            check(self._shape, self._dtype, bucket)
            for digest in digests:
                digest.add(bucket)
            self.carrier.stage(bucket)

        async for bucket in each(buckets):
            sent_bytes += size(bucket)
            seen.update(bucket)
            if refused is None and bucket:
                try:
                    await asyncio.to_thread(take, bucket)
                except WeightsError as error:
                    refused = error
        if refused is None:
            try:
                check_complete(self._shape.tensors(), seen)
            except WeightsError as error:
                refused = error
        return refused, sent_bytes

    # The pause -----------------------------------------------------------------------------------

    async def _swap(
        self,
        servers: Sequence[PushTarget],
        version: int,
        kv: Kv,
        digests: Mapping[Kind, Digests],
    ) -> tuple[dict[str, float], dict[str, str]]:
        """Bring servers to the staged weights; (seconds for which each was paused, why the others failed).

        One that fails stays paused: it may hold a mixture.  One that does not pause in time holds up no other
        one beyond :data:`PAUSE_DEADLINE_S`.
        """
        began: dict[str, float] = {}

        async def pause(server: PushTarget) -> None:
            began[server.url] = time.perf_counter()
            await server.post("/pause_generation", limit_s=PAUSE_DEADLINE_S, mode=_PAUSE_MODES[kv])

        async def go_on(server: PushTarget) -> float:
            await _prove(server, digests[server.kind])
            await server.post("/update_weight_version", new_version=str(version), abort_all_requests=False)
            await server.post("/continue_generation")
            return time.perf_counter() - began[server.url]

        _, failures = await outcomes({server.url: pause(server) for server in servers})
        paused = [server for server in servers if server.url not in failures]
        failures |= await self.carrier.deliver(paused, flush_cache=kv == "recompute")
        loaded = [server for server in paused if server.url not in failures]
        pauses, failed = await outcomes({server.url: go_on(server) for server in loaded})
        return pauses, failures | failed


async def look_at(http: Http, url: str) -> tuple[PushTarget, dict[str, Any]]:
    """The server at ``url`` and what it says about itself.  Raises :class:`EngineError`."""
    info = await http.call(f"{url}/server_info", None, LOOK_DEADLINE_S)
    try:
        about = int(info["tp_size"]), str(info["device"]), str(info["startup_time"])
        server = PushTarget(url, http, *about, info.get("load_format") == REQUANTISES)
        dp = int(info.get("dp_size") or 1)
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(f"{url}/server_info: not as SGLang answers: {error!r}") from error
    if dp != 1:
        raise EngineError(
            f"{url}: SGLang takes weights in flight with dp_size 1 only; it has {dp}: start one server per "
            "replica"
        )
    return server, info


def has_plugin(info: Mapping[str, Any]) -> bool:
    """Whether the server keys its prefix cache by weight version (``in_server/plugin``)."""
    states = info.get("internal_states") or []
    return bool(states) and all(state.get("espalier") is True for state in states)


async def _prove(server: PushTarget, expected: Digests) -> None:
    """Raise :class:`EngineError` unless every rank holds of every parameter what was sent."""
    if found := await difference(server, expected):
        raise EngineError(f"{server.url}: it does not hold what was sent: {found}")


async def difference(server: PushTarget, expected: Digests) -> str:
    """The first parameter that a rank of the server does not hold as ``expected``, in words; empty: none.

    Raises :class:`EngineError` for a server that does not tell.
    """
    answer = await server.post("/weights_checker", action="checksum")
    held = answer.get("ranks") or []
    if len(held) != server.tp:
        raise EngineError(f"{server.url}: {len(held)} ranks reported checksums, expected {server.tp}")
    for rank, (theirs, ours) in enumerate(zip(held, expected.ranks, strict=True)):
        for name in sorted({*theirs["checksums"], *ours}):
            has, wanted = theirs["checksums"].get(name, "none"), ours.get(name, "none")
            if has != wanted:
                return f"{name} has checksum {has} on rank {rank}, not {wanted}"
    return ""
