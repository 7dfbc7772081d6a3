"""Tasks by name."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from system.config import Config, ConfigError
from system.tasks.base import HasCorpus, HasDemonstrations, HasTokenizer, make_task
from system.tasks.quickstart.task import QuickstartTask
from system.tasks.reasoning import ReasoningTask


def config(name: str, **task) -> Config:
    made = Config()
    made.task.name = name
    made.task.train_size, made.task.eval_size = 50, 20
    for key, value in task.items():
        setattr(made.task, key, value)
    return made


def test_quickstart_brings_everything():
    settings = config("quickstart", options={"right": 0.5, "slip": 0.25})
    settings.run.seed, settings.tools.search_top_k = 7, 2
    task = make_task(settings)
    assert isinstance(task, QuickstartTask)
    assert isinstance(task, HasCorpus)
    assert isinstance(task, HasTokenizer)
    assert isinstance(task, HasDemonstrations)
    assert (task.seed, task.skill.right, len(task.train()), len(task.eval())) == (7, 0.5, 50, 20)
    (demo,) = task.demonstrations(1, 0)
    results = [text for author, text in demo.segments if author == "tool" and ":" in text]
    assert all(text.count("\n") == 3 for text in results)  # two documents


def test_reasoning_gym():
    assert isinstance(make_task(config("reasoning-gym", dataset="chain_sum")), ReasoningTask)


def test_ones_own_task(monkeypatch: pytest.MonkeyPatch):
    module = ModuleType("my_tasks")

    class Mine:
        name = "mine"

        def __init__(self, config: Config) -> None:
            self.size = config.task.train_size

    module.Mine = Mine  # pyright: ignore
    module.constant = 3  # pyright: ignore
    monkeypatch.setitem(sys.modules, "my_tasks", module)
    assert make_task(config("my_tasks:Mine")).size == 50  # pyright: ignore
    for path, message in (
        ("my_tasks:Other", "Other"),
        ("no_such_module:Mine", "no_such_module"),
        ("my_tasks:constant", "not callable"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_task(config(path))


def test_errors_suggest():
    with pytest.raises(ConfigError, match="did you mean quickstart"):
        make_task(config("quikstart"))
    with pytest.raises(ConfigError, match=r"package\.module:Name"):
        make_task(config("zzz"))
    with pytest.raises(ConfigError, match=r"task\.options"):
        make_task(config("quickstart", options={"wrong": 1}))
    with pytest.raises(ConfigError, match=r"task\.options"):
        make_task(config("quickstart", options={"right": 0.9, "slip": 0.9}))
