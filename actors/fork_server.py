"""A small process that answers at a socket, and its template: an interpreter that has imported what a run's
actors need, and from which they are forked.

Run by :mod:`.forking` as ``python -m actors.fork_server SOCKET_FD DIRECTORY MODULE...``.  The template never
starts a computation, CUDA or Ray, so what is forked from it is as good as new; its memory is shared until
somebody writes to it, and its imports are done once.

It imports the modules that know nothing of Ray (``system``) at once, Ray and the actors as soon as the first
worker of a raylet is asked for: Ray reads on import what a raylet has put into its workers' environment.  So
a further raylet gets a further template, which imports everything anew.

Whoever asks for what cannot be is refused (the connection ends), and starts by himself: see :mod:`.forked`.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import resource
import runpy
import select
import shutil
import signal
import socket
import sys
import time
import traceback
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from actors.forked import DEADLINE_S, FORKED, GO

_ACTORS = (
    *("ray._private.workers.default_worker", "actors.engine", "actors.learner", "actors.rollout"),
    *("actors.tools", "actors.tree_sample", "actors.in_flight"),
)
_REQUEST = 1 << 20  # bytes; a worker whose environment is larger starts by itself
_STREAMS = 2  # standard output and error come with it
_SILENT_S = 5.0  # who has connected and says nothing for so long is refused
_LOOK_S = 1.0
_ASKERS = 256  # that may wait; each has three files open here at most
_RAYLET = "RAY_RAYLET_PID"
_NO_JOB = {"RAY_JOB_ID": "f" * 8}  # of workers that Ray starts before a job needs them


@dataclass(frozen=True, slots=True)
class WorkerRequest:
    """A worker that is to be forked, as :func:`.forked.request` tells of it."""

    arguments: list[str]
    environment: dict[str, str]
    directory: str
    limits: dict[str, list[int]]  # by the name of the resource: soft, hard
    oom_score_adj: int
    niceness: int

    @classmethod
    def read(cls, message: bytes) -> WorkerRequest:
        """Raises ValueError or TypeError where it is none."""
        told: Any = json.loads(message)
        if not isinstance(told, dict):
            raise TypeError("not a dictionary")
        found = cls(**told)
        environment = found.environment
        texts: list[Any] = [*found.arguments, *environment, *environment.values(), found.directory]
        if not all(isinstance(one, str) and "\0" not in one for one in texts):
            raise TypeError("not all of it is text")
        if not environment.get(_RAYLET):
            raise ValueError(f"no {_RAYLET}: it is not Ray that asks")
        return found

    @property
    def raylet(self) -> str:
        return self.environment[_RAYLET]


@dataclass(frozen=True, slots=True)
class Queued:
    """A request that the template has not taken yet."""

    message: bytes
    asker: socket.socket
    fds: list[int]  # the streams
    until: float

    def close_streams(self) -> None:
        for fd in self.fds:
            os.close(fd)


class Server:
    """Hands each request to the template that it needs, until standard input ends.

    It waits for nobody: a template that imports still, or hangs, takes no more than its socket holds, and
    further requests are queued here.
    """

    def __init__(self, listening: socket.socket, modules: Sequence[str]) -> None:
        """``modules``: what a template imports before it is asked for a worker."""
        self._listening, self._modules = listening, modules
        self._askers: dict[socket.socket, float] = {}  # until when each has to say what it wants
        self._template: socket.socket | None = _template(modules, [listening])
        self._raylet = ""  # whose workers it forks: there is one at a time; empty: none's yet
        self._queue: deque[Queued] = deque()  # for it, the oldest first

    def serve(self) -> None:
        while True:
            sources = [sys.stdin, self._listening, *self._askers]
            full = [self._template] if self._template and self._queue else []
            waiting = self._askers or self._queue
            ready, _, _ = select.select(sources, full, [], _LOOK_S if waiting else None)
            if sys.stdin in ready:
                return
            self._pass_on()
            for asker in [one for one in self._askers if one in ready]:
                self._hear(asker)
            for asker in [one for one, until in self._askers.items() if until < time.monotonic()]:
                self._refuse(asker, f"has said nothing for {_SILENT_S:.0f} s")
            if self._listening in ready:
                asker, _ = self._listening.accept()
                self._askers[asker] = time.monotonic() + _SILENT_S
                if len(self._askers) + len(self._queue) > _ASKERS:
                    self._refuse(asker, "came while too many others were waiting")

    def _refuse(self, asker: socket.socket, why: str) -> None:
        print(f"espalier: fork server: who asked for a worker {why}", file=sys.stderr, flush=True)
        self._askers.pop(asker, None)  # it is not there where it was queued
        asker.close()

    def _hear(self, asker: socket.socket) -> None:
        """Take a request from one who has something to say, or has gone."""
        fds: list[int] = []
        try:
            message, fds, flags = _received(asker)
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(fds) != _STREAMS:
                raise ValueError("not of the size that it should have")
            self._have_template(WorkerRequest.read(message), fds)
        except (OSError, ValueError, TypeError, RecursionError) as error:  # its text may hold a secret
            self._refuse(asker, f"is refused: {type(error).__name__}")
            for fd in fds:
                os.close(fd)
        else:
            del self._askers[asker]
            self._queue.append(Queued(message, asker, fds, time.monotonic() + DEADLINE_S))
            self._pass_on()

    def _have_template(self, asked: WorkerRequest, fds: Sequence[int]) -> None:
        """Start the template that ``asked`` needs, where there is none; ``fds`` came with it."""
        if not self._template or self._raylet not in ("", asked.raylet):
            self._forget_template("is of a raylet that has ended")
            self._template = _template(self._modules, [self._listening, *self._askers], fds)
        self._raylet = asked.raylet

    def _pass_on(self) -> None:
        """Hand the template what it has room for.  Where it is gone, or has had none until the oldest
        request's deadline, it is forgotten, and all who wait for it are refused.
        """
        while self._template and self._queue:
            first = self._queue[0]
            try:
                _send(self._template, first.message, [*first.fds, first.asker.fileno()])
            except BlockingIOError:
                if first.until < time.monotonic():
                    self._forget_template("is refused: the template takes no more")
                return
            except OSError as error:
                self._forget_template(f"is refused: {type(error).__name__}")
                return
            self._queue.popleft()
            first.close_streams()
            first.asker.close()

    def _forget_template(self, why: str) -> None:
        if self._template:
            self._template.close()
            self._template = None
        while self._queue:
            one = self._queue.popleft()
            one.close_streams()
            self._refuse(one.asker, why)


# Not socket.send_fds and recv_fds: those of Python 3.11 ignore their flags, and would wait.
def _send(template: socket.socket, message: bytes, fds: Sequence[int]) -> None:
    """Raises BlockingIOError where there is no room for it."""
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))
    template.sendmsg([message], [rights], socket.MSG_DONTWAIT)


def _received(asker: socket.socket) -> tuple[bytes, list[int], int]:
    """A message, the open files that came with it, and its flags."""
    fds = array("i")
    room = socket.CMSG_LEN(_STREAMS * fds.itemsize)
    message, ancillary, flags, _ = asker.recvmsg(_REQUEST, room, socket.MSG_DONTWAIT)
    for level, kind, rights in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(rights[: len(rights) - len(rights) % fds.itemsize])
    return message, fds.tolist(), flags


def _imported(modules: Iterable[str]) -> None:
    """Import ``modules``, of which nothing is garbage: a collection in a forked process would write to every
    object, and copy its page.
    """
    gc.disable()
    from system.learn import cpu

    with cpu.quick_import():
        for module in modules:
            importlib.import_module(module)
    gc.freeze()
    gc.enable()


def _template(
    modules: Iterable[str], sockets: Sequence[socket.socket], fds: Sequence[int] = ()
) -> socket.socket:
    """Start one, which imports ``modules``, then Ray with the environment of the first worker that it is
    asked for.  Returns the socket that takes requests, at whose end it ends.

    ``sockets`` and ``fds``: what would stay open with it.
    """
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork():
        its.close()
        return ours

    def serve() -> None:
        for one in (ours, *sockets):
            one.close()
        for fd in fds:
            os.close(fd)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)  # in place of the driver's pipe
        os.close(nothing)
        _imported(modules)
        knows_ray = False
        while True:
            message, fds_of_one, _, _ = socket.recv_fds(its, _REQUEST, _STREAMS + 1)
            if not message:
                return
            asked = WorkerRequest.read(message)
            if not knows_ray:
                os.environ.clear()
                os.environ.update(asked.environment | _NO_JOB)
                _imported(_ACTORS)
                knows_ray = True
            if not os.fork():
                its.close()
                _become(partial(_work, asked, fds_of_one))
            for fd in fds_of_one:
                os.close(fd)

    _become(serve)


def _become(what: Callable[[], None]) -> NoReturn:
    """Do ``what`` to the end of this process, in which its parent's work must not go on."""
    code = 1
    try:
        what()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _work(asked: WorkerRequest, fds: Sequence[int]) -> None:
    """Be the Ray worker that was asked for; ``fds``: its output, errors, and the socket it was asked at."""
    import numpy as np
    from ray._raylet import Config  # pyright: ignore[reportAttributeAccessIssue]

    os.setpgid(0, 0)  # the raylet kills the group of a worker that ends
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, fd in enumerate(fds[:_STREAMS], start=1):
        os.dup2(fd, number)
        os.close(fd)
    os.environ.clear()
    os.environ.update(asked.environment)
    os.chdir(asked.directory)
    for name, (soft, hard) in asked.limits.items():
        resource.setrlimit(getattr(resource, name), (soft, hard))
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write(str(asked.oom_score_adj))
    os.setpriority(os.PRIO_PROCESS, 0, asked.niceness)
    np.random.seed()  # drawn on import; Python's own generator sees to itself
    Config.initialize("")  # reads the environment again, but for what is one raylet's
    with socket.socket(fileno=fds[_STREAMS]) as asker:
        try:
            asker.send(FORKED)
            if asker.recv(1) != GO:
                return
        except OSError:  # it has waited for too long, and goes on by itself
            return
    # What setup_worker.py would replace this process by: the script that the arguments name.
    parser = argparse.ArgumentParser()
    parser.add_argument("--serialized-runtime-env-context")
    parser.add_argument("--language")
    _, sys.argv = parser.parse_known_args(asked.arguments)
    runpy.run_path(sys.argv[0], run_name="__main__")


def main(socket_fd: int, directory: str, modules: Sequence[str]) -> None:
    """Have a worker forked for everyone who asks, until standard input ends: the driver has, and if it was
    killed, nobody else removes the socket's ``directory``.
    """
    listening = socket.socket(fileno=socket_fd)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the workers: Ray knows when they end
    Server(listening, modules).serve()
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
