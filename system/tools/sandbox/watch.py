"""A warden's watch over a process that runs a program: its output, its deadline, its end."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_READ_SIZE = 1 << 16


class Capture:
    """The first and the last ``limit`` bytes of a stream, and how many there were."""

    def __init__(self, limit: int):
        self._limit = limit
        self.head, self.tail, self.total = bytearray(), bytearray(), 0

    def read(self, descriptor: int) -> bool:
        """Take what a pipe has; False at its end, or when a non-blocking one is empty."""
        try:
            data = os.read(descriptor, _READ_SIZE)
        except BlockingIOError:
            return False
        self.total += len(data)
        self.head += data[: max(0, self._limit - len(self.head))]
        self.tail = (self.tail + data)[-self._limit :]
        return bool(data)


class Output:
    """What a program writes to two pipes, the ends of which it is given."""

    def __init__(self, output_chars: int):
        kept = 4 * output_chars  # UTF-8: at most four bytes a character
        out = os.pipe()
        try:
            err = os.pipe()
        except OSError:
            os.close(out[0])
            os.close(out[1])
            raise
        self.given = (out[1], err[1])
        self._stdout, self._stderr = Capture(kept), Capture(kept)
        self.captures = {out[0]: self._stdout, err[0]: self._stderr}

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

    def told(self) -> dict[str, str | int]:
        return {
            "stdout": self._stdout.head.decode(errors="replace"),
            "stdout_bytes": self._stdout.total,
            "stderr": self._stderr.tail.decode(errors="replace"),
            "stderr_bytes": self._stderr.total,
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
