"""Environments for tests: what each answers tells all that was done in it."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any, ClassVar

from system.envs.protocol import (
    Action,
    CannotFork,
    Effects,
    Environment,
    ForkKind,
    Ids,
    Observation,
    Start,
    World,
)
from system.tools.outcome import ToolSpec
from system.tools.tool import ToolUnavailable

PUSH = ToolSpec("push", "push it", {"type": "object"}, "what")
LOOK = ToolSpec("look", "look at it", {"type": "object"}, "what", pure=True)


class Chain(World):
    """Its state is a hash of all that was done in it, and each answer is that hash."""

    def __init__(self, environment: Chains, start: Start | None, state: str, draws: int) -> None:
        self.environment, self.state, self.draws, self.closed = environment, state, draws, False
        self.opening = f"begun with {draws}" if start is None or start.saved is None else ""
        environment.open_worlds += 1

    async def step(self, action: Action) -> Observation:
        assert not self.closed
        environment = self.environment
        environment.acted.append((str(action.ids), self.state))
        (call,) = action.calls
        wish = call.arguments
        await asyncio.sleep(wish.get("before_s", 0.0))
        if wish.get("refused", 0) > environment.refusals.get(wish["what"], 0):
            environment.refusals[wish["what"]] = environment.refusals.get(wish["what"], 0) + 1
            raise ToolUnavailable("away", delivered=wish.get("delivered", True))
        self.state = hashlib.blake2b(
            f"{self.state}/{self.draws}/{wish['what']}".encode(), digest_size=8
        ).hexdigest()
        await asyncio.sleep(wish.get("after_s", 0.0))  # given up here, the world has changed all the same
        if wish.get("raises"):
            raise ValueError(f"no {self.state}")
        return Observation.of(self.state)

    async def result(self) -> dict[str, Any]:
        return {"state": self.state}

    async def fork(self, ids: Ids) -> World:
        await asyncio.sleep(self.environment.copy_s)
        if self.environment.stubborn:
            raise CannotFork("not now")
        return Chain(self.environment, None, self.state, self.draws)

    async def save(self) -> str:
        before = self.state
        await asyncio.sleep(self.environment.copy_s)
        assert before == self.state
        if self.environment.stubborn:
            raise CannotFork("not now")
        return json.dumps([self.state, self.draws])

    def reseed(self, seed: int) -> None:
        self.draws = seed

    async def close(self, why: str) -> None:
        assert not self.closed
        self.closed = True
        self.environment.open_worlds -= 1


class Chains(Environment):
    tools: ClassVar = {"push": PUSH, "look": LOOK}

    def __init__(
        self, forks: ForkKind, effects: Effects = Effects.SESSION, copy_s: float = 0.2, stubborn: bool = False
    ) -> None:
        self.forks, self.effects, self.copy_s, self.stubborn = forks, effects, copy_s, stubborn
        self.open_worlds, self.open_s, self.fails = 0, 0.1, 0
        self.acted: list[tuple[str, str]] = []
        self.refusals: dict[str, int] = {}

    async def open(self, start: Start) -> World:
        await asyncio.sleep(self.open_s)
        if self.fails:
            self.fails -= 1
            raise ToolUnavailable("no room", delivered=False)
        if start.saved is not None:
            return Chain(self, start, *json.loads(start.saved))
        return Chain(self, start, start.prompt.id, start.seed)
