"""The owner's end of a control channel, over which sockets are given away, one for each call made over it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from typing import Any

from system.awake import AwakeTimeout
from system.errors import EspalierError

_FULL_PAUSE_S = 0.005  # its queue is full; a fork server forks about a thousand times a second


class SandboxUnavailable(EspalierError, RuntimeError):
    """No mechanism of this machine gives the guarantees; the message says what is missing."""


class Lost(Exception):
    """Who serves a channel, or one call over it, died; the message: why there never was anybody, if so."""


class Channel:
    """Calls over a socket of whole messages (SOCK_SEQPACKET), whose other end is given away."""

    def __init__(self) -> None:
        self.control, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.setblocking(False)
        self._calls: set[socket.socket] = set()

    @property
    def busy(self) -> bool:
        return bool(self._calls)

    @property
    def dead(self) -> bool:
        """Whether nobody is left at the other end."""
        try:
            return not self.control.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    async def call(self, request: dict[str, Any], deadline_s: float) -> dict[str, Any]:
        """One request, one reply.  Raises Lost if whoever serves it is dead or silent."""
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        self._calls.add(ours)
        try:
            ours.setblocking(False)
            try:
                async with AwakeTimeout(deadline_s):
                    with theirs:
                        await self.pass_on(b"c", theirs)
                    await loop.sock_sendall(ours, json.dumps(request).encode() + b"\n")
                    return json.loads(await _line(ours))
            except TimeoutError:
                raise Lost from None
            except OSError as error:
                raise Lost(self._never_began()) from error
        finally:
            self._calls.discard(ours)
            ours.close()  # tells who serves it, if they still do, to give it up

    def _never_began(self) -> str:
        """What a fork server says that had no process for who was to serve it; empty: nothing."""
        for _ in range(2):  # at first Linux may tell only that a call was not read
            with contextlib.suppress(OSError, ValueError):  # ValueError: its end
                return json.loads(self.control.recv(1 << 16, socket.MSG_PEEK))["failed"]
        return ""

    async def pass_on(self, word: bytes, theirs: socket.socket) -> None:
        """Give the other end ``theirs``; ``word``: to do what with.  Raises OSError."""
        while True:
            try:
                socket.send_fds(self.control, [word], [theirs.fileno()])
                return
            except BlockingIOError:
                await asyncio.sleep(_FULL_PAUSE_S)

    async def end(self, within_s: float) -> None:
        """Give up all calls, and wait so long at most until the other end is closed as well."""
        for call in list(self._calls):
            with contextlib.suppress(OSError):
                call.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError, TimeoutError):
            self.control.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(within_s):
                while await asyncio.get_running_loop().sock_recv(self.control, 1 << 16):
                    pass
        self.control.close()


async def _line(channel: socket.socket) -> bytes:
    data = bytearray()
    while not data.endswith(b"\n"):
        data += await received(channel)
    return bytes(data)


async def received(channel: socket.socket) -> bytes:
    """Some bytes of a reply.  Raises OSError where it ends too early."""
    chunk = await asyncio.get_running_loop().sock_recv(channel, 1 << 16)
    if not chunk:
        raise ConnectionResetError("closed before the reply was complete")
    return chunk
