"""A phase of a run as a span: when it began, how long it took, and what happened within it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from system.tree.stats import TreeStats


@dataclass(frozen=True, slots=True)
class PhaseSpan:
    """A phase of the run that is over: ``generate``, ``train`` or ``publish``; or, within ``generate``, a
    ``tool`` call, or the ``reward`` of a leaf.
    """

    name: str
    start: float  # seconds since 1970
    seconds: float
    attributes: Mapping[str, str | int | float]
    within: Sequence[PhaseSpan] = ()


def of_tree(tree: TreeStats, closed: float) -> PhaseSpan:
    """``generate``: a tree that was ``closed`` then, in seconds since 1970.

    Calls and rewards stand in it at their distance from its start, which another machine's clock told; those
    of which nobody knows when they began (of trees of older versions) are left out.
    """
    start = closed - tree.seconds
    calls = [
        PhaseSpan(
            "tool",
            start + call.began_s,
            call.latency_s,
            {
                "tool.name": call.tool,
                "tool.status": call.status,
                "tool.attempts": call.attempts,
                "tool.cached": call.cached,
            },
        )
        for call in tree.calls
        if call.began_s >= 0
    ]
    rewards = [
        PhaseSpan(
            "reward",
            start + began,
            ended - began,
            {"tree.leaf": leaf, **({"reward.value": float(value)} if value == value else {})},
        )
        for leaf, (times, value) in enumerate(zip(tree.scoring, tree.reward.tolist(), strict=False))
        if times is not None
        for began, ended in (times,)
    ]
    about: dict[str, str | int | float] = {
        "tree.prompt": tree.prompt_id,
        "tree.task": tree.task,
        "tree.leaves": tree.leaves,
        "tree.forks": tree.forks,
        "tree.tokens": int(tree.generated),
        "tool.calls": len(tree.calls),
        "tool.seconds": sum(call.latency_s for call in tree.calls),
    }
    if tree.rewards.size:
        about["reward.mean"] = float(tree.rewards.mean())
    return PhaseSpan("generate", start, tree.seconds, about, [*calls, *rewards])
