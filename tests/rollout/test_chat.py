"""What the model is told: tools, calls and the form of answers; what a template opens; where a turn ends."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_tokenizers import CHATML, HERMES_TOOLS, MAY_THINK, chatml
from rollout_fakes import PROMPT, SPECS, PieceTokenizer, Segment, World, make_world, ok

from system.config import Config, ConfigError
from system.plugins import SYNTAXES
from system.rollout.chat import Chat, PromptError, make_chat
from system.rollout.reward import BranchView, Score
from system.rollout.rewards.arpo import ArpoReward
from system.rollout.tree_rollout import TreeRollout
from system.tree.prompt import Prompt
from system.tree.record import Kind, Tree
from system.twin.clock import run

USER = {"role": "user", "content": "who?"}
BRIEF = {"role": "system", "content": "be brief"}
TAGS, HERMES, CODER = (SYNTAXES.make(name, {}, SPECS) for name in ("tags", "hermes", "qwen3-coder"))


def text(chat: Chat, *messages: dict[str, str]) -> str:
    return chat.tokenizer.decode(chat.encode(messages or (USER,)).tolist())


def ids(chat: Chat, *pieces: str) -> list[int]:
    return chat.tokenizer.convert_tokens_to_ids(list(pieces))


def test_a_chat_template_makes_the_prompt() -> None:
    chat = Chat(chatml())
    assert chat.encode([USER]).dtype == np.int32
    assert text(chat, BRIEF, USER) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nwho?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_without_a_template_the_texts_are_the_prompt() -> None:
    assert text(Chat(chatml("")), BRIEF, USER) == "be brief\nwho?"
    told = text(Chat(chatml(""), TAGS, how="auto"))
    assert told == f"{TAGS.describe()}\nwho?"


def test_a_last_message_of_the_model_is_gone_on_with() -> None:
    begun = {"role": "assistant", "content": "Let me see.\n<think>"}
    assert text(Chat(chatml()), USER, begun).endswith("<|im_start|>assistant\nLet me see.\n<think>")


def test_the_template_tells_of_the_tools_where_it_teaches_the_syntax() -> None:
    chat = Chat(chatml(HERMES_TOOLS + CHATML), HERMES, how="auto")
    assert chat.told_by([USER]) == "template"
    told = text(chat, BRIEF, USER)
    assert told.startswith("<|im_start|>system\nbe brief\n\nTools:\n{")
    assert told.count("look something up") == told.count("run code") == 1
    assert HERMES.describe() not in told
    listed = [json.loads(line) for line in told.splitlines() if line.startswith('{"type"')]
    assert [one["function"]["name"] for one in listed] == ["search", "python"]


@pytest.mark.parametrize("syntax", [TAGS, CODER])
def test_else_the_syntax_tells_of_them(syntax: Any) -> None:
    chat = Chat(chatml(HERMES_TOOLS + CHATML), syntax, how="auto")
    assert chat.told_by([USER]) == "words"
    assert text(chat) == text(Chat(chatml()), {"role": "system", "content": syntax.describe()}, USER)
    both = {"role": "system", "content": f"be brief\n\n{syntax.describe()}"}
    assert text(chat, BRIEF, USER) == text(Chat(chatml()), both, USER)
    with pytest.raises(ConfigError, match=r"task\.tools_in_prompt=template: .* does not teach"):
        Chat(chatml(HERMES_TOOLS + CHATML), syntax, how="template")


def test_words_are_forced_and_none_leaves_the_prompt_alone() -> None:
    template = HERMES_TOOLS + CHATML
    assert HERMES.describe() in text(Chat(chatml(template), HERMES, how="words"))
    bare = text(Chat(chatml(template)))
    assert text(Chat(chatml(template), HERMES, how="none", answer_format="Answer.")) == bare
    assert text(Chat(chatml(template), SYNTAXES.make("tags", {}, {}), how="auto")) == bare


def test_data_that_tell_of_the_tools_themselves_are_left_alone() -> None:
    arpo = {"role": "system", "content": "Write <search> a query </search> or <python> code </python>."}
    chat = Chat(chatml(), TAGS, how="auto")
    assert chat.told_by([arpo, USER]) == "data"
    assert text(chat, arpo, USER) == text(Chat(chatml()), arpo, USER)
    search_r1 = {"role": "user", "content": "You can call a search engine by <search> query </search>. Who?"}
    assert chat.told_by([search_r1]) == "words"  # of python it says nothing
    only = SYNTAXES.make("tags", {}, {"search": SPECS["search"]})
    assert Chat(chatml(), only, how="auto").told_by([search_r1]) == "data"


def test_the_form_of_an_answer_is_told_once() -> None:
    chat = Chat(chatml(), how="auto", answer_format=ArpoReward.answer_format)
    assert text(chat).startswith(f"<|im_start|>system\n{ArpoReward.answer_format}<|im_end|>")
    told = {"role": "user", "content": "Who? Write <answer> \\boxed{...} </answer>."}
    assert text(chat, told) == text(Chat(chatml()), told)


def test_arguments_of_the_template() -> None:
    assert Chat(chatml(MAY_THINK)).opened == ""
    chat = Chat(chatml(MAY_THINK), arguments={"enable_thinking": False})
    assert text(chat).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert chat.opened == "<think>\n\n</think>\n\n"
    for template, name, reason in (
        (MAY_THINK, "enable_thinkng", "no such argument; did you mean enable_thinking"),
        (MAY_THINK, "tokenize", "is set by the system"),
        ("", "enable_thinking", "no chat template"),
    ):
        with pytest.raises(ConfigError, match=rf"task\.template\.{name}.*{reason}"):
            Chat(chatml(template), arguments={name: False})


def test_the_view_of_a_node_begins_with_what_was_opened_for_it() -> None:
    """Of real tokens, too, here one for each byte."""
    chat = Chat(chatml(MAY_THINK), arguments={"enable_thinking": False})
    prompt = chat.encode([USER])
    said = chat.tokenizer.encode("so", add_special_tokens=False)
    path = np.array([*prompt, *said, *ids(chat, "<|im_end|>")])
    assert chat.view(path, prompt.size, Kind.MODEL) == "<think>\n\n</think>\n\nso"
    assert Chat(chatml()).view(path[:-1], prompt.size + 1, Kind.MODEL) == "o"
    assert chat.view(path[: prompt.size], prompt.size - 30, Kind.TOOL).endswith("assistant\n")


def test_messages_that_the_template_refuses() -> None:
    refuses = "{%- if messages[0].role == 'system' %}{{- raise_exception('no system') }}{%- endif %}" + CHATML
    assert text(Chat(chatml(refuses))) == text(Chat(chatml()))
    with pytest.raises(PromptError, match="the chat template refuses the messages: no system"):
        Chat(chatml(refuses)).encode([BRIEF, USER])
    with pytest.raises(PromptError, match="no tokens"):
        Chat(chatml("")).encode([{"role": "user", "content": ""}])


def test_the_templates_end_of_turn_ends_generation(tmp_path: Path) -> None:
    base = Chat(chatml(eos="<|endoftext|>"))
    text_end, turn_end = ids(base, "<|endoftext|>", "<|im_end|>")
    assert base.ends == tuple(sorted((text_end, turn_end)))
    assert base.stop_ids == (turn_end,)  # at the tokenizer's own EOS every engine stops
    assert base.end == turn_end
    assert base.decode(np.array([*base.tokenizer.encode("hi"), turn_end])) == "hi"
    assert (Chat(chatml()).ends, Chat(chatml()).stop_ids) == ((turn_end,), ())
    plain = Chat(chatml("", eos="<|endoftext|>"))
    assert (plain.ends, plain.end) == ((text_end,), text_end)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [text_end, 7]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": None}))
    configured = make_chat(Config(), chatml(), str(tmp_path), TAGS)
    assert configured.ends == tuple(sorted((7, text_end, turn_end)))
    assert configured.stop_ids == tuple(sorted((7, text_end)))


def test_the_configuration_decides_who_tells(tmp_path: Path) -> None:
    config = Config()
    assert make_chat(config, chatml(), "", TAGS).told_by([USER]) == "nobody"  # a model made here
    config.model.path = str(tmp_path)
    chat = make_chat(config, chatml(), config.model.path, TAGS)
    assert chat.told_by([USER]) == "words"
    assert text(chat).count(ArpoReward.answer_format) == 1
    config.rollout.call_limit = 0
    assert make_chat(config, chatml(), config.model.path, TAGS).told_by([USER]) == "nobody"
    config.reward.name = "task"
    assert text(make_chat(config, chatml(), config.model.path, TAGS)) == text(Chat(chatml()))


class OpenedPieces(PieceTokenizer):
    """Pieces, under a template that begins the model's turn."""

    chat_template = "opened"
    added_tokens_decoder: dict[int, str] = {}  # noqa: RUF012

    def __init__(self, opened: str) -> None:
        super().__init__()
        self.opened = opened

    def apply_chat_template(self, messages: Any, *, tokenize: bool, **_: Any) -> Any:
        made = "".join(message["content"] for message in messages) + "\n" + self.opened
        return self.encode(made) if tokenize else made


class SeesBranches:
    """ArpoReward that remembers what it was given."""

    def __init__(self) -> None:
        self.views: list[BranchView] = []

    def score(self, prompt: Prompt, branch: BranchView) -> Score:
        self.views.append(branch)
        return ArpoReward().score(prompt, branch)


def grown(syntax: str, opened: str, *said: str) -> tuple[World, Tree, list[BranchView]]:
    """A tree of two roots whose segments say ``said`` in turn, under a template that opens ``opened``."""
    reward, tokenizer = SeesBranches(), OpenedPieces(opened)

    def script(text: str, rng: np.random.Generator) -> Segment:
        return Segment(said[text.count("found it")])

    world = make_world(script, lambda *_: ok(), syntax=syntax, reward=reward, leaves=2, roots=2)
    world.engine.tokenizer = world.tokenizer = tokenizer
    context = replace(world.context, tokenizer=tokenizer, asks=Chat(tokenizer))
    tree = run(TreeRollout(context, PROMPT, seed=1).run())
    return world, tree, reward.views


ANSWER = "so </think> <answer> \\boxed{ me } </answer>"


@pytest.mark.parametrize(
    ("opened", "answer"),
    [("<think>\n", ANSWER), ("<think>\n\n</think>\n\n", "<answer> \\boxed{ me } </answer>")],
)
def test_what_a_template_opens_counts_for_the_reward_and_is_not_trained(opened: str, answer: str) -> None:
    _, tree, views = grown("tags", opened, answer)
    assert tree.reward.tolist() == [1.0, 1.0]
    assert views[0].segments == ((Kind.MODEL, opened + answer),)
    model = tree.kind == Kind.MODEL
    sampled = len(OpenedPieces("").encode(answer)) + 1  # and EOS
    assert (tree.end - tree.start)[model].tolist() == [sampled, sampled]


def test_it_is_opened_again_in_every_turn_of_the_model() -> None:
    call = 'hm </think> <tool_call>{"name": "search", "arguments": {"query": "x"}}</tool_call>'
    world, tree, views = grown("hermes", "<think>\n", call, ANSWER)
    assert tree.reward.tolist() == [1.0, 1.0]
    kinds, texts = zip(*views[0].segments, strict=True)
    assert kinds == (Kind.MODEL, Kind.TOOL, Kind.MODEL)
    assert texts[0] == f"<think>\n{call}"
    assert texts[1].endswith("assistant\n")
    assert texts[2] == f"<think>\n{ANSWER}"
    assert world.text(world.engine.requests[-1].input_ids).endswith("assistant\n<think>\n")
    assert views[0].model_text.count("<think>") == views[0].model_text.count("</think>") == 2


def test_with_tags_the_turn_goes_on_after_a_result() -> None:
    call = "hm </think> <search> x </search>"
    world, tree, views = grown("tags", "<think>\n", call, f"<think> {ANSWER}")
    assert tree.reward.tolist() == [1.0, 1.0]
    assert world.text(world.engine.requests[-1].input_ids).endswith("</result>")
    assert [kind for kind, _ in views[0].segments] == [Kind.MODEL, Kind.TOOL, Kind.MODEL]


def test_the_engine_is_told_where_a_turn_ends() -> None:
    world = make_world(lambda text, rng: Segment("<think> x </think>"), leaves=2, roots=2)
    asks = Chat(world.tokenizer, ends=[5])
    run(TreeRollout(replace(world.context, asks=asks), PROMPT, seed=1).run())
    assert {request.sampling.stop_token_ids for request in world.engine.requests} == {(5,)}
