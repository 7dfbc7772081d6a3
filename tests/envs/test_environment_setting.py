"""What ``environment=…`` takes, and what is refused before anything is started, by name and with a remedy."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from system.config import load
from system.doctor.preflight import look
from system.envs.make import make_environment
from system.envs.protocol import ForkKind

HERE = str(Path(__file__).parent)
LIMITS = ("tools.names=[python]", "task.train_size=4", "task.eval_size=4")


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, HERE])


def problems(*words: str) -> list[str]:
    found = look(load(None, [*LIMITS, *words]), without=("run directory", "memory", "scratch"))
    return [str(one) for lines in found.values() for one in lines]


def test_a_plain_class_is_taken_with_its_options() -> None:
    config = load(None, ["environment=plain_worlds:Counter", "environment.options.start='3'"])
    environment = make_environment(config.environment)
    assert environment is not None
    assert environment.forks == ForkKind.NATIVE
    assert set(environment.tools) == {"add"}
    assert not problems("environment=plain_worlds:Counter")
    assert make_environment(load(None, []).environment) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["environment=plain_worlds:Mail"], "cannot be forked, and branching=arpo-calibrated forks: set"),
        (["environment=plain_worlds:Mail", "branching=at2po"], "branching=at2po forks: set branching=none"),
        (["environment=plain_worlds:Counter", "guide.expert=0.2"], "set guide.expert=0"),
        (["environment=plain_worlds:Undeclared"], "fork='copy': choose one of deepcopy, replay, none"),
        (["environment=plain_worlds:Untyped"], "add(number): say its type, as in number: str"),
        (["environment=plain_worlds:Slow"], "wait is async: write it without, or a whole environment"),
        (["environment=plain_worlds:Finished"], "done is a method: make it an attribute or a property"),
        (["environment=plain_worlds:Toolless"], "has no public method for a tool, and no reply()"),
        (["environment=plain_worlds:nothing"], "a class with reset() and public methods is needed, or one"),
        (
            ["environment=plain_worlds:Counter", "environment.options.stop=3"],
            "has no such option; it takes start",
        ),
        (
            ["environment=plain_worlds:Searching", "tools.names=[search]"],
            "'search' is a tool of environment.name='plain_worlds:Searching', too: take it out",
        ),
        (["environment=toolz"], "environment.name='toolz': choose one of tools, python, or your own as"),
        (["environment=plain_worlds:Absent"], "has no attribute 'Absent'"),
        (["environment.step_s=0"], "environment.step_s=0.0 must be above 0"),
    ],
)
def test_what_is_refused(words: list[str], said: str) -> None:
    try:
        found = problems(*words)
    except ValueError as error:  # where no part is looked at yet
        found = str(error).splitlines()
    assert any(said in line for line in found), found


def test_one_that_cannot_be_forked_goes_with_a_policy_that_does_not_fork() -> None:
    assert not problems("environment=plain_worlds:Mail", "branching=none")


def test_messages_need_a_syntax_that_has_turns(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "<|im_start|>"}))
    words = ["environment=plain_worlds:Asking", f"model.path={tmp_path}"]
    assert any("rollout.syntax=tags has no turns" in line for line in problems(*words))
    assert not any("has no turns" in line for line in problems(*words, "rollout.syntax=hermes"))
    assert not any("has no turns" in line for line in problems(*words, "rollout.answers=template"))
