"""What a run's ledger says of its prompts: trained once, twice, or lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from system.flow.ledger import surviving_updates

Prompt = tuple[int, str]  # epoch, prompt id


@dataclass(frozen=True, slots=True)
class Account:
    """Prompts of a run that has ended."""

    versions: int  # training steps that the final weights have seen
    trained: int
    twice: int  # trained more than once in an epoch
    lost: int  # abandoned, or left behind by more than the flow's window
    waiting: int  # issued and in flight at the end


def account(events: Sequence[dict[str, Any]], batch_trees: int, staleness: int, window: int) -> Account:
    """The account of a ledger's ``events``.

    The order in which prompts are trained may differ from the order of their issue by ``window`` batches of
    ``batch_trees``; ``staleness + 1`` batches may be in flight at the end.  What is further behind is lost.
    """
    trained = surviving_history(events)
    key = {e["number"]: (e["epoch"], e["prompt"]) for e in events if e["event"] == "issue"}
    silent = {key[e["number"]] for e in events if e["event"] == "silent"}
    issued = [prompt for prompt in dict.fromkeys(key.values()) if prompt not in silent]
    done = set(trained)
    left = [place for place, prompt in enumerate(issued) if prompt not in done]
    lost = sum(event["event"] == "abandon" for event in events)
    lost += sum(place < len(trained) - window * batch_trees for place in left)
    lost += max(0, len(left) - (staleness + 1) * batch_trees)
    return Account(
        versions=len(surviving_updates(events)),
        trained=len(done),
        twice=sum(count - 1 for count in Counter(trained).values()),
        lost=lost,
        waiting=len(left),
    )


def surviving_history(events: Sequence[dict[str, Any]]) -> list[Prompt]:
    """The prompts that the final weights were trained on, in order, without updates that were taken back."""
    issued = {e["number"]: (e["epoch"], e["prompt"]) for e in events if e["event"] == "issue"}
    return [issued[number] for _, numbers in surviving_updates(events) for number in numbers]
