"""Plain classes as users may write them, right and wrong; named in tests as ``plain_worlds:…``."""

from __future__ import annotations

from typing import Any

from system.tree.prompt import Prompt


class Counter:
    fork = "deepcopy"

    def __init__(self, start: int = 0) -> None:
        self.count = start

    def reset(self, prompt: Prompt) -> None:
        """Nothing to do."""

    def add(self, number: int) -> str:
        """Add a number."""
        self.count += number
        return str(self.count)


class Mail(Counter):
    fork = "none"


class Undeclared(Counter):
    fork = "copy"


class Untyped:
    fork = "replay"

    def reset(self, prompt: Prompt) -> None:
        """Nothing to do."""

    def add(self, number) -> str:  # type: ignore[no-untyped-def]
        return str(number)


class Slow(Counter):
    async def wait(self, number: int) -> str:
        return str(number)


class Finished(Counter):
    def done(self) -> bool:
        return True


class Toolless:
    def reset(self, prompt: Prompt) -> None:
        """Nothing to do."""


class Searching(Counter):
    def search(self, query: str) -> str:
        return query


class Asking(Counter):
    def reply(self, text: str) -> str | None:
        return "and?"


def nothing() -> Any:
    return object()
