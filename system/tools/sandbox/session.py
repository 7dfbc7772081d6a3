"""What runs inside a tree of sessions: the first process, which forks them, and a session's loop.

The loop shares its process with the model's code.  Its warden (:mod:`.tree_warden`) trusts nothing that it
says; this only has to be right for programs that leave it alone.
"""

from __future__ import annotations

import fcntl
import functools
import os
import random
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from system.tools.sandbox import kernel, lockdown, program, transport
from system.tools.sandbox.process import become_program, end_with

_Path = TypeVar("_Path", str, bytes)
_where = os.getcwd  # as it is before a session replaces it
MOST_BYTES = 16 << 20  # of a message from the warden, which has code in it


def first_process(
    confinement: lockdown.Confinement, directories: str, uid: int | None, warden: socket.socket
) -> None:
    """Process 1 of a tree's PID namespace: forks a session for each message, and runs nothing of theirs.

    Without handlers for signals nothing inside can end it; when it ends, the kernel kills all the others.
    """
    kernel.set_name("sandbox-tree-1")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps all sessions
    kernel.die_with_parent(signal.SIGKILL)
    while True:
        try:
            asked = transport.receive(warden, MOST_BYTES)
        except OSError:  # also when the warden died before the signal for that was set
            return
        (control,) = asked.descriptors
        if os.fork() == 0:
            session = _Session(socket.socket(fileno=control), asked.values["home"])
            end_with(functools.partial(session.begin, confinement, directories, uid, asked.values["seed"]))
        os.close(control)


class _Session:
    """One interpreter; a fork of it goes on with a copy of this."""

    def __init__(self, control: socket.socket, home: str):
        self._control, self._home, self._cells = control, home, 0
        self._told_where = False  # a program that was may have kept a path that a fork makes invalid

    def begin(self, confinement: lockdown.Confinement, directories: str, uid: int | None, seed: int) -> None:
        kernel.set_name("sandbox-session")
        null = os.open(os.devnull, os.O_WRONLY)
        become_program(self._home, null, null)
        listen: Callable[[int], None] = lambda listener: self._answer({"listener": True}, listener)  # noqa: E731
        try:
            lockdown.confine_session(
                confinement, directories, self._home, uid, self._control.fileno(), listen
            )
        except Exception as error:  # whatever it is, no program must run, and the warden must hear why
            self._answer({"failed": f"{type(error).__name__}: {error}"})
            raise
        self._namespace = program.fresh_main()
        os.getcwd, os.getcwdb = self._noted(os.getcwd), self._noted(os.getcwdb)
        _seed(seed)
        self._answer({"ready": True})
        self._serve()

    def _serve(self) -> None:
        while True:
            try:
                asked = transport.receive(self._control, MOST_BYTES)
            except OSError:
                os._exit(0)
            values = asked.values
            if "home" in values:
                self._move(values["home"])
            if "code" in values:
                self._answer({"exit_code": self._run(values["code"], values["seed"], asked.descriptors)})
            elif asked.descriptors:
                self._fork(*asked.descriptors)
            else:
                self._answer({"moved": True})

    def _answer(self, values: dict[str, Any], *descriptors: int) -> None:
        transport.send(self._control, values, descriptors)

    def _run(self, code: str, seed: int | None, outputs: tuple[int, ...]) -> int:
        high = [
            fcntl.fcntl(output, fcntl.F_DUPFD, 3) for output in outputs
        ]  # an earlier cell may have closed
        for output in outputs:  # the descriptors 1 and 2, so that these are they
            os.close(output)
        for target, output in zip((1, 2), high, strict=True):
            os.dup2(output, target)
            os.close(output)
        program.take_outputs()
        if seed is not None:
            _seed(seed)
        self._cells += 1
        filename = f"<python {self._cells}>"  # a function keeps the lines of the cell that it stands in
        try:
            return program.run_cell(code, self._namespace, program.join_own_threads, filename)
        finally:
            program.flush()

    def _noted(self, tell_where: Callable[[], _Path]) -> Callable[[], _Path]:
        """What all of Python's library asks where it is."""

        @functools.wraps(tell_where)
        def noted() -> _Path:
            self._told_where = True
            return tell_where()

        return noted

    def _fork(self, theirs: int) -> None:
        if self._told_where:
            os.close(theirs)
            return self._answer({"told_where": True})
        drawn = random.getstate()  # its module seeds it anew in a child
        try:
            pid = os.fork()
        except OSError as error:
            os.close(theirs)
            return self._answer({"failed": str(error)})
        random.setstate(drawn)
        if pid == 0:
            os.dup2(theirs, self._control.fileno())
        os.close(theirs)
        self._answer({"forked": pid > 0})

    def _move(self, home: str) -> None:
        """Be where the warden says that this session's directory is now."""
        old, self._home = self._home, home
        if old == home:
            return
        for name in ("HOME", "TMPDIR"):
            if os.environ.get(name) == old:
                os.environ[name] = home
        tempfile: Any = sys.modules.get("tempfile")
        if tempfile is not None and tempfile.tempdir == old:
            tempfile.tempdir = home
        try:
            where = _where()
        except OSError:
            where = old
        if where == old or where.startswith(old + "/"):  # a parent's directory has moved under its feet
            os.chdir(home + where.removeprefix(old))


def _seed(seed: int) -> None:
    random.seed(seed)
    if (numpy_random := sys.modules.get("numpy.random")) is not None:
        numpy_random.seed(seed % 2**32)
