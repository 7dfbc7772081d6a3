"""Conversations as tokens: exactly those that a rollout would have, had the model said this.

The prompt is told as in training by reinforcement (:meth:`.Chat.encode`).  What the model said is taken as it
stands and encoded by itself, as sampled text would be; only calls and thoughts that are given as fields are
written by the chat template, or by the call syntax where that puts the answers (``rollout.answers``).  What
comes behind a turn is what a rollout appends there.  The model's turn and the token that ends it are learned;
the prompt, messages of users, and results of tools are not, also where a result stands within the model's
text: the call syntax tells where.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from system.config import ConfigError
from system.plugins import PluginError
from system.rollout.chat import Chat, PromptError
from system.rollout.codec import ChatCodec, TemplateRefused
from system.rollout.encode import encode_text
from system.rollout.syntax.base import ParsedCall, Syntax
from system.sft.example import Example
from system.sft.forms import Conversation, Message
from system.tasks.columns import RowUnusable
from system.tree.record import Int32, Kind

Node = tuple[Kind, Int32]


class TextPart(NamedTuple):
    """A part of a text of the model's that holds tools' results as well."""

    kind: Kind  # MODEL or TOOL
    text: str
    trusted: bool = True  # special tokens that are spelled out in it are such


class Encoder:
    """One way of asking, and one call syntax."""

    def __init__(self, chat: Chat, syntax: Syntax) -> None:
        """Raises :class:`ConfigError` where the tokenizer has no token that ends the model's turn."""
        if chat.end is None:
            raise ConfigError("model.path: the tokenizer has no token that ends the model's turn")
        self._chat, self._syntax, self._end = chat, syntax, chat.end
        spelled = (chat.tokenizer.decode([end], skip_special_tokens=False) for end in chat.ends)
        self._closers = tuple(text for text in spelled if text)

    def example(self, one: Conversation) -> Example:
        """The tokens of a conversation.  Raises :class:`RowUnusable` for one that cannot be put so."""
        try:
            return Example.of(one.where, [*self._nodes(one)])
        except (RowUnusable, TemplateRefused, PromptError, PluginError) as error:
            raise RowUnusable(f"{one.where}: {error}") from error

    def _nodes(self, one: Conversation) -> Iterator[Node]:
        asked = one.question
        yield Kind.PROMPT, self._prompt(one)
        # Turns of the assistant, and what others say between them.
        groups = groupby(one.messages[len(asked) :], lambda message: message["role"] == "assistant")
        runs = [list(run) for _, run in groups]
        for turn, behind in zip(runs[::2], [*runs[1::2], []], strict=True):
            said, answers = turn[0], [message for message in behind if message["role"] == "tool"]
            learned = Kind.TOOL if said.get("weight") == 0 else Kind.MODEL
            by_syntax = self._chat.codec is None and bool(answers)  # the turn goes on behind its results
            for kind, tokens in self._turn(said, answers, one, ends=not by_syntax):
                yield (learned if kind == Kind.MODEL else kind), tokens
            if behind:
                yield Kind.TOOL, self._behind(behind, one)

    def _prompt(self, one: Conversation) -> Int32:
        """What the model is asked; tools of the row's own are told by the template."""
        if one.tools:
            return self._template().prompt(one.question, one.tools)
        return self._chat.encode(one.question)

    def _turn(
        self, said: Message, answers: Sequence[Message], one: Conversation, *, ends: bool
    ) -> Iterator[Node]:
        """The model's turn, with the results that stand in it; ``ends``: with the token that ends it.
        ``answers``: of tools, behind it.
        """
        calls, text = said.get("tool_calls", ()), said["content"]
        if said.get("reasoning_content") or (calls and self._chat.codec):
            if any(part.kind == Kind.TOOL for part in parted(text, self._syntax)):
                raise RowUnusable("a result stands in the text of a message whose calls are fields")
            written = {key: value for key, value in said.items() if key != "weight"}
            if not self._chat.codec:  # the template writes the thought, the syntax the calls
                written.pop("tool_calls", None)
            heard = answers if self._chat.codec else []
            ids = self._template().said(written, heard, one.tools or None)
            if not calls or self._chat.codec:
                yield Kind.MODEL, ids if ends else ids[:-1]
                return
            yield Kind.MODEL, ids[:-1]
            text = ""
        for piece in parted(_without(self._chat.opened, text), self._syntax):
            yield piece.kind, self._encoded(piece)
        if calls:
            yield Kind.MODEL, self._encoded(TextPart(Kind.MODEL, self._written(calls, text)))
        if ends:
            yield Kind.MODEL, self._closing()

    def _written(self, calls: Sequence[dict[str, Any]], text: str) -> str:
        """The call as the syntax has it, behind ``text``."""
        if len(calls) > 1:
            raise RowUnusable(
                f"{len(calls)} calls in one message: the call syntax puts an answer behind each; set "
                "rollout.answers=template, or write one call a message"
            )
        made = calls[0]["function"]
        before = " " if text and not text[-1].isspace() else ""
        return before + self._syntax.write(ParsedCall(made["name"], made["arguments"]))

    def _encoded(self, piece: TextPart) -> Int32:
        if piece.kind == Kind.MODEL:
            for closer in self._closers:
                if closer in piece.text:
                    raise RowUnusable(
                        f"the assistant's text spells {closer!r}, which ends its turn: split it into messages"
                    )
        return encode_text(self._chat.tokenizer, piece.text, trusted=piece.trusted)

    def _closing(self) -> Int32:
        """What ends the model's turn."""
        codec = self._chat.codec
        if codec and codec.closing:
            return encode_text(self._chat.tokenizer, codec.closing)
        return np.array([self._end], np.int32)

    def _behind(self, messages: Sequence[Message], one: Conversation) -> Int32:
        """What stands between two turns of the model."""
        codec, tools = self._chat.codec, one.tools or None
        heard = [{k: v for k, v in message.items() if k != "tool_call_id"} for message in messages]
        if codec:
            return codec.increment(heard, ended=True, tools=tools)
        parts: list[Int32] = []
        rest = list(heard)
        while rest and rest[0]["role"] == "tool":
            parts += self._wrapped(
                rest.pop(0)["content"], self._syntax.result_open, self._syntax.result_close
            )
        if rest and (template := self._chat.turns):
            parts.append(template.increment(rest, ended=len(rest) == len(heard), tools=tools))
        elif rest:
            for message in rest:
                parts += self._wrapped(
                    message["content"], self._syntax.message_open, self._syntax.message_close
                )
        return np.concatenate(parts)

    def _wrapped(self, text: str, before: str, after: str) -> list[Int32]:
        after += self._chat.opened if self._syntax.new_turn else ""
        return [
            encode_text(self._chat.tokenizer, before),
            encode_text(self._chat.tokenizer, text, trusted=False),
            encode_text(self._chat.tokenizer, after),
        ]

    def _template(self) -> ChatCodec:
        if template := self._chat.turns:
            return template
        raise RowUnusable("tools, calls or thoughts as fields need a chat template, and the model has none")


def _without(opened: str, text: str) -> str:
    """``text`` without the beginning (``<think>``) that the template has ``opened`` the turn with."""
    tag, said = opened.strip(), text.lstrip()
    if not tag or not said.startswith(tag):
        return text
    return said[len(tag) :].removeprefix(opened[len(opened.rstrip()) :])


def parted(text: str, syntax: Syntax) -> list[TextPart]:
    """``text`` of the model's, cut where tools' results stand in it: the pieces joined are the text.

    A result may hold tags of results itself.  Raises :class:`RowUnusable` where these do not agree: what of
    the text is a result could not be told.
    """
    opens, closes = syntax.in_text
    found = [*_marks(opens, text, 1), *_marks(closes, text, -1)]
    pieces: list[TextPart] = []
    done = depth = begin = 0
    for start, end, step in sorted(found):
        if start < done:  # white space that both want
            start = done
        if step > 0 and not depth:
            pieces += [TextPart(Kind.MODEL, text[done:start]), TextPart(Kind.TOOL, text[start:end])]
            done = begin = end
        depth += step
        if depth < 0:
            raise RowUnusable(f"{text[start:end].strip()!r} ends a result that has not begun")
        if step < 0 and not depth:
            pieces += [
                TextPart(Kind.TOOL, text[begin:start], trusted=False),
                TextPart(Kind.TOOL, text[start:end]),
            ]
            done = end
    if depth:
        raise RowUnusable("a result does not end: its closing tag is missing")
    pieces.append(TextPart(Kind.MODEL, text[done:]))
    return [piece for piece in pieces if piece.text]


def _marks(pattern: str, text: str, step: int) -> Iterator[tuple[int, int, int]]:
    for match in re.finditer(pattern, text):
        yield match.start(), match.end(), step
