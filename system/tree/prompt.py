"""A question: where a trajectory tree begins."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from system.text import as_text


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question.  ``messages`` are chat messages; a tokenizer without a chat template gets their plain
    text."""

    id: str  # unique within the data set, stable across runs
    messages: tuple[dict[str, str], ...]  # ({"role": ..., "content": ...}, ...)
    answers: tuple[str, ...]  # accepted gold answers
    kind: str = "default"  # for metrics per task kind
    extra: dict[str, Any] = field(default_factory=dict)  # JSON-able
    demonstration: tuple[tuple[str, str], ...] = ()  # an expert's: (("model", text), ("tool", text), ...)

    @property
    def actions(self) -> tuple[str, ...]:
        """What the expert wrote before the answer: every text of the model's that a tool's follows."""
        return tuple(
            text
            for (author, text), (after, _) in pairwise(self.demonstration)
            if (author, after) == ("model", "tool")
        )

    def __post_init__(self) -> None:
        """What a tokenizer, a file and a server can take: a lone surrogate becomes U+FFFD."""
        set_field = object.__setattr__
        set_field(self, "id", as_text(self.id))
        set_field(self, "kind", as_text(self.kind))
        set_field(self, "answers", tuple(map(as_text, self.answers)))
        set_field(self, "messages", tuple(map(_cleaned, self.messages)))
        shown = tuple((author, as_text(text)) for author, text in self.demonstration)
        set_field(self, "demonstration", shown)


def _cleaned(message: dict[str, str]) -> dict[str, str]:
    return {key: as_text(value) for key, value in message.items()}
