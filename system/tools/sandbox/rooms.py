"""Where the programs of one warden run, one after the other: each finds an empty directory, and nobody else.

In a cell that is a tmpfs of limited size, and a PID namespace; otherwise a directory beside those of others.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol

from system.tools.sandbox import cell, kernel, lockdown, quota
from system.tools.sandbox.scratch import remove_tree
from system.tools.sandbox.watch import Ending, Look

_CLEAN_UP_S = 1.0  # that a caller waits for the removal of a scratch directory; the rest is done after it


class Room(Protocol):
    """For one program at a time.  All raise OSError."""

    scratch: str
    ruleset: int  # of Landlock, for programs in ``scratch``

    def enter(self, uid: int | None) -> None:
        """Get it ready for a program with this user id."""
        ...

    def fork(self) -> int: ...

    def look(self, pid: int) -> Look | None:
        """How to see whether program ``pid`` has filled it; None where the file system has a size."""
        ...

    def leave(self) -> bool:
        """Begin to clean up behind a program, which has ended; whether another one may enter soon."""
        ...

    def clean(self) -> None:
        """Finish that.  No error if there is nothing to do."""
        ...


@contextmanager
def room(confinement: lockdown.Confinement) -> Generator[Room]:
    """For the programs of the warden that this process is.  Cleaned at the end of the block."""
    own = _CellRoom(confinement) if confinement.settings.namespaces else _Directory(confinement)
    try:
        yield own
    finally:
        own.clean()


class _CellRoom:
    """A file system that stays while no program has changed anything in it."""

    def __init__(self, confinement: lockdown.Confinement):
        self._confinement, self.scratch = confinement, cell.SCRATCH
        flags = os.O_RDONLY | os.O_CLOEXEC
        self._own_pids = os.open("self/ns/pid", flags, dir_fd=confinement.proc)
        self._mount()

    def _mount(self) -> None:
        cell.mount_scratch(self._confinement.settings, self._confinement.uid(), self.scratch)
        os.utime(self.scratch, (0, 0))  # whatever is made or removed in it changes this
        self.ruleset = lockdown.landlock_ruleset(self._confinement, self.scratch)

    def enter(self, uid: int | None) -> None:
        if uid is not None:
            os.chown(self.scratch, uid, uid)

    def fork(self) -> int:
        return cell.fork_program(self._own_pids)

    def look(self, pid: int) -> None:
        return None

    def leave(self) -> bool:
        return True

    def clean(self) -> None:
        if os.stat(self.scratch).st_mtime_ns:
            kernel.unmount(self.scratch)
            if self.ruleset >= 0:
                os.close(self.ruleset)
            self._mount()


class _Directory:
    """A directory per program.  A warden that has read names of a program's files serves no other one."""

    def __init__(self, confinement: lockdown.Confinement):
        self._confinement, self.scratch, self.ruleset = confinement, "", -1

    def enter(self, uid: int | None) -> None:
        name = f"call-{os.getpid()}-{os.urandom(4).hex()}"
        self.scratch = os.path.join(self._confinement.settings.base, name)
        os.mkdir(self.scratch, 0o700)
        if uid:
            os.chown(self.scratch, uid, uid)
        os.utime(self.scratch, (0, 0))  # as in a cell
        self.ruleset = lockdown.landlock_ruleset(self._confinement, self.scratch)

    def fork(self) -> int:
        return os.fork()

    def look(self, pid: int) -> Look:
        def look() -> tuple[Ending | None, float]:
            began = time.monotonic()
            if excess := quota.excess(self.scratch, pid, self._confinement.settings.limits):
                return Ending("filled", excess), 0.0
            return None, max(quota.PAUSE_S, quota.SHARE * (time.monotonic() - began))

        return look

    def leave(self) -> bool:
        os.close(self.ruleset)
        untouched = not os.stat(self.scratch).st_mtime_ns
        return remove_tree(self.scratch, _CLEAN_UP_S) and untouched

    def clean(self) -> None:
        if self.scratch:
            remove_tree(self.scratch)
