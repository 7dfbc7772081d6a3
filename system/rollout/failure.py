"""A tree that failed, by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from system.errors import EspalierError
from system.tree.record import Mishap, Outcome

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


def too_few(
    prompt_id: str,
    outcomes: Sequence[Outcome],
    mishaps: Sequence[Mishap],
    scored: int,
    budget: int,
    cut: bool,
) -> RolloutFailed:
    """The failure of a tree with only ``scored`` scores.

    ``outcomes``: of its branches; ``cut``: the tree's deadline ended some of them.  The reward is to blame
    when there would be leaves enough with the scores that failed.
    """
    if sum(outcome.scored for outcome in outcomes) >= min(2, budget):
        reason, mishaps = "reward", [one for one in mishaps if one.kind == "reward"]
    elif any(mishap.kind == ENGINE_LOST for mishap in mishaps):
        reason = ENGINE_LOST
    elif cut:
        reason = "deadline"
    else:
        reason = Counter(outcomes).most_common(1)[0][0].name.lower()
    detail = [f"{scored} of {budget} leaves scored", *(one.text for one in mishaps[:1])]
    return RolloutFailed(prompt_id, reason, "; ".join(detail))
