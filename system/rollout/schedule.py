"""Rollout schedules: when the branches of growing trees may generate, fork and start.

``barrier-free`` is the default: a branch waits for its own tokens and its own tool only.  ``eager`` forks at
once what would else start as late roots.  ``lockstep`` is the schedule of the released ARPO code, the
baseline: all live branches of all trees on a worker generate, then all their tools run, then the trees fork
and top up, and the next round begins.  The rollout is the same.
"""

from __future__ import annotations

import asyncio
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Collection, Hashable
from typing import ClassVar, Protocol

from system.rollout.budget import Budget
from system.rollout.recent import Recent
from system.tools.outcome import ToolOutcome


class Growing(Protocol):
    """What a schedule sees of a live branch (:class:`system.rollout.branch.Branch`)."""

    @property
    def calls(self) -> int:
        """Tool calls on its path."""
        ...

    @property
    def undecided(self) -> bool:
        """Whether a tool call is under way or its answer has not been decided upon."""
        ...

    @property
    def late(self) -> bool:
        """Whether that call takes longer than :meth:`Schedule.patience_s`."""
        ...


class Schedule(ABC):
    """What a branch asks on its way.  One schedule serves all trees of a rollout.

    Every branch calls :meth:`join` once, then, as often as it writes a segment, :meth:`meet` when the segment
    is there and, if it called a tool, again when the result is there; at its end it calls :meth:`leave`.
    By default nobody waits.
    """

    streaming: ClassVar[bool]  # a branch may fork while its segment is still being written

    async def join(self, branch: Hashable) -> None:
        """Return when ``branch`` may begin to generate."""
        return

    async def meet(self, branch: Hashable) -> None:
        """``branch`` has done its part of the phase; return when the next one begins."""
        return

    def leave(self, branch: Hashable) -> None:
        """``branch`` has ended, however that came about.  Nobody waits for it any more."""
        return

    def patience_s(self, tool: str) -> float:
        """Seconds after which a call of ``tool`` is late (:attr:`Growing.late`); infinite: never."""
        return math.inf

    def answered(self, tool: str, outcome: ToolOutcome) -> None:
        """A call of ``tool``, by whichever branch, has come to ``outcome``."""
        return

    @abstractmethod
    def top_ups(self, live: Collection[Growing], remaining: int, call_limit: int) -> int:
        """Fresh roots to start now, at most ``remaining``, what is left of the tree's budget.  ``live``: its
        branches.
        """

    def lent(self, asked: int, live: Collection[Growing], budget: Budget, call_limit: int) -> int:
        """Forks to make at a result beyond the ``asked`` ones, which the policy wants and the budget allows;
        at most what these leave of it.  ``live``: the tree's branches; the one at the result, which is among
        them, is decided upon.
        """
        return 0


class BarrierFree(Schedule):
    """Nobody waits.  What can no longer be forked is topped up by fresh roots at once."""

    streaming: ClassVar[bool] = True

    def top_ups(self, live: Collection[Growing], remaining: int, call_limit: int) -> int:
        """The rest of the budget, unless a live branch may still bring a fork."""
        return 0 if any(_may_fork(b, call_limit) for b in live) else remaining


class Eager(Schedule):
    """Nobody waits, and what a tree keeps for forks is forked as early as it can be.

    A fork begins where its parent is and so ends when that ends; a root that starts late ends late, and the
    slowest leaf sets the pace of a tree.  So of the leaves that are left, every branch that may still fork,
    the one at the result among them, keeps so many shares of n / N - 1 (:attr:`Budget.share`); what is over,
    because a branch has ended without having used its own, is forked at the next result: more forks there
    instead of roots later.

    Where the policy forks, ``keep`` shares each are kept, and at most ``most`` of what was kept for forks at
    the tree's start is forked, as long as a branch is left that may fork later.  Where it does not,
    ``spare`` shares each are kept, more than a share: so its decision still says where most forks are.

    Fresh roots start when no branch may fork any more but those whose call is late.  Such a branch has no
    share until the answer is there; then it may fork if something is left.  A call is late after ``factor``
    times the median of its tool's last ``window`` calls on this rollout worker, if there were ``least`` of
    them: the median does not mind the slow calls.
    """

    streaming: ClassVar[bool] = True

    def __init__(
        self,
        keep: float = 0.25,
        spare: float = 1.5,
        most: float = 0.5,
        factor: float = 2.0,
        window: int = 256,
        least: int = 16,
    ) -> None:
        self._keep, self._spare, self._most = keep, spare, most
        self._factor, self._window, self._least = factor, window, least
        self._latencies: defaultdict[str, Recent] = defaultdict(Recent)

    def patience_s(self, tool: str) -> float:
        seen = self._latencies.get(tool)
        return self._factor * seen.median if seen and len(seen) >= self._least else math.inf

    def answered(self, tool: str, outcome: ToolOutcome) -> None:
        if outcome.attempts:  # else it was answered without the tool: from the cache, or refused
            self._latencies[tool].add(outcome.latency_s, self._window)

    def top_ups(self, live: Collection[Growing], remaining: int, call_limit: int) -> int:
        """The rest of the budget, unless a live branch that is not late may still bring a fork."""
        return 0 if _hopeful(live, call_limit) else remaining

    def lent(self, asked: int, live: Collection[Growing], budget: Budget, call_limit: int) -> int:
        """What is over the shares of all that may fork later."""
        later = _hopeful(live, call_limit)
        kept = math.floor((self._keep if asked else self._spare) * budget.share * later)
        over = budget.remaining - kept
        if asked and later:
            over = min(over, math.floor(self._most * budget.kept))
        return max(over - asked, 0)


class Lockstep(Schedule):
    """Rounds over all live branches of all trees, as in the released ARPO code (one data-parallel rank).

    A round has two phases, each of which ends when every branch in it has arrived: all generate, then all
    tools run.  Forks are decided between phases, in the order in which the branches joined, and a tree
    without a live branch gets exactly one fresh root per round.  A branch that starts while tools run waits
    for the next round; so does a tree that comes late.

    A barrier whose parties come and go, with the two phases alternating (a "phaser").
    """

    streaming: ClassVar[bool] = False  # released: entropies are looked at after the whole segment

    def __init__(self) -> None:
        self.rounds = 0  # generation phases completed: the barriers that the engine has waited at
        self._generating = True  # the phase: generation, or tools
        self._members: dict[Hashable, None] = {}  # branches of this round, in the order of joining
        self._waiting: dict[Hashable, asyncio.Future[None]] = {}  # those that have arrived
        self._joining: dict[Hashable, asyncio.Future[None]] = {}  # branches of the next round

    async def join(self, branch: Hashable) -> None:
        if self._generating:
            self._members[branch] = None
        else:
            self._joining[branch] = asyncio.get_running_loop().create_future()
            await self._joining[branch]

    async def meet(self, branch: Hashable) -> None:
        loop = asyncio.get_running_loop()
        arrived = self._waiting[branch] = loop.create_future()
        loop.call_soon(self._advance)  # at once, who comes last would not wait: it would go on before all
        await arrived

    def leave(self, branch: Hashable) -> None:
        self._joining.pop(branch, None)
        self._waiting.pop(branch, None)
        if branch in self._members:
            del self._members[branch]
            self._advance()

    def top_ups(self, live: Collection[Growing], remaining: int, call_limit: int) -> int:
        """One root for a tree in which nothing lives."""
        return 0 if live else min(1, remaining)

    def _advance(self) -> None:
        """Go on to the next phase if everybody has arrived at the end of this one."""
        if len(self._waiting) < len(self._members) or (self._generating and not self._members):
            return
        arrived, self._waiting = self._waiting, {}
        self._generating = not self._generating
        if self._generating:
            newcomers, self._joining = self._joining, {}
            self._members |= dict.fromkeys(newcomers)
            arrived |= newcomers
        else:
            self.rounds += 1
        for branch in self._members:  # their tasks go on in this order
            if not arrived[branch].done():  # it may have been cancelled, and is about to leave
                arrived[branch].set_result(None)


def _hopeful(branches: Collection[Growing], call_limit: int) -> int:
    """How many of them may fork and have no late call."""
    return sum(_may_fork(branch, call_limit) and not branch.late for branch in branches)


def _may_fork(branch: Growing, call_limit: int) -> bool:
    """Whether the branch may come back from a tool, or has and was not decided upon."""
    return branch.undecided or branch.calls < call_limit


SCHEDULES: dict[str, type[Schedule]] = {"barrier-free": BarrierFree, "eager": Eager, "lockstep": Lockstep}


def make_schedule(name: str) -> Schedule:
    """The schedule that ``rollout.schedule`` names; raises ``ValueError`` for an unknown name."""
    if name not in SCHEDULES:
        raise ValueError(f"unknown rollout schedule {name!r}")
    return SCHEDULES[name]()
