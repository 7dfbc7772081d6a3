"""``espalier doctor`` does a demonstration twice, and finds a world that answers otherwise."""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from system.config import load
from system.doctor.checks import environment
from system.doctor.facts import Facts
from system.doctor.finding import Level
from system.doctor.replay_facts import Replays, replays
from system.envs.protocol import Message, Observation

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def walk(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setattr(sys, "path", [*sys.path, str(EXAMPLES)])
    return importlib.import_module("walk")


def findings(found: Replays | None) -> list[tuple[Level, str]]:
    config = load(None, [])
    return [
        (one.level, str(one)) for one in environment(Facts((3, 11, 0), "x", {}, {}, 1, replays=found), config)
    ]


def test_the_same_twice(walk: Any) -> None:
    found = replays(load("walk.yaml", []))
    assert found == Replays(4, 4)
    ((level, text),) = findings(found)
    assert level is Level.OK
    assert "4 of 4 demonstrations answered the same" in text


def test_another_answer_the_second_time(walk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def wander(self: Any, way: Literal["north", "east", "south", "west"]) -> Observation:
        return Observation((Message(f"somewhere {random.random()}"),))

    monkeypatch.setattr(walk.City, "walk", wander)
    found = replays(load("walk.yaml", []))
    assert found is not None
    assert (found.same, found.tried) == (0, 4)
    ((level, text),) = findings(found)
    assert level is Level.WARNING
    assert "step 1: messages was [('tool', 'ok', 'somewhere" in text


def test_where_there_is_nothing_to_try(walk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert replays(load(None, [])) is None
    assert findings(None) == []
    monkeypatch.setattr(walk.City, "fork", "none")
    assert replays(load("walk.yaml", [])) is None
