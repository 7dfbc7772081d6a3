"""``eval.sets``: which questions they are, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from system.config import ConfigError, load
from system.evals.sets import question_sets, to_ask
from system.tasks.base import make_task


def config_of(*overrides: str) -> Any:
    return load(None, ["task.eval_size=3", "task.train_size=8", "eval.questions=2", *overrides])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "aime.jsonl"
    rows = [{"problem": f"What is {n} + 1?", "solution": str(n + 1)} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_each_question_of_each_set_is_asked_as_often_as_it_says(data: Path) -> None:
    config = config_of(
        "eval.temperature=1",
        f"eval.sets=[{{name: aime, path: {data}, questions: 3, samples: 4, columns: {{question: problem, "
        "answer: solution}}, {name: other, task: {name: quickstart, eval_size: 5}}]",
    )
    sets = question_sets(config, make_task(config))
    assert [(one.name, len(one.questions), one.samples) for one in sets] == [
        ("", 2, 1),
        ("aime", 3, 4),
        ("other", 2, 1),  # as eval.questions says
    ]
    asked = to_ask(sets)
    assert [one.seed for one in asked] == list(range(2 + 12 + 2))
    assert [one.sample for one in asked[2:10]] == [0, 1, 2, 3] * 2
    assert len({one.key for one in asked}) == len(asked)
    assert asked[2].prompt.answers == ("1",)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("eval.samples=2", r"eval\.samples asks for several answers, but eval\.temperature=0"),
        ("eval.sets=[{name: a, path: x, samples: 2}]", r"eval\.sets\[a\]\.samples asks for several"),
        ("eval.sets=[{name: a}]", r"eval\.sets\[a\] needs either a path"),
        ("eval.choose=b/accuracy", r"eval\.sets has no 'b' \(there are: none\)"),
        ("eval.choose=pass@4", r"choose last, or by one of accuracy, reward\n"),
        ("eval.choose=accuracy", r"the last model alone to choose of: set eval\.every"),
        ("eval.sets=[{name: a, path: x, task: {name: quickstart}}]", r"needs either a path"),
        ("eval.sets=[{name: a/b, path: x}]", r"eval\.sets\[0\]\.name='a/b': letters"),
        ("eval.sets=[{name: held-out, path: x}]", r"name of the task's own questions"),
        ("eval.sets=[{name: a, path: ~/x}]", r"eval\.sets\[a\]\.path=~/x: `~`"),
        ("eval.sets=[{path: x}]", r"eval\.sets\[0\]\.name=''"),
        (
            "eval.sets=[{name: a, path: x}, {name: a, path: y}]",
            r"eval\.sets\[a\]\.name: 'a' stands there twice",
        ),
        (
            "eval.sets=[{name: a, path: x, sample: 2}]",
            r"eval\.sets\[a\]\.sample: a set has .*did you mean samples",
        ),
        (
            "eval.sets=[{name: a, path: x, samples: many}]",
            r"eval\.sets\[a\]\.samples='many' must be an integer",
        ),
        ("eval.sets=[{name: a, task: {nam: jsonl}}]", r"eval\.sets\[a\]\.task\.nam: .*did you mean name"),
        ("eval.sets=[{name: a, task: jsn}]", r"eval\.sets\[a\]\.task\.name='jsn': choose .*mean jsonl"),
        (
            "eval.sets=[{name: a, task: {name: quickstart, eval_size: -2}}]",
            r"eval\.sets\[a\]\.task\.eval_size=-2 must be -1 or more",
        ),
        ("eval.sets=[{name: a, path: x, reward: 3}]", r"eval\.sets\[a\]\.reward\.name='3': choose"),
        (
            "eval.sets=[{name: a, path: x}, {name: b, path: x, reward: {nam: f1}}]",
            r"eval\.sets\[b\]\.reward\.nam: the section reward has .*did you mean name",
        ),
        ("eval.sets=[{name: a, path: x, reward: f2}]", r"eval\.sets\[a\]\.reward\.name='f2': choose"),
        (
            "eval.sets=[{name: a, path: x, reward: {deadline_s: soon}}]",
            r"eval\.sets\[a\]\.reward\.deadline_s='soon' must be a number",
        ),
        (
            "eval.sets=[{name: a, path: x, reward: {workers: 0}}]",
            r"eval\.sets\[a\]\.reward\.workers=0 must be 1 or more",
        ),
        (
            "eval.sets=[{name: a, path: x, reward: [f1, {name: judge, weigt: 1}]}]",
            r"eval\.sets\[a\]\.reward\.parts\[1\]\.weigt: a reward has .*did you mean weight",
        ),
        (
            "eval.sets=[{name: a, path: x, reward: [f1, {name: arpo, deadline_s: 0}]}]",
            r"eval\.sets\[a\]\.reward\.parts\[1\]\.deadline_s=0\.0 must be above 0",
        ),
        ("eval.sets=[{name: a, path: x, reward: [f1, f1]}]", r"sets\[a\]\.reward\.parts\[0\]\.label: two"),
        ("eval.sets=[{name: a, path: x, reward: [f1, 3]}]", r"sets\[a\]\.reward\.parts: 3 must be"),
        ("eval.sets=[{name: a, path: x, reward: true}]", r"eval\.sets\[a\]\.reward\.name='True'"),
        ("eval.sets=[{name: a, path: x, questions: -2}]", r"eval\.sets\[a\]: questions are -1"),
        ("eval.sets=[{name: a, task: {name: jsonl}, columns: {answer: x}}]", r"of a task they stand in"),
    ],
)
def test_what_is_wrong_is_told_by_its_place(given: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        config_of(given)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            "engine=sglang engine.urls=[http://a:1]",
            r"eval\.engines are started by the run, and with engine\.urls",
        ),
        (
            "agent.listen=127.0.0.1:8200 agent.token_env=T branching=none tools.names=[]",
            r"eval\.engines start another: set eval\.engines=0",
        ),
    ],
)
def test_what_does_not_go_with_engines_of_their_own(given: str, told: str) -> None:
    config_of(*given.split())
    with pytest.raises(ConfigError, match=told):
        config_of("eval.engines=1", *given.split())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("eval.sets=[{name: a, path: nowhere.jsonl}]", r"eval\.sets\[a\]: .*nowhere\.jsonl"),
        (
            "eval.sets=[{name: a, task: {name: jsonl}}]",
            r"eval\.sets\[a\]: the task has no held-out questions",
        ),
    ],
)
def test_a_set_that_cannot_be_read(given: str, told: str) -> None:
    config = config_of(given)
    with pytest.raises(ConfigError, match=told):
        question_sets(config, make_task(config))
