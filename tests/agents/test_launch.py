"""Programs and functions as agents: what they are told, how they end, and what is left of them."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from system.agents.launch import (
    AgentFailed,
    FunctionAgent,
    ProgramAgent,
    SessionAddress,
    reward_of,
    told,
    turn_rewards_of,
)
from system.agents.process import inherited
from system.config import AgentConfig
from system.tree.prompt import Prompt

KEY = "k3y-of-this-session"
SESSION = SessionAddress(f"http://h/s/{KEY}/v1", f"http://h/s/{KEY}", KEY, "espalier", 7)
PROMPT = Prompt(
    "q1", ({"role": "user", "content": "2 + 2 = {prompt}?"},), ("4",), "sum", {"repo": "a", "gold": "4"}
)
TASK = told(PROMPT, ["repo"])


def program(tmp_path: Path, code: str, words: str = "", **settings: Any) -> ProgramAgent:
    (tmp_path / "agent.py").write_text(code)
    (tmp_path / "scratch").mkdir()
    command = f"{sys.executable} {tmp_path / 'agent.py'} {words}"
    return ProgramAgent(AgentConfig(command=command, **settings), tmp_path / "scratch")


def gone(pid: int, within_s: float = 20.0) -> bool:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


async def test_a_program_is_told_its_task_and_where_its_session_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "not for agents")
    monkeypatch.setenv("HF_TOKEN", "for this one")
    code = """
import json, os, sys
task = json.load(open(sys.argv[1]))
print("thinking aloud")
print(json.dumps({"task": task, "argument": sys.argv[2], "cwd": os.getcwd(), "env": dict(os.environ)}))
"""
    agent = program(tmp_path, code, "{prompt} {question}", env={"MODE": "fast"}, env_from=["HF_TOKEN"])
    told_back = (await agent(SESSION, TASK)).result
    assert told_back["task"] == {
        "id": "q1",
        "kind": "sum",
        "messages": [{"role": "user", "content": "2 + 2 = {prompt}?"}],
        "question": "2 + 2 = {prompt}?",
        "extra": {"repo": "a"},
        "seed": 7,
    }
    assert told_back["argument"] == "2 + 2 = {prompt}?"  # a question is never filled in itself
    env = told_back["env"]
    assert env["OPENAI_BASE_URL"].startswith("http://h/s/")
    assert env["ESPALIER_PROMPT"].startswith(told_back["cwd"])
    assert env["TMPDIR"] == told_back["cwd"] != os.getcwd()
    assert (env["MODE"], env["HF_TOKEN"], env["ESPALIER_SEED"]) == ("fast", "for this one", "7")
    assert "WANDB_API_KEY" not in env
    assert KEY not in json.dumps(told_back)  # it printed its keys, and none is kept
    assert env["ANTHROPIC_API_KEY"] == env["OPENAI_API_KEY"] == env["ESPALIER_SESSION"] == "<redacted>"
    assert not list((tmp_path / "scratch").iterdir())


async def test_a_program_that_fails_says_how(tmp_path: Path) -> None:
    code = "import sys; print('password=hunter2'); sys.exit('no such model')"
    with pytest.raises(AgentFailed, match="code 1: no such model") as failed:
        await program(tmp_path, code)(SESSION, TASK)
    assert "hunter2" not in failed.value.output
    with pytest.raises(AgentFailed, match=r"agent\.command: .*there is no program"):
        await ProgramAgent(AgentConfig(command="/no/such/program"), tmp_path)(SESSION, TASK)


async def test_of_much_output_the_end_is_kept(tmp_path: Path) -> None:
    code = """
import sys
for i in range(300):
    sys.stdout.write("x" * 10000 + chr(10))
print('{"reward": 0.5, "correct": true}')
"""
    ran = await program(tmp_path, code)(SESSION, TASK)
    assert ran.result == {"reward": 0.5, "correct": True}
    assert len(ran.output) <= 2000


@pytest.mark.parametrize("how", ["cancelled", "ended"])
async def test_nothing_of_a_program_goes_on(tmp_path: Path, how: str) -> None:
    """Not it, which does not listen to SIGTERM, nor the child that it leaves behind with its pipes."""
    code = f"""
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, 1); time.sleep(600)"])
open({str(tmp_path / "pids")!r} + ".new", "w").write(f"{{os.getpid()}} {{child.pid}}")
os.rename({str(tmp_path / "pids")!r} + ".new", {str(tmp_path / "pids")!r})
time.sleep({600 if how == "cancelled" else 0})
"""
    running = asyncio.create_task(program(tmp_path, code)(SESSION, TASK))
    while not (tmp_path / "pids").exists():  # noqa: ASYNC110 -- another process makes it
        await asyncio.sleep(0.05)
    if how == "cancelled":
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    else:
        await running
    for pid in (tmp_path / "pids").read_text().split():
        assert gone(int(pid))
    assert not list((tmp_path / "scratch").iterdir())


def test_what_a_program_inherits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "MY_SECRET",
        "GH_TOKEN",
        "AWS_ACCESS_KEY_ID",
        "DB_PASSWORD",
        "RAY_ADDRESS",
        "GIT_AUTHOR_NAME",
    ):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("NO_PROXY", "example.org")
    env = inherited(["GH_TOKEN"])
    assert {"GH_TOKEN", "GIT_AUTHOR_NAME"} <= env.keys()
    assert not {"MY_SECRET", "AWS_ACCESS_KEY_ID", "DB_PASSWORD", "RAY_ADDRESS"} & env.keys()
    assert env["NO_PROXY"] == "example.org,127.0.0.1,localhost"
    assert env["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


# Functions


async def answers(session: SessionAddress, task: dict[str, Any], words: str = "") -> Any:
    return {"said": f"{session.api_key} {task['question']}{words}"}


def in_a_thread(session: SessionAddress, task: dict[str, Any]) -> Any:
    return "on the main thread" if threading.current_thread() is threading.main_thread() else "elsewhere"


LET_GO = threading.Event()


def stuck(session: SessionAddress, task: dict[str, Any]) -> Any:
    LET_GO.wait()


def gives(session: SessionAddress, task: dict[str, Any], what: Any = None) -> Any:
    if what == "exit":
        raise SystemExit("over and out")
    return what


def agent(name: str, **options: Any) -> FunctionAgent:
    return FunctionAgent(AgentConfig(run=f"{__name__}:{name}", options=options))


async def test_a_function_runs_on_the_loop_or_in_a_thread() -> None:
    assert (await agent("answers", words="!")(SESSION, TASK)).result == {
        "said": f"{KEY} 2 + 2 = {{prompt}}?!"
    }
    assert (await agent("in_a_thread")(SESSION, TASK)).result == {"text": "elsewhere"}


async def test_a_thread_past_its_deadline_is_left_behind() -> None:
    try:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await agent("stuck")(SESSION, TASK)
    finally:
        LET_GO.set()


@pytest.mark.parametrize(
    ("what", "result"),
    [
        (None, {}),
        (0.5, {"reward": 0.5}),
        (True, {"reward": 1.0}),
        ("42", {"text": "42"}),
        ({"a": 1}, {"a": 1}),
    ],
)
async def test_what_a_function_may_return(what: Any, result: dict[str, Any]) -> None:
    assert (await agent("gives", what=what)(SESSION, TASK)).result == result


@pytest.mark.parametrize(("what", "why"), [([1], "a list"), ("exit", "SystemExit: over and out")])
async def test_what_a_function_may_not(what: Any, why: str) -> None:
    with pytest.raises(AgentFailed, match=why):
        await agent("gives", what=what)(SESSION, TASK)


def test_rewards_are_numbers() -> None:
    assert reward_of({}) is None
    assert reward_of({"reward": 1}) == 1.0
    assert turn_rewards_of({"turn_rewards": [0, 0.5]}, 2) == [0.0, 0.5]
    for result in ({"reward": "high"}, {"reward": float("nan")}):
        with pytest.raises(AgentFailed, match="no finite number"):
            reward_of(result)
    for given in (0.5, [None], [float("inf")]):
        with pytest.raises(AgentFailed, match="turn_rewards"):
            turn_rewards_of({"turn_rewards": given}, 9)


def test_a_column_that_is_not_there_is_named() -> None:
    with pytest.raises(AgentFailed, match=r"no column 'image' \(known: repo, gold\)"):
        told(PROMPT, ["image"])


async def test_programs_do_not_outlive_a_worker_that_is_killed(tmp_path: Path) -> None:
    pids = tmp_path / "pid"
    code = f"import os, time; open({str(pids)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    (tmp_path / "agent.py").write_text(code)
    (tmp_path / "scratch").mkdir()
    worker = f"""
import asyncio
from pathlib import Path
from system.agents.launch import ProgramAgent, SessionAddress
from system.config import AgentConfig
scratch = Path({str(tmp_path / "scratch")!r})
agent = ProgramAgent(AgentConfig(command="python {tmp_path / "agent.py"}"), scratch)
asyncio.run(agent(SessionAddress("", "", "key", "m", 0), {{"question": ""}}))
"""
    running = await asyncio.create_subprocess_exec(sys.executable, "-c", worker)
    while not (pids.exists() and pids.read_text()):  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    running.kill()
    await running.wait()
    assert gone(int(pids.read_text()))
