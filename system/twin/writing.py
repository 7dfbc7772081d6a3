"""A segment while the engine model writes it, for a reader of tokens or for one that only counts."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np

from system.engine.protocol import Chunk, EngineError, Finish, GenerateRequest
from system.twin.agent import Utterance, written
from system.twin.prefix import Path


@dataclass(eq=False, slots=True, kw_only=True)
class Writing(ABC):
    """What the engine model knows of a segment."""

    name: str  # for the trace: whose segment it is
    segment: Utterance
    path: Path  # what it goes on from
    length: int  # tokens of ``path``
    limit: int  # tokens it will have
    milestones: list[int]  # token counts at which its reader is told, the last first
    number: int = 0  # of the segment, from 1 on, once the engine has it
    done: int = 0
    joined: int = 0  # engine steps when it (last) began to decode, less the tokens it had then
    cached: int = -1
    versions: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])  # (first token, version)
    closed: bool = False

    @abstractmethod
    def reached(self) -> None:
        """It has ``done`` tokens; ``milestones`` are those that are left, none at its end."""

    @abstractmethod
    def failed(self, error: EngineError) -> None:
        """The engine has died."""


@dataclass(eq=False, slots=True, kw_only=True)
class Spoken(Writing):
    """One whose reader gets tokens."""

    request: GenerateRequest
    finish: Finish
    sent: int = 0
    chunks: asyncio.Queue[Chunk | EngineError] = field(default_factory=asyncio.Queue[Chunk | EngineError])

    def reached(self) -> None:
        begin, end = self.sent, self.done
        version = np.full(end - begin, self.versions[0][1], np.int32)
        for first, value in self.versions[1:]:
            version[max(0, first - begin) :] = value
        finish = None if self.milestones else self.finish
        self.sent = end
        asked = self.request
        scored = None if asked.score_from is None else asked.input_ids.size - asked.score_from
        self.chunks.put_nowait(
            Chunk(
                tokens=written(self.segment, self.number, self.limit)[begin:end],
                logprob=np.full(end - begin, -1.0, np.float32),
                entropy=np.full(end - begin, self.segment.entropy, np.float32),
                version=version,
                finish=finish,
                cached_tokens=self.cached if finish else 0,
                scores=None if scored is None else np.full(scored, -1.0, np.float32),
            )
        )

    def failed(self, error: EngineError) -> None:
        self.chunks.put_nowait(error)
