"""The longest chain of work in a simulation: what no schedule can end earlier than."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextvars import ContextVar
from typing import Any

from system.engine.protocol import Chunk, Engine, GenerateRequest
from system.tools.outcome import CallContext, ToolOutcome, Tools, ToolSpec


class CriticalPath:
    """Seconds of work on the longest chain of segments and calls that had to follow each other.

    Rollouts have it for their engine and their tools, whose work it adds up: ``token_s`` seconds for a token,
    however long its request waited, and for a call as long as it took.  A task inherits its creator's
    context, so a fork goes on from its parent's chain and a top-up from the chain of the branch whose end
    made room for it.
    """

    def __init__(self, engine: Engine, token_s: float, tools: Tools) -> None:
        self.seconds = 0.0  # of the longest chain so far
        self._engine, self._token_s, self._tools = engine, token_s, tools
        self._chain: ContextVar[float] = ContextVar("chain", default=0.0)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        async for chunk in self._engine.generate(request):
            self._add(chunk.tokens.size * self._token_s)
            yield chunk

    @property
    def specs(self) -> Mapping[str, ToolSpec]:
        return self._tools.specs

    async def call(self, tool: str, arguments: Mapping[str, Any], context: CallContext) -> ToolOutcome:
        outcome = await self._tools.call(tool, arguments, context)
        self._add(outcome.latency_s)
        return outcome

    def _add(self, seconds: float) -> None:
        """The current task did ``seconds`` of work."""
        chain = self._chain.get() + seconds
        self._chain.set(chain)
        self.seconds = max(self.seconds, chain)
