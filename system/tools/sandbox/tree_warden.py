"""The warden of one tree of sessions: interpreters that keep their state from cell to cell, and fork.

::

    Sandbox ──control──► fork server ──fork──► tree warden ──fork──► process 1 ──fork──► session ──fork──► …
       └────── a channel per tree ───────────────┘ └── a socket per session: cells, forks ──┘

Over the channel comes one socket per call, as for :mod:`.forkserver`; its one request is ``{do, …}``:

- ``open {seed}`` → ``{session}``;  ``close {session}`` → ``{}``
- ``run {session, code, wall_s, seed}`` → what a call's warden replies, with ``ended``: the session is gone
- ``fork {session, wall_s}`` → ``{session}``, or ``{refused, ended}``: why not, and whether it is gone

``{failed}`` is the answer when the sandbox itself is at fault, ``{full}`` when no session more may be opened,
``{gone}`` for a session that is not there.
The warden stands outside the confinement.  It has a thread for each call; one session is never asked two
things at once.  A session that runs no cell is stopped, so that threads and timers which it left behind take
no time.  When the channel or process 1 ends, the warden ends and takes everything with it.
"""

from __future__ import annotations

import json
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
from system.tools.sandbox.copying import NotCopied, copy_tree
from system.tools.sandbox.fork_gate import ForkGate
from system.tools.sandbox.lockdown import Confinement
from system.tools.sandbox.looking import Looks, Unseen, cpu_s
from system.tools.sandbox.process import end_with
from system.tools.sandbox.session import first_process
from system.tools.sandbox.watch import Ending, Output, watch

_REQUEST_S, _ANSWER_S, _BEGINS_S, _DIES_S = 10.0, 2.0, 10.0, 5.0
_LEAST_LOOK_S = 0.01
_STACK_BYTES = 256 << 10  # of a warden's thread


class _Ended(Exception):
    """The session has died, or does not keep to what its loop does: it is killed."""


class _Refused(Exception):
    """This cannot be done now; says why.  Nothing has changed."""


class _NoRoom(_Refused):
    """The tree has as many sessions as it may have."""


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
            raise _Ended from error

    def answer(self, within_s: float) -> transport.Received:
        return _answer(self.control, within_s)


class TreeWarden:
    """See the module."""

    def __init__(self, confinement: Confinement, channel: socket.socket):
        self._confinement, self._channel = confinement, channel
        self._limits = confinement.settings.limits
        self._looks = Looks(confinement.proc)
        self._uid = confinement.uid()
        self._sessions: dict[str, _Live] = {}
        self._coming = 0  # sessions that begin
        self._lock = threading.Lock()
        self._beginning = threading.Lock()  # one session at a time, so that no process goes unnoticed

    def serve(self) -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        kernel.set_name("sandbox-tree")
        self._directories = cell.enter_tree(self._uid, self._confinement.proc)
        self._first, theirs = socket.socketpair()
        pid = self._first_pid = kernel.fork_first()
        if pid == 0:
            self._first.close()
            self._channel.close()
            end_with(lambda: first_process(self._confinement, self._directories, self._uid, theirs))
        theirs.close()
        try:
            kernel.one_arena()
            threading.stack_size(_STACK_BYTES)
            self._gate = ForkGate()
            self._serve_calls(os.pidfd_open(pid))
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)  # which returns when all sessions are gone

    def _serve_calls(self, first: int) -> None:
        poller = select.poll()
        poller.register(first, select.POLLIN)
        poller.register(self._channel, select.POLLIN)
        while first not in dict(poller.poll()):
            message, descriptors, _, _ = socket.recv_fds(self._channel, 16, 1)
            if not message:
                return
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
                return {"session": self._open(request["seed"])}
            live = self._sessions.get(request["session"])
            if live is None:
                return {"gone": True}
            with live.lock:
                if live.dead:
                    return {"gone": True}
                match request["do"]:
                    case "run":
                        return self._run(live, request, call)
                    case "fork":
                        return self._fork(live, time.monotonic() + request["wall_s"])
                    case _:
                        self._kill(live)
                        return {}
        except _NoRoom as full:
            return {"full": str(full)}
        except (OSError, _Ended, _Refused) as error:
            return {"failed": f"{type(error).__name__}: {error}"}

    # Beginning and end

    def _open(self, seed: int) -> str:
        with self._room(), self._beginning:
            ours, theirs, link = _control()
            home = self._new_home()
            try:
                with theirs:
                    transport.send(self._first, {"home": home, "seed": seed}, [theirs.fileno()])
                listening = _answer(ours, _BEGINS_S)
                ready = listening if "failed" in listening.values else _answer(ours, _BEGINS_S)
                for listener in listening.descriptors:
                    self._gate.add(listener)
                if "ready" not in ready.values:
                    raise _Refused(f"a session could not be confined: {ready.values.get('failed')}")
                _, bare_mb = self._looks.memory_mb(ready.sender)
                return self._added(_Live(ours, link, home, ready.sender, bare_mb))
            except BaseException:
                ours.close()
                self._remove(home)
                raise

    @contextmanager
    def _room(self) -> Generator[None]:
        """For one session more."""
        with self._lock:
            if len(self._sessions) + self._coming >= self._limits.branches:
                raise _NoRoom(f"the tree has {self._limits.branches} sessions, as many as it may have")
            self._coming += 1
        try:
            yield
        finally:
            with self._lock:
                self._coming -= 1

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

    def _new_home(self) -> str:
        """An empty directory that nobody knows of."""
        home = self._unused_name()
        cell.mount_scratch(self._confinement.settings, self._uid, home)
        return home

    def _unused_name(self) -> str:
        home = os.path.join(self._directories, os.urandom(8).hex())
        os.mkdir(home, 0)
        return home

    def _remove(self, home: str) -> None:
        kernel.unmount(home)
        os.rmdir(home)

    # A cell

    def _run(self, live: _Live, request: dict[str, Any], call: socket.socket) -> dict[str, Any] | None:
        began, wall_s, output = time.monotonic(), request["wall_s"], Output(self._limits.output_chars)
        links = {live.socket_link, "/dev/null", *(f"pipe:[{os.fstat(end).st_ino}]" for end in output.given)}
        used = before = 0.0
        code: int | None = None

        def look() -> tuple[Ending | None, float]:
            nonlocal used
            with suppress(OSError):  # it is gone, as another end will tell
                used = cpu_s(live.pid) - before
            left = self._limits.cpu_s - used
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
        except _Ended:
            pass
        finally:
            peak_mb, own_mb = self._looks.memory_mb(live.pid)
            if code is None:
                self._kill(live)
            else:
                live.links = links
            output.drain()
        if ending.how == "abandoned" or (code is None and self._looks.ending(self._first_pid)):
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
            if self._looks.threads(live.pid) <= self._limits.threads + 1:
                return None
        except Unseen:  # it is gone, as another end will tell
            return None
        return Ending("filled", f"the program ran more than {self._limits.threads} threads")

    # A fork

    def _fork(self, live: _Live, until: float) -> dict[str, Any]:
        home = ""
        try:
            with self._room():
                self._looks.wait_stopped(live.pid)
                if self._looks.threads(live.pid) > 1:
                    raise _Refused("it runs more than one thread")
                home = self._new_home()
                copy_tree(live.home, home, self._uid, until)
                return {"session": self._added(self._forked(live, home, until))}
        except (NotCopied, Unseen, _Refused) as refusal:
            if home:
                self._remove(home)
            return {"refused": str(refusal), "ended": False}
        except (OSError, _Ended):
            if home:
                self._remove(home)
            self._kill(live)
            return {"refused": "its process did not answer, and was ended", "ended": True}

    def _forked(self, live: _Live, home: str, until: float) -> _Live:
        """The child of ``live`` whose directory is ``home``.  Raises _Refused with ``live`` as it was."""
        ours, theirs, link = _control()
        child: _Live | None = None
        try:
            with self._beginning:
                child = self._let_fork(live, ours, theirs, link, home, until)
            with child.awake():
                child.say({"home": home}, (), _ANSWER_S)
                if child.answer(_ANSWER_S).values != {"moved": True}:
                    raise _Ended
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
                raise _Refused("it knows the path of its directory")
            if "failed" in told:
                raise _Refused("the kernel gives it no second process")
            if told != {"forked": True}:
                raise _Ended
            hello = _answer(ours, max(0.0, until - time.monotonic()))
            if hello.values != {"forked": False} or hello.sender in before:
                raise _Ended
            child = _Live(ours, link, home, hello.sender, live.bare_mb)
            child.links = {*live.links, link} - {live.socket_link}
            child.signal(signal.SIGSTOP)
            return child
        except BaseException:
            self._gate.disarm()
            for pid in self._looks.children({live.pid, self._first_pid}):
                if pid not in before:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            raise
        finally:
            self._gate.disarm()

    def _check_apart(self, live: _Live, child: _Live) -> None:
        """Raise _Refused if parent and child have anything in common that either can change."""
        for one in (live, child):
            self._looks.wait_stopped(one.pid)
            if self._looks.threads(one.pid) > 1:
                raise _Ended
        if self._looks.parent(child.pid) != live.pid:
            raise _Ended
        if shared := self._looks.shares(child.pid, child.links, self._directories, child.home):
            raise _Refused(shared)
        if shared := self._looks.shares(live.pid, live.links, self._directories, live.home):
            raise _Refused(shared)


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
        raise _Ended from error


def _exit_code(told: dict[str, Any]) -> int:
    code = told.get("exit_code")
    if not isinstance(code, int):
        raise _Ended
    return code & 0xFF
