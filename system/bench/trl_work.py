"""That the ways which ``espalier bench trl`` compares do the same work, from what each has left behind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from system.tree.record import Tree

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class BenchQuestion:
    """A question in the order of training, and how both sides put it."""

    id: str
    messages: list[dict[str, str]]
    answers: list[str]
    token_ids: list[int]  # of the whole prompt


@dataclass(frozen=True, slots=True)
class WorkDone:
    """What a run trained on."""

    ends: list[float]  # unix time of the end of each training step
    completions: int  # trained on in each step
    calls: float  # tool calls per completion
    problems: list[str] = field(default_factory=list)  # in what it is not the work that was asked for


def of_trl(
    lines: Records, result: Mapping[str, Any], asked: Sequence[BenchQuestion], leaves: int
) -> WorkDone:
    """``lines``: steps.jsonl, ``result``: result.json of :mod:`.trl_train`; ``leaves``: per question."""
    problems: list[str] = []
    at, per_step = 0, 0
    for line in lines:
        names: list[str] = line["questions"]
        expected = [one.id for one in asked[at : at + len(names)]]
        if names != expected:
            problems.append(f"step {line['step']}: other questions, or in another order")
        if line["completions"] != len(names) * leaves:
            problems.append(
                f"step {line['step']}: {line['completions']} completions, not {len(names) * leaves}"
            )
        at, per_step = at + len(names), line["completions"]
    if other := result["other_tokens"]:
        problems.append(f"other token ids of {len(other)} prompts, {other[0]} among them")
    total = sum(line["completions"] for line in lines)
    calls = sum(line["calls"] for line in lines) / max(total, 1)
    return WorkDone([line["time"] for line in lines], per_step, calls, problems)


def of_espalier(
    records: Records,
    ledger: Records,
    trees: Iterable[Tree],
    asked: Sequence[BenchQuestion],
    batch_leaves: int,
    in_order: bool,
) -> WorkDone:
    """``records``: of the training steps; ``ledger``: the events of ledger.jsonl; ``trees``: some of them.

    ``in_order``: a synchronous run, whose every step has just the questions that TRL's has.  An asynchronous
    one issues them in that order, and trains on what is there.
    """
    problems: list[str] = []
    issued = [event["prompt"] for event in ledger if event["event"] == "issue"]
    if issued[: len(asked)] != [one.id for one in asked][: len(issued)]:
        problems.append("other questions, or issued in another order")
    for step, record in enumerate(records, 1):
        if record["train/leaves"] != batch_leaves:
            problems.append(f"step {step}: {record['train/leaves']:g} completions, not {batch_leaves}")
    at = 0
    for event in ledger if in_order else ():
        if event["event"] == "train":
            numbers = sorted(event["numbers"])
            if numbers != list(range(at, at + len(numbers))):
                problems.append(f"step {event['version']}: other questions than the next ones")
            at += len(numbers)
    known = {one.id: one.token_ids for one in asked}
    for tree in trees:
        ids = tree.tokens[: tree.start[1] if tree.n_nodes > 1 else None].tolist()
        if ids != known.get(tree.prompt_id, ids):
            problems.append(f"{tree.prompt_id}: other token ids of the prompt")
    closed = [record for record in records if "rollout/leaves" in record]  # a step may see no tree close
    leaves = sum(record["rollout/leaves"] for record in closed)
    calls = sum(record["rollout/calls_per_leaf"] * record["rollout/leaves"] for record in closed)
    return WorkDone([record["time"] for record in records], batch_leaves, calls / max(leaves, 1), problems)


def steady(ends: Sequence[float]) -> list[float]:
    """Seconds from the end of one step to that of the next, without the first such (a pipeline fills, caches
    warm up) and the last (an asynchronous run has nothing to grow beside it).

    Raises ValueError for fewer than four steps, which leave nothing.
    """
    if len(ends) < 4:
        raise ValueError(f"{len(ends)} training steps: four at least")
    return [after - before for before, after in pairwise(ends)][1:-1]
