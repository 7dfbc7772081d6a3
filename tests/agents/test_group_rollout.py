"""Groups of agents through the endpoint: episodes, scores, limits, and the tree that a learner gets."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import Any

import httpx
import numpy as np
import pytest
from agent_models import ScriptedEngine, served
from openai import APIStatusError, AsyncOpenAI

from system.agents.group_rollout import GroupRollout
from system.agents.launch import AgentFailed, Launch, Ran, SessionAddress
from system.agents.runner import AgentRunner
from system.config import AgentConfig, Config, RolloutConfig, ToolsConfig
from system.engine.protocol import EngineLost
from system.rollout.branching import Never
from system.rollout.chat import Chat
from system.rollout.context import RolloutContext
from system.rollout.failure import RolloutFailed
from system.rollout.reward import BranchView, Score
from system.rollout.scorer import Scorer
from system.rollout.scoring import Scoring
from system.rollout.syntax.hermes import HermesSyntax
from system.tools.service import build_tools
from system.tree.prompt import Prompt
from system.tree.record import Kind, Outcome, Tree
from system.tree.stats import TreeStats

PROMPT = Prompt("q1", ({"role": "user", "content": "How much is it?"},), ("42",), "sum")
END = "<|im_end|>"


class SeesAll:
    """A reward that keeps what it is shown: 1 where the text says 42."""

    def __init__(self) -> None:
        self.seen: list[BranchView] = []

    async def score(self, prompt: Prompt, branch: BranchView) -> Score:
        self.seen.append(branch)
        return Score(float("42" in branch.model_text), "42" in branch.model_text)


async def ask(session: SessionAddress, *texts: str, **settings: Any) -> str:
    messages: list[Any] = [{"role": "user", "content": text} for text in texts]
    async with AsyncOpenAI(base_url=session.openai_url, api_key=session.api_key, max_retries=0) as openai:
        asked = {"model": session.model, **settings}
        reply = await openai.chat.completions.create(messages=messages, **asked)
    return reply.choices[0].message.content or ""


class Bench:
    """A runner over a scripted engine; what each agent does is a function of its number."""

    def __init__(
        self, launch: Launch, *lines: str | Exception, agent: Mapping[str, Any] | None = None, **rollout: Any
    ) -> None:
        config = Config(agent=AgentConfig(run="x:y", **{"deadline_s": 20.0, **(agent or {})}))
        self.engine = ScriptedEngine(lines)
        self.reward = SeesAll()
        tokenizer = self.engine.tokenizer
        settings = {"leaves": 2, "roots": 2, "tree_deadline_s": 20.0, **rollout}
        context = RolloutContext(
            engine=self.engine,
            tools=build_tools(ToolsConfig(names=[]), {}),
            syntax=HermesSyntax({}),
            policy=Never(1),
            scoring=Scoring([Scorer(self.reward)]),
            tokenizer=tokenizer,
            config=RolloutConfig(**settings),
            vocab_size=len(tokenizer),
            asks=Chat(tokenizer),
        )
        self.runner = AgentRunner(config, context, launch, served(self.engine, tokenizer))

    async def tree(self, **settings: Any) -> Tree:
        return await GroupRollout(self.runner, PROMPT, seed=3, **settings).run()


def numbered(*agents: Any) -> Launch:
    """The first episode to begin runs the first of ``agents``, and so on."""
    left = list(agents)

    async def launch(session: SessionAddress, task: Mapping[str, Any]) -> Ran:
        return Ran(await left.pop(0)(session, task) or {})

    return launch


async def says(session: SessionAddress, task: Mapping[str, Any]) -> None:
    await ask(session, task["question"])


async def sleeps(session: SessionAddress, task: Mapping[str, Any]) -> None:
    await asyncio.sleep(600)


async def test_rewards_see_what_was_said_and_episodes_become_one_tree() -> None:
    bench = Bench(numbered(says, says), f"It is 42.{END}", f"It is 41.{END}", agent={"concurrency": 1})
    tree = await bench.tree()
    stats = TreeStats.of(tree)
    assert tree.episode.tolist() == [0, 1]
    assert stats.rewards.tolist() == [1.0, 0.0]
    assert [view.model_text for view in bench.reward.seen] == ["It is 42.", "It is 41."]
    assert [view.outcome for view in bench.reward.seen] == [Outcome.ENDED] * 2
    assert tree.kind.tolist() == [Kind.PROMPT, Kind.MODEL, Kind.MODEL]
    assert "How much is it?" in bench.engine.tokenizer.decode(tree.tokens[: tree.end[0]].tolist())
    assert [one["turns"] for one in tree.meta["agents"]] == [1, 1]
    assert bench.runner.counters["agent/episodes"] == 2
    seeds = [request.sampling.seed for request in bench.engine.requests]
    assert len(set(seeds)) == 2  # each agent has a stream of its own


async def test_an_agent_that_compacts_its_history_counts_once_in_its_group() -> None:
    async def forgetful(session: SessionAddress, task: Mapping[str, Any]) -> None:
        for text in ("One.", "Two.", "Three."):
            await ask(session, text)

    lines = [f"{word}{END}" for word in ("It is 42.", "I mean 42.", "Yes, 42.", "41.")]
    tree = await Bench(numbered(forgetful, says), *lines, agent={"concurrency": 1}).tree()
    assert tree.episode.tolist() == [0, 0, 0, 1]
    assert tree.meta["agents"][0]["rewrites"] == 2
    stats = TreeStats.of(tree)
    assert stats.rewards.tolist() == [1.0, 0.0]
    assert stats.response_tokens[0] > stats.response_tokens[1] > 0


async def test_an_agents_own_reward_goes_before_the_configured_one() -> None:
    async def sure(session: SessionAddress, task: Mapping[str, Any]) -> Any:
        await ask(session, "One.")
        await ask(session, "Two.")
        return {"reward": 0.25, "correct": True, "turn_rewards": [0.5]}

    bench = Bench(numbered(sure, says), *[f"It is 42.{END}"] * 3, agent={"concurrency": 1})
    tree = await bench.tree()
    assert tree.reward.tolist() == [0.75, 0.75, 1.0]
    assert tree.correct.tolist() == [1, 1, 1]
    assert tree.step_reward.sum() == 0.5
    assert TreeStats.of(tree).parts["agent"].tolist()[0] == 0.25
    assert len(bench.reward.seen) == 1


async def test_what_an_agents_own_reward_is_made_of_is_measured() -> None:
    def scored(parts: Any) -> Any:
        async def one(session: SessionAddress, task: Mapping[str, Any]) -> Any:
            await ask(session, "One.")
            return {"reward": 0.5, "parts": parts}

        return one

    alone = {"concurrency": 1, "deadline_s": 60.0}
    wrong = [scored({"a": math.nan}), scored({"a b": 1.0}), scored([1.0])]
    agents = [scored({"right": 1.0, "brief": -0.5}), scored({"right": 0.0}), *wrong]
    bench = Bench(numbered(*agents), *[f"It is 42.{END}"] * 5, agent=alone, leaves=5, tree_deadline_s=120.0)
    tree = await bench.tree()
    parts = TreeStats.of(tree).parts
    assert parts["agent/right"].tolist()[:2] == [1.0, 0.0]
    assert parts["agent/brief"][0] == -0.5
    assert np.isnan(parts["agent/brief"][1:]).all()
    assert tree.correct.tolist()[2:] == [-1, -1, -1]  # not scored
    assert [one[1].count("has the part") for one in tree.meta["mishaps"]] == [1, 1, 1]


def test_only_so_many_names_of_parts_become_metrics() -> None:
    runner = Bench(numbered()).runner
    assert runner.measured(["agent", "x"]) == ["agent", "x"]
    many = [f"made up {number}" for number in range(100)]
    assert len(runner.measured(many)) == 30
    assert runner.measured(["x", "made up 99"]) == ["x"]


async def test_an_agent_that_judges_by_itself_is_judged_by_nobody_else() -> None:
    async def silent(session: SessionAddress, task: Mapping[str, Any]) -> Any:
        await ask(session, "One.")

    async def sure(session: SessionAddress, task: Mapping[str, Any]) -> Any:
        await ask(session, "One.")
        return {"reward": 1.0}

    launch = numbered(silent, sure, sure)
    launch.judges = True  # type: ignore[attr-defined]
    alone = {"concurrency": 1, "deadline_s": 60.0}
    bench = Bench(launch, *[f"It is 42.{END}"] * 3, agent=alone, leaves=3, tree_deadline_s=120.0)
    tree = await bench.tree()
    assert not bench.reward.seen
    assert tree.correct.tolist() == [-1, 1, 1]
    assert "ended by ENDED has no reward of its own" in tree.meta["mishaps"][0][1]


async def test_a_reward_may_be_reported_to_the_session_and_a_failed_agents_is_not_taken() -> None:
    async def report(session: SessionAddress, reward: float) -> None:
        async with httpx.AsyncClient() as http:
            told = await http.post(
                f"{session.anthropic_url}/reward", json={"reward": reward, "correct": True}
            )
            assert told.status_code == 200, told.text

    async def reports(session: SessionAddress, task: Mapping[str, Any]) -> None:
        await says(session, task)
        await report(session, 0.5)

    async def breaks(session: SessionAddress, task: Mapping[str, Any]) -> None:
        await reports(session, task)
        raise AgentFailed("then it broke")

    async def knows_better(session: SessionAddress, task: Mapping[str, Any]) -> Any:
        await reports(session, task)
        return {"reward": 0.25, "correct": True}

    lines = [f"41.{END}"] * 3
    launch = numbered(reports, breaks, knows_better)
    tree = await Bench(launch, *lines, agent={"concurrency": 1}, leaves=3, roots=3).tree()
    np.testing.assert_array_equal(tree.reward, [0.5, np.nan, 0.25])
    assert tree.correct.tolist() == [1, -1, 1]


async def test_what_an_agent_says_it_came_to_is_scored_in_place_of_its_last_words() -> None:
    async def summarises(session: SessionAddress, task: Mapping[str, Any]) -> Any:
        await ask(session, "One.")
        return {"text": "So it is 42."}

    bench = Bench(numbered(summarises, says), *[f"Hm.{END}"] * 2, agent={"concurrency": 1})
    assert (await bench.tree()).reward.tolist() == [1.0, 0.0]
    assert bench.reward.seen[0].result == {"text": "So it is 42."}


async def test_a_failed_agent_is_no_zero() -> None:
    async def breaks(session: SessionAddress, task: Mapping[str, Any]) -> None:
        await ask(session, "One.")
        raise AgentFailed("KeyError: 'choices'", "Traceback …")

    lines = [f"It is 42.{END}", f"41{END}", f"42{END}"]
    bench = Bench(numbered(breaks, says, says), *lines, agent={"concurrency": 1}, leaves=3, roots=3)
    tree = await bench.tree()
    assert tree.outcome.tolist() == [Outcome.ENVIRONMENT, Outcome.ENDED, Outcome.ENDED]
    np.testing.assert_array_equal(tree.reward, [np.nan, 0.0, 1.0])
    assert tree.meta["mishaps"] == [["agent", "KeyError: 'choices'"]]
    assert tree.meta["agents"][0]["output"] == "Traceback …"
    assert bench.runner.counters["agent/failed"] == 1


async def test_a_group_of_failed_agents_is_lost_by_name() -> None:
    async def breaks(session: SessionAddress, task: Mapping[str, Any]) -> None:
        raise AgentFailed("no module named agent")

    with pytest.raises(RolloutFailed, match="environment: 0 of 2 leaves scored; no module named agent"):
        await Bench(numbered(breaks, breaks)).tree()


async def test_a_lost_engine_is_nobodys_fault() -> None:
    async def meets(session: SessionAddress, task: Mapping[str, Any]) -> None:
        try:
            await ask(session, "One.")
        except APIStatusError as error:
            raise AgentFailed(str(error)) from error

    with pytest.raises(RolloutFailed) as failed:
        await Bench(numbered(meets, meets), EngineLost("down"), EngineLost("down")).tree()
    assert failed.value.blameless


async def test_an_agent_at_a_limit_of_ours_is_scored() -> None:
    async def goes_on(session: SessionAddress, task: Mapping[str, Any]) -> None:
        try:
            for text in ("One.", "Two."):
                await ask(session, text)
        except APIStatusError as error:
            raise AgentFailed(str(error)) from error

    lines = [f"It is 42.{END}", f"41{END}"]
    bench = Bench(numbered(goes_on, says), *lines, agent={"turns": 1, "concurrency": 1})
    tree = await bench.tree()
    assert tree.outcome.tolist() == [Outcome.TURN_LIMIT, Outcome.ENDED]
    assert tree.reward.tolist() == [1.0, 0.0]
    assert not tree.meta["mishaps"]


async def test_a_deadline_ends_one_agent_and_not_the_others() -> None:
    bench = Bench(
        numbered(sleeps, says, says),
        *[f"It is 42.{END}"] * 2,
        agent={"deadline_s": 3.0},
        leaves=3,
        roots=3,
    )
    tree = await bench.tree()
    assert sorted(tree.outcome.tolist()) == [Outcome.DEADLINE, Outcome.ENDED, Outcome.ENDED]
    assert np.isfinite(tree.reward).sum() == 2


async def test_the_trees_deadline_ends_all_that_are_left_and_those_that_wait() -> None:
    bench = Bench(
        numbered(says, says, sleeps),
        *[f"It is 42.{END}"] * 2,
        agent={"concurrency": 1},
        leaves=4,
        roots=4,
        tree_deadline_s=4.0,
    )
    tree = await asyncio.wait_for(bench.tree(), 60)  # one sleeps for ten minutes
    assert tree.outcome.tolist() == [Outcome.ENDED] * 2 + [Outcome.DEADLINE] * 2
    assert tree.meta["agents"][3] == {
        "outcome": "deadline",
        "seconds": 0.0,
        "turns": 0,
        "rewrites": 0,
        "retries": 0,
        "output": "",
    }


async def test_an_evaluation_runs_the_agent_once_and_greedily() -> None:
    bench = Bench(numbered(says), f"It is 42.{END}")
    tree = await bench.tree(greedy=True)
    assert tree.n_leaves == 1
    assert bench.engine.requests[0].sampling.temperature == 0
    assert TreeStats.of(tree).correct.tolist() == [True]


async def test_cancelling_a_group_closes_its_sessions() -> None:
    began = asyncio.Event()
    urls: list[SessionAddress] = []

    async def waits(session: SessionAddress, task: Mapping[str, Any]) -> None:
        urls.append(session)
        began.set()
        await asyncio.sleep(600)

    group = asyncio.create_task(Bench(numbered(waits, waits)).tree())
    await began.wait()
    group.cancel()
    with pytest.raises(asyncio.CancelledError):
        await group
    with pytest.raises(APIStatusError, match="closed"):
        await ask(urls[0], "Still there?")
