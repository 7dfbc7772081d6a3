"""The warden of one tree of sessions: interpreters that keep their state from cell to cell, and fork.

::

    Sandbox ──control──► fork server ──fork──► tree warden ──fork──► process 1 ──fork──► session ──fork──► …
       └────── a channel per tree ───────────────┘ └── a socket per session: cells, forks ──┘

Calls are those of :mod:`.session_warden`; ``open {seed}`` and ``run {…, seed}`` say what a session draws by.
A session that runs no cell is stopped, so that threads and timers which it left behind take
no time.  When the channel or process 1 ends, the warden ends and takes everything with it.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any

from system.tools.sandbox import cell, kernel, transport
from system.tools.sandbox.copying import NotCopied
from system.tools.sandbox.fork_gate import ForkGate
from system.tools.sandbox.lockdown import Confinement
from system.tools.sandbox.looking import Unseen, cpu_s
from system.tools.sandbox.process import end_with
from system.tools.sandbox.session import first_process
from system.tools.sandbox.session_warden import Ended, Refused, SessionWarden
from system.tools.sandbox.watch import Ending, Output, watch

_ANSWER_S, _BEGINS_S, _DIES_S = 2.0, 10.0, 5.0
_LEAST_LOOK_S = 0.01


class _Live:
    """A session, seen from outside."""

    def __init__(self, control: socket.socket, socket_link: str, home: str, pid: int, bare_mb: float):
        """``bare_mb``: the memory of an interpreter without state."""
        self.control, self.home, self.pid, self.bare_mb = control, home, pid, bare_mb
        self.pidfd = os.pidfd_open(pid)
        self.socket_link = socket_link
        self.links = {"/dev/null", socket_link}  # what its descriptors may be at a fork
        self.lock = threading.Lock()
        self.dead = False

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    @contextmanager
    def awake(self) -> Generator[None]:
        self.signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.signal(signal.SIGSTOP)

    def say(self, values: dict[str, Any], descriptors: tuple[int, ...], within_s: float) -> None:
        self.control.settimeout(within_s)
        try:
            transport.send(self.control, values, descriptors)
        except OSError as error:
            raise Ended from error

    def answer(self, within_s: float) -> transport.Received:
        return _answer(self.control, within_s)


class TreeWarden(SessionWarden[_Live]):
    """See the module."""

    def __init__(self, confinement: Confinement, channel: socket.socket):
        super().__init__(confinement, channel)
        self._beginning = threading.Lock()  # one session at a time, so that no process goes unnoticed

    def serve(self) -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        kernel.set_name("sandbox-tree")
        self._directories = cell.enter_tree(self.uid, self.confinement.proc)
        self._first, theirs = socket.socketpair()
        pid = self._first_pid = kernel.fork_first()
        if pid == 0:
            self._first.close()
            self._channel.close()
            end_with(lambda: first_process(self.confinement, self._directories, self.uid, theirs))
        theirs.close()
        try:
            self._gate = ForkGate()
            self._serve_calls(os.pidfd_open(pid))
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)  # which returns when all sessions are gone

    # Beginning and end

    def _open(self, request: dict[str, Any]) -> str:
        with self._room(), self._beginning:
            ours, theirs, link = _control()
            home = self._new_home()
            try:
                with theirs:
                    transport.send(self._first, {"home": home, "seed": request["seed"]}, [theirs.fileno()])
                listening = _answer(ours, _BEGINS_S)
                ready = listening if "failed" in listening.values else _answer(ours, _BEGINS_S)
                for listener in listening.descriptors:
                    self._gate.add(listener)
                if "ready" not in ready.values:
                    raise Refused(f"a session could not be confined: {ready.values.get('failed')}")
                _, bare_mb = self.looks.memory_mb(ready.sender)
                return self._added(_Live(ours, link, home, ready.sender, bare_mb))
            except BaseException:
                ours.close()
                self._remove(home)
                raise

    def _added(self, live: _Live) -> str:
        live.signal(signal.SIGSTOP)
        with self._lock:
            name = os.path.basename(live.home) + str(live.pid)
            self._sessions[name] = live
        return name

    def _kill(self, live: _Live) -> None:
        """End it, whatever it does; its files go with it."""
        live.dead = True
        live.signal(signal.SIGKILL)
        select.select([live.pidfd], [], [], _DIES_S)
        with self._lock:
            self._sessions = {name: one for name, one in self._sessions.items() if one is not live}
        os.close(live.pidfd)
        live.control.close()
        self._remove(live.home)

    # A cell

    def _run(self, live: _Live, request: dict[str, Any], call: socket.socket) -> dict[str, Any] | None:
        began, wall_s, output = time.monotonic(), request["wall_s"], Output(self.limits.output_chars)
        links = {live.socket_link, "/dev/null", *(f"pipe:[{os.fstat(end).st_ino}]" for end in output.given)}
        used = before = 0.0
        code: int | None = None

        def look() -> tuple[Ending | None, float]:
            nonlocal used
            with suppress(OSError):  # it is gone, as another end will tell
                used = cpu_s(live.pid) - before
            left = self.limits.cpu_s - used
            ending = Ending("cpu") if left <= 0 else self._too_many(live)
            return ending, max(_LEAST_LOOK_S, left / (os.cpu_count() or 1))

        with suppress(OSError):
            before = cpu_s(live.pid)
        ending = Ending("exited")
        try:
            with live.awake():
                asked = {"code": request["code"], "seed": request["seed"], "home": live.home}
                try:
                    live.say(asked, output.given, wall_s)
                finally:
                    output.close_given()
                ends = {
                    live.pidfd: Ending("exited"),
                    call.fileno(): Ending("abandoned"),
                    live.control.fileno(): Ending("answered"),
                }
                ending = watch(ends, output.captures, began + wall_s, look)
                look()
                if ending.how == "answered" and (excess := self._too_many(live)):
                    ending = excess
                if ending.how == "answered":
                    code = _exit_code(live.answer(_ANSWER_S).values)
        except Ended:
            pass
        finally:
            peak_mb, own_mb = self.looks.memory_mb(live.pid)
            if code is None:
                self._kill(live)
            else:
                live.links = links
            output.drain()
        if ending.how == "abandoned" or (code is None and self.looks.ending(self._first_pid)):
            return None
        killed = -signal.SIGKILL if ending.how == "cpu" else 1
        return {
            "exit_code": killed if code is None else code,
            "ended": code is None,
            "timed_out": ending.how == "deadline",
            "excess": ending.told,
            "held_mb": max(0.0, own_mb - live.bare_mb),
            "wall_s": time.monotonic() - began,
            "cpu_s": used,
            "peak_rss_mb": peak_mb,
            **output.told(),
        }

    def _too_many(self, live: _Live) -> Ending | None:
        """Its threads, of which the kernel counts those of a tree."""
        try:
            if self.looks.threads(live.pid) <= self.limits.threads + 1:
                return None
        except Unseen:  # it is gone, as another end will tell
            return None
        return Ending("filled", f"the program ran more than {self.limits.threads} threads")

    # A fork

    def _fork(self, live: _Live, until: float) -> dict[str, Any]:
        home = ""
        try:
            with self._room():
                self.looks.wait_stopped(live.pid)
                if self.looks.threads(live.pid) > 1:
                    raise Refused("it runs more than one thread")
                home = self._new_home()
                self._copy(live.home, home, until)
                return {"session": self._added(self._forked(live, home, until))}
        except (NotCopied, Unseen, Refused) as refusal:
            if home:
                self._remove(home)
            return {"refused": str(refusal), "ended": False}
        except (OSError, Ended):
            if home:
                self._remove(home)
            self._kill(live)
            return {"refused": "its process did not answer, and was ended", "ended": True}

    def _forked(self, live: _Live, home: str, until: float) -> _Live:
        """The child of ``live`` whose directory is ``home``.  Raises Refused with ``live`` as it was."""
        ours, theirs, link = _control()
        child: _Live | None = None
        try:
            with self._beginning:
                child = self._let_fork(live, ours, theirs, link, home, until)
            with child.awake():
                child.say({"home": home}, (), _ANSWER_S)
                if child.answer(_ANSWER_S).values != {"moved": True}:
                    raise Ended
            self._check_apart(live, child)
            moved = self._unused_name()
            kernel.move_mount(live.home, moved)  # its child knows the old name, and nobody this one
            os.rmdir(live.home)
            live.home = moved
            return child
        except BaseException:
            if child is not None:
                child.signal(signal.SIGKILL)
                os.close(child.pidfd)
            ours.close()
            raise

    def _let_fork(
        self, live: _Live, ours: socket.socket, theirs: socket.socket, link: str, home: str, until: float
    ) -> _Live:
        """Its new child, stopped.  Whatever else it has started meanwhile is ended."""
        with self._lock:
            before = {session.pid for session in self._sessions.values()}
        self._gate.arm(live.pid)
        try:
            with live.awake():
                with theirs:
                    live.say({"home": live.home}, (theirs.fileno(),), _ANSWER_S)
                told = live.answer(max(0.0, until - time.monotonic())).values
            if "told_where" in told:
                raise Refused("it knows the path of its directory")
            if "failed" in told:
                raise Refused("the kernel gives it no second process")
            if told != {"forked": True}:
                raise Ended
            hello = _answer(ours, max(0.0, until - time.monotonic()))
            if hello.values != {"forked": False} or hello.sender in before:
                raise Ended
            child = _Live(ours, link, home, hello.sender, live.bare_mb)
            child.links = {*live.links, link} - {live.socket_link}
            child.signal(signal.SIGSTOP)
            return child
        except BaseException:
            self._gate.disarm()
            for pid in self.looks.children({live.pid, self._first_pid}):
                if pid not in before:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            raise
        finally:
            self._gate.disarm()

    def _check_apart(self, live: _Live, child: _Live) -> None:
        """Raise Refused if parent and child have anything in common that either can change."""
        for one in (live, child):
            self.looks.wait_stopped(one.pid)
            if self.looks.threads(one.pid) > 1:
                raise Ended
        if self.looks.parent(child.pid) != live.pid:
            raise Ended
        if shared := self.looks.shares(child.pid, child.links, self._directories, child.home):
            raise Refused(shared)
        if shared := self.looks.shares(live.pid, live.links, self._directories, live.home):
            raise Refused(shared)


def _control() -> tuple[socket.socket, socket.socket, str]:
    """A session's socket: our end, which tells who sent what; its end; and that as /proc names it."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return ours, theirs, f"socket:[{os.fstat(theirs.fileno()).st_ino}]"


def _answer(control: socket.socket, within_s: float) -> transport.Received:
    control.settimeout(max(within_s, 1e-3))
    try:
        return transport.receive(control, transport.ANSWER_BYTES)
    except (OSError, ValueError, RecursionError) as error:
        raise Ended from error


def _exit_code(told: dict[str, Any]) -> int:
    code = told.get("exit_code")
    if not isinstance(code, int):
        raise Ended
    return code & 0xFF
