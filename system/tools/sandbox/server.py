"""The owner's end of :mod:`system.tools.sandbox.forkserver`."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from system.foreign import AwakeTimeout
from system.scratch import Scratch
from system.tools.sandbox.channel import Channel, Lost, SandboxUnavailable, received
from system.tools.sandbox.scratch import remove_tree
from system.tools.sandbox.settings import Settings
from system.tools.sandbox.transport import REQUEST

log = logging.getLogger(__name__)

_ROOT = str(Path(__file__).resolve().parents[3])
_BOOT = (
    "import sys; sys.path.insert(0, sys.argv[1]); from system.tools.sandbox.forkserver import main; "
    "del sys.path[0]; main()"
)
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "TZ": "UTC"}  # no secrets; one order of sets
_START_DEADLINE_S = 60.0  # packages take seconds to import on a busy machine
_STOP_DEADLINE_S, _STOP_PAUSE_S = 5.0, 0.05
_MOST_IDLE = 2  # wardens that wait for their next call


class ForkServer(Channel):
    """A running fork server."""

    def __init__(self, scratch: Scratch, settings: Settings):
        super().__init__()
        self._scratch, self._settings = scratch, settings
        flags = ("-s", "-S", "-P")  # no user or site packages, no current directory on the path
        arguments = (_ROOT, str(self.theirs.fileno()), settings.to_json())
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed by stop)
        with self.theirs:
            self._process = subprocess.Popen(
                [sys.executable, *flags, "-c", _BOOT, *arguments],
                pass_fds=[self.theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                env=_ENVIRONMENT,
                cwd="/",
                start_new_session=True,
            )
        self.trees: set[Channel] = set()  # of sessions
        self._idle: list[socket.socket] = []  # channels of wardens of calls, the last one used at the end
        self._most_idle = _MOST_IDLE

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def busy(self) -> bool:
        """Also when it is dead itself: calls and trees outlive it."""
        return super().busy or bool(self.trees)

    async def greet(self) -> list[str]:
        """Wait until it is ready; returns the mechanisms.  Raises SandboxUnavailable with its reason."""
        try:
            async with asyncio.timeout(_START_DEADLINE_S):
                data = await asyncio.get_running_loop().sock_recv(self.control, 1 << 16)
        except TimeoutError:
            raise SandboxUnavailable(
                f"the fork server did not start within {_START_DEADLINE_S:g} s"
            ) from None
        except OSError as error:
            raise SandboxUnavailable(f"the fork server could not be heard: {error}") from error
        if not data:
            raise SandboxUnavailable(f"the fork server died while starting: {self._last_error()}")
        hello: dict[str, Any] = json.loads(data)
        if "failed" in hello:
            raise SandboxUnavailable(hello["failed"])
        return hello["ready"]

    def _last_error(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line), "no reason given")

    async def run(self, code: str, wall_s: float, deadline_s: float) -> dict[str, Any]:
        """What the warden of a call replies (:mod:`system.tools.sandbox.call_warden`), with ``stdout`` and
        ``stderr``.  Raises Lost if it dies, or is silent for ``deadline_s``."""
        data = code.encode(errors="surrogatepass")
        try:
            async with AwakeTimeout(deadline_s):
                warden = await self._warden()
                self._calls.add(warden)
                try:
                    request = REQUEST.pack(wall_s, len(data)) + data
                    with suppress(ConnectionError):  # who takes no more of it may have said why
                        await asyncio.get_running_loop().sock_sendall(warden, request)
                    reply = await _reply(warden)
                except BaseException:
                    warden.close()  # tells it, if it lives, to give the call up
                    raise
                finally:
                    self._calls.discard(warden)
        except OSError as error:
            raise Lost from error
        if reply.get("again") and len(self._idle) < self._most_idle:
            self._idle.append(warden)
        else:
            warden.close()
        return reply

    async def _warden(self) -> socket.socket:
        """The channel of one that is idle, or of a new one.  Raises OSError."""
        while self._idle:
            if _waits(warden := self._idle.pop()):
                return warden
            warden.close()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            with theirs:
                await self.pass_on(b"c", theirs)
        except BaseException:
            ours.close()
            raise
        return ours

    async def tree(self) -> Channel:
        """A warden of sessions that fork (:mod:`system.tools.sandbox.tree_warden`, or
        :mod:`~system.tools.sandbox.shell_warden`).  Raises Lost."""
        tree = Channel()
        try:
            with tree.theirs:
                await self.pass_on(b"t" if self._settings.shell is None else b"s", tree.theirs)
        except OSError as error:
            tree.control.close()
            raise Lost from error
        self.trees.add(tree)
        return tree

    async def end_tree(self, tree: Channel) -> None:
        """End its sessions and wait until their processes are gone."""
        self.trees.discard(tree)
        await tree.end(_STOP_DEADLINE_S)

    async def end(self, within_s: float) -> None:
        self._most_idle = 0
        while self._idle:
            self._idle.pop().close()
        await super().end(within_s)

    async def stop(self) -> None:
        """End every call and session, then the server, then remove what they wrote."""
        await asyncio.gather(*(self.end_tree(tree) for tree in [*self.trees]))
        await self.end(0.0)
        try:
            await asyncio.to_thread(self._process.wait, _STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        self._errors.close()
        await self._remove_base()

    async def _remove_base(self) -> None:
        """A warden that has lost its fork server may still be removing its own scratch directory."""
        until = time.monotonic() + _STOP_DEADLINE_S
        try:
            while (left := until - time.monotonic()) > 0:
                try:
                    if await asyncio.to_thread(remove_tree, self._settings.base, left):
                        return
                except OSError:
                    await asyncio.sleep(_STOP_PAUSE_S)
            log.warning("the sandbox's directory %s could not be removed", self._settings.base)
        finally:
            self._scratch.release()


def _waits(warden: socket.socket) -> bool:
    """Whether a warden waits for a request: it has neither ended nor said anything."""
    try:
        warden.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


async def _reply(warden: socket.socket) -> dict[str, Any]:
    data, end = bytearray(), 0  # of its first line
    while not end:
        data += await received(warden)
        end = data.find(b"\n") + 1
    reply = json.loads(data[:end])
    out, err = reply.pop("kept", (0, 0))
    while len(data) < end + out + err:
        data += await received(warden)
    reply["stdout"] = data[end : end + out].decode(errors="replace")
    reply["stderr"] = data[end + out : end + out + err].decode(errors="replace")
    return reply
