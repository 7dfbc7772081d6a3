"""What the wardens of sessions have in common: calls over a channel, room, directories.

Over the channel (SOCK_SEQPACKET) come messages of a byte, each with the socket of one call, over which go one
request and one reply, each a line of JSON.  The request is ``{do, …}``:

- ``open {…}`` → ``{session}``;  ``close {session}`` → ``{}``
- ``run {session, code, wall_s, …}`` → ``{exit_code, timed_out, excess, wall_s, cpu_s, peak_rss_mb, stdout,
  stdout_bytes, stderr, stderr_bytes, ended}``; ``ended``: the session is gone
- ``fork {session, wall_s}`` → ``{session}`` (of a shell ``held_mb`` as well), or
  ``{refused, ended}``: why not, and whether it is gone

``{failed}`` is the answer when the sandbox itself is at fault, ``{full}`` when no session more may be opened,
``{gone}`` for a session that is not there.  A warden stands outside the confinement.  It has a thread for
each call; one session is never asked two things at once.
"""

from __future__ import annotations

import json
import os
import select
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

from system.tools.sandbox import cell, kernel
from system.tools.sandbox.copying import NotCopied, copy_tree
from system.tools.sandbox.lockdown import Confinement
from system.tools.sandbox.looking import Looks

_REQUEST_S = 10.0
_STACK_BYTES = 256 << 10  # of a thread
_COPIES = 8  # at once: each holds two descriptors for every directory on its way down


class Ended(Exception):
    """The session has died, or does not keep to what its loop does: it is killed."""


class Refused(Exception):
    """This cannot be done now; says why.  Nothing has changed."""


class NoRoom(Refused):
    """The tree has as many sessions as it may have."""


class Kept(Protocol):
    """A session, seen from outside."""

    lock: threading.Lock
    dead: bool
    home: str


_Kept = TypeVar("_Kept", bound=Kept)


class SessionWarden(ABC, Generic[_Kept]):
    """Serves the calls of one tree of sessions."""

    _directories: str  # in which the sessions' homes are

    def __init__(self, confinement: Confinement, channel: socket.socket):
        self.confinement, self._channel = confinement, channel
        self.limits = confinement.settings.limits
        self.looks = Looks(confinement.proc)
        self.uid = confinement.uid()
        self._sessions: dict[str, _Kept] = {}
        self._coming = 0  # sessions that begin
        self._lock = threading.Lock()
        self._copies = threading.Semaphore(_COPIES)

    @staticmethod
    def fork(_: Confinement) -> int:
        return os.fork()

    @abstractmethod
    def _open(self, request: dict[str, Any]) -> str:
        """The name of a new session."""

    @abstractmethod
    def _run(self, live: _Kept, request: dict[str, Any], call: socket.socket) -> dict[str, Any] | None: ...

    @abstractmethod
    def _fork(self, live: _Kept, until: float) -> dict[str, Any]: ...

    @abstractmethod
    def _kill(self, live: _Kept) -> None:
        """End it, whatever it does; its files go with it."""

    def _serve_calls(self, until: int | None = None) -> None:
        """Until the channel ends, or something can be read at the descriptor ``until``."""
        kernel.one_arena()
        threading.stack_size(_STACK_BYTES)
        poller = select.poll()
        if until is not None:
            poller.register(until, select.POLLIN)
        poller.register(self._channel, select.POLLIN)
        while until not in dict(poller.poll()):
            message, descriptors, _, _ = socket.recv_fds(self._channel, 16, 1)
            if not message:
                return
            if descriptors:  # none could be had: that call has ended, the others go on
                call = socket.socket(fileno=descriptors[0])
                threading.Thread(target=self._serve_call, args=(call,), daemon=True).start()

    def _serve_call(self, call: socket.socket) -> None:
        reply = None
        with call:
            call.settimeout(_REQUEST_S)
            try:
                request = json.loads(call.makefile("rb").readline())
                reply = self._done(request, call)
                if reply is not None:
                    call.sendall(json.dumps(reply).encode() + b"\n")
                    call.settimeout(None)
                    call.recv(1)  # its end; an error if the reply was not read
            except (OSError, ValueError):  # the caller has gone: nobody knows of a session that it asked for
                live = self._sessions.get((reply or {}).get("session", ""))
                if live is not None:
                    with live.lock:
                        if not live.dead:
                            self._kill(live)

    def _done(self, request: dict[str, Any], call: socket.socket) -> dict[str, Any] | None:
        """The reply; None when the caller went away."""
        try:
            if request["do"] == "open":
                return {"session": self._open(request)}
            live = self._sessions.get(request["session"])
            if live is None:
                return {"gone": True}
            with live.lock:
                if live.dead:
                    return {"gone": True}
                match request["do"]:
                    case "run":
                        return self._ran(live, request, call)
                    case "fork":
                        return self._fork(live, time.monotonic() + request["wall_s"])
                    case _:
                        self._kill(live)
                        return {}
        except NoRoom as full:
            return {"full": str(full)}
        except (OSError, Ended, Refused) as error:
            return {"failed": f"{type(error).__name__}: {error}"}

    def _ran(self, live: _Kept, request: dict[str, Any], call: socket.socket) -> dict[str, Any] | None:
        """A session whose call the sandbox could not run is not used again by whoever asked."""
        try:
            return self._run(live, request, call)
        except BaseException:
            if not live.dead:
                self._kill(live)
            raise

    @contextmanager
    def _room(self) -> Generator[None]:
        """For one session more."""
        with self._lock:
            if len(self._sessions) + self._coming >= self.limits.branches:
                raise NoRoom(f"the tree has {self.limits.branches} sessions, as many as it may have")
            self._coming += 1
        try:
            yield
        finally:
            with self._lock:
                self._coming -= 1

    def _new_home(self) -> str:
        """An empty directory that nobody knows of."""
        home = self._unused_name()
        cell.mount_scratch(self.confinement.settings, self.uid, home)
        return home

    def _unused_name(self) -> str:
        home = os.path.join(self._directories, os.urandom(8).hex())
        os.mkdir(home, 0)
        return home

    def _copy(self, source: str, target: str, until: float) -> None:
        """Raises NotCopied."""
        if not self._copies.acquire(timeout=max(0.0, until - time.monotonic())):
            raise NotCopied("too many others are being copied")
        try:
            copy_tree(source, target, self.uid, until)
        finally:
            self._copies.release()

    def _remove(self, home: str) -> None:
        kernel.unmount(home)
        os.rmdir(home)
