"""Agents that behave oddly at their end: one episode is lost, by name, and never its group."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from test_group_rollout import END, Bench, numbered, says
from test_launch import SESSION, TASK, program

from system.agents.launch import AgentFailed, FunctionAgent, SessionAddress, told
from system.config import AgentConfig
from system.tree.prompt import Prompt


def returning(value: Any) -> Any:
    async def agent(session: SessionAddress, task: Mapping[str, Any]) -> Any:
        await says(session, task)
        return value

    return agent


@pytest.mark.parametrize(
    "result",
    [
        {"reward": 10**400},
        {"reward": 1e39},
        {"reward": float("nan")},
        {"reward": "1"},
        {"reward": 1.0, "correct": np.array([True, False])},
        {"reward": 1.0, "correct": "false"},
        {"reward": 1.0, "turn_rewards": [10**400]},
        {"reward": 1.0, "turn_rewards": [1e39]},
        {"reward": 1.0, "turn_rewards": [0.5, 0.5]},
        {"reward": 1.0, "turn_rewards": "many"},
        {"reward": 3e38, "turn_rewards": [3e38]},
        {"turn_rewards": [1e39]},
    ],
    ids=str,
)
async def test_a_result_that_is_none_leaves_its_episode_unscored(result: dict[str, Any]) -> None:
    launch = numbered(returning(result), says, says)
    bench = Bench(launch, *[f"42{END}"] * 3, agent={"concurrency": 1}, leaves=3, roots=3)
    tree = await bench.tree()
    np.testing.assert_array_equal(tree.reward, [np.nan, 1.0, 1.0])
    assert tree.step_reward.sum() == 0 or not tree.step_reward.size
    ((kind, text),) = tree.meta["mishaps"]
    assert kind == "reward"
    assert "the agent's result has" in text


async def cancelled_inside(session: object, task: object) -> None:
    raise asyncio.CancelledError("a sub-agent's")


def cancelled_in_thread(session: object, task: object) -> None:
    raise asyncio.CancelledError("a sub-agent's")


class Stop(BaseException):
    """As pytest's own, or a framework's."""


async def stops(session: object, task: object) -> None:
    raise Stop("enough")


async def stops_many(session: object, task: object) -> None:
    raise BaseExceptionGroup("many", [Stop("enough")])


@pytest.mark.parametrize("agent", [cancelled_inside, cancelled_in_thread, stops, stops_many])
async def test_a_function_that_raises_what_no_function_should_has_failed(agent: Any) -> None:
    with pytest.raises(AgentFailed, match=r"enough|cancellation of its own|many"):
        await FunctionAgent(AgentConfig(run=f"{__name__}:{agent.__name__}"))(SESSION, TASK)


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\u0085", "\x0c", "\x1e"])
async def test_a_result_is_the_whole_last_line(tmp_path: Path, odd: str) -> None:
    code = f"""
import json
print(json.dumps({{"reward": 0.25}}))
print(json.dumps({{"text": "a" + {odd!r} + "b", "reward": 0.5}}, ensure_ascii=False))
"""
    ran = await program(tmp_path, code, env={"PYTHONUTF8": "1"})(SESSION, TASK)
    assert ran.result == {"text": f"a{odd}b", "reward": 0.5}


async def test_a_result_of_which_the_beginning_is_lost_is_none(tmp_path: Path) -> None:
    code = """import json; print(json.dumps({"reward": 1, "text": "x" * 100_000}))"""
    with pytest.raises(AgentFailed, match="the last line that the agent's program printed has more than"):
        await program(tmp_path, code)(SESSION, TASK)


@pytest.mark.parametrize("value", [object(), b"x", {1, 2}, {(1, 2): 3}])
async def test_a_column_that_no_json_holds_is_named(tmp_path: Path, value: Any) -> None:
    agent = program(tmp_path, "", "{prompt}")
    with pytest.raises(AgentFailed, match=r"agent\.columns: a column of question q1 is nothing that JSON"):
        await agent(SESSION, {**TASK, "extra": {"repo": value}})
    assert not list((tmp_path / "scratch").iterdir())


async def test_half_a_character_in_a_task_is_told_as_it_is(tmp_path: Path) -> None:
    code = "import json, sys; print(json.dumps(json.load(open(sys.argv[1]))['extra']))"
    ran = await program(tmp_path, code, "{prompt}")(SESSION, {**TASK, "extra": {"repo": "\ud800"}})
    assert ran.result == {"repo": "\ud800"}


@pytest.mark.parametrize(
    ("value", "right"), [(np.bool_(True), 1), (np.float32(0.0), 0), (None, 1), (False, 0)]
)
async def test_right_and_wrong_in_other_words(value: Any, right: int) -> None:
    launch = numbered(returning({"reward": np.float32(1.0), "correct": value}), says)
    tree = await Bench(launch, *[f"42{END}"] * 2, agent={"concurrency": 1}).tree()
    assert tree.correct.tolist() == [right, 1]


@pytest.mark.parametrize("reward", [10**400, 1e39, float("nan"), float("inf"), True, "1", None])
async def test_a_reward_that_no_record_holds_is_not_taken(reward: Any) -> None:
    statuses: list[int] = []

    async def reports(session: SessionAddress, task: Mapping[str, Any]) -> None:
        await says(session, task)
        async with httpx.AsyncClient() as http:
            told = await http.post(
                f"{session.anthropic_url}/reward",
                content=json.dumps({"reward": reward}),
                headers={"Content-Type": "application/json"},
            )
            statuses.append(told.status_code)
            assert told.json()["error"]["message"] == "reward: expected a finite number"

    tree = await Bench(numbered(reports, says), *[f"42{END}"] * 2, agent={"concurrency": 1}).tree()
    assert statuses == [400]
    assert tree.reward.tolist() == [1.0, 1.0]


def test_what_an_agent_writes_into_its_task_is_its_own() -> None:
    prompt = Prompt("q", ({"role": "user", "content": "?"},), ("4",), "sum", {"tests": [{"in": [1]}]})
    told(prompt, ["tests"])["extra"]["tests"][0]["in"].clear()
    assert prompt.extra == {"tests": [{"in": [1]}]}


async def test_a_program_that_stops_its_supervisor_ends_all_the_same(tmp_path: Path) -> None:
    code = "import os, signal, time; os.kill(os.getppid(), signal.SIGSTOP); time.sleep(600)"
    running = asyncio.create_task(program(tmp_path, code)(SESSION, TASK))
    await asyncio.sleep(1.5)
    running.cancel()
    ended, _ = await asyncio.wait([running], timeout=60)
    assert ended
    assert running.cancelled()
