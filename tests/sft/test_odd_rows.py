"""Rows that could be read in two ways, or in none: paired by what they say, or told by line and reason."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from system.config import SftConfig
from system.sft.data import read
from system.sft.forms import Forms
from system.tasks.columns import RowUnusable
from system.tasks.files import DataError, rows

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
GOOD = json.dumps({"messages": [USER, ASSISTANT]})


def call(name: str, own: str | None) -> dict[str, Any]:
    made = {"type": "function", "function": {"name": name, "arguments": {}}}
    return made if own is None else made | {"id": own}


def answer(text: str, to: str | None) -> dict[str, Any]:
    return {"role": "tool", "content": text} | ({} if to is None else {"tool_call_id": to})


def paired(calls: list[str | None], answers: list[str | None], *turns: Any) -> list[tuple[str, str]]:
    """(What is called, what answers), in the order in which they come."""
    asked = {"role": "assistant", "content": "", "tool_calls": [call(f"f-{one}", one) for one in calls]}
    said = [USER, *turns, asked, *(answer(f"f-{one}", one) for one in answers), ASSISTANT]
    found = Forms().conversation({"messages": said}, "x").messages
    names = {one["id"]: one["function"]["name"] for m in found for one in m.get("tool_calls", ())}
    heard = [m for m in found if m["role"] == "tool"]
    assert [m["tool_call_id"] for m in heard] == sorted(m["tool_call_id"] for m in heard)
    return [(names[m["tool_call_id"]], m["content"]) for m in heard]


def test_answers_are_paired_with_calls_by_their_ids() -> None:
    """And come in the order of the calls, as a rollout has them."""
    in_order = [("f-a", "f-a"), ("f-b", "f-b"), ("f-c", "f-c")]
    for order in (["a", "b", "c"], ["c", "a", "b"], ["b", "c", "a"]):
        assert paired(["a", "b", "c"], order) == in_order
    assert paired(["a", "b"], ["b"]) == [("f-b", "f-b")]  # the first one has none
    before = [{"role": "assistant", "content": "", "tool_calls": [call("f", "a")]}, answer("f", "a"), USER]
    assert paired(["a", "b"], ["b", "a"], *before)[1:] == in_order[:2]  # ids that come again in a later turn


def test_without_ids_on_both_sides_answers_come_in_the_order_of_the_calls() -> None:
    assert paired([None, None], [None, None]) == [("f-None", "f-None")] * 2
    assert paired(["a", "b"], [None, None]) == [("f-a", "f-None"), ("f-b", "f-None")]
    assert paired([None, None], ["b", "a"]) == [("f-None", "f-b"), ("f-None", "f-a")]


@pytest.mark.parametrize(
    ("calls", "answers", "reason"),
    [
        (
            ["a", "b"],
            ["a", "c"],
            r"is to 'c' \(tool_call_id\), and the calls before it have the ids 'a', 'b'",
        ),
        (["a", "b"], ["b", None], "has no tool_call_id, and the calls before it have"),
        (["a", "a"], ["a"], "two calls have the id 'a'"),
        (["a", "b"], ["b", "b"], "two answers are to the id 'b'"),
    ],
)
def test_ids_that_do_not_agree_are_refused(
    calls: list[str | None], answers: list[str | None], reason: str
) -> None:
    with pytest.raises(RowUnusable, match=reason):
        paired(calls, answers)


def saying(**more: Any) -> dict[str, Any]:
    return {"messages": [USER, {**ASSISTANT, **more}]}


LINES: list[tuple[str | bytes, str]] = [
    ('{"messages": [], "messages": [1]}', "an object has the key 'messages' twice: take out"),
    (GOOD.replace('"content": "Ho"', '"content": "Ho", "content": "He"'), "has the key 'content' twice"),
    (json.dumps({"conversations": '[{"from": "human", "from": "gpt"}]'}), "has the key 'from' twice"),
    (
        json.dumps(saying(tool_calls=[{"name": "f", "arguments": '{"a": 1, "a": 2}'}])),
        "the arguments of the call of 'f': an object has the key 'a' twice",
    ),
    (GOOD.replace("Ho", "H\\ud83d"), r"half of a character \(U\+D83D, a lone surrogate\)"),
    (GOOD.replace("Hi", "H\\udc00"), "a lone surrogate"),
    (
        json.dumps(saying(tool_calls=[{"name": "f", "arguments": {"a": "\ud83d"}}])),
        "a lone surrogate",
    ),
    (json.dumps(saying(reasoning_content="Hm", content="<think>Hm</think>Ho")), "keep one"),
    (json.dumps(saying(reasoning_content=["Hm"])), "reasoning_content is no text"),
    ('{"messages": "é"}'.encode("latin-1"), r"not UTF-8 \(byte 0xe9 at 15\): convert"),
    ("{", "not JSON"),
]


@pytest.mark.parametrize(("line", "reason"), LINES)
@pytest.mark.parametrize("packed", [False, True])
def test_a_line_that_cannot_be_used_costs_a_row(
    line: str | bytes, reason: str, packed: bool, tmp_path: Path
) -> None:
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    bad = line.encode() if isinstance(line, str) else line
    text = b"\n".join([GOOD.encode(), bad, GOOD.encode()])
    path.write_bytes(gzip.compress(text) if packed else text)
    with pytest.raises(DataError, match=rf"line 2\b.*{reason}(.|\n)*1 of 3 rows"):
        read(SftConfig(path=str(path)), 0)
    found = read(SftConfig(path=str(path), skip=0.4), 0)
    (fault,) = found.faults
    assert re.search(rf"line 2\b.*{reason}", fault)
    assert [one.where for one in found.train] == [f"{path}, line 1", f"{path}, line 3"]


def test_whole_characters_beyond_the_first_plane_are_characters(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD.replace("Ho", "H\\ud83d\\ude00"))
    (one,) = read(SftConfig(path=str(tmp_path / "a.jsonl")), 0).train
    assert one.messages[-1]["content"] == "H\U0001f600"


def test_a_question_that_says_something_twice_is_told_by_line(tmp_path: Path) -> None:
    """Of which the last would be taken otherwise."""
    (tmp_path / "a.jsonl").write_text('{"question": "1+1?", "answer": "2", "answer": "3"}')
    with pytest.raises(DataError, match=r"line 1: an object has the key 'answer' twice"):
        list(rows(tmp_path / "a.jsonl"))
    (tmp_path / "a.json").write_text('[{"question": "1+1?", "answer": "2", "answer": "3"}]')
    with pytest.raises(DataError, match=r"a\.json: an object has the key 'answer' twice"):
        list(rows(tmp_path / "a.json"))
