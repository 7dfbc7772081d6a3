"""The model as sessions speak with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from system.engine.protocol import Engine
from system.rollout.codec import ChatCodec
from system.rollout.encode import Tokenizer, encode_text
from system.rollout.syntax.base import Syntax
from system.rollout.syntax.tags import TagSyntax
from system.tools.outcome import ToolSpec
from system.tree.record import Int32

FROZEN = "espalier-frozen"  # the name under which the same weights answer, and nothing is trained


class Rendering(Protocol):
    """Messages as tokens; :class:`.ChatCodec` is one."""

    @property
    def ends(self) -> Sequence[int]:
        """Tokens that end a turn."""
        ...

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> Int32:
        """The whole conversation, ready for the model's turn."""
        ...

    def increment(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        ended: bool,
        tools: Sequence[Mapping[str, Any]],
    ) -> Int32:
        """What comes behind the model's turn, up to its next."""
        ...


@dataclass(frozen=True)
class ServedModel:
    """An engine, and how text and tokens become each other."""

    engine: Engine
    tokenizer: Tokenizer
    rendering: Rendering
    syntax: Callable[[Mapping[str, ToolSpec]], Syntax]  # of calls, made of the tools that a request names
    one_call: bool  # a turn ends with its first call
    max_context: int  # tokens of prompt and answer together
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1

    def words(self, system: str, tools: Sequence[Mapping[str, Any]], syntax: Syntax) -> str:
        """What is to be said of ``tools`` besides what the ``system`` message and the chat template say; "":
        nothing.  A model without a template knows the tools of its task.

        Raises :class:`.TemplateRefused`.
        """
        if not isinstance(self.rendering, ChatCodec):
            return ""
        told = self.rendering.rendered([{"role": "user", "content": "?"}], tools)
        return "" if syntax.is_told_in(f"{system}\n{told}") else syntax.describe()


class PlainRendering:
    """For a model without a chat template: contents in order, calls and answers in the tags of ARPO.

    The model's turn ends with EOS, or with its call.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.ends = (tokenizer.eos_token_id,)

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> Int32:
        """The contents up to the model's first turn as the quickstart's prompts are made, then what was said
        as it would have been said."""
        del tools  # these models know theirs
        roles = [message["role"] for message in messages]
        first = roles.index("assistant") if "assistant" in roles else len(messages)
        asked = "\n".join(message["content"] for message in messages[:first])
        parts = [np.asarray(self._tokenizer.encode(asked), np.int32)]
        for message in messages[first:]:
            said = message["role"] == "assistant"
            parts.append(self._turn(message) if said else self._told(message))
        return np.concatenate(parts)

    def increment(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        ended: bool,
        tools: Sequence[Mapping[str, Any]],
    ) -> Int32:
        return np.concatenate([self._told(message) for message in messages])

    def _told(self, message: Mapping[str, Any]) -> Int32:
        tool = message["role"] == "tool"
        before = TagSyntax.result_open if tool else TagSyntax.message_open
        after = TagSyntax.result_close if tool else TagSyntax.message_close
        return np.concatenate(
            [
                encode_text(self._tokenizer, before),
                encode_text(self._tokenizer, message["content"], trusted=False),
                encode_text(self._tokenizer, after),
            ]
        )

    def _turn(self, message: Mapping[str, Any]) -> Int32:
        thought = message.get("reasoning_content", "")
        words = [f" <think> {thought} </think>"] if thought else []
        words += [message["content"]] if message["content"] else []
        for call in message.get("tool_calls", ()):
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            values = arguments.values() if isinstance(arguments, dict) else [arguments]
            words.append(f" <{name}> {' '.join(map(str, values))} </{name}>")
        return encode_text(self._tokenizer, "".join(words), trusted=False)
