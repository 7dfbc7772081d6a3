"""What the model reads, by the model's own chat template: a whole prompt, or what comes behind its turn.

Append only: what the model sampled is never rendered, let alone encoded, again.  What comes behind its turn
(an *increment*) is read off the template: a short conversation, the *anchor*, whose last turn stands for the
model's, is rendered with the new messages, and what stands behind the token that ends that turn is the
increment.  That this is the same behind every conversation is not assumed but tried, for each shape of
messages ("tool", "tool, tool", "user", …) with several anchors; a template for which it is not so is refused.

Contents are not trusted: :mod:`system.rollout.mask`.
"""

from __future__ import annotations

import copy
import itertools
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError

from system.errors import EspalierError
from system.rollout.encode import Tokenizer, encode_text
from system.rollout.mask import Mask, Specials
from system.tree.record import Int32

ChatMessage = Mapping[str, Any]
"""As OpenAI's chat completions have it: role, content; tool_calls (arguments as an object), tool_call_id,
name, reasoning_content."""
Schemas = Sequence[Mapping[str, Any]]
"""Tools as OpenAI's chat completions have them."""

ROLES = ("tool", "user", "system")  # that may speak behind the model's turn
# What rendering raises: jinja2's own, and what expressions of a template do (1 / 0, a range without end).
_TEMPLATE_ERRORS = (
    TemplateError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
_GAP = re.compile(r"<\d+>")  # where a content stands in a glue
_THOUGHT = re.compile(r"<(think|thinking|thought|reasoning)>.*?</\1>\s*", re.DOTALL)
# What the conversations that are tried begin with.
_USER, _SYSTEM = {"role": "user", "content": "Is it so?"}, {"role": "system", "content": "Be brief, now."}
_TURN = {"role": "assistant", "content": "So it is."}


class TemplateRefused(EspalierError, ValueError):
    """A chat template, or a tokenizer, of which no exact tokens can be had; or messages that it refuses."""


@dataclass(frozen=True, slots=True, eq=False)
class Anchor:
    """A conversation whose last turn stands for the model's, before what comes behind it is appended."""

    name: str
    history: tuple[ChatMessage, ...]  # before that turn
    thinks: bool = False  # that turn has a thought
    calls: bool = False  # that turn makes the calls that the messages behind it answer


class Tried(NamedTuple):
    """What came of an anchor."""

    anchor: Anchor
    forgets: bool  # earlier thoughts are left out of the template's text once the messages have come
    glue: str  # the template's text, with <0>, <1>, … where the contents stand


_PASTS: tuple[tuple[str, tuple[ChatMessage, ...]], ...] = (
    ("user", (_USER,)),
    ("system", (_SYSTEM,)),
    ("system, user", (_SYSTEM, _USER)),
    ("user, assistant, user", (_USER, _TURN, _USER)),
)
_ANCHORS = [
    Anchor(name + (", assistant with a thought" if thinks else ", assistant"), past, thinks)
    for name, past in _PASTS
    for thinks in (True, False)
]


class ChatCodec:
    """One tokenizer, its chat template, and what the template is told in every rendering."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        tools: Schemas = (),
        arguments: Mapping[str, Any] | None = None,
        ends: Iterable[int] = (),
    ) -> None:
        """``tools``: told wherever a call names no others.  ``arguments``: the template's own
        (``enable_thinking``).  ``ends``: tokens that end a turn, besides the template's and EOS.

        Raises :class:`TemplateRefused` where there is no template, or none whose turns end with a special
        token.
        """
        self.tokenizer, self.tools = tokenizer, list(tools)
        self._arguments = dict(arguments or {})
        self._specials = Specials(tokenizer)
        self._tried: dict[tuple[Any, ...], Tried | str] = {}
        if not getattr(tokenizer, "chat_template", None):
            raise TemplateRefused("the model's tokenizer has no chat template")
        self.closing, self._closer = self._turns_end()
        self.end = self._specials.ids[self._closer]  # the token that ends the model's turn
        eos: int | None = tokenizer.eos_token_id
        self.ends = tuple(sorted({self.end, *ends} | ({eos} if eos is not None else set())))

    def prompt(self, messages: Sequence[ChatMessage], tools: Schemas | None = None) -> Int32:
        """Token ids [P] of the whole conversation, ready for the model's turn; one of the model at its end is
        gone on with.

        Raises :class:`TemplateRefused` for messages that the template refuses, and for none.
        """
        mask = Mask(self._specials)
        text = self.rendered(mask.hide(messages), mask.hide(self.tools if tools is None else tools))
        ids = self._encoded(text, mask)
        if not ids.size:
            raise TemplateRefused("the prompt has no tokens: the chat template makes no text of the messages")
        return ids

    def increment(
        self, messages: Sequence[ChatMessage], *, ended: bool, tools: Schemas | None = None
    ) -> Int32:
        """Token ids [k] of what comes behind the model's turn: ``messages`` (of tools, of a user), up to the
        model's next turn.

        ``ended``: the turn's last token is one of :attr:`ends`; else what closes it comes first.
        Raises :class:`TemplateRefused` as :meth:`tried` does, and for messages that the template refuses.
        """
        roles = [str(message["role"]) for message in messages]
        schemas = self.tools if tools is None else tools
        if self._without_tools(roles, schemas):
            schemas = ()
        anchor = self.tried(roles, schemas).anchor
        mask = Mask(self._specials)
        hidden = mask.hide([dict(message) for message in messages])
        _, text = self._parted(anchor, hidden, mask.hide(schemas))
        ids = self._encoded(text, mask)
        return ids if ended else np.concatenate([self._specials.encode(self.closing), ids])

    def said(self, turn: ChatMessage, answers: Sequence[ChatMessage], tools: Schemas | None = None) -> Int32:
        """Token ids [k] of a ``turn`` of the model as the template writes it, up to the token that ends it,
        with its thought and its calls, which are given as fields; ``answers``: what tools say behind it.

        Raises :class:`TemplateRefused` where that cannot be told from what stands around it.
        """
        schemas = self.tools if tools is None else tools
        mask = Mask(self._specials)
        given, told = mask.hide([turn, *_paired(answers)]), mask.hide(schemas)
        before = self.rendered([_USER], told, add_generation_prompt=True)
        whole = self.rendered([_USER, *given], told, add_generation_prompt=bool(answers))
        text, ends, _ = whole.removeprefix(before).partition(self._closer)
        if not whole.startswith(before) or not ends:
            raise TemplateRefused("the chat template writes the model's turn otherwise than it begins one")
        fields = (given[0].get(key) for key in ("reasoning_content", "content"))
        thought, content = (str(field or "").strip() for field in fields)
        if thought not in text:
            raise TemplateRefused(
                "the chat template leaves out the thought (reasoning_content): put it into the content as "
                "the model is to write it, or take it out"
            )
        if "</think>" not in content and content not in text:  # else the template takes thoughts out of it
            raise TemplateRefused("the chat template leaves out what stands beside the calls: take it out")
        return self._encoded(text + ends, mask)

    def tried(self, roles: Sequence[str], tools: Schemas | None = None) -> Tried:
        """The anchor for messages of these ``roles``.  Raises :class:`TemplateRefused` where none will do."""
        schemas = self.tools if tools is None else tools
        key = (tuple(roles), bool(schemas))
        if key not in self._tried:
            self._tried[key] = self._try(key[0], schemas)
        found = self._tried[key]
        if isinstance(found, str):
            raise TemplateRefused(found)
        return found

    def rendered(self, messages: Sequence[ChatMessage], tools: Schemas = (), **options: Any) -> str:
        """The template's text.  Raises :class:`TemplateRefused`."""
        goes_on = bool(messages) and messages[-1]["role"] == "assistant"
        if "add_generation_prompt" not in options:
            options |= {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}
        given = copy.deepcopy([dict(message) for message in messages])  # a template may write into them
        known = {**self._arguments, **options, "tokenize": False}
        try:
            text = self.tokenizer.apply_chat_template(given, tools=list(tools) or None, **known)
        except _TEMPLATE_ERRORS as error:
            raise TemplateRefused(f"the chat template refuses the messages: {error}") from error
        return str(text)

    def overhead(self, roles: Sequence[str]) -> int:
        """Tokens that the template writes around messages of these ``roles``, the turn's end included.

        Raises as :meth:`tried` does.
        """
        return self._specials.encode(self.closing + _GAP.sub("", self.tried(roles).glue)).size

    def described(self, roles: Sequence[str]) -> str:
        """A line on what was found for messages of these ``roles``, or why they are refused."""
        name = ", ".join(roles)
        try:
            anchor, forgets, glue = self.tried(roles)
        except TemplateRefused as refused:
            return f"{name}: {refused}"
        size = self.overhead(roles)
        past = "; leaves earlier thoughts out, which stay here" if forgets else ""
        return f"{name}: behind [{anchor.name}], {size} tokens of glue: {self.closing + glue!r}{past}"

    def _encoded(self, text: str, mask: Mask) -> Int32:
        """Token ids [k] of the template's ``text``.  Raises :class:`TemplateRefused` where it has written
        what is hidden in it in other letters: the model would read something that nobody said.
        """
        if mask.damaged(text):
            raise TemplateRefused(
                "the chat template writes contents in other letters (upper, replace, truncate, …), so that "
                "special tokens that they spell out cannot be told from its own: take the filter out of the "
                "template, or these tokens out of the contents"
            )
        return self._specials.encode(text, mask)

    def _without_tools(self, roles: Sequence[str], tools: Schemas) -> bool:
        """Whether the same stands behind the model's turn where the template is told no ``tools``, which may
        be long and would be told in every rendering.
        """
        own = self.tried(roles, tools)
        try:
            return self.tried(roles, ()).glue == own.glue
        except TemplateRefused:
            return False

    # How a turn ends

    def _turns_end(self) -> tuple[str, str]:
        """The text that closes the model's turn, and the special token at its end, as it is spelled."""
        for anchor in _ANCHORS:
            word = _word()
            try:
                text = self.rendered([*anchor.history, _turn(word)], (), add_generation_prompt=False)
            except TemplateRefused:
                continue
            after = text.rpartition(word)[2]
            found = self._specials.pattern.search(after)
            if word in text and found and not after[: found.start()].strip():
                self._check_apart(found[0])
                return after[: found.end()], found[0]
        raise TemplateRefused(
            "the chat template ends the model's turn with no special token, so that where a turn ends cannot "
            "be told: take rollout.answers=syntax, or mark that token as special in the tokenizer"
        )

    def _check_apart(self, spelled: str) -> None:
        if self._specials.ids[spelled] in encode_text(self.tokenizer, spelled, trusted=False):
            raise TemplateRefused(
                f"the tokenizer makes the special token {spelled!r} of plain text, too "
                "(split_special_tokens has no effect): a tool's answer could end the model's turn"
            )

    # Anchors

    def _parted(
        self, anchor: Anchor, messages: Sequence[ChatMessage], tools: Schemas, word: str = ""
    ) -> tuple[str, str]:
        """The template's text of ``anchor`` and ``messages``: up to the end of the anchor's last turn, and
        what comes behind it.  ``word``: what that turn says.
        """
        word = word or _word()
        given = _paired(messages)
        turn = _turn(word, anchor.thinks, given if anchor.calls else ())
        text = self.rendered([*anchor.history, turn, *given], tools, add_generation_prompt=True)
        return self._cut(text, word)

    def _cut(self, text: str, word: str) -> tuple[str, str]:
        """``text`` up to the end of the turn that says ``word``, and the rest."""
        before, found, after = text.partition(word)
        rest, ends, behind = after.partition(self._closer)
        if not found or not ends:
            raise TemplateRefused("the chat template leaves the model's turn out")
        return before + found + rest + ends, behind

    def _try(self, roles: tuple[str, ...], tools: Schemas) -> Tried | str:
        """The first anchor that will do, or why there is none."""
        name = ", ".join(roles)
        if not roles or set(roles) - set(ROLES):
            return f"messages of [{name}] do not come behind the model's turn, only of {', '.join(ROLES)}"
        words = [_word() for _ in roles]
        said = [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)]
        faults: list[str] = []
        for calls in (True, False) if roles[0] == "tool" else (False,):
            found = self._try_anchors([replace(one, calls=calls) for one in _ANCHORS], words, said, tools)
            if isinstance(found, Tried):
                return found
            faults.append(found)
        return (
            f"the chat template has no exact form for messages of [{name}] behind the model's turn: "
            f"{faults[-1]}; take rollout.answers=syntax, or another chat template"
        )

    def _try_anchors(
        self, anchors: Sequence[Anchor], words: Sequence[str], said: Sequence[ChatMessage], tools: Schemas
    ) -> Tried | str:
        """The first of ``anchors`` that will do for what is ``said``, the ``words``; or why there is none."""
        word, refusal = _word(), ""
        found: dict[Anchor, tuple[str, str]] = {}
        for anchor in anchors:
            try:
                found[anchor] = self._parted(anchor, said, tools, word)
            except TemplateRefused as refused:
                refusal = refusal or str(refused)
        if len({id(anchor.history) for anchor in found}) < 2:
            return refusal  # that it is the same behind two conversations cannot be seen
        if len({behind for _, behind in found.values()}) > 1:
            return "what it writes depends on what was said before"
        _, glue = next(iter(found.values()))
        if problem := self._faults(glue, words):
            return problem
        stays = {
            anchor: self._stays(anchor, said, tools, before, word) for anchor, (before, _) in found.items()
        }
        best = next((one for how in ("exactly", "but thoughts") for one in found if stays[one] == how), None)
        if best is None:
            return "it writes what was said before anew"
        for i, one in enumerate(words):
            glue = glue.replace(one, f"<{i}>")
        return Tried(best, any(stays[one] == "but thoughts" for one in found if one.thinks), glue)

    def _stays(
        self, anchor: Anchor, said: Sequence[ChatMessage], tools: Schemas, before: str, word: str
    ) -> str:
        """How the anchor's text without what is ``said`` behind it is the beginning ``before`` of that with
        it: "exactly", "but thoughts", or "" for not at all.
        """
        turn = _turn(word, anchor.thinks, _paired(said) if anchor.calls else ())
        try:
            text = self.rendered([*anchor.history, turn], tools, add_generation_prompt=False)
            alone, _ = self._cut(text, word)
        except TemplateRefused:
            return ""
        if alone == before:
            return "exactly"
        return "but thoughts" if _THOUGHT.sub("", alone) == _THOUGHT.sub("", before) else ""

    def _faults(self, glue: str, words: Sequence[str]) -> str:
        """What is wrong with the text behind an anchor, in which the ``words`` are the contents."""
        if any(one["content"] in glue for one in (_USER, _SYSTEM, _TURN)):
            return "it repeats what was said before"
        places = [glue.find(word) for word in words]
        if min(places) < 0 or places != sorted(places) or any(glue.count(word) != 1 for word in words):
            return "it leaves contents out, repeats them or puts them in another order"
        whole: list[int] = self.tokenizer.encode(glue, add_special_tokens=False)
        if self._specials.encode(glue).tolist() != whole:
            return "the tokenizer makes other tokens of a text behind a special token than of it alone"
        for spelled in set(self._specials.pattern.findall(glue)):
            self._check_apart(spelled)
        return ""


def _word() -> str:
    """One that no template writes by itself, of letters and digits."""
    return f"w{secrets.token_hex(8)}d"


def _turn(word: str, thinks: bool = False, answered: Sequence[ChatMessage] = ()) -> dict[str, Any]:
    """A turn of the model that says ``word``, or makes the calls that messages of tools at the beginning of
    ``answered`` answer, the word among their arguments.
    """
    tools = list(itertools.takewhile(lambda message: message["role"] == "tool", answered))
    turn: dict[str, Any] = {"role": "assistant", "content": "" if tools else word}
    if thinks:
        turn["reasoning_content"] = "Hm."
    if tools:
        turn["tool_calls"] = [
            {
                "type": "function",
                "id": message["tool_call_id"],
                "function": {
                    "name": message.get("name", "tool"),
                    "arguments": {"a": word if i + 1 == len(tools) else "b"},
                },
            }
            for i, message in enumerate(tools)
        ]
    return turn


def _paired(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """``messages`` with ids for the calls that tools answer, where there is none: nine letters and digits, as
    some templates want them.
    """
    paired = [dict(message) for message in messages]
    for i, message in enumerate(paired):
        if message["role"] == "tool":
            message.setdefault("tool_call_id", f"call{i:05d}")
    return paired
