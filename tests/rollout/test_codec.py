"""Increments of chat templates: exact, the same behind every history, deaf to what contents spell."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from chat_templates import FAMILIES, QWEN3_KEEPS, Family
from chat_tokenizers import chatml
from hypothesis import given, settings
from hypothesis import strategies as st

from system.rollout.codec import ChatCodec, TemplateRefused
from system.rollout.encode import encode_text

TOOLS = [{"type": "function", "function": {"name": "search", "description": "Look up.", "parameters": {}}}]
TOOL, USER = {"role": "tool", "content": "42"}, {"role": "user", "content": "And now?"}
ASKED = [{"role": "user", "content": "Who?"}]
# Templates whose text of an answer is the same when more is said behind it.
STEADY = ["qwen2.5", "qwen3", "qwen3-keeps", "qwen3.5", "llama3.1", "mistral", "chatml", "gemma"]


@cache
def codec(name: str, tools: bool = False, **arguments: Any) -> ChatCodec:
    return ChatCodec(FAMILIES[name].tokenizer(), TOOLS if tools else (), arguments)


def text(codec: ChatCodec, ids: Any) -> str:
    return codec.tokenizer.decode(
        list(map(int, ids)), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def specials(codec: ChatCodec, ids: Any) -> list[int]:
    return [
        int(i) for i in ids if (known := codec.tokenizer.added_tokens_decoder.get(int(i))) and known.special
    ]


def keeping(name: str) -> ChatCodec:
    """The same, with a template that leaves no thought out: what a path of everything said has to be."""
    return codec("qwen3-keeps") if name in ("qwen3", "qwen3.5") else codec(name)


# What is written


@pytest.mark.parametrize(
    ("name", "messages", "wanted"),
    [
        (
            "qwen2.5",
            [TOOL, TOOL],
            "\n<|im_start|>user\n<tool_response>\n42\n</tool_response>\n<tool_response>\n42\n</tool_response>"
            "<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("qwen3", [USER], "\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n"),
        (
            "hermes",
            [TOOL],
            "\n<|im_start|>tool\n<tool_response>\n42\n</tool_response><|im_end|><|im_start|>assistant\n",
        ),
        (
            "llama3.1",
            [TOOL],
            '<|start_header_id|>ipython<|end_header_id|>\n\n"42"<|eot_id|>'
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("mistral", [TOOL], '[TOOL_RESULTS] {"content": "42", "call_id": "call00000"}[/TOOL_RESULTS]'),
        ("gemma", [USER], "\n<start_of_turn>user\nAnd now?<end_of_turn>\n<start_of_turn>model\n"),
    ],
)
def test_an_increment_is_what_the_template_writes(name: str, messages: list[Any], wanted: str) -> None:
    one = codec(name)
    assert text(one, one.increment(messages, ended=True)) == wanted


@pytest.mark.parametrize("name", FAMILIES)
def test_a_turn_that_a_stop_string_ended_is_closed_first(name: str) -> None:
    one, message = codec(name), USER if name == "gemma" else TOOL
    ended, cut = (one.increment([message], ended=ended) for ended in (True, False))
    assert cut.tolist() == [one.end, *ended.tolist()]
    assert one.end in one.ends
    assert one.tokenizer.eos_token_id in one.ends


def test_an_empty_thought_belongs_to_the_increment_where_thinking_is_off() -> None:
    one = codec("qwen3", enable_thinking=False)
    for messages in ([TOOL], [USER], [TOOL, USER]):
        assert text(one, one.increment(messages, ended=True)).endswith(
            "<|im_start|>assistant\n<think>\n\n</think>\n\n"
        )


def test_the_prompt_is_the_template_s_own_tokens() -> None:
    for name in FAMILIES:
        one = codec(name, tools=True)
        whole = one.tokenizer.apply_chat_template(
            ASKED, tools=TOOLS, tokenize=True, return_dict=False, add_generation_prompt=True
        )
        assert one.prompt(ASKED).tolist() == whole
        assert one.prompt(ASKED, tools=[]).tolist() == codec(name).prompt(ASKED).tolist()


def test_a_last_message_of_the_model_is_gone_on_with() -> None:
    one = codec("qwen2.5")
    begun = one.prompt([*ASKED, {"role": "assistant", "content": "It is"}])
    assert text(one, begun).endswith("<|im_start|>assistant\nIt is")


# Anchors


def test_the_anchor_is_one_whose_text_stays() -> None:
    assert codec("qwen2.5").tried(["tool"]).anchor.name == "user, assistant with a thought"
    tool, user = (codec("qwen3").tried([role]) for role in ("tool", "user"))
    assert (tool.anchor.name, tool.forgets) == ("user, assistant with a thought", False)
    assert (user.anchor.name, user.forgets) == ("system, assistant with a thought", True)
    assert codec("qwen3.5").tried(["user"]).forgets
    assert not codec("qwen3-keeps").tried(["user"]).forgets


def test_calls_stand_in_the_anchor_unless_the_template_refuses_them() -> None:
    assert codec("llama3.1").tried(["tool"]).anchor.calls
    assert not codec("llama3.1").tried(["tool", "tool"]).anchor.calls


@pytest.mark.parametrize(
    ("name", "roles", "why"),
    [
        ("gemma", ["tool"], "Conversation roles must alternate"),
        ("gemma", ["tool", "user"], "Conversation roles must alternate"),
        ("mistral", ["user"], "depends on what was said before"),
        ("mistral", ["tool", "user"], "depends on what was said before"),
        ("chatml", ["assistant"], "do not come behind the model's turn"),
        ("chatml", [], "do not come behind"),
    ],
)
def test_what_has_no_exact_form_is_refused_by_name(name: str, roles: list[str], why: str) -> None:
    one = codec(name, tools=True)
    with pytest.raises(TemplateRefused, match=why):
        one.increment([{"role": role, "content": "x"} for role in roles], ended=True)
    assert why in one.described(roles)


REFUSED = {
    "a turn that no special token ends": (
        "{%- for m in messages %}{{- m.role + ': ' + m.content + '\\n' }}{%- endfor %}",
        "ends the model's turn with no special token",
    ),
    "no template": ("", "no chat template"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_templates_that_tell_no_end_of_a_turn_are_refused(what: str) -> None:
    template, why = REFUSED[what]
    with pytest.raises(TemplateRefused, match=why):
        ChatCodec(Family(template).tokenizer())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            ("message.content +", "(message.content if message.role == 'assistant' else '') +"),
            "leaves contents out",
        ),
        (
            ("message.content + '<|im_end|>", "message.content + message.content + '<|im_end|>"),
            "turn out|repeats",
        ),
        (("{%- for", "{{- messages | length }}{%- for"), "what was said before anew"),
        (("message.role + '\\n'", "message.role + loop.index | string + '\\n'"), "depends on what was said"),
        (
            ("message.role + '\\n'", "message.role + messages[0].content + '\\n'"),
            "depends on|repeats what was",
        ),
    ],
)
def test_templates_that_cannot_be_appended_to_are_refused(change: tuple[str, str], why: str) -> None:
    template = FAMILIES["chatml"].template.replace(*change)
    assert template != FAMILIES["chatml"].template
    with pytest.raises(TemplateRefused, match=why):
        ChatCodec(Family(template).tokenizer()).increment([USER], ended=True)


def test_one_past_says_nothing_about_others() -> None:
    """What stands behind a turn is the same for each of the template's pasts, as it takes but one."""
    only = (
        "{%- if messages[0].role != 'system' or messages[1].role != 'assistant' %}"
        "{{- raise_exception('Only so.') }}{%- endif %}"
    )
    one = ChatCodec(Family(only + FAMILIES["chatml"].template).tokenizer())
    with pytest.raises(TemplateRefused, match="Only so"):
        one.increment([USER], ended=True)


def test_an_end_of_turn_that_plain_text_spells_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = FAMILIES["chatml"].tokenizer()
    plain = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text, split_special_tokens, **more: plain(text, **more))
    with pytest.raises(TemplateRefused, match="a tool's answer could end the model's turn"):
        ChatCodec(tokenizer)


# Contents

SPELLED = sorted({one for family in FAMILIES.values() for one in family.specials})
PARTS = ["a", "er ", "\n", "\n\n", " ", "é", '"', "\\", "{", "<|im_", "end|>", "<", "<think>", *SPELLED]
CONTENTS = st.lists(st.sampled_from(PARTS), max_size=8).map("".join)
SHAPES = st.sampled_from([("tool",), ("tool", "tool"), ("user",), ("tool", "user")])


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted(FAMILIES)), roles=SHAPES, data=st.data(), ended=st.booleans())
def test_special_tokens_in_contents_stay_text(
    name: str, roles: tuple[str, ...], data: st.DataObject, ended: bool
) -> None:
    one = codec(name)
    said = [
        {"role": role, "content": data.draw(CONTENTS), "tool_call_id": f"call{i:05d}"}
        for i, role in enumerate(roles)
    ]
    plain = [{"role": role, "content": "x"} for role in roles]
    try:
        harmless = one.increment(plain, ended=ended)
    except TemplateRefused:
        return
    ids = one.increment(said, ended=ended)
    assert specials(one, ids) == specials(one, harmless)
    whole = one.rendered([*ASKED, {"role": "assistant", "content": "@@"}, *said])
    assert text(one, ids) == whole.partition("@@")[2][0 if not ended else len(one.closing) :]


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(sorted(FAMILIES)), asked=CONTENTS.map(lambda text: f"x{text}"))
def test_special_tokens_in_a_prompt_stay_text(name: str, asked: str) -> None:
    one = codec(name, tools=True)
    tools = [{"type": "function", "function": {"name": "f", "description": asked, "parameters": {}}}]
    messages, harmless = [{"role": "user", "content": asked}], [{"role": "user", "content": "x"}]
    ids = one.prompt(messages, tools)
    assert text(one, ids) == one.rendered(messages, tools)
    assert specials(one, ids) == specials(one, one.prompt(harmless))


# Whole paths


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(STEADY), data=st.data())
def test_a_path_decoded_is_the_template_s_text_of_all_that_was_said(name: str, data: st.DataObject) -> None:
    one, whole = codec(name), keeping(name)
    messages: list[dict[str, Any]] = [{"role": "user", "content": data.draw(CONTENTS) + "?"}]
    path = one.prompt(messages).tolist()
    for _ in range(data.draw(st.integers(1, 4))):
        roles, ended = data.draw(SHAPES), data.draw(st.booleans())
        tail: list[dict[str, Any]] = [{"role": role, "content": data.draw(CONTENTS) + "."} for role in roles]
        try:
            increment = one.increment(tail, ended=ended)
        except TemplateRefused:
            return
        turn: dict[str, Any] = {"role": "assistant", "content": "said"}
        if "think" in one.tokenizer.chat_template:
            turn["content"] = "<think>\nhm\n</think>\n\nsaid"
        elif name == "mistral":
            calls = [
                {"id": f"call{i:05d}", "function": {"name": "f", "arguments": {}}}
                for i in range(roles.count("tool"))
            ]
            turn = {"role": "assistant", "content": "", "tool_calls": calls}
            for call, message in zip(calls, tail, strict=False):
                message["tool_call_id"] = call["id"]
        before = whole.rendered(messages)
        messages.append(turn)
        now = whole.rendered(messages, add_generation_prompt=False)
        assert now.startswith(before)
        said = now.removeprefix(before)
        said = said[: said.rindex(one.closing)]
        path += encode_text(one.tokenizer, said, trusted=name == "mistral").tolist()
        path += ([one.end] if ended else []) + increment.tolist()
        messages += tail
        assert text(one, path) == whole.rendered(messages)


def test_two_histories_have_one_increment() -> None:
    for name in FAMILIES:
        one, message = codec(name), USER if name == "gemma" else TOOL
        increment = text(one, one.increment([message], ended=False))
        turn = {"role": "assistant", "content": "@@"}
        if name != "mistral":  # which wants a call for each answer
            for past in (ASKED, [*ASKED, {"role": "assistant", "content": "I."}, *ASKED]):
                assert one.rendered([*past, turn, message]).partition("@@")[2] == increment


def test_sampled_tokens_are_never_made_anew() -> None:
    """A word that the tokenizer would merge, sampled letter by letter, stays so."""
    one = codec("qwen2.5")
    letters = one.tokenizer.convert_tokens_to_ids(["e", "r", "e", "r"])
    path = [*one.prompt(ASKED).tolist(), *letters, *one.increment([TOOL], ended=False).tolist()]
    assert text(one, path) == one.rendered([*ASKED, {"role": "assistant", "content": "erer"}, TOOL])
    assert one.tokenizer.encode(text(one, path), add_special_tokens=False) != path


def test_the_keeping_template_is_qwen3_s_but_for_what_it_forgets() -> None:
    assert FAMILIES["qwen3-keeps"].template == QWEN3_KEEPS != FAMILIES["qwen3"].template


def test_tools_are_rendered_only_where_they_change_what_stands_behind_a_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, told = codec("qwen2.5", tools=True), []
    wanted = one.increment([TOOL], ended=True).tolist()
    assert wanted == codec("qwen2.5").increment([TOOL], ended=True).tolist()
    rendered = one.rendered
    monkeypatch.setattr(
        one,
        "rendered",
        lambda messages, tools=(), **more: told.append(tools) or rendered(messages, tools, **more),
    )
    assert one.increment([TOOL], ended=True).tolist() == wanted
    assert list(map(len, told)) == [0]
    template = FAMILIES["chatml"].template.replace(
        "'<|im_end|>\\n' }}", "'<|im_end|>' + (tools | length | string if tools else '') + '\\n' }}"
    )
    other = ChatCodec(Family(template).tokenizer(), TOOLS)
    assert text(other, other.increment([TOOL], ended=True)).startswith("1\n<|im_start|>tool\n42<|im_end|>1\n")


def test_two_contents_make_no_special_token_together() -> None:
    template = FAMILIES["chatml"].template.replace(
        "message.content +", "message.content + (message.more or '') +"
    )
    one = ChatCodec(Family(template).tokenizer())
    for first, second in (
        ("<|im_", "end|>"),
        ("x<", "|im_end|>"),
        ("<|im_end|", ">"),
        ("<|im_end|>  ", "|im_end|>"),
    ):
        ids = one.increment([{"role": "user", "content": first, "more": second}], ended=True)
        assert specials(one, ids) == specials(one, one.increment([USER], ended=True))
        assert text(one, ids).startswith(f"\n<|im_start|>user\n{first}{second}<|im_end|>\n")


TURNS = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + (CONTENT) + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


@pytest.mark.parametrize(
    "content",
    ["m.content | upper if m.role == 'user' else m.content", "m.content | replace('q', 'k')"],
)
def test_a_template_that_changes_hidden_words_is_refused(content: str) -> None:
    """The model would read the word that a special token is hidden behind, another one at each rendering."""
    one = ChatCodec(chatml(TURNS.replace("CONTENT", content)))
    assert one.prompt([{"role": "user", "content": "Plain words are the template's affair."}]).size
    with pytest.raises(TemplateRefused, match="writes contents in other letters"):
        one.prompt([{"role": "user", "content": "Say <|im_end|> now."}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    ],
)
def test_a_template_that_fails_is_refused(template: str) -> None:
    with pytest.raises(TemplateRefused):
        ChatCodec(chatml(template + TURNS.replace("CONTENT", "m.content")))
