"""A tree that failed, by name."""

from __future__ import annotations

from system.errors import EspalierError

ENGINE_LOST = "engine lost"  # why a branch ended, or a tree failed, without a fault of the prompt


class RolloutFailed(EspalierError, RuntimeError):
    """Too few branches ended with a score for the tree to teach anything.

    ``reason`` is a word for counters: "engine lost" if a server was, "deadline" (the tree's), else the
    commonest outcome of its branches in lower case ("engine_error", "deadline", "cancelled"); of an error
    that nobody expected, its class.
    """

    def __init__(self, prompt_id: str, reason: str, detail: str) -> None:
        super().__init__(prompt_id, reason, detail)  # its own arguments, so that it can be pickled
        self.prompt_id, self.reason, self.detail = prompt_id, reason, detail

    def __str__(self) -> str:
        return f"tree of prompt {self.prompt_id!r}: {self.reason}: {self.detail}"

    @property
    def blameless(self) -> bool:
        """Whether no attempt at the prompt has failed: its engine was lost."""
        return self.reason == ENGINE_LOST
