"""Frozen is dead: every actor answers a heartbeat, and one that is silent for too long is killed.

A process that is stopped, or stuck where it holds Python's lock, is still there: only its silence tells.
Heartbeats run in a thread of their own in each actor, so a long training step is not silence.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from actors.ray_support import ActorLost, answer

BEATS = 12  # looks in the time after which silence is death
KILL_DEADLINE_S = 30.0


@dataclass(frozen=True, slots=True)
class Watched:
    """An actor, as the watch sees it."""

    actor: Any
    options: Mapping[str, Any]  # of its place: where a process that kills it has to run
    returns: bool  # Ray starts it again; without one that does not, the run cannot go on
    spare: bool = False  # the run goes on without it, whether it is back or not
    server_s: float = 0.0  # how much longer a server of its own may take (engine.start_deadline_s)


@dataclass(slots=True)
class _Pulse:
    heard: float  # when it answered last, or when it was missed first
    pid: int = 0  # 0: not heard since it was started
    call: Any = None  # the answer that is waited for


class Heartbeats:
    """Watches actors until cancelled.

    ``silent_s``: how long one may be silent.  ``return_s``: how long one may take to be back, but for its
    server.  An actor that is taken out of ``actors`` is watched no more.
    """

    def __init__(
        self,
        actors: Callable[[], Mapping[str, Watched]],
        silent_s: float,
        return_s: float,
        tell: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._actors, self._silent_s, self._return_s = actors, silent_s, return_s
        self._tell, self._clock, self._pulses = tell, clock, dict[str, _Pulse]()

    async def watch(self) -> None:
        """Raises ActorLost for a silent actor that does not return, or one that is not back in time."""
        pause, last = self._silent_s / BEATS, self._clock()
        while True:
            await asyncio.sleep(pause)
            now = self._clock()
            if now - last > 3 * pause:  # this process stood still: nobody was silent but itself
                for pulse in self._pulses.values():
                    pulse.heard = now
            last = now
            watched = self._actors()
            for name in self._pulses.keys() - watched.keys():
                del self._pulses[name]
            for name, one in watched.items():
                await self._look(name, one, self._pulses.setdefault(name, _Pulse(now)))

    async def _look(self, name: str, one: Watched, pulse: _Pulse) -> None:
        now = self._clock()
        if pulse.call is None:
            pulse.call = asyncio.ensure_future(_beat(one.actor))
            return
        if pulse.call.done():
            pid, pulse.call = pulse.call.result(), None
            if pid:
                pulse.heard, pulse.pid = now, pid
            elif pulse.pid:  # its process is gone
                pulse.heard, pulse.pid = now, 0
        silent, return_s = now - pulse.heard, self._return_s + one.server_s
        if pulse.pid and silent > self._silent_s:
            self._tell(f"{name} has been silent for {silent:.0f} s: killed")
            await _kill(one, pulse.pid)
            pulse.heard, pulse.pid = now, 0
            if not one.returns:
                raise ActorLost(f"{name} was silent for {silent:.0f} s (cluster.silent_s)")
        elif not pulse.pid and silent > return_s and one.spare:
            self._tell(f"{name}: not back within {return_s:.0f} s; the run goes on without it")
            pulse.heard = now
        elif not pulse.pid and silent > return_s:
            settings = "cluster.start_deadline_s" + (" + engine.start_deadline_s" if one.server_s else "")
            raise ActorLost(f"{name}: not back within {return_s:.0f} s ({settings})")


async def _beat(actor: Any) -> int:
    """The process that answers for ``actor``; 0 while there is none."""
    try:
        return int(await actor.beat.remote())
    except RayError:
        return 0


async def _kill(one: Watched, pid: int) -> None:
    """SIGKILL, which reaches a stopped process as well."""
    if not one.options:  # on this machine
        _end(pid)
        return
    ender: Any = ray.remote(_end)
    there = {**one.options, "num_cpus": 0, "num_gpus": 0}
    await answer(ender.options(**there).remote(pid), KILL_DEADLINE_S, f"killing process {pid}")


def _end(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
