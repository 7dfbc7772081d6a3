"""Arguments of calls as models write them, and methods as authors do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, Literal

import pytest

from system.config import ToolsConfig
from system.envs.arguments import typed
from system.envs.plain import PlainEnvironment
from system.envs.protocol import Acted, Action, Ids, Observation, Start, WorldFailed
from system.plugins import SYNTAXES
from system.rollout.syntax.base import MalformedCall, ParsedCall, bounded
from system.tools.outcome import CallContext, ToolOutcome, ToolSpec, ToolStatus
from system.tools.service import ToolService
from system.tools.tool import CallRefused
from system.tree.prompt import Prompt


class Scales:
    fork = "deepcopy"

    def reset(self, prompt: Prompt) -> None:
        self.total = 0.0

    def weigh(self, pounds: float) -> str:
        """Add to the scales."""
        self.total += pounds
        return str(self.total)

    def reward(self) -> float:
        return -self.total


SPECS = PlainEnvironment("x:Scales", Scales, Scales).tools


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "[[NaN]]", "1" + 400 * "0"])
def test_a_number_by_which_nobody_can_calculate_is_refused(number: str) -> None:
    """It would end its branch without a score, which a model may come to prefer to a bad one."""
    hermes = SYNTAXES.make("hermes", {}, SPECS)
    call = f'{{"name": "weigh", "arguments": {{"pounds": {number}}}}}'
    parsed = hermes.parse(f"<tool_call>{call}</tool_call>")
    assert parsed == ParsedCall("weigh", parsed.arguments) if isinstance(parsed, ParsedCall) else False
    refused = bounded(parsed)
    assert refused == MalformedCall("a number in the arguments is not finite, or too large")


def test_numbers_that_are_some_are_taken() -> None:
    call = ParsedCall("weigh", {"a": [1, -2.5, True, None, "NaN", {"b": 1e308}], "c": 10**300})
    assert bounded(call) is call


@pytest.mark.parametrize("text", ["nan", "inf", "-Infinity", "1e999", "1" + 400 * "0"])
def test_nor_is_a_text_that_spells_one(text: str) -> None:
    with pytest.raises(CallRefused, match="is not of type 'number'"):
        typed(SPECS["weigh"], {"pounds": text})


class Shop:
    fork = "replay"

    def reset(self, prompt: Prompt) -> None:
        """Nothing to do."""

    def buy(self, count: int | None = None) -> str:
        return repr(count)

    def choose(self, shelf: Literal[1, 2]) -> str:
        return repr(shelf)

    def pack(self, sizes: list[int]) -> str:
        return repr(sizes)

    def look(self) -> str:
        """Look around."""
        return "shelves"

    def name(self, word: str | int) -> str:
        return repr(word)

    @staticmethod
    def price(pence: int) -> str:
        """What it costs."""
        return f"{pence / 100:.2f}"

    @classmethod
    def owner(cls, year: int) -> str:
        return f"{cls.__name__} {year}"


SHOP = PlainEnvironment("x:Shop", Shop, Shop)


@pytest.mark.parametrize(
    ("tool", "argument", "text", "answer"),
    [
        ("buy", "count", "3", "3"),
        ("buy", "count", " null ", "None"),
        ("choose", "shelf", "2", "2"),
        ("pack", "sizes", "[1, 2]", "[1, 2]"),
        ("name", "word", "3", "'3'"),
        ("price", "pence", "250", "2.50"),
        ("owner", "year", "1984", "Shop 1984"),
    ],
)
def test_a_text_is_read_as_what_is_wanted(tool: str, argument: str, text: str, answer: str) -> None:
    """Between tags there is nothing but text."""
    for syntax, call in (
        ("tags", f"<{tool}> {text} </{tool}>"),
        (
            "qwen3-coder",
            f"<tool_call>\n<function={tool}>\n<parameter={argument}>\n{text}\n</parameter>\n</function>\n"
            "</tool_call>",
        ),
    ):
        parsed = SYNTAXES.make(syntax, {}, SHOP.tools).parse(call)
        assert isinstance(parsed, ParsedCall), syntax
        world = SHOP.open(Start(Ids("r", "train", "1", "0"), Prompt("p", (), ()), 0, 1.0))
        made = Acted(tool, typed(SHOP.tools[tool], parsed.arguments))
        answered: Any = world.step(Action((made,), "", Ids("r", "train", "1", "0"), 1.0))
        assert isinstance(answered, Observation)
        assert answered.messages[0].text == answer, syntax


def test_a_tool_without_arguments_can_be_called_by_tags() -> None:
    tags = SYNTAXES.make("tags", {}, {"look": SHOP.tools["look"]})
    for written in ("<look></look>", "<look> </look>", "<look>\n</look>"):
        assert tags.parse(f"I see. {written}") == ParsedCall("look", {}), written
    assert typed(SHOP.tools["look"], {}) == {}
    told = tags.parse("<look> around </look>")
    assert told == MalformedCall("<look> takes nothing: write <look></look>")
    assert tags.parse(tags.write(ParsedCall("look", {}))) == ParsedCall("look", {})
    assert "Call it as <look></look>." in tags.describe()


class Squares:
    """A tool that keeps no state."""

    spec = ToolSpec(
        "square",
        "The square of a number.",
        {"type": "object", "properties": {"number": {"type": "integer"}}, "required": ["number"]},
        "number",
    )

    async def run(self, arguments: Mapping[str, Any], context: CallContext) -> ToolOutcome:
        return ToolOutcome(ToolStatus.OK, str(arguments["number"] ** 2))

    async def check(self) -> None:
        """Nothing has to be there for it."""


async def test_tools_without_a_state_read_texts_as_well() -> None:
    tools = ToolService([Squares()], ToolsConfig())
    call = SYNTAXES.make("tags", {}, tools.specs).parse("<square> 12 </square>")
    assert isinstance(call, ParsedCall)
    assert (await tools.call(call.tool, call.arguments, CallContext())).text == "144"
    refused = await tools.call(call.tool, {"number": "twelve"}, CallContext())
    assert refused.text == "square: number: 'twelve' is not of type 'integer'."
    await tools.close()


def test_what_a_text_does_not_spell_is_refused() -> None:
    for tool, argument, text in (
        ("buy", "count", "three"),
        ("choose", "shelf", "3"),
        ("pack", "sizes", json.dumps("x")),
        ("pack", "sizes", "[" * 100_000),
        ("pack", "sizes", "[NaN]"),
        ("pack", "sizes", "[" * 60 + "]" * 60),
    ):
        with pytest.raises(CallRefused):
            typed(SHOP.tools[tool], {argument: text})


def test_a_type_of_the_third_draft_that_is_a_schema_is_left_to_the_check() -> None:
    draft = "http://json-schema.org/draft-03/schema#"
    schema = {"$schema": draft, "properties": {"a": {"type": ["integer", {"enum": ["x"]}]}}}
    assert typed(ToolSpec("t", "", schema, "a"), {"a": "x"}) == {"a": "x"}


class Unready:
    """Its method returns what is no text yet."""

    def reset(self, prompt: Prompt) -> None:
        """Nothing to do."""

    def read(self, kind: str) -> Any:
        if kind == "coroutine":
            return asyncio.sleep(0, "text")
        return b"text" if kind == "bytes" else iter(["text"])


@pytest.mark.filterwarnings("ignore:coroutine 'sleep' was never awaited")
@pytest.mark.parametrize("kind", ["bytes", "coroutine", "iterator"])
def test_a_method_that_returns_no_text_costs_the_branch(kind: str) -> None:
    ids = Ids("r", "train", "1", "0")
    world = PlainEnvironment("x:Unready", Unready, Unready).open(Start(ids, Prompt("p", (), ()), 0, 1.0))
    with pytest.raises(WorldFailed, match=r"bad_observation: .*no Observation and no text"):
        world.step(Action((Acted("read", {"kind": kind}),), "", ids, 1.0))
