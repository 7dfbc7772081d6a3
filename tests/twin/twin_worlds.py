"""Small worlds for the twin's tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from system.config import Config, load
from system.twin.agent import AgentModel
from system.twin.dist import Constant
from system.twin.speeds import LinearEngine, LinearLearner
from system.twin.tools import ToolModel
from system.twin.world import Models

FAR = ("generate", "branch", "tree")


def config(*overrides: str) -> Config:
    return load(
        None,
        [
            "rollout.leaves=4",
            "rollout.roots=2",
            "rollout.concurrency=8",
            "rollout.call_limit=3",
            "rollout.max_response_tokens=2000",
            "rollout.max_tool_result_tokens=200",
            "engine.max_context=4000",
            "flow.batch_leaves=16",
            *(f"rollout.{name}_deadline_s=1e9" for name in FAR),
            *overrides,
        ],
    )


def models(**changes: Any) -> Models:
    plain: dict[str, Any] = {
        "engine": LinearEngine(0.01, 0.001, per_prefill_s=1e-4),
        "learner": LinearLearner(1.0, 1e-4),
        "agent": AgentModel(segment_tokens=Constant(50), prompt_tokens=Constant(20)),
        "tools": {"search": ToolModel(Constant(1.0), Constant(20))},
        "publish_s": 0.5,
        "update_s": 0.1,
    }
    return Models(**(plain | changes))


def surviving(events: Sequence[dict[str, Any]]) -> list[tuple[int, tuple[int, str]]]:
    """(version, (epoch, prompt)) of every tree that the final weights were trained on."""
    issued = {e["number"]: (e["epoch"], e["prompt"]) for e in events if e["event"] == "issue"}
    updates: list[tuple[int, list[int]]] = []
    for event in events:
        if event["event"] == "train":
            updates.append((event["version"], event["numbers"]))
        elif event["event"] == "restore":
            updates = [update for update in updates if update[0] <= event["trained_through"]]
    return [(version, issued[number]) for version, numbers in updates for number in numbers]
