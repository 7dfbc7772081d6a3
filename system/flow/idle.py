"""Where the time goes: what every actor was waiting for.  Pure accounting."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

BUSY = "busy"


@dataclass(slots=True)
class _Actor:
    since: float  # time up to which this actor is accounted
    open: Counter[str] = field(default_factory=Counter)
    spent: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))


class IdleClock:
    """Attributes each actor's time to causes, with any number of overlapping waits.

    An actor is idle when it waits and does nothing else: while a ``BUSY`` interval is open, time counts as
    busy, whatever else is being waited for.  Otherwise the time is split evenly between the causes being
    waited for, so that an actor's causes add up to its wall time.  Time in no interval counts for nothing.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """``clock``: monotonic seconds."""
        self._clock = clock
        self._actors: dict[str, _Actor] = {}

    @contextlib.contextmanager
    def during(self, actor: str, cause: str) -> Generator[None]:
        """``actor`` waits for ``cause``, or is ``BUSY``, for the length of the block; blocks may overlap."""
        self._advance(actor).open[cause] += 1
        try:
            yield
        finally:
            self._advance(actor).open[cause] -= 1

    def idle(self) -> dict[str, dict[str, float]]:
        """Seconds by actor and cause, open intervals included; ``BUSY`` is one of the causes."""
        return {actor: dict(self._advance(actor).spent) for actor in list(self._actors)}

    def _advance(self, actor: str) -> _Actor:
        now = self._clock()
        state = self._actors.setdefault(actor, _Actor(since=now))
        elapsed = now - state.since
        if elapsed < 0:
            raise ValueError(f"{actor}: time runs backwards, from {state.since} to {now}")
        state.since = now
        causes = [cause for cause, count in state.open.items() if count]
        blamed = [BUSY] if BUSY in causes else causes
        for cause in blamed:
            state.spent[cause] += elapsed / len(blamed)
        return state
