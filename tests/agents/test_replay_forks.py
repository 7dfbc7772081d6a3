"""Agents forked by replay: the same turns at no cost, a new one at the fork; and what a random tool does."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from openai import AsyncOpenAI
from test_group_rollout import END, Bench

from system.agents.launch import Ran, SessionAddress
from system.agents.replay import RecordedTurn, ReplayScript, RetoldTurn
from system.rollout.branching import Decision, EntropyUnknown, Policy
from system.tree.record import Kind, Origin, Outcome, validate
from system.tree.stats import TreeStats

LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "To look.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}
CALL = f'<tool_call>\n{{"name": "look", "arguments": {{"word": "%s"}}}}\n</tool_call>{END}'


@dataclass(frozen=True)
class Once(Policy):
    """Forks at the first result that it is asked about, and at no other."""

    probe_tokens: int = 2

    def decide(self, probe: Any, state: Any, rng: np.random.Generator) -> Decision:
        return Decision(int(state.forks == 0), 1.0, 0.5, probe.delta_h)


class Knows(Once):
    def decide(self, probe: Any, state: Any, rng: np.random.Generator) -> Decision:
        raise EntropyUnknown("no entropies")


class Agent:
    """Looks until the model answers; its tool tells ``results`` one after the other, or the word itself."""

    def __init__(self, *results: str) -> None:
        self.results = itertools.cycle(results) if results else None
        self.runs: list[list[Any]] = []

    async def __call__(self, session: SessionAddress, task: Mapping[str, Any]) -> Ran:
        messages: list[Any] = [{"role": "user", "content": task["question"]}]
        self.runs.append(messages)
        async with AsyncOpenAI(base_url=session.openai_url, api_key=session.api_key, max_retries=0) as openai:
            while True:
                reply = await openai.chat.completions.create(model="any", messages=messages, tools=[LOOK])  # type: ignore[list-item]
                message = reply.choices[0].message
                messages.append(message.model_dump(exclude_none=True))
                if not message.tool_calls:
                    return Ran()
                for call in message.tool_calls:
                    word = json.loads(call.function.arguments)["word"]
                    result = next(self.results) if self.results else f"{word}!"
                    messages.append({"role": "tool", "tool_call_id": call.id, "content": result})


def bench(agent: Agent, *lines: str, policy: Policy | None = None, leaves: int = 2) -> Bench:
    made = Bench(agent, *lines, agent={"forks": "replay"}, leaves=leaves, roots=1)
    object.__setattr__(made.runner.context, "policy", policy or Once())
    return made


async def test_a_fork_is_told_the_same_up_to_where_it_forks() -> None:
    agent = Agent()
    made = bench(agent, CALL % "a", CALL % "b", *[f"It is 42.{END}", f"It is 41.{END}"])
    tree = await made.tree()
    validate(tree)
    assert len(made.engine.requests) == 4  # a, b, and one answer each: nothing was sampled for the replay
    assert sorted(tree.origin.tolist()) == [Origin.ROOT, Origin.FORK]
    heard = [[one["content"] for one in run if one["role"] == "tool"] for run in agent.runs]
    assert sorted(heard) == [["a!"], ["a!", "b!"]]
    stats = TreeStats.of(tree)
    assert sorted(stats.rewards.tolist()) == [0.0, 1.0]
    # The root's first turn stands once, and both go on from it.
    first = int(np.flatnonzero(tree.kind == Kind.MODEL)[0])
    assert stats.scored_below[first] == 2
    assert stats.generated == sum(
        len(made.engine.tokenizer.encode(line))
        for line in (CALL % "a", CALL % "b", "It is 42." + END, "It is 41." + END)
    )
    (decision, *later) = tree.forks
    assert decision.forks == 1
    assert not any(one.forks for one in later)
    assert tree.kind[decision.node] == Kind.TOOL
    assert stats.scored_below[decision.node] == 2
    words = [call.arguments["word"] for call in tree.calls]
    assert sorted(words) == sorted(set(words))  # a call that a fork was told of again is one call
    assert made.runner.counters.get("agent/diverged", 0) == 0


async def test_with_a_tool_that_answers_otherwise_it_goes_on_as_a_fresh_root() -> None:
    made = bench(Agent("1", "2", "3"), CALL % "a", CALL % "b", *[f"It is 42.{END}", f"It is 41.{END}"])
    tree = await made.tree()
    validate(tree)
    assert sorted(tree.origin.tolist()) == [Origin.ROOT, Origin.TOP_UP]
    assert made.runner.counters["agent/diverged"] == 1
    assert tree.outcome.tolist() == [Outcome.ENDED] * 2
    first = int(np.flatnonzero(tree.kind == Kind.MODEL)[0])
    assert TreeStats.of(tree).scored_below[first] == 2  # what was told again is the same turn all the same


async def test_what_no_fork_took_of_the_budget_are_fresh_roots() -> None:
    made = bench(Agent(), *[f"It is 42.{END}"] * 3, leaves=3)
    tree = await made.tree()
    assert tree.origin.tolist() == [Origin.ROOT, Origin.TOP_UP, Origin.TOP_UP]
    assert not tree.forks


async def test_a_policy_that_needs_what_the_engine_does_not_tell_ends_the_group() -> None:
    made = bench(Agent(), CALL % "a", f"It is 42.{END}", f"It is 41.{END}", policy=Knows())
    with pytest.raises(EntropyUnknown):
        await made.tree()


async def test_an_evaluation_does_not_fork() -> None:
    made = bench(Agent(), CALL % "a", f"It is 42.{END}")
    assert (await made.tree(greedy=True)).origin.tolist() == [Origin.ROOT]


def test_a_script_answers_what_was_asked_and_nothing_else() -> None:
    prompts = [np.array(ids, np.int32) for ids in ([1], [1, 2], [1, 2, 3])]
    told = [RetoldTurn((0, number), RecordedTurn(prompt)) for number, prompt in enumerate(prompts)]
    script = ReplayScript(told[:2], prompts[2])
    assert script.next(prompts[1]) is told[1]  # side by side, they may come in another order
    assert script.next(prompts[0]) is told[0]
    assert script.next(prompts[2]) is None
    assert (script.forked, script.diverged) == (True, False)
    assert script.next(prompts[0]) is None  # from now on, everything is sampled
    early = ReplayScript(told[:2], prompts[2])
    assert early.next(prompts[2]) is None
    assert early.diverged
