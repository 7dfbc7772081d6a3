"""What a task gives the system: prompts with verifiable answers, in a fixed order for a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from system.tree.prompt import Prompt


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A supervised trajectory: alternating model and tool text after the prompt."""

    prompt: Prompt
    segments: tuple[tuple[str, str], ...]  # (("model", text), ("tool", text), ...)


class Task(Protocol):
    """A source of prompts."""

    name: str

    def train(self) -> Sequence[Prompt]:
        """Training prompts; the run shuffles them by its own seed, epoch by epoch."""
        ...

    def eval(self) -> Sequence[Prompt]:
        """Held-out prompts."""
        ...


# What a task may bring besides its prompts.


@runtime_checkable
class HasCorpus(Protocol):
    def corpus(self) -> list[dict[str, str]]:
        """Documents {"id", "title", "text"} for the search tool."""
        ...


@runtime_checkable
class HasTokenizer(Protocol):
    def tokenizer(self) -> Any:
        """A Hugging Face tokenizer made for this task, for a new tiny model."""
        ...


@runtime_checkable
class HasDemonstrations(Protocol):
    def demonstrations(self, n: int, seed: int) -> list[Demonstration]:
        """Supervised trajectories for a warm start."""
        ...
