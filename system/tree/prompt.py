"""A question: where a trajectory tree begins."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question.  ``messages`` are chat messages; a tokenizer without a chat template gets their plain
    text."""

    id: str  # unique within the data set, stable across runs
    messages: tuple[dict[str, str], ...]  # ({"role": ..., "content": ...}, ...)
    answers: tuple[str, ...]  # accepted gold answers
    kind: str = "default"  # for metrics per task kind
    extra: dict[str, Any] = field(default_factory=dict)  # JSON-able
