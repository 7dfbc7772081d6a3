"""Weights by broadcast: the learner and a server's tensor-parallel ranks in one process group.

NCCL between GPUs, gloo between CPUs.  Every server has a group of its own, so that one that dies takes no
other's update with it; the learner sends a bucket once per server.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from system.engine.protocol import EngineError
from system.engine.weights.base import Bucket, on_this_host
from system.engine.weights.sglang import Carrier, PushTarget

JOIN_DEADLINE = timedelta(seconds=60)  # for all members of a group to come together
_numbers = count()
_nccl = threading.Lock()  # communicators of one device take turns


@dataclass(slots=True)
class _Group:
    """The learner is rank 0, the server's ranks follow."""

    name: str
    incarnation: str  # of the server that joined
    process_group: Any
    device: torch.device


class Distributed(Carrier):
    """``/update_weights_from_distributed``.

    A group lasts from update to update.  It is built anew with a server that was restarted, and after any
    failure.
    """

    def __init__(self, address: str) -> None:
        """``address`` of this process, for servers on other machines; those on this one use loopback."""
        super().__init__()
        self._address = address
        self._groups: dict[str, _Group] = {}  # by URL

    async def connect(self, server: PushTarget) -> None:
        group = self._groups.get(server.url)
        if group is not None and group.incarnation == server.incarnation:
            return
        self.disconnect(server.url)
        address = "127.0.0.1" if on_this_host(server.url) else self._address
        backend = "nccl" if server.device == "cuda" else "gloo"
        name = f"espalier-{socket.gethostname()}-{urlsplit(server.url).netloc}-{next(_numbers)}"
        listening = socket.create_server((address, 0))  # the store's; bound to this address only
        port = listening.getsockname()[1]
        invitation = server.post(
            "/init_weights_update_group",
            master_address=address,
            master_port=port,
            rank_offset=1,
            world_size=1 + server.tp,
            group_name=name,
            backend=backend,
        )
        joined = await _together(
            server, lambda: _join(listening, address, port, 1 + server.tp, name, backend), invitation
        )
        device = (
            torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")
        )
        self._groups[server.url] = _Group(name, server.incarnation, joined, device)

    async def load(self, server: PushTarget, bucket: Bucket, flush_cache: bool) -> None:
        group = self._groups[server.url]
        announcement = server.post(
            "/update_weights_from_distributed",
            names=list(bucket),
            dtypes=[str(t.dtype).removeprefix("torch.") for t in bucket.values()],
            shapes=[list(t.shape) for t in bucket.values()],
            group_name=group.name,
            load_format="flattened_bucket",
            flush_cache=flush_cache,
        )
        await _together(server, lambda: _broadcast(bucket, group), announcement)

    def disconnect(self, url: str) -> None:
        if group := self._groups.pop(url, None):
            dist.destroy_process_group(group.process_group)


async def _together(server: PushTarget, ours: Callable[[], Any], theirs: Any) -> Any:
    """Both sides of a collective: ``ours`` in a thread, ``theirs`` asked for by HTTP; returns ours."""
    mine, answer = await asyncio.gather(asyncio.to_thread(ours), theirs, return_exceptions=True)
    for outcome in (answer, mine):
        if isinstance(outcome, EngineError):
            raise outcome
        if isinstance(outcome, RuntimeError):  # torch's error for a peer that is gone or late
            raise EngineError(f"{server.url}: {outcome}") from outcome
        if isinstance(outcome, BaseException):
            raise outcome
    return mine


def _join(listening: socket.socket, address: str, port: int, world: int, name: str, backend: str) -> Any:
    """Rank 0's side of SGLang's ``init_custom_process_group``: a group beside torch's default one."""
    store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        address,
        port,
        world,
        is_master=True,
        timeout=JOIN_DEADLINE,
        wait_for_workers=True,
        master_listen_fd=listening.detach(),
    )
    group, _ = c10d._new_process_group_helper(  # pyright: ignore[reportPrivateUsage]
        world,
        0,
        [],
        c10d.Backend(backend),
        c10d.PrefixStore(name, store),
        group_name=c10d.GroupName(name),
        timeout=JOIN_DEADLINE,
    )
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world)}  # pyright: ignore[reportPrivateUsage]
    return group


def _broadcast(bucket: Bucket, group: _Group) -> None:
    """One flat buffer, in the order of the names that were announced."""
    parts = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in bucket.values()]
    cuda = group.device.type == "cuda"
    with _nccl if cuda else contextlib.nullcontext():
        flat = torch.cat(parts).to(group.device)
        dist.broadcast(flat, src=0, group=group.process_group)
        if cuda:
            torch.cuda.synchronize()
