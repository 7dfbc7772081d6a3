"""A server that takes weights as SGLang does, generates nothing, and can be made to fail: for the benchmark
of weight updates and for tests.

``python -m system.bench.fake_sglang`` reads a :class:`Behaviour` (JSON) from its input and prints its URL.
Weights reach it over a :class:`Relay`: a process group of plain sockets in which every member hands on what
it receives, as NCCL's ring does, over links of a fixed bandwidth.  It knows only models whose parameters
SGLang neither pads nor splits (one rank; vocabulary a multiple of 64, feed-forward size of 32).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import orjson
from aiohttp import web

_CHUNK = 1 << 16
_LATE_S = 0.1  # a process that was scheduled so late makes up for it: the link would not have idled
_BYTES = {"float32": 4, "bfloat16": 2}
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class Behaviour:
    """How the server behaves."""

    bytes_s: float = math.inf  # bandwidth of its link
    deadline_s: float = 60.0  # of its sockets
    # What it does wrong at call number `call` (from 1) of `path`: "refuse" it, "hang" (in the middle of a
    # bucket, where that brings one), or "die".  "": nothing.
    fault: str = ""
    path: str = ""
    call: int = 1


class SlowLink:
    """A connection over which bytes leave at a fixed bandwidth."""

    def __init__(self, connection: socket.socket, bytes_s: float) -> None:
        self._connection, self._bytes_s = connection, bytes_s
        self._free_at = 0.0  # when what was sent has left
        self.sent = 0

    def send(self, chunk: memoryview) -> None:
        self._connection.sendall(chunk)
        self.sent += len(chunk)
        now = time.monotonic()
        self._free_at = max(self._free_at, now - _LATE_S) + len(chunk) / self._bytes_s
        time.sleep(max(self._free_at - now, 0.0))


class Relay:
    """One member of the group: it receives from the one before it and sends to the one after it.

    Members meet at the leader's socket: each tells its rank and where it listens, and is told the next one's
    port, 0 at the end.  Calls block, and raise OSError for a neighbour that is gone or late; then the whole
    relay falls apart, for whoever fails hangs up.
    """

    def __init__(self, bytes_s: float, deadline_s: float) -> None:
        self._bytes_s, self._deadline_s = bytes_s, deadline_s
        self._before: socket.socket | None = None
        self.after: SlowLink | None = None
        self._open: list[socket.socket] = []

    def lead(self, meeting: socket.socket, world: int) -> None:
        """As rank 0: wait for the others at ``meeting`` and show each its successor."""
        meeting.settimeout(self._deadline_s)
        self._open.append(meeting)
        ports, members = {world: 0}, dict[int, socket.socket]()
        for _ in range(world - 1):
            member = self._kept(meeting.accept()[0])
            told = json.loads(member.makefile().readline())
            ports[told["rank"]], members[told["rank"]] = told["port"], member
        for rank, member in members.items():
            member.sendall(f"{ports[rank + 1]}\n".encode())
        self._send_to(ports[1])

    def follow(self, host: str, port: int, rank: int) -> None:
        """As another rank, at the leader's ``host`` and ``port``."""
        with socket.create_server(("127.0.0.1", 0)) as listening:
            listening.settimeout(self._deadline_s)
            meeting = self._kept(socket.create_connection((host, port), timeout=self._deadline_s))
            meeting.sendall(json.dumps({"rank": rank, "port": listening.getsockname()[1]}).encode() + b"\n")
            following = meeting.makefile().readline()
            if not following:
                raise OSError("the leader has given up")
            self._send_to(int(following))
            self._before = self._kept(listening.accept()[0])

    def send(self, data: memoryview) -> None:
        assert self.after is not None
        for start in range(0, len(data), _CHUNK):
            self.after.send(data[start : start + _CHUNK])

    def receive(self, size: int) -> Iterator[bytes]:
        """``size`` bytes in chunks, each of which is handed on before the next is read."""
        assert self._before is not None
        while size:
            chunk = self._before.recv(min(size, _CHUNK))
            if not chunk:
                raise OSError("the member before this one has hung up")
            if self.after is not None:
                self.after.send(memoryview(chunk))
            size -= len(chunk)
            yield chunk

    def hang_up(self) -> None:
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _send_to(self, port: int) -> None:
        if port:
            connection = socket.create_connection(("127.0.0.1", port), timeout=self._deadline_s)
            self.after = SlowLink(self._kept(connection), self._bytes_s)

    def _kept(self, connection: socket.socket) -> socket.socket:
        connection.settimeout(self._deadline_s)
        self._open.append(connection)
        return connection


class FakeServer:
    """As much of SGLang as an update talks to.  ``/server_info`` also tells version, and pause."""

    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour, self._calls = behaviour, Counter[str]()
        self._relays: dict[str, Relay] = {}
        self._held: dict[str, bytes] = {}  # by Hugging Face name
        self._version, self._paused, self._in_session = "0", False, False
        self._began = time.time()
        self._paths: dict[str, Callable[[Any], Awaitable[dict[str, Any] | None]]] = {
            "server_info": self._server_info,
            "pause_generation": self._pause_generation,
            "continue_generation": self._continue_generation,
            "begin_weight_update": self._begin_weight_update,
            "end_weight_update": self._end_weight_update,
            "init_weights_update_group": self._init_weights_update_group,
            "destroy_weights_update_group": self._destroy_weights_update_group,
            "update_weights_from_distributed": self._update_weights_from_distributed,
            "weights_checker": self._weights_checker,
            "update_weight_version": self._update_weight_version,
        }

    async def handle(self, request: web.Request) -> web.Response:
        path, body = request.match_info["path"], await request.json() if request.can_read_body else {}
        self._calls[path] += 1
        fault = self._behaviour.fault if self._at_fault(path) else ""
        if fault == "die":
            os._exit(1)
        try:
            if fault == "refuse":
                raise RuntimeError("it does not want to")
            if fault == "hang" and path != "update_weights_from_distributed":
                await asyncio.sleep(3600)
            answer = await self._paths[path](body)
        except (OSError, RuntimeError) as error:
            return web.json_response({"success": False, "message": str(error)}, status=400)
        return web.json_response({"success": True} | (answer or {}))

    def _at_fault(self, path: str) -> bool:
        return path == self._behaviour.path and self._calls[path] == self._behaviour.call

    async def _server_info(self, body: Any) -> dict[str, Any]:
        about = {"tp_size": 1, "dp_size": 1, "device": "cpu", "startup_time": self._began}
        return about | {"weight_version": self._version, "paused": self._paused}

    async def _pause_generation(self, body: Any) -> None:
        self._paused = True

    async def _continue_generation(self, body: Any) -> None:
        self._paused = False

    async def _begin_weight_update(self, body: Any) -> None:
        if self._in_session:
            raise RuntimeError("a session is open")
        self._in_session = True

    async def _end_weight_update(self, body: Any) -> None:
        self._in_session = False

    async def _init_weights_update_group(self, body: Any) -> None:
        relay = Relay(self._behaviour.bytes_s, self._behaviour.deadline_s)
        try:
            meeting = body["master_address"], body["master_port"], body["rank_offset"]
            await asyncio.to_thread(relay.follow, *meeting)
        except OSError:
            relay.hang_up()
            raise
        self._relays[body["group_name"]] = relay

    async def _destroy_weights_update_group(self, body: Any) -> None:
        if body["group_name"] not in self._relays:
            raise RuntimeError("no such group")
        self._relays.pop(body["group_name"]).hang_up()

    async def _update_weights_from_distributed(self, body: Any) -> None:
        await asyncio.to_thread(self._receive, body)

    def _receive(self, body: Any) -> None:
        relay = self._relays[body["group_name"]]
        sizes = [
            math.prod(shape) * _BYTES[dtype]
            for shape, dtype in zip(body["shapes"], body["dtypes"], strict=True)
        ]
        parts = list[bytes]()
        try:
            for chunk in relay.receive(sum(sizes)):
                parts.append(chunk)
                if self._behaviour.fault == "hang" and self._at_fault("update_weights_from_distributed"):
                    time.sleep(3600)
        except OSError:
            relay.hang_up()
            raise
        flat, start = b"".join(parts), 0
        for name, size in zip(body["names"], sizes, strict=True):
            self._held[name] = flat[start : start + size]
            start += size

    async def _weights_checker(self, body: Any) -> dict[str, Any]:
        return {"ranks": [{"checksums": await asyncio.to_thread(self._digests)}]}

    def _digests(self) -> dict[str, str]:
        whole = dict[str, list[bytes]]()
        order = {part: at for parts in _FUSED.values() for at, part in enumerate(parts)}
        for name, data in sorted(self._held.items(), key=lambda item: order.get(item[0].split(".")[-2], 0)):
            module = name.split(".")[-2]
            fused = next((fused for fused, parts in _FUSED.items() if module in parts), module)
            whole.setdefault(name.replace(f".{module}.", f".{fused}."), []).append(data)
        return {name: hashlib.sha256(b"".join(parts)).hexdigest()[:16] for name, parts in whole.items()}

    async def _update_weight_version(self, body: Any) -> None:
        self._version = body["new_version"]


async def serve(behaviour: Behaviour) -> None:
    app = web.Application()
    app.router.add_route("*", "/{path}", FakeServer(behaviour).handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(Behaviour(**orjson.loads(sys.stdin.buffer.read()))))
