"""Several engine models as one engine."""

from __future__ import annotations

from collections.abc import AsyncIterator

from system.engine.protocol import Chunk, GenerateRequest
from system.twin.engine_model import EngineModel


class EngineModels:
    """Several engines as one: a tree's branches stay where their prefixes are, unless that engine is down or
    much busier than another.

    New trees go to the less loaded of two engines in rotation (the power of two choices).
    """

    def __init__(self, engines: list[EngineModel]) -> None:
        self.engines = engines
        self._home: dict[str, EngineModel] = {}
        self._turn = 0

    def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        return self.choose(request.route).generate(request)

    def forget(self, route: str) -> None:
        """The tree is closed."""
        self._home.pop(route, None)

    def choose(self, route: str) -> EngineModel:
        """The engine for the next request of a tree."""
        home, other = self._home.get(route), self._candidate()
        if home is None or not home.alive or home.load > 2 * other.load + 8:
            home = self._home[route] = other
        return home

    def _candidate(self) -> EngineModel:
        count = len(self.engines)
        first, second = (self.engines[(self._turn + i * (count // 2 or 1)) % count] for i in (0, 1))
        self._turn += 1
        if first.alive != second.alive:
            return first if first.alive else second
        return first if first.load <= second.load else second
