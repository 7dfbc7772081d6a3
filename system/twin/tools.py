"""Tools as latencies behind the real tool service: its cache, limits, deadlines, retries and breaker.

What is modelled is the tool itself: how long a call takes, how long its answer is, whether it fails.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from system.config import ToolsConfig
from system.tools.outcome import CallContext, ToolOutcome, ToolSpec, ToolStatus
from system.tools.service import ToolService
from system.tools.tool import ToolUnavailable
from system.twin.clock import Trace
from system.twin.dist import Constant, Dist


@dataclass(frozen=True)
class ToolModel:
    """One tool.  ``pure``: equal calls of one prompt may share an answer."""

    latency: Dist = field(default_factory=lambda: Constant(1.0))
    result_tokens: Dist = field(default_factory=lambda: Constant(64))  # without the result's own tags
    failures: float = 0.0  # share of calls that come back as an error, after their latency
    pure: bool = True


class TwinTools:
    """Every model behind one service."""

    def __init__(self, models: Mapping[str, ToolModel], limits: ToolsConfig, seed: int, trace: Trace) -> None:
        self._tools = [_SimulatedTool(name, model, seed) for name, model in models.items()]
        self._service = ToolService(
            self._tools, limits, seed=seed, clock=lambda: asyncio.get_running_loop().time()
        )
        self._by_name = {tool.spec.name: tool for tool in self._tools}
        self._trace = trace

    @property
    def specs(self) -> Mapping[str, ToolSpec]:
        return self._service.specs

    @property
    def running(self) -> int:
        """Calls inside tools."""
        return sum(tool.running for tool in self._tools)

    def set_down(self, down: bool) -> None:
        """Inject or mend a failure: the tools' servers are away."""
        for tool in self._tools:
            tool.down = down

    def drawn(self, tool: str, prompt_id: str, query: int, branch: int) -> tuple[float, int]:
        """Seconds and tokens of the answer to a call that reaches the tool."""
        latency, size, _ = self._by_name[tool].drawn(f"{prompt_id} {query}", branch)
        return latency, size

    async def call(self, tool: str, arguments: Mapping[str, Any], context: CallContext) -> ToolOutcome:
        """As :meth:`system.tools.outcome.Tools.call`; the result's text is its length in tokens."""
        asked = {"query": f"{context.prompt_id} {arguments['query']}"}  # of one prompt only
        outcome = await self._service.call(tool, asked, context)
        self._trace.note("tool", tool, context.prompt_id, context.branch)
        text = outcome.text if outcome.text.isdigit() else "1"
        return replace(outcome, text=text)


class _SimulatedTool:
    """Implements :class:`system.tools.tool.Tool`.  A call's draws come from what it asks and whose it is, not
    from the order of calls."""

    def __init__(self, name: str, model: ToolModel, seed: int) -> None:
        self.spec = ToolSpec(name, "simulated", {"type": "object"}, "query", pure=model.pure)
        self.running, self.down = 0, False
        self._model, self._seed = model, seed

    async def run(self, arguments: Mapping[str, Any], context: CallContext) -> ToolOutcome:
        if self.down:
            raise ToolUnavailable("its server is away", delivered=False)
        latency, size, failed = self.drawn(arguments["query"], context.branch)
        self.running += 1
        try:
            await asyncio.sleep(latency)
        finally:
            self.running -= 1
        return ToolOutcome(ToolStatus.ERROR if failed else ToolStatus.OK, str(size), latency)

    def drawn(self, query: str, branch: int) -> tuple[float, int, bool]:
        """Seconds and tokens of an answer, and whether it is an error."""
        model = self._model
        rng = np.random.default_rng([self._seed, branch, zlib.crc32(query.encode())])
        latency, size = model.latency.draw(rng), round(model.result_tokens.draw(rng))
        return latency, max(size, 1), bool(rng.random() < model.failures)

    async def check(self) -> None:
        return None
