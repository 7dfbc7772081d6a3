"""``python supervisor.py COMMAND…``: run a command that must not outlive whoever started this.

The owner holds the write end of this process's standard input.  When that closes, because the owner closed
it or because it died in whatever way, the command's whole process group is killed.  SIGTERM asks the command
to end by itself first.  Exits with the command's status (128 + n after signal n).  Standard library only:
it starts in milliseconds, and a single thread makes the parent-death signal of its child reliable (the
kernel ties that signal to the thread that forked).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

LOOK_S = 0.2
GRACE_S = 10.0  # between SIGTERM and SIGKILL
_PR_SET_PDEATHSIG = 1


def main(command: list[str]) -> int:
    """Run ``command`` to its end, the owner's end, or SIGTERM."""
    asked: list[float] = []  # when SIGTERM came
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(time.monotonic()))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the owner's to handle
    libc = ctypes.CDLL(None)

    def before_exec() -> None:  # in the child: if this process is killed, so is the command
        libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=before_exec
    )
    forwarded = False
    while child.poll() is None:
        if _owner_gone():
            break
        if asked and not forwarded:
            _signal_group(child.pid, signal.SIGTERM)
            forwarded = True
        if forwarded and time.monotonic() > asked[0] + GRACE_S:
            break
    _signal_group(child.pid, signal.SIGKILL)  # also what is left of the group after its leader has ended
    status = child.wait()
    return status if status >= 0 else 128 - status


def _owner_gone() -> bool:
    """Wait a moment for the owner's end of the pipe to close."""
    readable, _, _ = select.select([0], [], [], LOOK_S)
    return bool(readable) and not os.read(0, 1024)


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
