"""Weights by broadcast: the learner and the ranks of all servers in one process group.

A bucket leaves the learner once, however many servers there are; NCCL (between GPUs) and gloo (between CPUs)
hand it on among them.  The group lasts from update to update.  It is built anew, before the pause, where
servers have come, gone or been restarted; a server that fails within an update costs the others one more
start of it, in a group without that server.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import count
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from system.engine.control import Silent
from system.engine.protocol import EngineError
from system.engine.weights.base import GROUP_DEADLINE_S, Bucket, on_this_host, outcomes
from system.engine.weights.sglang import Carrier, PushTarget, open_session

ANSWER_S = 10.0  # for a server to say that it has given up, once it must have
ROOM_BYTES = 4 << 30  # of GPU memory, to be left free by what is staged there
_numbers = count()


class Wire(Protocol):
    """This process's end, rank 0, of a group.  Its calls but :meth:`close` block; they raise RuntimeError or
    OSError when a peer is gone or late.
    """

    def join(self) -> None:
        """Wait for all others."""

    def broadcast(self, flat: Tensor) -> None:
        """Send a buffer of bytes to all."""

    def close(self) -> None:
        """Leave; another thread's call then ends, at the latest when its time is up."""


@dataclass(frozen=True, slots=True)
class Invitation:
    """What a group is made of.  ``listening``: the socket at ``address`` where the members meet."""

    listening: socket.socket
    address: str
    world: int
    name: str
    backend: str  # nccl | gloo


class TorchGroup:
    """A :class:`Wire` of PyTorch: rank 0's side of SGLang's ``init_custom_process_group``."""

    def __init__(self, invitation: Invitation) -> None:
        self._to = invitation
        self._port: int = invitation.listening.getsockname()[1]
        # The store's daemon.  When it goes, everybody who still waits for a member fails at once.
        self._store: Any = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            invitation.address,
            self._port,
            invitation.world,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=GROUP_DEADLINE_S),
            master_listen_fd=invitation.listening.detach(),
        )
        self._group: Any = None
        nccl = invitation.backend == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def join(self) -> None:
        to, deadline = self._to, timedelta(seconds=GROUP_DEADLINE_S)
        store = dist.TCPStore(to.address, self._port, to.world, timeout=deadline)  # pyright: ignore[reportPrivateImportUsage]
        # Beside torch's default group, and of other processes: so without `device_id`, see learn/parallel.py.
        self._group, _ = c10d._new_process_group_helper(  # pyright: ignore[reportPrivateUsage]
            to.world,
            0,
            [],
            c10d.Backend(to.backend),
            c10d.PrefixStore(to.name, store),
            group_name=c10d.GroupName(to.name),
            # NCCL's watchdog would end this process; before that, `close` ends the broadcast.
            timeout=deadline * 2 if to.backend == "nccl" else deadline,
        )
        c10d._world.pg_group_ranks[self._group] = {rank: rank for rank in range(to.world)}  # pyright: ignore[reportPrivateUsage]
        if self._store is None:  # closed meanwhile
            self.close()
            raise RuntimeError("a member did not come")

    def broadcast(self, flat: Tensor) -> None:
        dist.broadcast(flat.to(self._device, non_blocking=True), src=0, group=self._group)
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def close(self) -> None:
        self._store = None
        if self._group is not None:
            self._group.abort()  # a peer may be gone: leaving in order would wait for it
            dist.destroy_process_group(self._group)
            self._group = None


@dataclass(slots=True)
class _Group:
    name: str
    members: list[tuple[str, str]]  # (URL, incarnation), in the order of their ranks
    wire: Wire
    whole: bool = False  # all are there, and wait for the next bucket


@dataclass(frozen=True, slots=True)
class _Staged:
    """A bucket as one buffer of bytes, and what SGLang is told about it."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    flat: Tensor


class Distributed(Carrier):
    """``/update_weights_from_distributed``."""

    on_gpu = True

    def __init__(self, address: str, wire: Callable[[Invitation], Wire] = TorchGroup) -> None:
        """``address`` of this process, for servers on other machines; where all are on this one they use
        loopback.
        """
        super().__init__()
        self._address, self._wire = address, wire
        self._group: _Group | None = None

    def stage(self, bucket: Bucket) -> None:
        parts = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in bucket.values()]
        flat = torch.cat(parts)
        if flat.is_cuda and not _room():
            flat = flat.to("cpu", non_blocking=True)  # pinned, which a copy that nobody waits for is
            torch.cuda.synchronize()
        self._staged.append(
            _Staged(
                list(bucket),
                [str(tensor.dtype).removeprefix("torch.") for tensor in bucket.values()],
                [list(tensor.shape) for tensor in bucket.values()],
                flat,
            )
        )

    async def connect(self, servers: Sequence[PushTarget]) -> dict[str, str]:
        """A group of ``servers``, without those that do not join."""
        failures: dict[str, str] = {}
        while left := [server for server in servers if server.url not in failures]:
            members = [(server.url, server.incarnation) for server in left]
            if self._group is not None and self._group.whole and self._group.members == members:
                break
            failures |= await self._meet(left)
        return failures

    async def deliver(self, servers: Sequence[PushTarget], flush_cache: bool) -> dict[str, str]:
        failures: dict[str, str] = {}
        while left := [server for server in servers if server.url not in failures]:
            failed = await self.connect(left) or await self._send(left, flush_cache)
            if not failed:
                _, failed = await outcomes({s.url: s.post("/end_weight_update") for s in left})
                return failures | failed
            failures |= failed
        return failures

    async def _meet(self, servers: Sequence[PushTarget]) -> dict[str, str]:
        """A group of these servers in place of the former; or why there is none, by the servers to blame."""
        await self._part(servers)
        kind = servers[0].device
        if others := [server.url for server in servers if server.device != kind]:
            return {url: f"{url}: not on {kind} as {servers[0].url}, which one group needs" for url in others}
        address = "127.0.0.1" if all(on_this_host(server.url) for server in servers) else self._address
        world = 1 + sum(server.tp for server in servers)
        name = f"espalier-{socket.gethostname()}-{next(_numbers)}"
        backend = "nccl" if kind == "cuda" else "gloo"
        listening = socket.create_server((address, 0))  # bound to this address only
        port = listening.getsockname()[1]
        wire = self._wire(Invitation(listening, address, world, name, backend))
        calls: dict[str, Coroutine[Any, Any, Any]] = {}
        rank = 1
        for server in servers:
            calls[server.url] = server.post(
                "/init_weights_update_group",
                master_address=address,
                master_port=port,
                rank_offset=rank,
                world_size=world,
                group_name=name,
                backend=backend,
            )
            rank += server.tp
        self._group = _Group(name, [(server.url, server.incarnation) for server in servers], wire)
        failures = await _together(wire, wire.join, calls)
        self._group.whole = not failures
        return failures

    async def _part(self, servers: Sequence[PushTarget]) -> None:
        """Leave the group, and have those of ``servers`` leave it that are in it."""
        group, self._group = self._group, None
        if group is None:
            return
        await asyncio.to_thread(group.wire.close)
        members = [server for server in servers if (server.url, server.incarnation) in group.members]
        calls = {
            server.url: server.post("/destroy_weights_update_group", limit_s=ANSWER_S, group_name=group.name)
            for server in members
        }
        await outcomes(calls)  # one that fails here fails again when it is invited

    async def _send(self, servers: Sequence[PushTarget], flush_cache: bool) -> dict[str, str]:
        """Everything staged, to all members; or why they must have it again, by the servers to blame."""
        group = self._group
        assert group is not None
        _, failures = await outcomes({server.url: open_session(server) for server in servers})
        if failures:
            return failures
        group.whole = False  # until all buckets have come through
        for number, staged in enumerate(self._staged, 1):
            news: dict[str, Any] = {
                "names": staged.names,
                "dtypes": staged.dtypes,
                "shapes": staged.shapes,
                "group_name": group.name,
                "load_format": "flattened_bucket",
                "flush_cache": flush_cache and number == len(self._staged),
            }
            calls = {
                server.url: server.post("/update_weights_from_distributed", **news) for server in servers
            }
            if failures := await _together(group.wire, partial(group.wire.broadcast, staged.flat), calls):
                return failures
        group.whole = True
        return {}


def _room() -> bool:
    """Whether this GPU has memory left for more than what the next bucket needs on its way."""
    kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # by torch, for whoever asks
    return torch.cuda.mem_get_info()[0] + kept > ROOM_BYTES


async def _together(
    wire: Wire, ours: Callable[[], None], theirs: Mapping[str, Coroutine[Any, Any, Any]]
) -> dict[str, str]:
    """Both sides of a collective: ``ours`` in a thread, ``theirs`` asked for by HTTP (by URL).

    Returns why it failed, by the servers to blame: those that do not answer; if all do, those that failed
    before this process gave up (the others failed because it did); if none, all.  ``wire`` is closed then.
    """
    mine = asyncio.ensure_future(asyncio.to_thread(ours))
    calls = {url: asyncio.ensure_future(call) for url, call in theirs.items()}
    everyone: list[asyncio.Future[Any]] = [mine, *calls.values()]
    limit_s, began, good = GROUP_DEADLINE_S + ANSWER_S, time.monotonic(), False
    try:
        await asyncio.wait(everyone, timeout=limit_s, return_when=asyncio.FIRST_EXCEPTION)
        first = {url: why for url, call in calls.items() if call.done() and (why := _fault(url, call))}
        good = all(one.done() and one.exception() is None for one in everyone)
        if good:
            return {}
        await asyncio.to_thread(wire.close)
        left_s = began + limit_s - time.monotonic()  # by when those who wait for another one have given up
        await asyncio.wait(everyone, timeout=max(left_s, ANSWER_S))
    finally:
        if not good:
            wire.close()
            for one in everyone:
                one.cancel()
    failed = {url: why for url, call in calls.items() if (why := _fault(url, call))}
    silent = {url: why for url, why in failed.items() if _is_silent(calls[url])}
    fault = "it hangs" if mine.cancelled() or not mine.done() else mine.exception()
    if isinstance(fault, BaseException) and not isinstance(fault, RuntimeError | OSError):
        raise fault
    return silent or first or failed or {url: f"{url}: its group failed: {fault}" for url in calls}


def _fault(url: str, call: asyncio.Future[Any]) -> str:
    """What is wrong with the server's part of a collective; empty: nothing."""
    if not call.done() or call.cancelled():
        return f"{url}: no answer, and its group waited for it"
    error = call.exception()
    if error is not None and not isinstance(error, EngineError):
        raise error
    return str(error or "")


def _is_silent(call: asyncio.Future[Any]) -> bool:
    return not call.done() or call.cancelled() or isinstance(call.exception(), Silent)
