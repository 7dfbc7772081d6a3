"""Forking an agent whose memory is out of reach: another is started and told again what the first one was.

The turns up to the fork are answered with the tokens that were sampled then, without an engine, as long as
the agent asks what was asked then, token for token; at the fork its turn is sampled anew.  That needs tools
that answer alike in a fresh world.  An agent that asks for anything else goes on by itself from there.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from system.engine.protocol import Chunk, Engine, GenerateRequest
from system.tree.record import Int32


@dataclass(slots=True)
class RecordedTurn:
    """One request, and what the engine sampled for it."""

    prompt: Int32  # [P]
    chunks: list[Chunk] = field(default_factory=list[Chunk])


@dataclass(frozen=True, slots=True)
class RetoldTurn:
    """A turn that an episode was given: whose turn it is in the first place, and what was recorded of it."""

    turn: tuple[int, int]  # (episode, piece) that sampled it
    recorded: RecordedTurn


class ReplayScript:
    """What one agent is told again."""

    def __init__(self, turns: Sequence[RetoldTurn], fork: Int32) -> None:
        """``turns``: in the order they were told; ``fork``: the prompt [P] whose turn is sampled anew."""
        self._left, self._fork = list(turns), fork
        self.forked = False  # the fork was reached
        self.diverged = False  # something else was asked before

    @property
    def over(self) -> bool:
        """Whether the agent goes on by itself."""
        return self.forked or self.diverged

    @classmethod
    def none(cls) -> ReplayScript:
        """That of an agent that goes on by itself from the start."""
        script = cls((), np.empty(0, np.int32))
        script.forked = True
        return script

    def next(self, prompt: Int32) -> RetoldTurn | None:
        """The turn that answers ``prompt``; None: it is to be sampled."""
        if self.over:
            return None
        for place, one in enumerate(self._left):
            if np.array_equal(one.recorded.prompt, prompt):
                return self._left.pop(place)
        self.forked = not self._left and np.array_equal(prompt, self._fork)
        self.diverged = not self.forked
        return None


class ReplayingEngine:
    """An engine that remembers what it was asked by sessions that may be forked, and answers for it where a
    script says so.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.scripts: dict[str, ReplayScript] = {}  # by route
        self._asked: dict[
            str, tuple[RecordedTurn, tuple[int, int] | None]
        ] = {}  # by request, until it is taken

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        script = self.scripts.get(request.route)
        if script is None:  # nobody will ask
            async with aclosing(cast("AsyncGenerator[Chunk]", self._engine.generate(request))) as stream:
                async for chunk in stream:
                    yield chunk
            return
        if (told := script.next(request.input_ids)) is not None:
            self._asked[request.rid] = told.recorded, told.turn
            for chunk in told.recorded.chunks:
                yield chunk
            return
        recorded = RecordedTurn(request.input_ids)
        self._asked[request.rid] = recorded, None
        async with aclosing(cast("AsyncGenerator[Chunk]", self._engine.generate(request))) as stream:
            async for chunk in stream:
                recorded.chunks.append(chunk)
                yield chunk

    def take(self, rid: str) -> tuple[RecordedTurn, tuple[int, int] | None]:
        """What was recorded of a request, and, if it was told again, whose turn it is."""
        return self._asked.pop(rid)

    def forget(self, route: str) -> None:
        """The session is closed."""
        self.scripts.pop(route, None)
        for rid in [rid for rid in self._asked if rid.startswith(f"{route}:")]:
            del self._asked[rid]
