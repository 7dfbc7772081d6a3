"""A live branch of a growing tree, and the stopwatch that tells where its time goes."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import numpy as np

from system.engine.protocol import Finish
from system.envs.live import BranchSession
from system.rollout.codec import ChatMessage
from system.tree.record import Kind, Origin


@dataclass(slots=True, eq=False)
class Branch:
    """A live branch; the tokens themselves are in the growth."""

    key: tuple[int, ...]  # (root number, fork number, ...): its identity, whatever the order of events
    origin: Origin
    node: int  # its newest node
    rng: np.random.Generator  # branching decisions
    seeds: np.random.Generator  # sampling seeds
    request: str = ""  # id of the newest engine request on its path: that one's server holds the path's KV
    number: int = 0  # in the order of starting, within its tree
    calls: int = 0  # on its path
    tools: tuple[tuple[str, str], ...] = ()  # (tool, status) of each call on its path
    segments: tuple[tuple[Kind, str], ...] = ()  # its path as text, after the prompt
    measured: bool = False  # the start of its newest segment has been looked at
    entropy: float = math.nan  # H of its newest measured segment
    baseline: float = math.nan  # H_init
    has_baseline: bool = False
    seed: int = 0  # of the segment being written
    finish: Finish | None = None  # of that segment, once it is there
    calling: bool = False  # the call that its newest segment ends with is under way
    late: bool = False  # and takes longer than the schedule's patience (:meth:`Schedule.patience_s`)
    began_s: float = math.nan  # as of awake_s(); NaN: not yet
    spent_s: float = 0.0  # of its deadline, before the run was resumed
    answer: int | None = None  # the TOOL node that the policy has not decided upon
    forked: int = 0
    streak: int = 0  # :attr:`TreeState.streak`
    session: BranchSession | None = None  # what it acts in, where there is an environment
    # (calls, actions in the session) up to the end of each answer on its path.
    passed: tuple[tuple[int, int], ...] = ()
    # Of a tree's first root: what it read at each answer, as a chat template gets it; not kept over a resume.
    heard: tuple[tuple[ChatMessage, ...], ...] = ()
    says: bool = False  # its newest segment is no call but a message, which its session answers
    over: bool = False  # its session has said that it ends here

    @classmethod
    def planted(cls, seed: int, key: tuple[int, ...], origin: Origin, node: int) -> Branch:
        """A branch that begins at the end of ``node``, with streams of its own of the tree's ``seed``."""
        decisions, sampling = (np.random.SeedSequence([seed, i], spawn_key=key) for i in (0, 1))
        return cls(key, origin, node, np.random.default_rng(decisions), np.random.default_rng(sampling))

    def fork(self, seed: int, node: int, before: int, inherits: bool) -> Branch:
        """A sibling of what this branch wrote after ``node``, where its first ``before`` segments end.
        ``inherits``: it keeps the baseline.
        """
        child = Branch.planted(seed, (*self.key, self.forked), Origin.FORK, node)
        self.forked += 1
        child.request, child.streak = self.request, self.streak
        child.segments = self.segments[:before]
        child.passed = self.passed[: sum(kind == Kind.TOOL for kind, _ in child.segments)]
        child.calls, actions = child.passed[-1] if child.passed else (0, 0)
        child.tools = self.tools[: child.calls]
        if self.session is not None:
            child.session = self.session.fork(child.key, actions)
        if inherits:
            child.baseline, child.has_baseline = self.baseline, self.has_baseline
        return child

    @property
    def first(self) -> bool:
        """Whether it is its tree's first root."""
        return self.key == (0,)

    @property
    def messages(self) -> int:
        """How many answers on its path are to messages, not to calls."""
        return sum(before == after for (before, _), (after, _) in pairwise([(0, 0), *self.passed]))

    @property
    def undecided(self) -> bool:
        """Whether a tool call is under way or its answer has not been decided upon."""
        return self.calling or self.answer is not None


class Stopwatch:
    """Adds the time that passes in a ``with`` (the event loop's, seconds) to one of several causes."""

    def __init__(self, seconds: dict[str, float], cause: str) -> None:
        self._seconds, self._cause = seconds, cause
        self._clock = asyncio.get_running_loop().time
        self._since = self._clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.switch(self._cause)

    def switch(self, cause: str) -> None:
        now = self._clock()
        self._seconds[self._cause] += now - self._since
        self._since, self._cause = now, cause
