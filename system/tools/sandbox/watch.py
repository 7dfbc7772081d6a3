"""A warden's watch over a process that runs a program: its output, its deadline, its end."""

from __future__ import annotations

import mmap
import os
import select
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_READ_SIZE = 1 << 16


def private_memory(size: int) -> mmap.mmap:
    """Zeros that the kernel takes back when they are closed."""
    return mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class Capture:
    """The first or the last ``limit`` bytes of a stream, and how many there were.

    They lie in memory of their own: once closed, a process that is forked off ours finds nothing of them.
    """

    def __init__(self, limit: int, *, first: bool):
        self._limit, self._first = limit, first
        self._memory = private_memory(limit + _READ_SIZE)
        self._view = memoryview(self._memory)
        self._held = self.total = 0

    def read(self, descriptor: int) -> bool:
        """Take what a pipe has; False at its end, or when a non-blocking one is empty."""
        try:
            count = os.readv(descriptor, [self._view[self._held : self._held + _READ_SIZE]])
        except BlockingIOError:
            return False
        self.total += count
        self._held += count
        if self._held > self._limit:
            if not self._first:
                self._memory.move(0, self._held - self._limit, self._limit)
            self._held = self._limit
        return count > 0

    @property
    def kept(self) -> memoryview:
        return self._view[: self._held]

    def close(self) -> None:
        """No view of what was kept may be left."""
        self._view.release()
        self._memory.close()


class Output:
    """What a program writes to two pipes, the ends of which it is given: of the first its beginning is kept,
    of the second its end."""

    def __init__(self, output_chars: int):
        out = os.pipe()
        try:
            err = os.pipe()
        except OSError:
            os.close(out[0])
            os.close(out[1])
            raise
        self.given = (out[1], err[1])
        limit = 4 * output_chars  # UTF-8: at most four bytes a character
        self.stdout, self.stderr = Capture(limit, first=True), Capture(limit, first=False)
        self.captures = {out[0]: self.stdout, err[0]: self.stderr}

    def close_given(self) -> None:
        """Of our process, once another one has them."""
        for end in self.given:
            os.close(end)

    def drain(self) -> None:
        """Take what is left, without waiting, and close the pipes."""
        for end, capture in self.captures.items():
            os.set_blocking(end, False)
            while capture.read(end):
                pass
            os.close(end)

    def close(self) -> None:
        """Let go of what was kept."""
        for capture in self.captures.values():
            capture.close()

    def told(self) -> dict[str, str | int]:
        return {
            "stdout": str(self.stdout.kept, errors="replace"),
            "stdout_bytes": self.stdout.total,
            "stderr": str(self.stderr.kept, errors="replace"),
            "stderr_bytes": self.stderr.total,
        }


@dataclass(frozen=True)
class Ending:
    """How a watch ended."""

    how: str  # exited | deadline | abandoned (by the caller) | filled | cpu | answered
    told: str = ""  # "filled": with what


Look = Callable[[], tuple[Ending | None, float]]  # what it has found, and seconds until it looks again


def watch(
    ends: Mapping[int, Ending], captures: Mapping[int, Capture], deadline: float, look: Look | None
) -> Ending:
    """Collect output until the ``deadline`` (monotonic) passes, one of ``ends`` has something to be read, or
    ``look`` finds an end."""
    poller = select.poll()
    for descriptor in (*ends, *captures):
        poller.register(descriptor, select.POLLIN)
    next_look = deadline if look is None else time.monotonic()
    while True:
        now = time.monotonic()
        if now >= deadline:
            return Ending("deadline")
        if look is not None and now >= next_look:
            found, pause_s = look()
            if found is not None:
                return found
            next_look = time.monotonic() + pause_s
        for descriptor, _ in poller.poll(max(0.0, min(deadline, next_look) - time.monotonic()) * 1000):
            if descriptor in ends:
                return ends[descriptor]
            if not captures[descriptor].read(descriptor):
                poller.unregister(descriptor)
