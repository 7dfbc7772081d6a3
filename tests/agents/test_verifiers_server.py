"""The server of verifiers' episodes: whatever an environment does is one episode.

The package itself is a stand-in here (fake_verifiers); test_verifiers.py has the real one.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from system.agents.launch import AgentFailed, FunctionAgent, SessionAddress, parts_of
from system.agents.verifiers import server as serving
from system.agents.verifiers.agent import COLUMN, VerifiersAgent
from system.agents.verifiers.command import REMEDY, interpreter
from system.config import AgentConfig, ConfigError, load
from system.doctor.preflight import look
from system.tasks.base import make_task

FAKE = str(Path(__file__).parent / "fake_verifiers")
SESSION = SessionAddress("http://h/s/KEY-1/v1", "http://h/s/KEY-1", "KEY-1", "espalier", 7)


def settings(**options: Any) -> AgentConfig:
    options = {"environment": "games", "python": sys.executable, "start_s": 60.0} | options
    return AgentConfig(run="verifiers", options=options, env={"PYTHONPATH": FAKE})


def does(what: str) -> dict[str, Any]:
    return {"extra": {COLUMN: {"split": "train", "data": {"prompt": "?", "does": what}}}}


class Bench:
    def __init__(self, directory: Path) -> None:
        self._directory, self.made = directory, list[VerifiersAgent]()

    def agent(self, **options: Any) -> VerifiersAgent:
        config = settings(**options)
        made = VerifiersAgent(**config.options, settings=config, directory=self._directory)
        self.made.append(made)
        return made


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    yield made
    for agent in made.made:
        await agent.close()


async def gone(process: int) -> bool:
    for _ in range(100):
        try:
            if psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        await asyncio.sleep(0.05)
    return False


async def test_an_episode_is_scored_by_its_environment(bench: Bench) -> None:
    agent = bench.agent(right=0.2)
    right, half = await asyncio.gather(agent(SESSION, does("right")), agent(SESSION, does("half")))
    assert (right["reward"], right["correct"], right["parts"]["right"]) == (1.0, True, 1.0)
    assert "late" not in right["parts"]  # what was not scored
    assert parts_of(right)["judge_how_wéll_"] == 2.0  # a name that metrics can have
    assert (half["reward"], half["correct"]) == (0.25, True)
    assert right["parts"]["process"] != half["parts"]["process"]  # a process for each at a time
    again = await agent(SESSION, does("half"))
    assert again["parts"]["process"] in (right["parts"]["process"], half["parts"]["process"])
    assert again["parts"]["runs"] == 2  # which is kept


async def test_what_an_environment_prints_is_no_answer_and_there_is_nothing_to_read(bench: Bench) -> None:
    assert (await bench.agent()(SESSION, does("print")))["reward"] == 0.25


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("raise", "ValueError: no luck with http://h/s/…/v1"),
        ("fail", "TaskError: its reward raised"),
        ("exit", "SystemExit: 4"),
        ("panic", "Panic: at src/lib.rs:7"),
        ("secret", "Incorrect API key provided: <redacted>"),
        ("exit beside", "its process died; the last output: .*not authenticated: log in"),
        ("interrupt", "its process died"),
        ("two", "2 trained agents played"),
        ("die", "its process died; the last output: .*its last words"),
    ],
)
async def test_one_that_fails_says_how_and_the_next_one_runs(bench: Bench, what: str, says: str) -> None:
    agent = bench.agent()
    with pytest.raises(AgentFailed, match=f"(?s){says}"):
        await agent(SESSION, does(what))
    assert (await agent(SESSION, does("right")))["reward"] == 1.0


async def test_a_reward_that_is_no_number_is_none(bench: Bench) -> None:
    from system.agents.launch import reward_of

    with pytest.raises(AgentFailed, match="no finite number"):
        reward_of(await bench.agent()(SESSION, does("nan")))


async def test_a_process_that_died_between_two_episodes_is_not_the_next_ones_end(bench: Bench) -> None:
    agent = bench.agent()
    process = int((await agent(SESSION, does("right")))["parts"]["process"])
    os.kill(process, signal.SIGKILL)
    assert await gone(process)
    assert (await agent(SESSION, does("right")))["parts"]["process"] != process


async def test_forks_do_not_draw_the_same_numbers(bench: Bench) -> None:
    agent = bench.agent(environment="numpy")
    draws = await asyncio.gather(*(agent(SESSION, does("right")) for _ in range(3)))
    assert len({one["parts"]["draw"] for one in draws}) == 3


@pytest.mark.parametrize(("what", "stays"), [("wait", True), ("hang", False)])
async def test_an_episode_that_is_late_is_given_up(
    bench: Bench, what: str, stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process with it, where that does not listen; another one beside it is not concerned."""
    monkeypatch.setattr(serving, "GRACE_S", 1.0)
    agent = bench.agent()
    process = int((await agent(SESSION, does("right")))["parts"]["process"])
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await agent(SESSION, does(what))
    after = await agent(SESSION, does("half"))
    assert (after["parts"]["process"] == process) == stays
    assert after["reward"] == 0.25  # not what the late one said
    assert stays or await gone(process)


async def test_a_server_that_dies_is_started_again(bench: Bench) -> None:
    agent = bench.agent()
    process = int((await agent(SESSION, does("right")))["parts"]["process"])
    parent = psutil.Process(process).parent()
    assert parent is not None
    waiting = asyncio.create_task(agent(SESSION, does("wait")))
    await asyncio.sleep(0.3)
    os.kill(parent.pid, signal.SIGKILL)
    with pytest.raises(AgentFailed, match="its process died"):
        await waiting
    assert await gone(process)
    assert (await agent(SESSION, does("right")))["reward"] == 1.0


async def test_children_of_a_server_with_threads_load_by_themselves(bench: Bench) -> None:
    agent = bench.agent(environment="threads")
    first = await agent(SESSION, does("right"))
    assert first["parts"]["runs"] == 1
    assert first["reward"] == 1.0


async def test_a_process_ends_after_its_last_episode(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "LIFE", 2)
    agent = bench.agent()
    processes = [int((await agent(SESSION, does("right")))["parts"]["process"]) for _ in range(3)]
    assert processes[0] == processes[1] != processes[2]
    assert await gone(processes[0])


async def test_a_process_whose_threads_hang_ends_all_the_same(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "LIFE", 1)
    process = int((await bench.agent()(SESSION, does("linger")))["parts"]["process"])
    assert await gone(process)


async def test_nothing_is_left_when_the_worker_is_gone(bench: Bench) -> None:
    agent = bench.agent()
    process = int((await agent(SESSION, does("right")))["parts"]["process"])
    hanging = asyncio.create_task(agent(SESSION, does("hang")))
    await asyncio.sleep(0.3)
    await agent.close()
    assert await gone(process)
    with pytest.raises(AgentFailed):
        await hanging


async def test_a_server_that_cannot_load_is_not_started_for_each_episode(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = bench.agent(environment="none")
    for _ in range(2):
        with pytest.raises(AgentFailed, match=r"agent\.options\.environment: .*taskset 'none' not found"):
            await agent(SESSION, does("right"))
    begun = agent._server._begin
    monkeypatch.setattr(agent._server, "_begin", lambda: pytest.fail("started again"))
    with pytest.raises(AgentFailed):
        await agent(SESSION, does("right"))
    monkeypatch.setattr(agent._server, "_begin", begun)
    slow = bench.agent(environment="slow", start_s=2.0)
    with pytest.raises(AgentFailed, match=r"did not load within agent\.options\.start_s=2 s"):
        await slow(SESSION, does("right"))


async def test_a_worker_loads_the_environment_before_the_first_episode(bench: Bench, tmp_path: Path) -> None:
    launch = FunctionAgent(settings(environment="none"), tmp_path)
    with pytest.raises(ConfigError, match=r"agent\.options\.environment: .*taskset 'none' not found"):
        await launch.check()
    agent = bench.agent()
    await agent.check()
    process = agent._server._process
    assert (await agent(SESSION, does("right")))["reward"] == 1.0
    assert agent._server._process is process
    await FunctionAgent(AgentConfig(run=f"{__name__}:Counting")).check()  # has nothing to check


# The task, and what is told before anything starts


def config(*words: str, **options: Any) -> Any:
    made = load(None, ["task=verifiers", "agent.run=verifiers", "branching=none", "tools.names=[]", *words])
    made.agent.options, made.agent.env = settings(**options).options, {"PYTHONPATH": FAKE}
    return made


def test_the_first_tasks_are_held_out_and_the_others_trained_on() -> None:
    task = make_task(config("task.eval_size=2"))
    assert [one.messages[0]["content"] for one in task.eval()] == ["question 0", "question 1"]
    assert len(task.train()) == 4
    (first, *_) = task.train()
    assert first.extra[COLUMN] == {"split": "train", "data": {"prompt": "question 2", "does": "right"}}
    apart = make_task(config("task.eval_size=2", "task.train_size=3", held_out={"split": "test"}))
    assert [len(apart.train()), len(apart.eval())] == [3, 2]
    assert apart.eval()[0].extra[COLUMN]["split"] == "eval"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"environment": "none"}, r"agent\.options\.environment: .*taskset 'none' not found; correct it"),
        ({"environment": {"agent": {}}}, r"agent\.options\.environment=.*: name a taskset"),
        ({"environment": ""}, r"agent\.options\.environment='': name a taskset"),
        ({"python": "/no/python"}, r"agent\.options\.python: there is no interpreter /no/python: make verif"),
        (
            {"environment": "slow", "start_s": 2.0},
            r"did not load within 2 s \(.*\): raise agent\.options\.start_s",
        ),
        ({"environment": "panics"}, r"agent\.options\.environment: Panic: at src/lib\.rs:7"),
        ({"environment": "empty"}, r"agent\.options\.environment: the taskset has no tasks"),
        ({"pyhton": "x"}, r"agent\.options\.pyhton: verifiers has no such option; did you mean python\?"),
        ({"right": "much"}, r"agent\.options\.right='much' must be a number"),
    ],
)
def test_what_is_wrong_is_told_before_anything_starts(options: dict[str, Any], says: str) -> None:
    found = look(config("task.eval_size=2", **options))
    lines = "\n".join(str(one) for problems in found.values() for one in problems)
    assert re.search(says, lines), lines


def test_what_does_not_load_in_time_says_what_it_put_out_last(tmp_path: Path) -> None:
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\necho reading its data >&2\nexec sleep 600\n")
    slow.chmod(0o755)
    with pytest.raises(ConfigError, match=r"within 2 s \(its last line: reading its data\)"):
        make_task(config(python=str(slow), start_s=2.0)).train()


async def test_what_an_environment_starts_while_its_tasks_are_read_is_ended(tmp_path: Path) -> None:
    made, started = config("task.eval_size=2", environment="starts"), tmp_path / "started"
    made.agent.env["STARTED"] = str(started)
    assert len(await asyncio.to_thread(make_task(made).train)) == 4
    assert await gone(int(started.read_text()))


def test_an_interpreter_without_verifiers_is_told_with_the_remedy() -> None:
    made = config()
    made.agent.env = {}
    with pytest.raises(ConfigError, match=r"agent\.options\.python=.* has no verifiers 0\.4 .*: make verif"):
        make_task(made).train()
    assert interpreter(sys.executable) == sys.executable
    assert "make verifiers" in REMEDY


def test_too_few_tasks_and_questions_of_others() -> None:
    with pytest.raises(ConfigError, match=r"task\.eval_size=6: the taskset has only 6 tasks"):
        make_task(config("task.eval_size=6")).eval()
    lines = [str(one) for one in look(config("task=quickstart"))["task"]]
    assert any("'verifiers'" in line and "task.name=verifiers" in line for line in lines)
    with pytest.raises(ConfigError, match=r"task\.name=verifiers goes with agent\.run=verifiers"):
        make_task(config("agent.run="))


class Counting:
    """An agent of one's own that is made once."""

    def __init__(self, start: int = 3) -> None:
        self.count = start

    async def __call__(self, session: SessionAddress, task: Any) -> float:
        self.count += 1
        return float(self.count)


async def test_a_class_is_made_once_and_its_object_called() -> None:
    agent = FunctionAgent(AgentConfig(run=f"{__name__}:Counting", options={"start": 5}))
    assert [(await agent(SESSION, {})).result for _ in range(2)] == [{"reward": 6.0}, {"reward": 7.0}]
