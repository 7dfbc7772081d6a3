"""Tools as latencies: how long a call takes, how long its answer is, whether it fails."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from system.bench.twin.dist import Constant, Dist
from system.bench.twin.trace import Trace
from system.tools.outcome import CallContext, ToolOutcome, ToolSpec, ToolStatus


@dataclass(frozen=True)
class ToolModel:
    """One tool.  ``deadline_s`` cuts a call off, as the tool service does."""

    latency: Dist = field(default_factory=lambda: Constant(1.0))
    result_tokens: Dist = field(default_factory=lambda: Constant(64))  # without the result's own tags
    failures: float = 0.0  # share of calls that come back as an error, after their latency
    deadline_s: float = 120.0
    concurrency: int = 1_000_000  # calls at once; the rest waits


class TwinTools:
    """The tool service of the twin.  A call's draws come from its arguments, not from the order of calls."""

    def __init__(self, models: Mapping[str, ToolModel], seed: int, trace: Trace | None = None) -> None:
        self.models, self._seed, self._trace = dict(models), seed, trace
        self.specs = {name: ToolSpec(name, "simulated", {"type": "object"}, "query") for name in self.models}
        self.calls = 0
        self.running = 0
        self.down = False  # injected: the tool's server is away
        self._places = {name: asyncio.Semaphore(model.concurrency) for name, model in self.models.items()}

    async def call(self, tool: str, arguments: Mapping[str, Any], context: CallContext) -> ToolOutcome:
        model, loop = self.models[tool], asyncio.get_running_loop()
        rng = np.random.default_rng([self._seed, int(arguments["query"])])
        latency, size = model.latency.draw(rng), round(model.result_tokens.draw(rng))
        failed = rng.random() < model.failures
        began = loop.time()
        self.calls += 1
        self.running += 1
        try:
            async with self._places[tool]:
                if self.down:
                    return ToolOutcome(ToolStatus.UNAVAILABLE, "1", loop.time() - began)
                await asyncio.sleep(min(latency, model.deadline_s))
        finally:
            self.running -= 1
        took = loop.time() - began
        if self._trace:
            self._trace.note("tool", tool, context.prompt_id, context.branch)
        if latency > model.deadline_s:
            return ToolOutcome(ToolStatus.TIMEOUT, "1", took)
        return ToolOutcome(ToolStatus.ERROR if failed else ToolStatus.OK, str(max(size, 1)), took)
