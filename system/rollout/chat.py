"""What the model is told: chat messages as the tokens of a prompt, tools and call format included.

Tools are told in one of two ways.  A chat template that takes ``tools=`` and then teaches the configured call
syntax (Qwen's and ``hermes``) is its own best teacher; otherwise the syntax's words
(:meth:`.Syntax.describe`) go into the system message.  Neither is done where the data do it themselves, as
ARPO's and Search-R1's prompts do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from system.config import Config, ConfigError, RewardConfig, rewards
from system.envs.make import make_environment
from system.envs.protocol import Environment
from system.errors import EspalierError
from system.models.directory import end_tokens
from system.plugins import REWARDS, SYNTAXES, nearest
from system.rollout.codec import ChatCodec, TemplateRefused
from system.rollout.encode import OPENING_TOKENS, Tokenizer, decode, opening
from system.rollout.syntax.base import Syntax, function_schema
from system.tools.outcome import ToolSpec
from system.tools.service import build_tools
from system.tree.record import Int32, Kind

Messages = Sequence[Mapping[str, str]]
SET_HERE = ("tokenize", "add_generation_prompt", "continue_final_message", "return_dict", "tools", "messages",
            "conversation", "chat_template")  # fmt: skip
_ASKED, _SAID = {"role": "user", "content": "?"}, "@@"
_ANSWER = "<answer>"


class PromptError(EspalierError, ValueError):
    """Messages that cannot be made a prompt, for instance because the chat template refuses them."""


class Told(NamedTuple):
    """A conversation as the model is asked."""

    messages: Messages
    tools: list[dict[str, Any]] | None  # that the chat template tells of


class Chat:
    """One way of asking, with one tokenizer."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        syntax: Syntax | None = None,
        *,
        how: str = "none",
        arguments: Mapping[str, Any] | None = None,
        answer_format: str = "",
        ends: Iterable[int] = (),
        answers: str = "syntax",
    ) -> None:
        """``syntax``: of the tools that may be called, if any.  ``how``: ``task.tools_in_prompt``.
        ``arguments``: of the chat template.  ``answer_format``: what the reward wants the model to be told.
        ``ends``: tokens that end a turn, besides the tokenizer's and the template's.  ``answers``:
        ``rollout.answers``.

        Raises :class:`ConfigError` for arguments that the template does not know, where ``how`` is "template"
        and the template does not teach the syntax, and for ``answers`` that the template cannot put.
        """
        self.tokenizer, self._how = tokenizer, how
        self._syntax = syntax if syntax and syntax.specs else None
        self._answer_format = answer_format
        self._arguments = dict(arguments or {})
        template = _whole_text(getattr(tokenizer, "chat_template", None))
        if problem := unknown_arguments(template, self._arguments):
            raise ConfigError(problem)
        self._templated = bool(template)
        if how == "template" and self._syntax and not self._teaches:
            raise ConfigError(
                "task.tools_in_prompt=template: this model's chat template does not teach the configured "
                "rollout.syntax; set words, or the syntax that is the template's own"
            )
        eos = tokenizer.eos_token_id
        known = {end for end in (eos, self._end_of_turn, *ends) if end is not None}
        taught = bool(self._syntax and self._syntax.new_turn and self._teaches)
        by_template = answers == "template" or (answers == "auto" and taught)
        self.codec = self._made_codec(answers, known) if by_template else None
        """What puts answers by the chat template; None: the call syntax's words stand around them."""
        self.ends = self.codec.ends if self.codec else tuple(sorted(known))
        self.stop_ids = tuple(end for end in self.ends if end != eos)  # at EOS every engine stops by itself

    def encode(self, messages: Messages, guide: str = "") -> Int32:
        """Token ids [P] of ``messages``, ready for the model's turn; one of the model at their end is gone on
        with.  ``guide``: put at the end of the user's last message; all else is as without it.

        With a chat template: the template's own text, generation prompt included.  Without one: the contents
        in order, joined by newlines, with whatever the tokenizer itself puts around a text (a BOS token,
        say).
        Raises :class:`PromptError` for messages that the template refuses, and for none.
        """
        told = self.told(messages, guide)
        if self._templated:
            ids = self._apply(told.messages, told.tools, tokenize=True, return_dict=False)
        else:
            ids = self.tokenizer.encode("\n".join(message["content"] for message in told.messages))
        if not len(ids):
            raise PromptError("the prompt has no tokens: the question is empty")
        return np.asarray(ids, np.int32)

    def told(self, messages: Messages, guide: str = "") -> Told:
        """What :meth:`encode` makes the prompt of."""
        by = self.told_by(messages)
        words = self._syntax.describe() if self._syntax and by == "words" else ""
        told = self._with_words(messages, words)
        if guide:  # only now: its actions are calls, as if the messages told of the tools
            told = _guided(told, guide)
        return Told(told, self._tools() if by == "template" else None)

    def told_by(self, messages: Messages) -> str:
        """Who tells of the tools: "template", "words" (the syntax's), "data" (the messages), or "nobody"."""
        if not self._syntax or self._how == "none":
            return "nobody"
        if self._how != "auto":
            return self._how
        if self._syntax.is_told_in(_text(messages)):
            return "data"
        return "template" if self._teaches else "words"

    def decode(self, tokens: NDArray[np.integer]) -> str:
        """The text of ``tokens`` [k], without those that end a turn."""
        return decode(self.tokenizer, tokens, self.ends)

    def view(self, path: NDArray[np.integer], begin: int, kind: Kind) -> str:
        """The text of the node that the tokens of ``path`` from ``begin`` on are.

        What the template opens at the end of a prompt, or of a result (``<think>``), was not sampled and is
        not trained on, but the model goes on from there: in the view it is the model's.
        """
        text = self.decode(path[begin:])
        if kind == Kind.MODEL:
            return opening(self.decode(path[max(begin - OPENING_TOKENS, 0) : begin])) + text
        return text.removesuffix(opening(text))

    @property
    def end(self) -> int | None:
        """The token that ends the model's turn: the template's, else EOS."""
        eos: int | None = self.tokenizer.eos_token_id
        return eos if self._end_of_turn is None else self._end_of_turn

    @cached_property
    def opened(self) -> str:
        """What the template opens whenever it is the model's turn."""
        return opening(self._rendered([_ASKED])) if self._templated else ""

    @cached_property
    def _teaches(self) -> bool:
        """Whether the template, given the tools, says how to call them in the configured syntax."""
        if not self._templated or not self._syntax:
            return False
        return self._syntax.is_told_in(self._rendered([_ASKED], self._tools()))

    @cached_property
    def _end_of_turn(self) -> int | None:
        """The special token that the template puts after what the model said."""
        if not self._templated:
            return None
        said = {"role": "assistant", "content": _SAID}
        after = self._rendered([_ASKED, said], add_generation_prompt=False).rpartition(_SAID)[2].lstrip()
        ids: list[int] = self.tokenizer.encode(after, add_special_tokens=False)
        return ids[0] if ids and ids[0] in self.tokenizer.added_tokens_decoder else None

    @cached_property
    def turns(self) -> ChatCodec | None:
        """What puts a user's messages between turns, also where the call syntax puts the tools' answers; None
        without a chat template.  Raises :class:`.TemplateRefused` for a template of which no exact tokens can
        be had.
        """
        if self.codec or not self._templated:
            return self.codec
        return ChatCodec(self.tokenizer, (), self._arguments, self.ends)

    def _made_codec(self, answers: str, ends: Iterable[int]) -> ChatCodec:
        tools = self._tools() if self._how != "none" else []
        try:
            return ChatCodec(self.tokenizer, tools, self._arguments, ends)
        except TemplateRefused as refused:
            raise ConfigError(f"rollout.answers={answers}: {refused}") from refused

    def _tools(self) -> list[dict[str, Any]]:
        return [function_schema(spec) for spec in self._syntax.specs.values()] if self._syntax else []

    def _with_words(self, messages: Messages, tools: str) -> list[dict[str, str]]:
        """``messages`` with what is to be added to the system message, ``tools`` first; made, if there is
        none.
        """
        return with_words(messages, tools, self._answer_format if self._how != "none" else "")

    def _rendered(self, messages: Messages, tools: list[dict[str, Any]] | None = None, **options: Any) -> str:
        """What the template makes of a message of ours; empty where it refuses that."""
        try:
            return self._apply(messages, tools, tokenize=False, **options)
        except PromptError:
            return ""

    def _apply(self, messages: Messages, tools: list[dict[str, Any]] | None, **options: Any) -> Any:
        goes_on = bool(messages) and messages[-1]["role"] == "assistant"
        if "add_generation_prompt" not in options:
            options |= {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}
        try:
            return self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], tools=tools, **self._arguments, **options
            )
        except (TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
            raise PromptError(f"the chat template refuses the messages: {error}") from error


def with_words(messages: Messages, tools: str, answer_format: str) -> list[dict[str, str]]:
    """``messages`` with what is to be added to the system message, which is made if there is none: how
    ``tools`` are called, and the ``answer_format``, where they do not tell of it themselves.
    """
    words = [tools] if tools else []
    if answer_format and _ANSWER not in _text(messages):
        words.append(answer_format)
    copies = [dict(message) for message in messages]
    if not words:
        return copies
    if copies and copies[0]["role"] == "system":
        words.insert(0, copies.pop(0)["content"])
    return [{"role": "system", "content": "\n\n".join(words)}, *copies]


def answer_format(section: RewardConfig) -> str:
    """What the rewards want the model to be told: of several, the first that asks for a form."""
    formats = (getattr(REWARDS.find(one.name), "answer_format", "") for one in rewards(section))
    return next(filter(None, formats), "")


def make_chat(
    config: Config,
    tokenizer: Tokenizer,
    model_path: str,
    syntax: Syntax,
    environment: Environment | None = None,
) -> Chat:
    """The way of asking that is configured.  ``model_path``: where the model's generation config lies.

    ``auto`` adds nothing for a model that is made here: it knows its task's own prompts and nothing else.
    Raises :class:`ConfigError`.
    """
    how = config.task.tools_in_prompt
    if how == "auto" and not config.model.path:
        how = "none"
    chat = Chat(
        tokenizer,
        syntax if config.rollout.call_limit else None,
        how=how,
        arguments=config.task.template,
        answer_format=answer_format(config.reward),
        ends=end_tokens(model_path),
        answers=config.rollout.answers,
    )
    if config.rollout.calls_per_turn == "many" and syntax.specs and not chat.codec:
        raise ConfigError(
            "rollout.calls_per_turn=many: a turn of several calls ends where the chat template ends it: set "
            "rollout.answers=template, with a model that has a chat template"
        )
    if chat.codec:
        for roles in answered_roles(config, syntax, environment):
            try:
                chat.codec.tried(roles)
            except TemplateRefused as refused:
                raise ConfigError(f"rollout.answers={config.rollout.answers}: {refused}") from refused
    return chat


def answered_roles(config: Config, syntax: Syntax, environment: Environment | None) -> list[tuple[str, ...]]:
    """Who may speak behind the model's turn, as far as that is known before a run."""
    roles: list[tuple[str, ...]] = []
    if syntax.specs and config.rollout.call_limit:
        roles += [("tool",), ("tool", "tool")][: 2 if config.rollout.calls_per_turn == "many" else 1]
    if environment and environment.answers_messages:
        roles.append(("user",))
    return roles


def make_syntax(config: Config, tools: Mapping[str, ToolSpec], environment: Environment | None) -> Syntax:
    """The configured call syntax, with the ``tools`` that keep no state and those of the ``environment``.

    Raises :class:`ConfigError` for two of one name.
    """
    more = environment.tools if environment else {}
    if twice := sorted(tools.keys() & more.keys()):
        raise ConfigError(
            f"tools.names: {twice[0]!r} is a tool of environment.name={config.environment.name!r}, too: take "
            "it out, or rename either"
        )
    syntax = SYNTAXES.make(config.rollout.syntax.name, config.rollout.syntax.options, {**tools, **more})
    syntax.several = config.rollout.calls_per_turn == "many"
    return syntax


def planned_syntax(config: Config) -> Syntax:
    """The configured call syntax with the configured tools, of which none is called: no server runs yet."""
    nowhere = "http://127.0.0.1"
    specs = build_tools(config.tools, {"search": nowhere, "python": nowhere}).specs
    return make_syntax(config, specs, make_environment(config.environment))


def unknown_arguments(template: str, arguments: Mapping[str, Any]) -> str:
    """What is wrong with ``task.template``: an argument that the ``template`` never asks for would be ignored
    without a word; "" for nothing.
    """
    words = set(re.findall(r"\b[A-Za-z_]\w*", template))
    for name in map(str, arguments):
        if name in SET_HERE:
            return f"task.template.{name} is set by the system: take it out"
        if not template:
            return f"task.template.{name}: the model's tokenizer has no chat template: take it out"
        if name not in words:
            return (
                f"task.template.{name}: the model's chat template has no such argument{nearest(name, words)}"
            )
    return ""


def _guided(messages: list[dict[str, str]], guide: str) -> list[dict[str, str]]:
    """``messages`` with ``guide`` at the end of the user's last one."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        raise PromptError("a guide stands at the end of the user's last message, and there is none")
    told = {**messages[last], "content": messages[last]["content"] + guide}
    return [*messages[:last], told, *messages[last + 1 :]]


def _whole_text(template: Any) -> str:
    """A chat template; of several by name, all of them."""
    if isinstance(template, Mapping):
        return "\n".join(map(str, template.values()))
    return template or ""


def _text(messages: Messages) -> str:
    return "\n".join(message["content"] for message in messages if message["role"] != "assistant")
