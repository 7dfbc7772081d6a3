"""A rollout worker: grows many trees at once on one event loop, or runs groups of agents in their place."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from pathlib import Path
from typing import Any

import ray

from actors import keys
from system import config as configuration
from system.agents.group_rollout import GroupRollout
from system.agents.runner import AgentRunner
from system.rollout import process
from system.rollout.context import build_context
from system.rollout.guard import one_tree
from system.rollout.planting import planted
from system.rollout.sets import contexts
from system.rollout.snapshot import can_freeze, freeze, thaw
from system.rollout.tree_rollout import TreeRollout
from system.text import described
from system.tree.prompt import Prompt
from system.tree.record import Mishap, Tree
from system.tree.stats import TreeStats


class RolloutWorker:
    """Restarted by Ray when it dies; the trees it was growing go back to pending and are grown again."""

    def __init__(
        self, config: dict[str, Any], model: str, engines: list[str], tools: dict[str, str], store: Path
    ) -> None:
        """``store``: the run directory, for what a reward keeps."""
        process.prepare()
        settings = configuration.from_dict(config)
        self._context, self._tools, self._engine = build_context(
            settings, model, engines, tools, keys.held(), store
        )
        self._sets = contexts(settings, self._context, model, keys.held(), store)
        agents, token = settings.agent.on, keys.held().sessions
        self._agents = AgentRunner.of(settings, self._context, token) if agents else None
        self._growing: dict[int, TreeRollout] = {}

    async def beat(self) -> int:
        """The process's number, if its event loop turns: trees grow on it, so here it is the heart."""
        return os.getpid()

    async def check(self) -> None:
        """Return: this process is there.  Its tools may still be on their way back."""

    async def check_tools(self) -> None:
        """Raise ToolStartError if a configured tool cannot work, and what an environment, an agent or a
        teacher has against it.
        """
        await self._tools.check()
        if self._agents is not None:
            await self._agents.check()
        if self._context.environments is not None:
            await self._context.environments.check()
        if self._context.teacher is not None:
            await self._context.teacher.check()

    async def counters(self) -> dict[str, float]:
        """Running totals of engine client, tools, rewards and environment, since this process started."""
        worlds = self._context.environments
        own = self._engine.counters | self._tools.counters | self._context.scoring.counters
        own |= self._agents.counters if self._agents else {}
        drift = Counter(self._context.drift.counters)
        for context in self._sets.values():
            own |= context.scoring.counters
            drift.update(context.drift.counters)
        return own | drift | (worlds.counters if worlds else {})

    async def grow(
        self,
        prompt: Prompt,
        ticket: int,
        seed: int,
        temperature: float,
        start: bytes | None = None,
        guide: int = 0,
    ) -> tuple[Tree, TreeStats]:
        """A tree, which stays in the object store, and its statistics, computed here and only here.

        ``start``: a snapshot to go on from, which holds its guide.  ``guide``: as in :class:`TreeRollout`.
        Raises SnapshotError if ``start`` is none, RolloutFailed for whatever else goes wrong with this one
        tree, and ConfigError for what would with every tree.
        """
        with one_tree(prompt.id):
            if self._agents is not None:
                group = GroupRollout(self._agents, prompt, seed=seed, ticket=ticket, temperature=temperature)
                tree = await group.run()
                return tree, TreeStats.of(tree)
            growing = (
                await planted(
                    self._context, prompt, seed=seed, ticket=ticket, temperature=temperature, guide=guide
                )
                if start is None
                else thaw(self._context, prompt, start, ticket)
            )
            self._growing[ticket] = growing
            try:
                tree = await growing.run()
            finally:
                del self._growing[ticket]
            return tree, TreeStats.of(tree)

    @ray.method(num_returns=2)
    async def snapshots(self) -> tuple[list[int], dict[int, bytes]]:
        """The tickets of the growing trees that can be frozen; and the frozen trees by ticket, for whoever
        writes them down.  One that fails to be is grown anew on a resume.
        """
        found: dict[int, bytes] = {}
        for ticket in list(self._growing):
            if (growing := self._growing.get(ticket)) and can_freeze(growing):
                try:
                    found[ticket] = freeze(growing)
                except Exception as error:
                    growing.mishaps.append(Mishap("snapshot", described(error)))
            await asyncio.sleep(0)  # between two trees, the others go on
        return list(found), found

    async def answer(self, prompt: Prompt, seed: int, temperature: float, of: str = "") -> TreeStats:
        """One branch, no forks; or one run of the agent.  Raises as :meth:`grow` does.

        ``seed`` tells the answers apart that are asked at a time, also those to one question.  ``of``: the
        set among ``eval.sets`` that asks; empty: the run's own questions.
        """
        ticket, context = f"answer-{seed}", self._sets.get(of, self._context)
        with one_tree(prompt.id):
            if self._agents is not None:
                alone = GroupRollout(
                    self._agents, prompt, seed=seed, ticket=ticket, greedy=True, temperature=temperature,
                    scoring=context.scoring,
                )  # fmt: skip
                return TreeStats.of(await alone.run())
            one = await planted(
                context, prompt, seed=seed, ticket=ticket, greedy=True, temperature=temperature
            )
            return TreeStats.of(await one.run())
