"""The game in examples/walk.py, whose state the environment keeps, is learned by trees that fork in it."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from system.config import load
from system.envs.make import make_environment
from system.envs.protocol import Acted, Action, Ids, Start
from system.observe.prompts import describe
from system.rollout.chat import planned_syntax
from system.study.measure import Trial, measure
from system.tasks.base import make_task

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setattr(sys, "path", [*sys.path, str(EXAMPLES)])


def test_the_demonstrations_walk_as_the_environment_does(here: None) -> None:
    config = load("walk.yaml", ["task.eval_size=4"])
    environment, task, syntax = (
        make_environment(config.environment),
        make_task(config),
        planned_syntax(config),
    )
    assert environment is not None
    walk: Any = importlib.import_module("walk")
    for shown in task.demonstrations(20, 0):  # type: ignore[attr-defined]
        question = walk.Walk(int(shown.prompt.id.rpartition("/")[2]))
        prompt = task._prompts("x", [question])[0]  # type: ignore[attr-defined]
        ids = Ids("", "", "", "")
        world: Any = environment.open(Start(ids, prompt, 0, 1.0))
        assert shown.prompt.messages[0]["content"] == f"{question.text}\n\n{world.opening}"
        for (_, said), (_, told) in zip(shown.segments[::2], shown.segments[1::2], strict=False):
            call: Any = syntax.parse(said)
            answer = world.step(Action((Acted(call.tool, call.arguments),), said, ids, 1.0))
            assert syntax.render_result(answer.messages[0].text) == told


@pytest.fixture(scope="module")
def began(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the model stands that every run begins with: the first makes it."""
    return tmp_path_factory.mktemp("began")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fork", ["deepcopy", "replay"])
def test_it_is_learned_with_forks(
    here: None, began: Path, monkeypatch: pytest.MonkeyPatch, fork: str
) -> None:
    """Evaluations beside the training have worlds of their own.  (The expert's habit, taken for certain, does
    not arrive.)
    """
    walk = importlib.import_module("walk")
    monkeypatch.setattr(walk.City, "fork", fork)
    words = ["task.train_size=1024", "task.eval_size=60", "eval.questions=60", "learn.tp=1"]
    config = load("walk.yaml", words)
    found = measure(config, Trial("walk.yaml", words, "", 24, 12, str(began), ""))
    accuracy = [point["accuracy"] for point in found["points"]]
    assert accuracy[0] < 0.3, found["points"]
    assert accuracy[-1] > 0.8, found["points"]
    assert found["forks"]["count"] > 200, found["points"]
    assert not found["dropped"], found["points"]


def test_the_prompt_command_shows_what_the_world_begins_with(here: None) -> None:
    told = "\n".join(describe(load("walk.yaml", []), 1))
    assert re.search(r"Q: walk \d+ \?\n\n(north|east|south|west)\n", told)
