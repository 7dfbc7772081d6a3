"""A warden of calls: it serves one after the other, each a program in a process of its own.

Over its channel come requests, each answered before the next: :data:`.transport.REQUEST`, then the code.  A
reply is a line of JSON, then what is ``kept`` of the program's two streams, so many bytes of each.  The line
is ``{failed}`` or ``{exit_code, timed_out, excess, wall_s, cpu_s, peak_rss_mb, stdout_bytes, stderr_bytes,
kept, again}``; ``again``: the warden takes another request.

It stands outside the confinement: it enforces the wall deadline and the quota of files, keeps the output,
cleans up behind each program, and kills it when the channel closes (the caller gave up, or died).  The next
program is a copy of the warden's memory: codes and outputs lie only in such that is given back before.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from contextlib import suppress
from typing import Any

from system.tools.sandbox import cell, kernel, lockdown, program
from system.tools.sandbox.process import become_program, end_with
from system.tools.sandbox.rooms import Room, room
from system.tools.sandbox.transport import REQUEST
from system.tools.sandbox.watch import Ending, Look, Output, private_memory, watch

_FAILURE_BYTES = 1 << 12


class CallWarden:
    """See the module."""

    def __init__(self, confinement: lockdown.Confinement, channel: socket.socket):
        self._confinement, self._channel = confinement, channel
        self._leash, self._theirs = socket.socketpair()
        self._leash.setblocking(False)

    @staticmethod
    def fork(confinement: lockdown.Confinement) -> int:
        if confinement.settings.namespaces:
            return cell.fork_warden(root=not confinement.ids[0])
        return os.fork()

    def serve(self) -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        kernel.set_name("sandbox-warden")
        confinement = self._confinement
        try:
            if confinement.settings.namespaces and confinement.ids[0]:
                cell.keep_ids(*confinement.ids, confinement.proc)
            with room(confinement) as own:
                calls = 0
                while self._call(own, confinement.uid(calls)):
                    try:
                        own.clean()
                    except OSError:  # the call has been answered; whoever comes next finds nobody here
                        break
                    calls += 1
                self._channel.close()  # nobody waits for the rest of the cleaning
        except OSError as error:
            with suppress(OSError):
                self._say({"failed": f"{type(error).__name__}: {error}"})

    def _say(self, reply: dict[str, Any], *more: memoryview) -> None:
        """Raises OSError when the caller is gone."""
        self._channel.sendmsg([json.dumps(reply).encode() + b"\n", *more])

    def _call(self, own: Room, uid: int | None) -> bool:
        """Serve the next call; whether another one may come."""
        header = self._channel.recv(REQUEST.size, socket.MSG_WAITALL)
        if len(header) < REQUEST.size:
            return False
        wall_s, length = REQUEST.unpack(header)
        with private_memory(length) as code:
            # Asked for no bytes, recv_into takes as many as there is room for.
            if length and self._channel.recv_into(code, length, socket.MSG_WAITALL) < length:
                return False
            own.enter(uid)
            started, output = time.monotonic(), Output(self._confinement.settings.limits.output_chars)
            if (pid := own.fork()) == 0:
                end_with(lambda: self._become_program(code[:length], own, uid, output.given))
        output.close_given()
        reply = self._watched(pid, started, wall_s, own.look(pid), output)
        if reply is None:
            return False
        reply["again"] = again = own.leave()
        self._say(reply, output.stdout.kept, output.stderr.kept)
        output.close()
        return again

    def _watched(
        self, pid: int, started: float, wall_s: float, look: Look | None, output: Output
    ) -> dict[str, Any] | None:
        """The reply, once the program has ended or has been ended; None when the caller went away."""
        handle = os.pidfd_open(pid)
        ends = {handle: Ending("exited"), self._channel.fileno(): Ending("abandoned")}
        try:
            ending = watch(ends, output.captures, started + wall_s, look)
        finally:
            os.kill(pid, signal.SIGKILL)  # the program is one process: with it, everything it started is gone
            _, status, usage = os.wait4(pid, 0)
            os.close(handle)
        if ending.how == "abandoned":
            return None
        with suppress(BlockingIOError):
            raise OSError(self._leash.recv(_FAILURE_BYTES).decode(errors="replace"))  # of an unconfined child
        output.drain()
        return {
            "exit_code": os.waitstatus_to_exitcode(status),
            "timed_out": ending.how == "deadline",
            "excess": ending.told,
            "wall_s": time.monotonic() - started,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "peak_rss_mb": usage.ru_maxrss / 1024,
            "stdout_bytes": output.stdout.total,
            "stderr_bytes": output.stderr.total,
            "kept": (len(output.stdout.kept), len(output.stderr.kept)),
        }

    def _become_program(self, code: bytes, own: Room, uid: int | None, given: tuple[int, int]) -> None:
        os.setsid()
        kernel.set_name("sandbox-python")
        try:
            become_program(own.scratch, *given)
            self._leash.close()
            lockdown.confine(self._confinement, own.scratch, own.ruleset, uid, self._theirs.fileno())
        except Exception as error:  # whatever it is, the program must not run, and the caller must hear why
            self._theirs.send(f"{type(error).__name__}: {error}".encode()[:_FAILURE_BYTES])
            raise
        self._theirs.close()
        program.leave(program.run(code.decode(errors="surrogatepass")))
