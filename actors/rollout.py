"""A rollout worker: grows many trees at once on one event loop."""

from __future__ import annotations

from typing import Any

from system import config as configuration
from system.tasks.base import Prompt
from system.tree.record import Tree


class RolloutWorker:
    """Restarted by Ray when it dies; the trees it was growing go back to pending and are grown again."""

    def __init__(self, config: dict[str, Any], model: str, engines: list[str], tools: dict[str, str]) -> None:
        from system.rollout import process
        from system.rollout.build import build_grower

        process.prepare()
        settings = configuration.from_dict(config)
        self._grower, self._tools, self._engine = build_grower(settings, model, engines, tools)

    async def check(self) -> None:
        """Raise ToolStartError if a configured tool cannot work."""
        await self._tools.check()

    async def counters(self) -> dict[str, float]:
        """Running totals of the engine client, since this process started."""
        return self._engine.counters

    async def grow(self, prompt: Prompt, ticket: int, seed: int) -> Tree:
        return await self._grower.grow(prompt, ticket=ticket, seed=seed)

    async def answer(self, prompt: Prompt, seed: int, temperature: float) -> Tree:
        """One branch, no forks."""
        return await self._grower.grow(prompt, seed=seed, greedy=True, temperature=temperature)
