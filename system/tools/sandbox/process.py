"""What a process that was forked off a warden or its fork server does first and last."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from system.tools.sandbox import program


def end_with(action: Callable[[], None]) -> None:
    """Run ``action`` as the whole of a forked process's life: it never returns into its parent's stack."""
    code = 70
    try:
        action()
        code = 0
    finally:
        os._exit(code)


def become_program(scratch: str, out: int, err: int) -> None:
    """Its streams, environment and signal handlers as a program finds them; ``out``, ``err``: descriptors."""
    null = os.open(os.devnull, os.O_RDWR)
    for source, target in ((null, 0), (out, 1), (err, 2)):
        os.dup2(source, target)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    os.environ["HOME"] = os.environ["TMPDIR"] = scratch
    program.take_streams()
