"""A circuit breaker: stop asking a tool that does not work, and find out cheaply when it works again."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum


class BreakerState(StrEnum):
    CLOSED = "closed"  # calls pass
    OPEN = "open"  # calls are refused until the pause is over
    HALF_OPEN = "half-open"  # one call is trying; the others are refused


class CircuitBreaker:
    """Opens after ``threshold`` failures in a row, for ``pause_s``; then lets one call through to try.

    A try that fails opens it again for twice as long, up to ``max_pause_s``; one that succeeds closes it.
    """

    def __init__(
        self, threshold: int, pause_s: float, max_pause_s: float, clock: Callable[[], float]
    ) -> None:
        self.state = BreakerState.CLOSED
        self._threshold, self._first_pause_s, self._max_pause_s = threshold, pause_s, max_pause_s
        self._clock = clock
        self.openings = self.rejections = 0  # so far
        self._failures = 0
        self._pause_s = pause_s
        self._until = 0.0

    def allow(self) -> bool:
        """Whether a call may go ahead.  Each allowed call ends with abandon, after success or failure if
        it told whether the tool works."""
        if self.state is BreakerState.OPEN and self._clock() >= self._until:
            self.state = BreakerState.HALF_OPEN
            return True
        self.rejections += self.state is not BreakerState.CLOSED
        return self.state is BreakerState.CLOSED

    def success(self) -> None:
        self.state, self._failures, self._pause_s = BreakerState.CLOSED, 0, self._first_pause_s

    def failure(self) -> None:
        self._failures += 1
        if self.state is BreakerState.HALF_OPEN:
            self._pause_s = min(2 * self._pause_s, self._max_pause_s)
        if self.state is BreakerState.HALF_OPEN or (
            self.state is BreakerState.CLOSED and self._failures >= self._threshold
        ):
            self.state, self._until = BreakerState.OPEN, self._clock() + self._pause_s
            self.openings += 1

    def abandon(self) -> None:
        """The call has ended.  If it told nothing about the tool (cancelled, say), another may try."""
        if self.state is BreakerState.HALF_OPEN:
            self.state = BreakerState.OPEN
