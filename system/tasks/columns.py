"""A row of a data set as a :class:`Prompt`: which column is the question, which the answer.

The layouts of others are known by their columns: ARPO and verl (``prompt``, ``reward_model.ground_truth``),
Search-R1 (the same, with ``{"target": […]}``), SkyRL (``reward_spec.ground_truth``), slime (``prompt``,
``label``), OpenRLHF (``input``, ``label``), TRL (``prompt``, ``completion``; ``messages``), rLLM
(``question`` or ``problem``; its rows for verl keep the question in ``extra_info``), FlashRAG
(``question``, ``golden_answers``), ShareGPT (``conversations``), GSM8K, MATH.  ``task.columns`` names others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from system.plugins import nearest
from system.tasks.files import DataError, Row
from system.tasks.gold import gold_answers, is_missing
from system.text import as_text
from system.tree.prompt import Prompt

ROLES = ("question", "answer", "id", "kind", "system", "demonstration")  # what task.columns may name
QUESTIONS = ("prompt", "messages", "conversations", "question", "problem", "query", "instruction", "input")
ANSWERS = (
    "reward_model.ground_truth", "reward_spec.ground_truth", "ground_truth", "golden_answers", "answers",
    "answer", "label", "target", "final_answer", "expected_answer", "gold", "completion", "response",
    "output", "solution", "extra_info.ground_truth", "extra_info.answer",
)  # fmt: skip
KINDS = ("kind", "ability", "data_source", "datasource")
SYSTEMS = ("system", "system_prompt")
DEMONSTRATIONS = ("demonstration", "trajectory", "actions")
_ANSWERED = ("messages", "conversations")  # these end with the answer
_SHAREGPT = {"human": "user", "gpt": "assistant"}
_OF_TOOLS = ("tool", "observation", "function", "function_call", "tool_call")  # calls and answers
_OF_MODEL = ("assistant", "gpt", "function_call", "tool_call")
_DEPTH = 32

Messages = tuple[dict[str, str], ...]


class RowUnusable(DataError):
    """A row that can be read, but is no question with an answer: it is left out, and said."""


class Columns:
    """How rows are read."""

    def __init__(self, named: Mapping[str, str], guided: bool = False) -> None:
        """``named``: role -> column, with dots for a field of an object; "" for a role that no column has.
        ``guided``: the demonstrations are needed, else they are not looked at.

        Raises :class:`DataError` for another role.
        """
        for role in named:
            if role not in ROLES:
                close = nearest(str(role), ROLES)
                raise DataError(f"task.columns.{role}: it may name {', '.join(ROLES)}{close}")
        self._named, self._guided = dict(named), guided

    def prompt(self, row: Row, where: str, default_id: str, system_prompt: str = "") -> Prompt:
        """The question of one row.  ``where`` names it in errors; ``system_prompt`` replaces the row's own.

        All columns but the question's go to ``extra``.  Raises :class:`RowUnusable`.
        """
        row = _unpacked(repair(row))
        column = self._column(row, "question", QUESTIONS)
        if not column:
            columns = ", ".join(map(str, row)) or "none"
            wanted = self._named.get("question") or f"one of {', '.join(QUESTIONS)}"
            raise RowUnusable(
                f"{where}: no question: expected the column {wanted}; found: {columns}; "
                "task.columns.question names it"
            )
        value = find(row, column)
        value = _asked(_listed(value)) if column in _ANSWERED else value
        messages = _messages(value, f"{where}, column {column}")
        if column == "instruction" and isinstance(extended := row.get("input"), str) and extended.strip():
            messages = (
                *messages[:-1],
                {"role": "user", "content": f"{messages[-1]['content']}\n\n{extended}"},
            )
        said = ""
        if column in _ANSWERED and messages[-1]["role"] == "assistant":
            *asked, last = messages
            messages, said = tuple(asked), last["content"]
        if not any(m["content"].strip() for m in messages if m["role"] != "system"):
            raise RowUnusable(f"{where}, column {column}: expected a text that is not empty")
        system = system_prompt or self._text(row, "system", SYSTEMS)
        return Prompt(
            id=self._text(row, "id", ("id",)) or default_id,
            messages=_with_system(messages, system),
            answers=self._answers(row, where, said),
            kind=self._text(row, "kind", KINDS) or "default",
            extra={as_text(k): plain(v) for k, v in row.items() if k != column and v is not None},
            demonstration=self._demonstration(row, where) if self._guided else (),
        )

    def _demonstration(self, row: Row, where: str) -> tuple[tuple[str, str], ...]:
        """The segments of a list of messages (what is not the assistant's is a tool's, once it has begun), or
        of a list of texts: the actions, whose results nobody knows.  () where the row has none.
        """
        column = self._column(row, "demonstration", DEMONSTRATIONS)
        if not column:
            return ()
        value = _listed(find(row, column))
        if isinstance(value, list | tuple) and all(isinstance(text, str) and text for text in value):
            return tuple(segment for text in value for segment in (("model", text), ("tool", "")))
        said = _messages(value, f"{where}, column {column}")
        first = next((i for i, message in enumerate(said) if message["role"] == "assistant"), len(said))
        authors = ("model" if message["role"] == "assistant" else "tool" for message in said[first:])
        return tuple(zip(authors, (message["content"] for message in said[first:]), strict=True))

    def _column(self, row: Row, role: str, usual: tuple[str, ...]) -> str:
        """The column that has the role in this row; "" for none."""
        names = usual if role not in self._named else (self._named[role],)
        return next((name for name in names if name and not is_missing(find(row, name))), "")

    def _text(self, row: Row, role: str, usual: tuple[str, ...]) -> str:
        value = find(row, self._column(row, role, usual))
        return str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else ""

    def _answers(self, row: Row, where: str, said: str) -> tuple[str, ...]:
        if self._named.get("answer") == "":
            return ()
        column = self._column(row, "answer", ANSWERS)
        if not column and not said.strip():
            wanted = self._named.get("answer") or "none of the usual ones is there, or they are empty"
            raise RowUnusable(
                f"{where}: no answer (column: {wanted}); name one with task.columns.answer, or '' where the "
                "reward needs none"
            )
        try:
            return gold_answers(find(row, column) if column else said)
        except ValueError as error:
            raise RowUnusable(f"{where}, column {column or 'messages'}: {error}") from error


def find(row: Row, name: str) -> Any:
    """The value of a column, or of a field of an object in one (``reward_model.ground_truth``); None: none.

    An object may be written as JSON text.
    """
    if not name:  # which an index of pandas may have for its column
        return None
    if name in row:
        return row[name]
    outer, dot, inner = name.partition(".")
    held = row.get(outer) if dot else None
    if isinstance(held, str) and held.lstrip()[:1] == "{":
        try:
            held = json.loads(held)
        except (ValueError, RecursionError):
            return None
    return find(held, inner) if isinstance(held, Mapping) else None


def repair(value: Any, depth: int = 0) -> Any:
    r"""Mend ``\boxed`` where a writer took ``\b`` for a backspace (0x08), as in all of ARPO's released
    files; and make lists and numbers of numpy's."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str):
        return value.replace("\x08oxed", "\\boxed")
    if depth < _DEPTH and isinstance(value, Mapping):
        return {key: repair(item, depth + 1) for key, item in value.items()}
    if depth < _DEPTH and isinstance(value, list | tuple):
        return [repair(item, depth + 1) for item in value]
    return value


def plain(value: Any, depth: int = 0) -> Any:
    """``value`` as JSON can hold it: NaN is null, dates and other objects are their text."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if depth < _DEPTH and isinstance(value, Mapping):
        return {as_text(key): plain(item, depth + 1) for key, item in value.items()}
    if depth < _DEPTH and isinstance(value, list | tuple):
        return [plain(item, depth + 1) for item in value]
    return as_text(value)


def _unpacked(row: Row) -> Row:
    """rLLM's rows for verl: the prompt is a placeholder, the question stands in ``extra_info``."""
    prompt, extra = row.get("prompt"), row.get("extra_info")
    if prompt == [{"role": "user", "content": "placeholder"}] and isinstance(extra, Mapping):
        return {key: value for key, value in row.items() if key != "prompt"} | dict(extra)
    return row


def _messages(value: Any, where: str) -> Messages:
    """Chat messages of a list of them, of its JSON text, or of a question's text."""
    if isinstance(value, str) and value.lstrip()[:2] in ("[{", "[\n"):
        value = _listed(value)  # else it is a question that begins like that
    if isinstance(value, str):
        return ({"role": "user", "content": value},)
    if not isinstance(value, list | tuple) or not value:
        raise RowUnusable(f"{where}: expected a text, or a list of {{role, content}}")
    return tuple(_message(message, f"{where}[{i}]") for i, message in enumerate(value))


def _asked(value: Any) -> Any:
    """Of a conversation in which tools are called what is asked, and the last thing said: what the model did
    in between is not told."""
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        return value
    speakers = [message.get("role", message.get("from")) for message in value]
    if not any(one in _OF_TOOLS for one in speakers) and not any(one.get("tool_calls") for one in value):
        return value
    first = next((i for i, one in enumerate(speakers) if one in _OF_MODEL), len(value))
    return [*value[:first], *value[max(first, len(value) - 1) :]]


def _listed(value: Any) -> Any:
    """A list where ``value`` is the JSON text of one, else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _message(value: Any, where: str) -> dict[str, str]:
    if isinstance(value, Mapping):
        role, content = value.get("role", value.get("from")), value.get("content", value.get("value"))
        content = whole_text(content)
        if isinstance(role, str) and role and isinstance(content, str):
            return {"role": _SHAREGPT.get(role, role), "content": content}
    raise RowUnusable(f"{where}: expected {{role, content}}, both texts")


def whole_text(content: Any) -> Any:
    """The text of a message's content, whose parts are joined where they are texts, not images; else as it
    is.
    """
    if isinstance(content, list | tuple):
        parts = [part.get("text") for part in content if isinstance(part, Mapping)]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(content):
            return "".join(texts)
    return content


def _with_system(messages: Messages, text: str) -> Messages:
    if not text:
        return messages
    return ({"role": "system", "content": text}, *(m for m in messages if m["role"] != "system"))
