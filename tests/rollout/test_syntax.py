"""Tool-call syntaxes: what parses, what is malformed and why."""

from __future__ import annotations

import json

import pytest
from rollout_fakes import SPECS

from system import plugins
from system.rollout.syntax.base import MalformedCall, ParsedCall
from system.rollout.syntax.hermes import HermesSyntax
from system.rollout.syntax.tags import TagSyntax

tags = TagSyntax(SPECS)
hermes = HermesSyntax(SPECS)


def test_tags_stop_at_every_tools_closing_tag() -> None:
    assert tags.stops == ("</search>", "</python>")


@pytest.mark.parametrize(
    ("text", "call"),
    [
        (
            "<think> hm </think> <search> birthplace of Alda </search>",
            ParsedCall("search", {"query": "birthplace of Alda"}),
        ),
        ("<search>x</search>\n", ParsedCall("search", {"query": "x"})),
        ("<python> print(1) </python>", ParsedCall("python", {"code": "print(1)"})),
        ("<python>\nif x:\n    y = 1\n</python>", ParsedCall("python", {"code": "if x:\n    y = 1"})),
        ("<python>\n    a = 1\n    b = 2\n</python>", ParsedCall("python", {"code": "a = 1\nb = 2"})),
        ("<python> if x:\n    y = 1\n</python>", ParsedCall("python", {"code": "if x:\n    y = 1"})),
        ("<think> I use <search> now </think> <search> b </search>", ParsedCall("search", {"query": "b"})),
        ("<search> a </search> <search> b </search>", ParsedCall("search", {"query": "b"})),
        (
            "<search> a </search>.\n\n",
            ParsedCall("search", {"query": "a"}),
        ),  # the closing token reached further
        ("<python> '<search>' </python>", ParsedCall("python", {"code": "'<search>'"})),
    ],
)
def test_tags_parse(text: str, call: ParsedCall) -> None:
    assert tags.parse(text) == call


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("no opener at all </search>", "without"),
        ("<search> a </search> and again </search>", "without"),
        ("<search></search>", "empty"),
        ("<search>   \n </search>", "empty"),
        ("<python> print(1) </search>", "without"),
    ],
)
def test_tags_malformed(text: str, reason: str) -> None:
    call = tags.parse(text)
    assert isinstance(call, MalformedCall)
    assert reason in call.reason


@pytest.mark.parametrize("text", ["", "<answer> \\boxed{ 42 } </answer>", "<search> never closed"])
def test_no_call_is_none(text: str) -> None:
    assert tags.parse(text) is None
    assert hermes.parse(text) is None


def test_tags_result_is_arpos() -> None:
    assert tags.render_result("Alda: Rome") == " <result>\nAlda: Rome\n</result>"


def test_hermes_parses_json() -> None:
    text = (
        'thinking\n<tool_call>\n{"name": "python", "arguments": {"code": "print(\\"</x>\\")"}}\n</tool_call>'
    )
    assert hermes.stops == ("</tool_call>",)
    assert hermes.parse(text) == ParsedCall("python", {"code": 'print("</x>")'})
    assert hermes.parse('<tool_call>{"name": "search"}</tool_call>\n') == ParsedCall("search", {})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("</tool_call>", "without"),
        ("<tool_call>{not json}</tool_call>", "JSON"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "JSON"),
        ("<tool_call>[1]</tool_call>", "name"),
        ('<tool_call>{"name": 3}</tool_call>', "name"),
        (
            '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
            "unknown tool 'rm'; tools: search, python",
        ),
        ('<tool_call>{"name": "search", "arguments": "q"}</tool_call>', "object"),
    ],
)
def test_hermes_malformed(text: str, reason: str) -> None:
    call = hermes.parse(text)
    assert isinstance(call, MalformedCall)
    assert reason in call.reason


def test_hermes_result_closes_the_turn_and_opens_the_next() -> None:
    rendered = hermes.render_result("42")
    assert rendered.startswith("<|im_end|>\n<|im_start|>user\n<tool_response>\n42\n</tool_response>")
    assert rendered.endswith("<|im_start|>assistant\n")


def test_system_prompts_name_every_tool() -> None:
    for syntax in (tags, hermes):
        for spec in SPECS.values():
            assert spec.name in syntax.system_prompt()
            assert spec.description in syntax.system_prompt()
    listed = [json.loads(x) for x in hermes.system_prompt().splitlines() if x.startswith('{"type"')]
    assert [x["function"]["name"] for x in listed] == ["search", "python"]


def test_every_configured_syntax_exists() -> None:
    for name in plugins.SYNTAXES.names:
        assert plugins.SYNTAXES.make(name, {}, SPECS).stops
    with pytest.raises(ValueError, match=r"rollout\.syntax='xml': choose one of tags, hermes"):
        plugins.SYNTAXES.make("xml", {}, SPECS)
