"""The helper process that forks a confined child per call: much faster than starting an interpreter.

Three kinds of process::

    Sandbox (asyncio) ──control──► fork server ──fork──► warden (one per call) ──fork──► the model's program
          └────────────────── a socket per call ───────────┘

The control channel (SOCK_SEQPACKET) carries one message per call: a byte with the call's socket attached.
Over that socket go one request and one reply, each a line of JSON: ``{code, wall_s}`` and either
``{failed}`` or ``{exit_code, timed_out, excess, wall_s, cpu_s, peak_rss_mb, stdout, stdout_bytes, stderr,
stderr_bytes}``.  The warden stands outside the confinement: it enforces the wall deadline and the quota of
files, keeps the output, removes the scratch directory, and kills the program when the call's socket closes
(the caller gave up, or died).  When the control channel closes, the fork server ends.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from functools import partial
from typing import Any

from system.tools.sandbox import cell, kernel, lockdown, program, quota
from system.tools.sandbox.packages import Finder
from system.tools.sandbox.process import become_program, end_with
from system.tools.sandbox.scratch import remove_tree
from system.tools.sandbox.settings import Settings
from system.tools.sandbox.shell_warden import ShellWarden
from system.tools.sandbox.tree_warden import TreeWarden
from system.tools.sandbox.watch import Ending, Output, watch

_READ_SIZE = 1 << 16
_REQUEST_DEADLINE_S = 10.0
_CLEAN_UP_S = 1.0  # that a caller waits for the removal of a scratch directory; the rest is done after it
# Libraries that start threads when they are imported: the fork server has to stay single-threaded.
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def main() -> None:
    """``python … main`` with the control socket's descriptor and the settings as arguments."""
    control = socket.socket(fileno=int(sys.argv[2]))
    settings = Settings.from_json(sys.argv[3])
    try:
        confinement = _prepare(settings)
    except Exception as error:  # whatever it is, the parent must hear of it
        control.send(json.dumps({"failed": f"{type(error).__name__}: {error}"}).encode())
        return
    control.send(json.dumps({"ready": confinement.mechanisms()}).encode())
    try:
        _serve(control, confinement)
    finally:
        _wait_for_wardens()
        if not settings.namespaces:
            remove_tree(settings.base)


def _prepare(settings: Settings) -> lockdown.Confinement:
    kernel.set_name("sandbox-server")
    sys.dont_write_bytecode = True
    sys.argv = [""]
    os.environ.clear()  # the start of this process set more than the programs need to see
    os.environ.update(PATH="/usr/bin:/bin", LANG="C.UTF-8", TZ="UTC")
    if settings.modules:
        os.environ.update(_ONE_THREAD)
    sys.path += settings.paths
    sys.meta_path.append(Finder(settings.modules))
    for name in settings.preload:
        importlib.import_module(name)
    confinement = lockdown.prepare(settings)
    gc.collect()
    gc.freeze()  # a child that collects garbage should not copy the pages of what it will never free
    return confinement


def _serve(control: socket.socket, confinement: lockdown.Confinement) -> None:
    signal.signal(signal.SIGCHLD, _reap)
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 16, 1)
        if not message:
            return
        if os.fork() == 0:
            control.close()
            warden = _WARDENS[message]
            end_with(warden(confinement, socket.socket(fileno=descriptors[0])).serve)
        for descriptor in descriptors:
            os.close(descriptor)


def _reap(*_: object) -> None:
    """Take note of the wardens that have ended.  Were they ignored, their processor time, and that of the
    programs, would be nobody's: what a run uses would look like others' work beside it.
    """
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _wait_for_wardens() -> None:
    """They end by themselves: whoever closed the control channel closes, or has lost, the calls' sockets."""
    with suppress(ChildProcessError):
        while True:
            os.wait()


class _Warden:
    """One call, seen from outside its confinement."""

    def __init__(self, confinement: lockdown.Confinement, channel: socket.socket):
        self._confinement = confinement
        self._channel = channel

    def serve(self) -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        kernel.set_name("sandbox-warden")
        self._channel.settimeout(_REQUEST_DEADLINE_S)
        request = json.loads(self._channel.makefile("rb").readline())
        own = os.path.join(self._confinement.settings.base, f"call-{os.getpid()}-{os.urandom(4).hex()}")
        try:
            try:
                reply = self._call(request, own)
                remove_tree(own, _CLEAN_UP_S)
            except OSError as error:
                reply = {"failed": f"{type(error).__name__}: {error}"}
            if reply is not None:
                self._channel.sendall(json.dumps(reply).encode() + b"\n")
        finally:
            self._channel.close()
            remove_tree(own)

    def _call(self, request: dict[str, Any], own: str) -> dict[str, Any] | None:
        """``own``: a directory to make for it, where the cell has none; the caller removes it."""
        settings, uid = self._confinement.settings, self._confinement.uid()
        if settings.namespaces:
            return self._run(request, cell.enter_call(settings, uid, self._confinement.proc), uid)
        os.mkdir(own, 0o700)
        if uid:
            os.chown(own, uid, uid)
        return self._run(request, own, uid)

    def _run(self, request: dict[str, Any], scratch: str, uid: int | None) -> dict[str, Any] | None:
        """Run the program to its end or its deadline; None when the caller went away."""
        settings, started = self._confinement.settings, time.monotonic()
        output = Output(settings.limits.output_chars)
        ours, leash = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            ours.close()
            end_with(lambda: self._become_program(request["code"], scratch, uid, output.given, leash))
        output.close_given()
        leash.close()
        ends = {os.pidfd_open(pid): Ending("exited"), self._channel.fileno(): Ending("abandoned")}
        look = None if settings.namespaces else partial(self._look, scratch, pid)  # a cell is of limited size
        try:
            ending = watch(ends, output.captures, started + request["wall_s"], look)
        finally:
            os.kill(pid, signal.SIGKILL)  # the program is one process: with it, everything it started is gone
            _, status, usage = os.wait4(pid, 0)
        if ending.how == "abandoned":
            return None
        if failure := ours.recv(_READ_SIZE):  # only an unconfined child could have written it
            return {"failed": failure.decode()}
        output.drain()
        return {
            "exit_code": os.waitstatus_to_exitcode(status),
            "timed_out": ending.how == "deadline",
            "excess": ending.told,
            "wall_s": time.monotonic() - started,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "peak_rss_mb": usage.ru_maxrss / 1024,
            **output.told(),
        }

    def _look(self, scratch: str, pid: int) -> tuple[Ending | None, float]:
        """Whether it has filled its directory."""
        began = time.monotonic()
        if excess := quota.excess(scratch, pid, self._confinement.settings.limits):
            return Ending("filled", excess), 0.0
        return None, max(quota.PAUSE_S, quota.SHARE * (time.monotonic() - began))

    def _become_program(
        self, code: str, scratch: str, uid: int | None, given: tuple[int, int], leash: socket.socket
    ) -> None:
        os.setsid()
        kernel.set_name("sandbox-python")
        become_program(scratch, *given)
        try:
            lockdown.confine(self._confinement, scratch, uid, leash.fileno())
        except Exception as error:  # whatever it is, the program must not run, and the caller must hear why
            leash.send(f"{type(error).__name__}: {error}".encode())
            raise
        leash.close()
        program.leave(program.run(code))


_WARDENS: dict[bytes, type[_Warden] | type[TreeWarden] | type[ShellWarden]] = {
    b"c": _Warden,
    b"t": TreeWarden,
    b"s": ShellWarden,
}
