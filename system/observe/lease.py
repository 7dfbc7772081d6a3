"""A run directory belongs to one driver at a time.

On one machine, and on file systems with locks, a lock tells: it ends with its process.  For the others the
holder touches the file now and then, and who finds one of another machine looks whether it is still touched.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path

from system.observe.rundir import RunDirError

NAME = "lease"
BEAT_S = 10.0  # between touches
LOOK_S = 35.0  # at a lease of another machine: more than three touches


@contextlib.contextmanager
def held(root: Path, beat_s: float = BEAT_S, look_s: float = LOOK_S, host: str = "") -> Generator[None]:
    """Hold the run directory ``root`` during the block.

    Raises RunDirError, naming the holder, where another process has it.  A holder that is gone is waited out
    (``look_s``) where only its silence can tell.  ``host``: this machine's name.
    """
    host = host or os.uname().nodename
    path = root / NAME
    lease = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise RunDirError(_taken(root, _holder(path))) from None
            # No locks on this file system: the touches have to do.
        holder = _holder(path)
        if holder and holder["host"] != host and _touched(path, look_s):
            raise RunDirError(_taken(root, holder))
        os.ftruncate(lease, 0)
        os.pwrite(lease, json.dumps({"host": host, "pid": os.getpid()}).encode(), 0)
        ended = threading.Event()
        beat = threading.Thread(target=_touch, args=(path, beat_s, ended.wait), name="lease", daemon=True)
        beat.start()
        try:
            yield
        finally:
            ended.set()
            beat.join()
            os.ftruncate(lease, 0)  # given back: the next one need not wait
    finally:
        os.close(lease)


def _taken(root: Path, holder: dict[str, object]) -> str:
    who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
    return f"{root} is in use by {who}: stop that run first, or name another directory"


def _holder(path: Path) -> dict[str, object]:
    """Who wrote the lease; empty when it was given back."""
    try:
        found = json.loads(path.read_text())
        return {"host": found["host"], "pid": found["pid"]}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _touched(path: Path, seconds: float) -> bool:
    """Whether somebody touches ``path`` within ``seconds``."""
    first, until = path.stat().st_mtime_ns, time.monotonic() + seconds
    while time.monotonic() < until:
        if path.stat().st_mtime_ns != first:
            return True
        time.sleep(min(0.5, seconds / 10))
    return False


def _touch(path: Path, every_s: float, ended: Callable[[float], bool]) -> None:
    while not ended(every_s):
        with contextlib.suppress(OSError):  # a full or absent file system ends the run elsewhere
            os.utime(path)
