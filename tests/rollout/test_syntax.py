"""Tool-call syntaxes: what parses, what is malformed and why."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from rollout_fakes import SPECS

from system import plugins
from system.rollout.syntax.base import MalformedCall, ParsedCall
from system.rollout.syntax.hermes import HermesSyntax
from system.rollout.syntax.qwen_coder import QwenCoderSyntax
from system.rollout.syntax.tags import TagSyntax

SYNTAXES = tags, hermes, coder = TagSyntax(SPECS), HermesSyntax(SPECS), QwenCoderSyntax(SPECS)


def test_a_tool_may_not_have_the_name_of_another_tag() -> None:
    with pytest.raises(
        plugins.PluginError, match="a tool cannot be called 'answer' where calls are written as"
    ):
        TagSyntax({"answer": replace(SPECS["search"], name="answer")})


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


SEARCH = ParsedCall("search", {"query": "x"})


@pytest.mark.parametrize(
    "content",
    [
        '{"name": "search", "arguments": {"query": "x"}}',
        '\n{"name": "search", "arguments": {"query": "x"}}\n',
        '{"name": "search", "arguments": "{\\"query\\": \\"x\\"}"}',
        '{"name": "search", "parameters": {"query": "x"}}',
        '{"type": "function", "function": {"name": "search", "arguments": {"query": "x"}}}',
        '{"function": {"name": "search", "arguments": "{\\"query\\": \\"x\\"}"}}',
        '[{"name": "search", "arguments": {"query": "x"}}]',
        '```json\n{"name": "search", "arguments": {"query": "x"}}\n```',
        '```\n{"name": "search", "arguments": {"query": "x"}}```',
    ],
)
def test_hermes_takes_what_can_be_meant_in_one_way_only(content: str) -> None:
    assert hermes.parse(f"so <tool_call>{content}</tool_call>\n") == SEARCH


def test_hermes_parses_json() -> None:
    text = (
        'thinking\n<tool_call>\n{"name": "python", "arguments": {"code": "print(\\"</x>\\")"}}\n</tool_call>'
    )
    assert hermes.stops == ("</tool_call>",)
    assert hermes.parse(text) == ParsedCall("python", {"code": 'print("</x>")'})
    assert hermes.parse('<tool_call>{"name": "search"}</tool_call>\n') == ParsedCall("search", {})
    broken = '<tool_call>{"name": "python", "arguments": {"code": "a = 1\nb = 2"}}</tool_call>'
    assert hermes.parse(broken) == ParsedCall("python", {"code": "a = 1\nb = 2"})


CALL = '{"name": "search", "arguments": {"query": "x"}}'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("</tool_call>", "without"),
        (
            "<tool_call>{not json}</tool_call>",
            "not valid JSON: .*, line 1, column 2, at 'not json}'; write {",
        ),
        ('<tool_call>{"name": "search"</tool_call>', "not valid JSON: .* at its end; write"),
        ('<tool_call>{"name": "search",\n "arguments": {x}}</tool_call>', "line 2, column 16, at 'x}}'"),
        ("<tool_call></tool_call>", "not valid JSON"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "JSON"),
        ("<tool_call>[1]</tool_call>", "name"),
        ('<tool_call>{"name": 3}</tool_call>', "name"),
        (
            '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
            "unknown tool 'rm'; tools: search, python$",
        ),
        ('<tool_call>{"name": "serach"}</tool_call>', "tools: search, python; did you mean search"),
        ('<tool_call>{"name": "search", "arguments": "q"}</tool_call>', "object, not a str"),
        ('<tool_call>{"name": "search", "arguments": [1]}</tool_call>', "object, not a list"),
        (f"<tool_call>[{CALL}, {CALL}]</tool_call>", "a list of 2 calls: one call at a time"),
        (f"<tool_call>{CALL}\n{CALL}</tool_call>", "several calls in one <tool_call>: one call at a time"),
        (f"<tool_call>{CALL} and so on</tool_call>", "goes on after its end, at 'and so on'"),
        ("<tool_call>\n<function=search>\n</function>\n</tool_call>", 'not valid JSON.*write {"name"'),
        (f"<tool_call>{'[' * 99_999}</tool_call>", "nested too deeply"),
        (f'<tool_call>{{"name": {"7" * 5000}}}</tool_call>', "a number is too long"),
    ],
)
def test_hermes_says_where_and_why_it_refuses(text: str, reason: str) -> None:
    call = hermes.parse(text)
    assert isinstance(call, MalformedCall)
    assert re.search(reason, call.reason), call.reason


def coder_call(*parameters: tuple[str, str], name: str = "search") -> str:
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters)
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


def test_qwen_coder_parses_tags() -> None:
    assert coder.parse("so\n" + coder_call(("query", "x"))) == SEARCH
    assert coder.parse(coder_call(("query", "x")).removeprefix("<tool_call>\n")) == SEARCH
    assert coder.parse(coder_call()) == ParsedCall("search", {})
    code = "if x < 1:\n    print('</a>')"
    assert coder.parse(coder_call(("code", code), name="python")) == ParsedCall("python", {"code": code})
    typed = {"n": {"type": "integer"}, "of": {"type": "array"}, "as": {"type": "string"}}
    spec = replace(SPECS["search"], parameters={"type": "object", "properties": typed})
    text = coder_call(("n", "3"), ("of", '["a"]'), ("as", "3"), ("more", "4"))
    arguments = {"n": 3, "of": ["a"], "as": "3", "more": "4"}
    assert QwenCoderSyntax({"search": spec}).parse(text) == ParsedCall("search", arguments)
    assert QwenCoderSyntax({"search": spec}).parse(coder_call(("n", "x"))) == ParsedCall("search", {"n": "x"})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            f"<tool_call>{CALL}</tool_call>",
            "</tool_call> without <function=name>: write\n<tool_call>\n<function",
        ),
        (coder_call(name="rm"), "unknown tool 'rm'"),
        ("<tool_call><function=search></tool_call>", "does not end with </function>"),
        ("<tool_call><function=search>query=x</function></tool_call>", "was expected, at 'query=x'"),
        (
            "<tool_call><function=search></function><function=search></function></tool_call>",
            "two calls in one",
        ),
    ],
)
def test_qwen_coder_says_where_and_why_it_refuses(text: str, reason: str) -> None:
    call = coder.parse(text)
    assert isinstance(call, MalformedCall)
    assert reason in call.reason


def test_hermes_result_closes_the_turn_and_opens_the_next() -> None:
    rendered = hermes.render_result("42")
    assert rendered.startswith("<|im_end|>\n<|im_start|>user\n<tool_response>\n42\n</tool_response>")
    assert rendered.endswith("<|im_start|>assistant\n")


def test_each_syntax_describes_its_tools_and_knows_its_own_words() -> None:
    for syntax in SYNTAXES:
        told = syntax.describe()
        for spec in SPECS.values():
            assert spec.name in told
            assert spec.description in told
        assert [other.is_told_in(told) for other in SYNTAXES] == [other is syntax for other in SYNTAXES]
        assert not syntax.is_told_in("Use search and python.")
    listed = [json.loads(x) for x in hermes.describe().splitlines() if x.startswith('{"type"')]
    assert [x["function"]["name"] for x in listed] == ["search", "python"]


def test_every_configured_syntax_exists() -> None:
    for name in plugins.SYNTAXES.names:
        assert plugins.SYNTAXES.make(name, {}, SPECS).stops
    with pytest.raises(ValueError, match=r"rollout\.syntax='xml': choose one of tags, hermes, qwen3-coder"):
        plugins.SYNTAXES.make("xml", {}, SPECS)
