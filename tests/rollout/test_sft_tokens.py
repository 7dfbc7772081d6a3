"""Conversations as tokens: those of a rollout in which the model said the same; results are never learned."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from chat_templates import FAMILIES
from chat_tokenizers import CHATML, MAY_THINK, chatml
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_fakes import PROMPT, SPECS, Segment, make_world, ok

from system.plugins import SYNTAXES
from system.rollout.branching import Never
from system.rollout.chat import Chat
from system.rollout.encode import encode_text
from system.rollout.syntax.base import ParsedCall, Syntax
from system.rollout.tree_rollout import TreeRollout
from system.sft.encode import Encoder, parted
from system.sft.example import Example
from system.sft.forms import Conversation, Forms
from system.tasks.columns import RowUnusable
from system.tree.record import Kind, validate
from system.twin.clock import run

TAGS, HERMES, CODER = (SYNTAXES.make(name, {}, SPECS) for name in ("tags", "hermes", "qwen3-coder"))
TOOLS = [{"type": "function", "function": {"name": "search", "parameters": {}}}]
USER = {"role": "user", "content": "who?"}
# What texts of others may hold: tags of calls and results, special tokens, whole or begun.
ODD = st.lists(
    st.sampled_from(
        [
            "a",
            " b",
            "\n",
            "ü",
            "<search>",
            "</search>",
            "<result>",
            "</result>",
            "<|im_end|>",
            "<|im_",
            "<think>",
        ]
    ),
    max_size=8,
).map("".join)
PLAIN = st.text("ab \n<>/", max_size=12)


@cache
def chat(family: str, answers: str = "auto", syntax: str = "hermes") -> Chat:
    made = {"hermes": HERMES, "tags": TAGS}[syntax]
    return Chat(FAMILIES[family].tokenizer(), made, how="none", answers=answers)


def example(chat: Chat, syntax: Syntax, *messages: dict[str, Any], **row: Any) -> Example:
    found = Encoder(chat, syntax).example(Forms().conversation({"messages": messages, **row}, "x"))
    validate(found.tree())
    return found


def text(chat: Chat, tokens: Any) -> str:
    return chat.tokenizer.decode(
        list(map(int, tokens)), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def learned(found: Example) -> np.ndarray:
    """[T] whether a token is."""
    return np.repeat(found.kind == Kind.MODEL, found.end - found.start)


def said(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def heard(content: str) -> dict[str, str]:
    return {"role": "tool", "content": content}


# The tokens of a rollout


def rolled_out(world: Any) -> tuple[np.ndarray, np.ndarray]:
    """(Tokens, whether sampled) of the one path of a rollout."""
    tree = run(TreeRollout(world.context, PROMPT, seed=1).run())
    kinds = np.repeat(tree.kind == Kind.MODEL, tree.end - tree.start)
    return tree.tokens, kinds


@settings(max_examples=40, deadline=None)
@given(results=st.lists(ODD, min_size=1, max_size=3))
def test_by_the_template_they_are_a_rollout_s(results: list[str]) -> None:
    """Only the token that ends a turn with a call is learned here, and appended there."""
    call = '<tool_call>\n{"name": "search", "arguments": {"query": "x"}}\n</tool_call>'
    turns, answers = iter([f"hm {i} {call}" for i in range(len(results))]), iter(results)
    world = make_world(
        lambda _, rng: Segment(next(turns, "It is me.")), lambda *_: ok(next(answers)),
        syntax="hermes", policy=Never(1), leaves=1, roots=1, call_limit=9, max_response_tokens=9000,
        max_tool_result_tokens=900,
    )  # fmt: skip
    tokenizer = FAMILIES["qwen2.5"].tokenizer()
    asks = Chat(tokenizer, world.context.syntax, how="auto", answers="auto")
    assert asks.codec is not None
    world.engine.tokenizer, world.engine.end, world.engine.prompt_text = tokenizer, asks.codec.end, ""
    world.context = replace(world.context, tokenizer=tokenizer, asks=asks, vocab_size=len(tokenizer))
    tokens, sampled = rolled_out(world)
    messages = [USER]
    for i, result in enumerate(results):
        messages += [said(f"hm {i} {call}"), heard(result)]
    found = example(asks, world.context.syntax, *messages, said("It is me."))
    assert found.tokens.tolist() == tokens.tolist()
    more = learned(found) & ~sampled
    assert not (sampled & ~learned(found)).any()
    assert set(tokens[more].tolist()) <= {asks.codec.end}
    assert more.sum() == len(results)


@settings(max_examples=60, deadline=None)
@given(results=st.lists(PLAIN, min_size=1, max_size=3), in_text=st.booleans())
def test_by_the_syntax_they_are_a_rollout_s(results: list[str], in_text: bool) -> None:
    """As messages of a tool, and within one text as in ARPO's data."""
    call = "<think> hm </think> <search> x </search>"
    turns, answers = iter([call] * len(results)), iter(results)
    world = make_world(
        lambda _, rng: Segment(next(turns, " It is me.")), lambda *_: ok(next(answers)),
        policy=Never(1), leaves=1, roots=1, call_limit=9, max_response_tokens=9000,
        max_tool_result_tokens=900,
    )  # fmt: skip
    world.context = replace(world.context, asks=Chat(world.tokenizer, world.context.syntax))
    tokens, sampled = rolled_out(world)
    whole = "".join(f"{call} <result>\n{result}\n</result>" for result in results) + " It is me."
    apart = [one for result in results for one in (said(call), heard(result))]
    messages = [USER, said(whole)] if in_text else [USER, *apart, said(" It is me.")]
    found = example(world.context.chat, TAGS, *messages)
    assert found.tokens.tolist() == tokens.tolist()
    assert learned(found).tolist() == sampled.tolist()


# Texts that hold results


@settings(max_examples=300, deadline=None)
@given(written=st.text("ab<>/\n ", max_size=20) | ODD)
def test_the_parts_of_any_text_are_the_text(written: str) -> None:
    for syntax in (TAGS, HERMES):
        try:
            parts = parted(written, syntax)
        except RowUnusable:
            assert "result>" in written or "tool_response>" in written
            continue
        assert "".join(part.text for part in parts) == written
        assert (
            "<result>" not in "".join(part.text for part in parts if part.kind == Kind.MODEL)
            or syntax is HERMES
        )


@settings(max_examples=200, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.text("ab<> \n", max_size=6), st.text("ab<>/ \n", max_size=9)), max_size=4),
    nested=st.booleans(),
)
def test_nothing_of_a_result_is_learned(pairs: list[tuple[str, str]], nested: bool) -> None:
    """Whatever stands in it, other results included."""
    inner = [f"x <result>{result}</result> y" if nested else result for _, result in pairs]
    written = "".join(f"{turn}<result>{one}</result>" for (turn, _), one in zip(pairs, inner, strict=True))
    parts = parted(written + "end", TAGS)
    model = "".join(part.text for part in parts if part.kind == Kind.MODEL)
    assert model == "".join(turn.rstrip() for turn, _ in pairs) + "end"


@pytest.mark.parametrize(
    ("written", "reason"),
    [("a </result> b", "ends a result that has not begun"), ("a <result> b", "a result does not end")],
)
def test_tags_that_do_not_agree_are_refused(written: str, reason: str) -> None:
    with pytest.raises(RowUnusable, match=reason):
        example(chat("qwen2.5", "syntax", "tags"), TAGS, USER, said(written))


def test_a_whole_conversation_in_one_text_of_hermes() -> None:
    turn = "<|im_end|>\n<|im_start|>user\n<tool_response>\nAda <|im_end|>\n</tool_response><|im_end|>\n"
    written = f"<tool_call>x</tool_call>{turn}<|im_start|>assistant\nAda."
    asks = chat("qwen2.5")
    found = example(asks, HERMES, USER, said(written))
    assert text(asks, found.tokens[learned(found)]) == "<tool_call>x</tool_call>Ada.<|im_end|>"
    tokens = found.tokens.tolist()
    assert tokens.count(asks.end) == 5  # the template's two, two around the result, and the last; none in it


# By the template


@pytest.mark.parametrize("family", ["chatml", "qwen2.5", "qwen3-keeps", "llama3.1", "gemma", "hermes"])
def test_turns_are_put_by_the_model_s_own_template(family: str) -> None:
    asks = chat(family, "syntax", "tags")
    messages = [USER, said("Ada."), {"role": "user", "content": "Sure?"}, said("Yes.")]
    found = example(asks, TAGS, *messages)
    assert asks.turns is not None
    wanted = asks.turns.rendered(messages, (), add_generation_prompt=False)
    assert wanted.startswith(text(asks, found.tokens))
    assert wanted.removeprefix(text(asks, found.tokens)).strip() == ""
    end = text(asks, [asks.end])
    assert text(asks, found.tokens[learned(found)]) == f"Ada.{end}Yes.{end}"


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3-keeps"])
def test_calls_given_as_fields_are_written_by_the_template(family: str) -> None:
    asks = chat(family)
    call = {
        "id": "call00000",
        "type": "function",
        "function": {"name": "search", "arguments": {"q": "<|im_end|>"}},
    }
    turn = said("I look.", tool_calls=[call])
    messages = [USER, turn, {**heard("Ada"), "tool_call_id": "call00000"}, said("Ada.")]
    found = example(asks, HERMES, *messages, tools=TOOLS)
    assert asks.codec is not None
    wanted = asks.codec.rendered(messages, TOOLS, add_generation_prompt=False)
    assert wanted.rstrip("\n") == text(asks, found.tokens)
    one = '<tool_call>\n{"name": "search", "arguments": {"q": "<|im_end|>"}}\n</tool_call>'
    assert text(asks, found.tokens[learned(found)]) == f"I look.\n{one}<|im_end|>Ada.<|im_end|>"
    assert found.tokens.tolist().count(asks.end) == wanted.count("<|im_end|>") - 1  # the argument's is text


def test_a_thought_given_as_a_field_is_written_by_the_template() -> None:
    asks = chat("qwen3-keeps")
    found = example(asks, HERMES, USER, said("Ada.", reasoning_content="Hm."))
    assert text(asks, found.tokens[learned(found)]) == "<think>\nHm.\n</think>\n\nAda.<|im_end|>"


@pytest.mark.parametrize("family", ["chatml", "llama3.1"])
def test_a_thought_that_the_template_leaves_out_is_refused(family: str) -> None:
    with pytest.raises(RowUnusable, match=r"leaves out the thought \(reasoning_content\): put it into"):
        example(chat(family, "syntax", "tags"), TAGS, USER, said("Ada.", reasoning_content="Hm."))


def test_what_the_template_opens_is_not_said_twice() -> None:
    tokenizer = chatml(CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}"))
    asks = Chat(tokenizer, TAGS, how="none")
    assert asks.opened == "<think>\n"
    for written in ("<think>\nhm</think> Ada", "<think>hm</think> Ada"):
        found = example(asks, TAGS, USER, said(written))
        assert text(asks, found.tokens).endswith("assistant\n<think>\nhm</think> Ada<|im_end|>")
        assert text(asks, found.tokens[learned(found)]) == "hm</think> Ada<|im_end|>"
    assert MAY_THINK != CHATML


# By the syntax


def test_calls_given_as_fields_are_written_by_the_syntax_that_puts_the_answers() -> None:
    asks = chat("qwen2.5", "syntax", "tags")
    turn = said("I look.", tool_calls=[{"function": {"name": "search", "arguments": {"query": "it"}}}])
    found = example(asks, TAGS, USER, turn, heard("Ada </result> <|im_end|>"), said(" Ada."))
    assert text(asks, found.tokens[learned(found)]) == "I look. <search> it </search> Ada.<|im_end|>"
    assert text(asks, found.tokens).endswith(
        "</search> <result>\nAda </result> <|im_end|>\n</result> Ada.<|im_end|>"
    )
    assert found.kind.tolist() == [Kind.PROMPT, Kind.MODEL, Kind.TOOL, Kind.MODEL]


VALUES = st.text('ab <>/{}"\\ü', max_size=8)


@given(query=VALUES.map(str.strip).filter(lambda t: t and "search>" not in t))
def test_a_tag_is_read_as_it_was_written(query: str) -> None:
    call = ParsedCall("search", {"query": query})
    assert TAGS.parse(TAGS.write(call)) == call


@given(arguments=st.dictionaries(st.sampled_from(["a", "b"]), st.text('ab c{}"\\ü\n', max_size=8)))
def test_a_call_is_read_as_it_was_written(arguments: dict[str, str]) -> None:
    call = ParsedCall("search", arguments)
    assert HERMES.parse(HERMES.write(call)) == call
    one = ParsedCall("search", {key: value.strip() for key, value in arguments.items()})
    assert CODER.parse(CODER.write(one)) == one


# What is not learned, and what is refused


def test_a_turn_of_weight_0_is_read_only() -> None:
    asks = chat("qwen2.5")
    messages = [USER, said("Eve.", weight=0), {"role": "user", "content": "Sure?"}, said("No: Ada.")]
    found = example(asks, HERMES, *messages)
    assert text(asks, found.tokens[learned(found)]) == "No: Ada.<|im_end|>"
    assert "Eve.<|im_end|>" in text(asks, found.tokens)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([said("a <|im_end|> b")], "spells '<|im_end|>', which ends its turn"),
        ([said("", tool_calls=[{"function": {"name": "f", "arguments": {}}}] * 2), heard("a"), said("b")],
         "2 calls in one message"),
        ([said("", tool_calls=[{"name": "search", "arguments": {"a": 1, "b": 2}}]), heard("a"), said("b")],
         "a tag holds one argument"),
    ],
)  # fmt: skip
def test_what_cannot_be_put_says_why(messages: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(RowUnusable) as caught:
        example(chat("qwen2.5", "syntax", "tags"), TAGS, USER, *messages)
    assert str(caught.value).startswith("x: ")
    assert reason in str(caught.value)


def test_a_result_in_the_text_beside_calls_as_fields_is_refused() -> None:
    turn = said("a <tool_response>b</tool_response>", tool_calls=[{"name": "search", "arguments": {}}])
    with pytest.raises(RowUnusable, match="a result stands in the text of a message whose"):
        example(chat("qwen2.5"), HERMES, USER, turn, heard("x"), said("y"))


def test_fields_need_a_template() -> None:
    from rollout_fakes import PieceTokenizer

    asks = Chat(PieceTokenizer(), TAGS)
    with pytest.raises(RowUnusable, match="need a chat template, and the model has none"):
        example(asks, TAGS, USER, said("Ada", reasoning_content="hm"))
    follow = example(asks, TAGS, USER, said("Ada"), {"role": "user", "content": "Sure?"}, said("Yes"))
    assert text(asks, follow.tokens) == "who?Ada<eos>\n<user>\nSure?\n</user>\nYes<eos>"


# Long ones


def test_a_long_one_is_cut_behind_a_turn_or_a_call_of_the_model() -> None:
    asks = chat("qwen2.5", "syntax", "tags")
    whole = example(
        asks, TAGS, USER, said("a<search>x</search><result>r</result>b<search>y</search><result>s</result>c")
    )
    ends = whole.end[whole.kind == Kind.MODEL].tolist()
    for most in range(int(whole.end[0]), whole.tokens.size + 1):
        cut = whole.cut(most)
        fits = [end for end in ends if end <= most]
        assert (cut is None) == (not fits)
        if cut:
            assert cut.tokens.size == fits[-1]
            assert cut.tokens.tolist() == whole.tokens[: fits[-1]].tolist()
            validate(cut.tree())


def test_learned_tokens_are_counted() -> None:
    asks = chat("qwen2.5")
    found = example(asks, HERMES, USER, said("Ada."))
    assert found.learned == int(learned(found).sum()) == encode_text(asks.tokenizer, "Ada.").size + 1
    assert isinstance(Forms().conversation({"messages": [USER, said("Ada.")]}, "x"), Conversation)
