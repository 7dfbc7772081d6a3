"""The longest chain of work in a simulation: what no schedule can end earlier than."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from system.engine.protocol import Chunk, Engine, GenerateRequest
from system.tools.outcome import CallContext, ToolOutcome, Tools, ToolSpec


class CriticalPath:
    """Seconds of work on the longest chain of segments and calls that had to follow each other.

    A task inherits its creator's context, so a fork goes on from its parent's chain and a top-up from the
    chain of the branch whose end made room for it.
    """

    def __init__(self) -> None:
        self.seconds = 0.0  # of the longest chain so far
        self._chain: ContextVar[float] = ContextVar("chain", default=0.0)

    def add(self, seconds: float) -> None:
        """The current task did ``seconds`` of work."""
        chain = self._chain.get() + seconds
        self._chain.set(chain)
        self.seconds = max(self.seconds, chain)


@dataclass
class MeasuredEngine:
    """``engine``, whose every token is ``token_s`` seconds of work, however long its request waited."""

    engine: Engine
    token_s: float
    path: CriticalPath

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        async for chunk in self.engine.generate(request):
            self.path.add(chunk.tokens.size * self.token_s)
            yield chunk


@dataclass
class MeasuredTools:
    """``tools``, whose every call is as much work as it took."""

    tools: Tools
    path: CriticalPath

    @property
    def specs(self) -> Mapping[str, ToolSpec]:
        return self.tools.specs

    async def call(self, tool: str, arguments: Mapping[str, Any], context: CallContext) -> ToolOutcome:
        outcome = await self.tools.call(tool, arguments, context)
        self.path.add(outcome.latency_s)
        return outcome
