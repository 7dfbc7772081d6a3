"""``espalier eval --endpoint`` asks our own endpoint, behind which a real engine talks and calls."""

from __future__ import annotations

from typing import Any

from system.config import load, rewards
from system.evals.endpoint import Questions
from system.evals.record import Asked
from system.rollout.completions import ChatCompletions
from system.rollout.scorer import Scorer
from system.rollout.scoring import Scoring
from system.tools.outcome import CallContext, ToolOutcome, ToolSpec, ToolStatus
from system.tree.prompt import Prompt


class Tools:
    """Those that the model calls, as its table of tokens has it."""

    def __init__(self) -> None:
        schema = {"type": "object", "properties": {}}
        self.specs = {name: ToolSpec(name, f"To {name}.", schema, "a") for name in ("add", "look")}
        self.called: list[str] = []

    async def call(self, tool: str, arguments: Any, context: CallContext) -> ToolOutcome:
        self.called.append(tool)
        return ToolOutcome(ToolStatus.OK, "3")


async def test_our_own_endpoint_answers(place: Any) -> None:
    session, tools, told = await place.open(), Tools(), list[str]()
    words = ["eval.temperature=1", "rollout.call_limit=6", "rollout.max_response_tokens=900"]
    config = load(None, words)
    scorer = Scorer.of(config, rewards(config.reward)[0])
    server = ChatCompletions(session.openai_url, "espalier", {}, key="anything")
    questions = Questions(config, server, tools, Scoring([scorer]), lambda _, text: told.append(text))
    prompt = Prompt("q", ({"role": "user", "content": "What is it?"},), ("42",))
    try:
        found = [await questions.ask(Asked("", prompt, i, i)) for i in range(4)]
    finally:
        await server.close()
        await scorer.close()
    assert told == []
    assert {one.outcome for one in found} <= {"stopped", "call_limit", "length"}
    assert all(one.tokens and one.text is not None for one in found)
    assert sum(one.tool_calls or 0 for one in found) >= len(tools.called) > 0
