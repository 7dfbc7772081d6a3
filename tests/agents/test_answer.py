"""What the model writes as an agent reads it: the same however it is cut into tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from system.agents.answer import AnswerReader, Delta, Written, calls_in
from system.rollout.syntax.base import ParsedCall
from system.rollout.syntax.hermes import HermesSyntax
from system.rollout.syntax.qwen_coder import QwenCoderSyntax
from system.rollout.syntax.tags import TagSyntax
from system.tools.outcome import ToolSpec

SPECS = {"search": ToolSpec("search", "Look it up.", {"type": "object", "properties": {"q": {}}}, "q")}
CALL = '<tool_call>{"name": "search", "arguments": {"q": "x"}}</tool_call>'
BAD = "<tool_call>{no}</tool_call>"


class Cut:
    """A tokenizer of bytes, and of a text that is cut into pieces."""

    def __init__(self, text: str, cuts: Sequence[int]) -> None:
        data = text.encode()
        ends = sorted({cut % (len(data) + 1) for cut in cuts} | {len(data)})
        self.pieces = [data[a:b] for a, b in zip([0, *ends], ends, strict=False)]

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")


def read(
    text: str, cuts: Sequence[int] = (), syntax: Any = HermesSyntax, ended: bool = True, **settings: Any
) -> tuple[Written, list[Delta], str]:
    tokenizer = Cut(text, cuts)
    reader = AnswerReader(tokenizer, {-1}, syntax(SPECS) if syntax else None, **settings)
    deltas: list[Delta] = []
    for token in range(len(tokenizer.pieces)):
        deltas += reader.feed(token)
        if reader.stopped:
            break
    rest, written = reader.finish(ended and not reader.stopped)
    return written, [*deltas, *rest], reader.stopped


PARTS = st.sampled_from(
    [CALL, BAD, "<think>", "</think>", "<tool_call>", "</tool_call>", "<to", "</", "STOP", "ST", " ", "\n\n",
     "é", "世界", "word", "<", "th", "in"]
)  # fmt: skip


@given(st.lists(PARTS, max_size=9), st.lists(st.integers(0, 200), max_size=60), st.booleans())
def test_how_it_is_cut_into_tokens_changes_nothing(parts: list[str], cuts: list[int], opened: bool) -> None:
    text = "".join(parts)
    settings: dict[str, Any] = {"stops": ["STOP"], "opened": "<think>\n" if opened else ""}
    written, deltas, stopped = read(text, cuts, **settings)
    whole, _, whole_stopped = read(text, **settings)
    assert (written, stopped) == (whole, whole_stopped)
    for kind, told in (("reasoning", written.reasoning), ("text", written.text)):
        assert "".join(delta.text for delta in deltas if delta.kind == kind) == told
    assert "STOP" not in written.text
    assert not (written.calls and written.malformed)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Written("", "", (), False)),
        ("It is 3. ", Written("", "It is 3. ", (), False)),
        ("<think>\nHm.\n</think>\n\nIt is.", Written("Hm.", "It is.", (), False)),
        ("<think>\nHm", Written("Hm", "", (), False)),
        ("a < b <tool", Written("", "a < b <tool", (), False)),
        (f"Now. {CALL}", Written("", "Now.", (ParsedCall("search", {"q": "x"}),), False)),
        (f"{CALL}\n{CALL}\nSo.", Written("", "So.", (ParsedCall("search", {"q": "x"}),) * 2, False)),
        (f"Now.\n{BAD}", Written("", f"Now.\n{BAD}", (), True)),
        (f"{CALL}{BAD}", Written("", f"{CALL}{BAD}", (), True)),
        ("<tool_call>{", Written("", "<tool_call>{", (), True)),
        (CALL.replace("search", "find"), Written("", CALL.replace("search", "find"), (), True)),
    ],
)
def test_what_is_thought_said_and_called(text: str, expected: Written) -> None:
    assert read(text)[0] == expected


def test_a_call_that_was_cut_is_text_and_not_malformed() -> None:
    written, _, _ = read(f"Now. {CALL}<tool_call>", ended=False)
    assert written == Written("", f"Now. {CALL}<tool_call>", (), False)


def test_without_tools_there_are_no_calls() -> None:
    assert read(CALL, syntax=None)[0] == Written("", CALL, (), False)


def test_a_stop_string_in_a_thought_is_none() -> None:
    written, _, stopped = read("<think>STOP</think>Go and STOP now", stops=["STOP"])
    assert (written.reasoning, written.text, stopped) == ("STOP", "Go and ", "STOP")


def test_a_stop_string_within_a_call_ends_the_text_there() -> None:
    written, _, stopped = read(f"Now.{CALL}", stops=['"arguments"'])
    assert (written.text, written.calls, stopped) == (
        'Now.<tool_call>{"name": "search", ',
        (),
        '"arguments"',
    )


FUNCTION = "<function=search>\n<parameter=q>\nx\n</parameter>\n</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("syntax", "text"),
    [
        (TagSyntax, "Now. <search> x </search>"),
        (QwenCoderSyntax, f"Now.\n<tool_call>\n{FUNCTION}"),
        (QwenCoderSyntax, f"Now. {FUNCTION}"),
    ],
)
def test_other_syntaxes(syntax: Any, text: str) -> None:
    assert read(text, range(len(text)), syntax)[0] == Written(
        "", "Now.", (ParsedCall("search", {"q": "x"}),), False
    )


@pytest.mark.parametrize("depth", [60, 490, 990])
def test_a_call_that_is_nested_too_deeply_makes_the_turn_text(depth: int) -> None:
    call = CALL.replace('"x"', "[" * depth + "]" * depth)
    assert calls_in(CALL, HermesSyntax(SPECS)) == ((ParsedCall("search", {"q": "x"}),), "")
    assert calls_in(call, HermesSyntax(SPECS)) is None
