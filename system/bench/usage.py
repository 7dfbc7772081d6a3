"""What a command and all that it starts use while it runs, and how busy others keep the machine meanwhile.

By what Linux says in ``/proc``: processor time of a process and of its ended children, memory shared with
others by its proportional share (PSS, which adds up over processes as resident memory does not), and the time
that a hypervisor gave to others (steal).
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import defaultdict
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from system.doctor.facts import usable_cpus

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
LOOK_S = 0.5  # between looks at the processes
MEMORY_S = 2.0  # between looks at their memory, each of which takes milliseconds per process
END_S = 15.0  # for what a command has started to end after it
MOST_STEAL = 0.03  # of all cores' time, above which a run is not quiet
MOST_FOREIGN = 0.15  # cores that others use, above which it is not


@dataclass(frozen=True, slots=True)
class ProcessStat:
    """One process at one time, in clock ticks."""

    pid: int
    parent: int
    began: int  # since the machine's start: with the pid its identity
    own: int  # processor time
    waited: int  # of its children that have ended and whose end it has taken note of, theirs included

    @classmethod
    def parse(cls, line: str) -> Self:
        """A line of ``/proc/PID/stat`` (proc(5)); the name may hold blanks and parentheses."""
        fields = line.rpartition(")")[2].split()
        ticks = [int(fields[i]) for i in range(11, 15)]  # utime, stime, cutime, cstime
        return cls(
            int(line.split(" ", 1)[0]), int(fields[1]), int(fields[19]), sum(ticks[:2]), sum(ticks[2:])
        )


def processes(proc: Path = Path("/proc")) -> dict[int, ProcessStat]:
    """All that there are now, by pid."""
    found: dict[int, ProcessStat] = {}
    for entry in os.scandir(proc):
        if entry.name.isdigit():
            with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                one = ProcessStat.parse(Path(entry.path, "stat").read_text(errors="replace"))
                found[one.pid] = one
    return found


@dataclass(frozen=True, slots=True)
class MachineTicks:
    """What all cores together have done since the machine's start, in clock ticks."""

    busy: int
    stolen: int  # wanted, but given to other guests of the hypervisor

    @classmethod
    def parse(cls, text: str) -> Self:
        """``/proc/stat``."""
        user, nice, kernel, _, _, interrupts, soft, stolen, *_ = map(int, text.split("\n", 1)[0].split()[1:])
        return cls(user + nice + kernel + interrupts + soft, stolen)

    @classmethod
    def now(cls) -> Self:
        return cls.parse(Path("/proc/stat").read_text())


class ProcessTree:
    """Some processes and all that descend from them, those included whose parent has ended since."""

    def __init__(self, roots: Collection[int]) -> None:
        self._roots = set(roots)
        self._seen: dict[tuple[int, int], ProcessStat] = {}
        self.alive: list[ProcessStat] = []

    def look(self, stats: Mapping[int, ProcessStat]) -> None:
        """Take note of who is there."""
        children: dict[int, list[ProcessStat]] = defaultdict(list)
        for one in stats.values():
            children[one.parent].append(one)
        known = [
            one for one in stats.values() if one.pid in self._roots or (one.pid, one.began) in self._seen
        ]
        found: dict[int, ProcessStat] = {}
        while known:
            one = known.pop()
            if one.pid not in found:
                found[one.pid] = one
                known += children[one.pid]
        self.alive = list(found.values())
        self._seen |= {(one.pid, one.began): one for one in self.alive}

    @property
    def ticks(self) -> int:
        """Processor time of all that were ever seen, and of children too short-lived to be.

        A process that has ended counts by its last look, or by what its parent was told of it where that is
        more.
        """
        alive = {(one.pid, one.began) for one in self.alive}
        pids = {one.pid for one in self._seen.values()}
        ended: dict[int, list[ProcessStat]] = defaultdict(list)
        tops = list(self.alive)
        for identity, one in self._seen.items():
            if identity not in alive:
                (ended[one.parent] if one.parent in pids else tops).append(one)

        def total(one: ProcessStat) -> int:
            return one.own + max(one.waited, sum(map(total, ended[one.pid])))

        return sum(map(total, tops))


def pss_mb(pid: int, proc: Path = Path("/proc")) -> float | None:
    """The proportional share of its memory, MiB; 0 if it has ended, None if it may not be read."""
    try:
        text = (proc / str(pid) / "smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    except PermissionError:
        return None
    return next((int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith("Pss:")), 0.0)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a command used, and what others did meanwhile."""

    seconds: float
    load: float  # mean number of runnable processes over the minute before it
    cpu_s: float  # of all its processes
    peak_mb: float  # PSS of all its processes at once
    unread: int  # processes whose memory may not be read
    stolen: float  # share of all cores' time
    foreign: float  # cores that other processes used, on average

    @property
    def noise(self) -> str:
        """Why a run is not quoted; empty: the machine was quiet."""
        found = [
            f"{self.stolen:.0%} of the processor's time was stolen" * (self.stolen > MOST_STEAL),
            f"others used {self.foreign:.2f} cores" * (self.foreign > MOST_FOREIGN),
        ]
        return "; ".join(filter(None, found))


class Watch:
    """Looks at a command's processes until it ends."""

    def __init__(self, beside: Sequence[int] = ()) -> None:
        """``beside``: pids of servers that work for it, which count, from now on."""
        self.load = os.getloadavg()[0]
        self._beside = ProcessTree(beside)
        self._beside.look(processes())
        self._before = self._beside.ticks
        self._machine, self._own, self._began = MachineTicks.now(), time.process_time(), time.monotonic()
        self._family = ProcessTree(())
        self._peak, self._unread = 0.0, 0

    @contextmanager
    def during(self, pid: int) -> Generator[None]:
        """Look at ``pid`` and its descendants, in the running event loop, while the context lasts."""
        self._family = ProcessTree([pid])
        looking = asyncio.get_running_loop().create_task(self._look())
        try:
            yield
        finally:
            looking.cancel()
            self._glance()

    async def _look(self) -> None:
        remembered = 0.0
        while True:
            self._glance()
            if (now := time.monotonic()) - remembered >= MEMORY_S:
                remembered = now
                self._weigh()
            await asyncio.sleep(LOOK_S)

    def _glance(self) -> None:
        stats = processes()
        self._family.look(stats)
        self._beside.look(stats)

    def _weigh(self) -> None:
        found = [pss_mb(one.pid) for one in (*self._family.alive, *self._beside.alive)]
        self._peak = max(self._peak, sum(one or 0.0 for one in found))
        self._unread = max(self._unread, found.count(None))

    def usage(self) -> Usage:
        """From the start of the watch until now."""
        machine, seconds = MachineTicks.now(), time.monotonic() - self._began
        ticks = self._family.ticks + self._beside.ticks - self._before
        busy, stolen = machine.busy - self._machine.busy, machine.stolen - self._machine.stolen
        foreign = (busy - ticks) / TICKS_PER_S - (time.process_time() - self._own)
        return Usage(
            seconds=seconds,
            load=self.load,
            cpu_s=ticks / TICKS_PER_S,
            peak_mb=self._peak,
            unread=self._unread,
            stolen=stolen / TICKS_PER_S / seconds / usable_cpus(),
            foreign=max(0.0, foreign / seconds),
        )

    async def end(self) -> int:
        """Wait until nothing is left of what the command started; what is still there after ``END_S`` is
        killed.  Returns how many were.
        """
        until = time.monotonic() + END_S
        while self._family.alive and time.monotonic() < until:
            await asyncio.sleep(0.1)
            self._glance()
        for one in self._family.alive:
            with suppress(ProcessLookupError):
                os.kill(one.pid, signal.SIGKILL)
        return len(self._family.alive)
