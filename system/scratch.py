"""Temporary directories that do not outlive their owner for long.

The owner of one holds a lock on it, which ends with its process, however that ends.  Whoever makes the next
one on that machine removes those without an owner first.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

PREFIX = "espalier-"
YOUNG_S = 30.0  # for the owner of a new one to lock it
SWEEP_S = 60.0  # for `rm`, which unlike Python removes a tree of any depth


@dataclass(frozen=True, slots=True)
class Scratch:
    """A directory of this process alone (mode 0700)."""

    path: Path
    lock: int  # a file descriptor, closed with the process at the latest

    @classmethod
    def make(cls, name: str, among: Path | None = None) -> Scratch:
        """``<tmp>/espalier-<name>-…``, or in the directory ``among``."""
        among = among or Path(tempfile.gettempdir())
        sweep(among)
        path = Path(os.path.realpath(tempfile.mkdtemp(prefix=f"{PREFIX}{name}-", dir=among)))
        lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(lock, fcntl.LOCK_EX)
        return cls(path, lock)

    def release(self) -> None:
        """Own it no more: whoever makes the next one may remove it."""
        os.close(self.lock)


def sweep(among: Path) -> list[Path]:
    """Remove the directories in ``among`` whose owners are gone; returns them."""
    ownerless = [path for path in among.glob(f"{PREFIX}*-*") if _ownerless(path)]
    if ownerless:
        subprocess.run(["rm", "-rf", "--", *map(str, ownerless)], timeout=SWEEP_S, check=False)
    return ownerless


def _ownerless(path: Path) -> bool:
    try:
        found = path.lstat()
        if found.st_uid != os.getuid() or time.time() - found.st_mtime < YOUNG_S:
            return False
        lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(lock)
    return True
