"""The task of commands in examples/tidy.py is learned by trees that fork with their files."""

from __future__ import annotations

import asyncio
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from system.config import load
from system.envs.make import make_environment
from system.envs.protocol import Acted, Action, Ids, Start, World
from system.rollout.chat import planned_syntax
from system.study.measure import Trial, measure
from system.tasks.base import make_task
from system.tools.tool import ToolUnavailable

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setattr(sys, "path", [*sys.path, str(EXAMPLES)])


@pytest.fixture
def usable() -> None:
    async def check() -> None:
        environment: Any = make_environment(load(EXAMPLES / "tidy.yaml", []).environment)
        try:
            await environment.check()
        except ToolUnavailable as error:
            pytest.skip(str(error))
        finally:
            await environment._sandbox.close()

    asyncio.run(check())


@pytest.mark.parametrize(("recipe", "tool"), [("tidy.yaml", "bash"), ("walk_python.yaml", "python")])
async def test_demonstrations_are_answered_as_they_say(
    usable: None, here: None, recipe: str, tool: str
) -> None:
    config = load(recipe, ["task.eval_size=4"])
    environment: Any = make_environment(config.environment)
    task: Any = make_task(config)
    syntax: Any = planned_syntax(config)
    try:
        for shown in task.demonstrations(6, 0):
            ids = Ids("", "", shown.prompt.id, "")
            world: World = await environment.open(Start(ids, shown.prompt, 0, 9.0))
            for (_, said), (_, told) in zip(shown.segments[::2], shown.segments[1::2], strict=False):
                call: Any = syntax.parse(said)
                assert call.tool == tool
                answer = await world.step(Action((Acted(call.tool, call.arguments),), said, ids, 9.0))
                assert syntax.render_result(answer.messages[0].text) == told
            await world.close("done")
    finally:
        await environment._sandbox.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_is_learned_with_forks(usable: None, here: None, tmp_path: Path) -> None:
    importlib.import_module("tidy")
    words = ["task.train_size=512", "task.eval_size=40", "eval.questions=40", "learn.tp=1"]
    config = load("tidy.yaml", words)
    found = measure(config, Trial("tidy.yaml", words, "", 12, 12, str(tmp_path), ""))
    accuracy = [point["accuracy"] for point in found["points"]]
    assert accuracy[0] < 0.4
    assert accuracy[-1] > 0.7
    assert found["forks"]["count"] > 100
    assert not found["dropped"]
