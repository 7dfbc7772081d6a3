"""Rows as conversations: the forms of others, and what is refused, by line and reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from system.config import SftConfig
from system.sft.data import read
from system.sft.forms import Forms
from system.tasks.columns import RowUnusable
from system.tasks.files import DataError

ARPO = {
    "conversations": [
        {"from": "human", "value": "Who wrote it?"},
        {"from": "gpt", "value": "<think>hm</think><search>it</search><result>Ada</result> \x08oxed{Ada}"},
    ],
    "system": "You may search.",
}
CALL = {"name": "search", "arguments": {"query": "it"}}


def messages(row: dict[str, Any], form: str = "auto", **named: str) -> list[tuple[str, str]]:
    found = Forms(form, named).conversation(row, "a.jsonl, line 1").messages
    return [(one["role"], one["content"]) for one in found]


def test_arpo_s_columns_as_they_are() -> None:
    said = "<think>hm</think><search>it</search><result>Ada</result> \\boxed{Ada}"  # the backspace mended
    assert messages(ARPO) == [("system", "You may search."), ("user", "Who wrote it?"), ("assistant", said)]


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"prompt": "2+2?", "completion": "4"}, [("user", "2+2?"), ("assistant", "4")]),
        (
            {"prompt": [{"role": "user", "content": "2+2?"}],
             "completion": [{"role": "assistant", "content": "4"}]},
            [("user", "2+2?"), ("assistant", "4")],
        ),
        (
            {"instruction": "Add.", "input": "2, 2", "output": "4", "system": "Be brief."},
            [("system", "Be brief."), ("user", "Add.\n2, 2"), ("assistant", "4")],
        ),
        ({"instruction": "Add.", "input": "", "output": "4"}, [("user", "Add."), ("assistant", "4")]),
        (
            {"messages": json.dumps([{"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                                     {"role": "assistant", "content": "Ho"}])},
            [("user", "Hi"), ("assistant", "Ho")],
        ),
    ],
)  # fmt: skip
def test_forms_are_told_by_their_columns(row: dict[str, Any], wanted: list[tuple[str, str]]) -> None:
    assert messages(row) == wanted


def test_a_form_and_columns_can_be_named() -> None:
    row = {"ask": "2+2?", "say": "4", "messages": [{"role": "user", "content": "another"}]}
    assert messages(row, "completion", prompt="ask", completion="say") == [
        ("user", "2+2?"),
        ("assistant", "4"),
    ]
    with pytest.raises(DataError, match=r"sft.columns.promt: .*did you mean prompt"):
        Forms("auto", {"promt": "ask"})


def test_sharegpt_s_calls_are_openai_s() -> None:
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "Who?"},
            {"from": "gpt", "value": "I look."},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "Ada"},
            {"from": "gpt", "value": "Ada."},
        ],
        "tools": json.dumps([{"name": "search", "parameters": {}}]),
    }
    function = {**CALL, "arguments": json.dumps(CALL["arguments"])}
    openai = {
        "messages": [
            {"role": "user", "content": "Who?"},
            {
                "role": "assistant",
                "content": "I look.",
                "tool_calls": [{"id": "x1", "type": "function", "function": function}],
            },
            {"role": "tool", "tool_call_id": "x1", "content": "Ada"},
            {"role": "assistant", "content": "Ada."},
        ],
        "tools": [{"type": "function", "function": {"name": "search", "parameters": {}}}],
    }
    one, other = (Forms().conversation(row, "x") for row in (sharegpt, openai))
    assert one == other
    assert one.messages[1]["tool_calls"][0]["function"] == CALL
    assert one.messages[1]["tool_calls"][0]["id"] == one.messages[2]["tool_call_id"]
    assert [message["role"] for message in one.question] == ["user"]


USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "Hi"}, "no conversation: expected messages or conversations, .* found: text"),
        ({"messages": []}, "no conversation"),
        ({"messages": [USER]}, "no message of the assistant"),
        ({"messages": [ASSISTANT, USER, ASSISTANT]}, "no message of a user comes before"),
        ({"messages": [USER, ASSISTANT, USER]}, "it ends with a message of the user"),
        ({"messages": [USER, ASSISTANT, ASSISTANT]}, "two messages of the assistant"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "2: the assistant says nothing"),
        ({"messages": [USER, {"role": "asistant", "content": "x"}]}, "message 2: 'asistant' is no role"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "message 2: the content is no text"),
        ({"messages": [USER, {"role": "tool", "content": "x"}, ASSISTANT]}, "a tool answers before"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]},
         "arguments of the call of 'f' are no JSON object"),
        ({"messages": [USER, {"role": "function_call", "content": "f(x)"}]}, "a tool call is {name, arg"),
        ({"messages": [USER, {**ASSISTANT, "weight": 2}]}, "weight is 2"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0}]}, "has weight 0"),
        ({"messages": [USER, ASSISTANT], "tools": "search"}, "tools is no list of schemas"),
        ({"prompt": "", "completion": "4"}, "prompt is neither a text nor a list"),
        ({"instruction": "Add.", "output": ""}, "expected a text that is not empty in output or response"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_says_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowUnusable, match=rf"^b.jsonl, line 7.*{reason}"):
        Forms().conversation(row, "b.jsonl, line 7")


def lines(path: Path, *rows: Any) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_each_bad_line_is_told_and_a_share_may_be_left_out(tmp_path: Path) -> None:
    good = [{"prompt": f"{i}?", "completion": str(i)} for i in range(17)]
    path = lines(tmp_path / "a.jsonl", *good[:5], "{not json", *good[5:9], {"text": "x"}, '"x"', *good[9:])
    with pytest.raises(DataError) as caught:
        read(SftConfig(path=path), 0)
    told = str(caught.value).splitlines()
    assert [int(re.findall(r"line (\d+)", line)[0]) for line in told[:-1]] == [6, 11, 12]
    assert "not JSON" in told[0]
    assert "3 of 20 rows (15.00%) are unusable, sft.skip=0 lets 0 be left out" in told[-1]
    with pytest.raises(DataError, match=r"sft.skip=0.1 lets 2 be left out"):
        read(SftConfig(path=path, skip=0.1), 0)
    data = read(SftConfig(path=path, skip=0.15), 0)
    assert (len(data.train), len(data.faults)) == (17, 3)


def test_of_many_bad_lines_the_first_are_told(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *({"text": str(i)} for i in range(50)))
    with pytest.raises(DataError) as caught:
        read(SftConfig(path=path, skip=1.0), 0)
    told = str(caught.value).splitlines()
    assert len(told) == 22
    assert told[20].endswith("and 30 more")


def test_a_share_of_the_questions_is_held_out_whatever_their_order(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i % 40}?", "completion": f"{i}"} for i in range(80)]
    one = read(SftConfig(path=lines(tmp_path / "a.jsonl", *rows), eval_share=0.1), 3)
    other = read(SftConfig(path=lines(tmp_path / "b.jsonl", *rows[::-1]), eval_share=0.1), 3)
    asked = [{str(c.question) for c in part} for part in (one.train, one.held_out)]
    assert (len(one.held_out), len(one.train)) == (8, 72)
    assert not asked[0] & asked[1]
    assert asked[1] == {str(c.question) for c in other.held_out}
    assert asked[1] != {
        str(c.question) for c in read(SftConfig(path=str(tmp_path / "a.jsonl"), eval_share=0.1), 4).held_out
    }
    with pytest.raises(DataError, match="there must be some on both sides"):
        read(SftConfig(path=str(tmp_path / "a.jsonl"), eval_share=0.001), 3)


def test_what_is_held_out_is_not_trained_on(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "completion": f"{i}"} for i in range(4)]
    train, held = lines(tmp_path / "a.jsonl", *rows), lines(tmp_path / "b.jsonl", rows[2])
    with pytest.raises(DataError, match=r"b.jsonl, line 1 is the same as .*a.jsonl, line 3"):
        read(SftConfig(path=train, eval_path=held), 0)


def test_lists_and_parquet_are_read_too(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.json").write_text(json.dumps([ARPO, ARPO]))
    pq.write_table(pa.Table.from_pylist([ARPO]), tmp_path / "b.parquet")
    both = [read(SftConfig(path=str(tmp_path / name)), 0).train for name in ("a.json", "b.parquet")]
    assert [one.messages for one in both[0]] == [one.messages for one in [*both[1], *both[1]]]
