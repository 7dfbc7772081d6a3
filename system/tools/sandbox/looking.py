"""What the kernel tells a warden of another process, whatever that process says of itself."""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

_PAUSE_S, _STOPS_S = 0.0005, 2.0
_PF_EXITING = 0x4  # linux/sched.h
_CPUCLOCK_SCHED = 2  # linux/posix-timers.h


class Unseen(Exception):
    """It has gone, or may not be looked at; says what."""


class Family(NamedTuple):
    """What several processes have together."""

    threads: int
    memory_mb: float  # what they share counts for each
    cpu_s: float


@dataclass(frozen=True)
class Looks:
    """Looks at processes through the descriptor of a /proc."""

    proc: int

    def _read(self, pid: int, name: str) -> str:
        try:
            handle = os.open(f"{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.proc)
            with open(handle, errors="replace") as file:
                return file.read()
        except OSError as error:
            raise Unseen(f"its /proc/…/{name} cannot be read: {error.strerror}") from error

    def _listed(self, name: str) -> list[str]:
        handle = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.proc)
        try:
            return os.listdir(handle)
        finally:
            os.close(handle)

    def _state(self, pid: int) -> list[str]:
        """/proc/…/stat from its third field on."""
        return self._read(pid, "stat").rpartition(")")[2].split()

    def parent(self, pid: int) -> int:
        return int(self._state(pid)[1])

    def threads(self, pid: int) -> int:
        return int(self._state(pid)[17])

    def ending(self, pid: int) -> bool:
        """Whether it is about to exit, or has."""
        try:
            return bool(int(self._state(pid)[6]) & _PF_EXITING)
        except Unseen:
            return True

    def wait_stopped(self, pid: int) -> None:
        """Return once a signal to stop has stopped it."""
        until = time.monotonic() + _STOPS_S
        while self._state(pid)[0] not in "Tt":
            if time.monotonic() > until:
                raise Unseen("it does not stop")
            time.sleep(_PAUSE_S)

    def children(self, parents: Collection[int]) -> list[int]:
        """Also where the kernel keeps no list of them."""
        found: list[int] = []
        for name in self._listed("."):
            if name.isdigit():
                try:
                    if self.parent(int(name)) in parents:
                        found.append(int(name))
                except Unseen:
                    continue
        return found

    def family(self, first: int) -> Family:
        """``first`` apart, all that came of it and is there."""
        parents: dict[int, tuple[int, list[str]]] = {}
        for name in self._listed("."):
            if name.isdigit():
                with suppress(Unseen):
                    state = self._state(int(name))
                    parents[int(name)] = int(state[1]), state
        found, again = {first}, True
        while again:
            more = {pid for pid, (parent, _) in parents.items() if parent in found} - found
            found, again = found | more, bool(more)
        states = [state for pid, (_, state) in parents.items() if pid in found]
        page, tick = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
        own = [parents[pid][1] for pid in found - {first} if pid in parents]
        return Family(
            threads=sum(int(state[17]) for state in own),
            memory_mb=sum(int(state[21]) for state in own) * page / (1 << 20),
            # Of children that were waited for, their parents keep the time.
            cpu_s=sum(int(time) for state in states for time in state[11:15]) / tick,
        )

    def memory_mb(self, pid: int) -> tuple[float, float]:
        """(Most memory that it has had at once, what it has now of its own or copied when written to); zeros
        where that is not told any more."""
        try:
            lines = self._read(pid, "status").splitlines()
        except Unseen:
            return 0.0, 0.0
        found = dict(line.split(":", 1) for line in lines if line.startswith(("VmHWM:", "RssAnon:")))
        peak, own = (int(found.get(name, "0").split()[0]) / 1024 for name in ("VmHWM", "RssAnon"))
        return peak, own

    def shares(self, pid: int, known: Collection[str], directories: str, home: str) -> str:
        """What ``pid`` may have in common with the process that it was forked from; empty: nothing.

        ``known``: what its descriptors may be, as links in /proc read; of ``directories`` only its ``home``
        may be its working directory.
        """
        try:
            for name in self._listed(f"{pid}/fd"):
                if os.readlink(f"{pid}/fd/{name}", dir_fd=self.proc) not in known:
                    return "it has open files"
            where = os.readlink(f"{pid}/cwd", dir_fd=self.proc) + "/"
        except OSError as error:
            raise Unseen(f"its descriptors cannot be seen: {error.strerror}") from error
        if where.startswith(directories + "/") and not where.startswith(home + "/"):
            return "its working directory is not its own"
        for line in self._read(pid, "maps").splitlines():
            _, rights, _, _, _, *path = line.split(maxsplit=5)
            name = path[0] if path else ""
            library = name.startswith("/") and not name.startswith((directories + "/", "/dev/"))
            if name.startswith(directories + "/") or ("s" in rights and (not library or "w" in rights)):
                return "it shares memory, or has mapped a file of its own"
        return ""


def cpu_s(pid: int) -> float:
    """CPU seconds that all threads of a process have used.  Raises OSError when it is gone."""
    return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)
