"""Questions put to a model behind OpenAI's chat completions, with the task's tools, and its answers scored.

The loop is the rollout's over messages instead of tokens: the model writes, what it calls is run, the answers
go back as messages of the tools, until it calls no more.  Calls are those of the API (``tool_calls``), whose
format the server's own chat template teaches.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from system.awake import AwakeTimeout
from system.config import Config
from system.errors import leaves
from system.evals.record import Answered, Asked
from system.http import HttpError
from system.rollout.chat import answer_format, with_words
from system.rollout.completions import ChatCompletions
from system.rollout.reward import BranchView, Score
from system.rollout.scoring import Scoring, TreeScores
from system.rollout.sets import scored_by
from system.rollout.syntax.base import function_schema
from system.text import as_text
from system.tools.outcome import CallContext, ToolOutcome, Tools, ToolStatus
from system.tree.record import Kind, Outcome

CHARS_PER_TOKEN = 4  # rollout.max_tool_result_tokens in characters: the model's tokenizer is not known here


class ChatTurn(NamedTuple):
    """What the model answered to one request."""

    message: dict[str, Any]  # as it is sent back
    text: str
    calls: Sequence[Mapping[str, Any]]
    length: bool  # it was cut at the limit of tokens
    tokens: int | None  # that it wrote; None: the server does not tell


@dataclass(slots=True)
class _Said:
    """A conversation after its question."""

    messages: list[dict[str, Any]]
    segments: list[tuple[Kind, str]] = field(default_factory=list[tuple[Kind, str]])
    tools: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])  # name, status
    tokens: int | None = 0  # that the model wrote


class Questions:
    """Asks the questions of an evaluation, each in a conversation of its own."""

    def __init__(
        self,
        config: Config,
        server: ChatCompletions,
        tools: Tools,
        scoring: Scoring,
        mishap: Callable[[str, str], None],
        sets: Mapping[str, Scoring] | None = None,
    ) -> None:
        """``mishap`` is told what went wrong: a kind and a text; ``sets``: those that are scored otherwise
        than by ``scoring``.
        """
        self._config, self._server, self._mishap = config, server, mishap
        self._scoring, self._sets = scoring, sets or {}
        self._limits, self._words = config.rollout, answer_format(config.reward)
        own = scored_by(config) if sets else {}
        self._words_of = {name: answer_format(its.reward) for name, (_, its) in own.items()}
        limits = self._limits
        # Not of OpenAI's own servers: top_k; of those of vLLM and SGLang.
        self._kept = {"top_p": limits.top_p} if limits.top_p < 1 else dict[str, float]()
        self._kept |= {"top_k": limits.top_k} if limits.top_k >= 0 else {}
        self._tools = tools
        specs = tools.specs.values() if config.rollout.call_limit else ()
        self._schemas = [function_schema(spec) for spec in specs]

    async def ask(self, asked: Asked) -> Answered:
        """Raises :class:`.RewardBroken`.  A question that the server does not answer is left unanswered."""
        loop = asyncio.get_running_loop()
        began, prompt = loop.time(), asked.prompt
        said = _Said(with_words(prompt.messages, "", self._words_of.get(asked.set, self._words)))
        try:
            async with AwakeTimeout(self._limits.tree_deadline_s):
                outcome = await self._converse(asked, said)
        except TimeoutError:
            outcome = Outcome.DEADLINE
        except HttpError as error:
            self._mishap("question not answered", f"{prompt.id}: {error}")
            return Answered.missing(asked)
        score, text = await self._scored(asked, said, outcome)
        return Answered(
            *(asked.set, prompt.id, prompt.kind, asked.sample),
            correct=score.correct if score else None,
            reward=score.value if score else None,
            outcome=outcome.name.lower(),
            tool_calls=len(said.tools),
            tokens=said.tokens,
            text=text,
            seconds=round(loop.time() - began, 3),
        )

    async def _converse(self, asked: Asked, said: _Said) -> Outcome:
        limit = self._limits.call_limit
        while True:
            left = self._limits.max_response_tokens - (said.tokens or 0)
            if left <= 0:
                return Outcome.LENGTH
            body = self._server.body(
                said.messages,
                tools=self._schemas or None,
                temperature=self._config.eval.temperature,
                max_tokens=left,
                seed=asked.seed,
                **self._kept,
            )
            turn = await self._server.complete(body, read_turn)
            said.messages.append(turn.message)
            said.segments.append((Kind.MODEL, turn.text))
            said.tokens = None if said.tokens is None or turn.tokens is None else said.tokens + turn.tokens
            if not turn.calls:
                return Outcome.LENGTH if turn.length else Outcome.STOPPED
            if len(said.tools) >= limit:
                return Outcome.CALL_LIMIT
            room = limit - len(said.tools)
            made = await asyncio.gather(
                *(self._call(asked, call, number < room) for number, call in enumerate(turn.calls))
            )
            for call, (name, outcome) in zip(turn.calls, made, strict=True):
                text = outcome.text[: self._limits.max_tool_result_tokens * CHARS_PER_TOKEN]
                said.messages.append({"role": "tool", "tool_call_id": call["id"], "content": text})
                said.segments.append((Kind.TOOL, text))
                said.tools.append((name, str(outcome.status)))

    async def _call(self, asked: Asked, call: Mapping[str, Any], allowed: bool) -> tuple[str, ToolOutcome]:
        """The tool's name and what came of the call."""
        name, written = call["function"]["name"], call["function"]["arguments"]
        try:
            arguments = json.loads(written or "{}")
        except ValueError:
            arguments = None
        if not allowed:
            why = f"not made: the limit of {self._limits.call_limit} tool calls is reached"
        elif not isinstance(arguments, dict):
            why = "the arguments are no JSON object"
        else:
            return name, await self._tools.call(name, arguments, CallContext(prompt_id=asked.prompt.id))
        return name, ToolOutcome(ToolStatus.REJECTED, f"Error: {why}")

    async def _scored(self, asked: Asked, said: _Said, outcome: Outcome) -> tuple[Score | None, str | None]:
        """The score, None where there is none, and the final answer."""
        if not outcome.scored:
            return None, None
        view = BranchView(tuple(said.segments), outcome, tuple(said.tools), said.tokens or 0)
        try:
            async with asyncio.TaskGroup() as tasks:
                scoring = self._sets.get(asked.set, self._scoring)
                scores = TreeScores(scoring, asked.prompt, tasks, self._mishap)
                scores.begin(0, view, None)
                await scores.close()
        except ExceptionGroup as errors:
            raise next(leaves(errors)) from errors
        for failed in scores.failures.values():
            self._mishap("reward", str(failed))
        (text,) = scores.record(1)["answers"]
        return scores.scores.get(0), text


def read_turn(answer: Mapping[str, Any]) -> ChatTurn:
    """The model's turn in the answer of a server.  Raises HttpError for one that is of no use."""
    match answer:
        case {"choices": [{"message": dict(message), **choice}, *_]}:
            text, calls = message.get("content"), message.get("tool_calls") or []
        case _:
            raise HttpError(f"no choices[0].message in the answer: {json.dumps(answer)[:200]}")
    if not (text is None or isinstance(text, str)) or not (text or calls or isinstance(text, str)):
        raise HttpError("choices[0].message has neither text nor tool calls")
    calls = [_checked(call) for call in calls] if isinstance(calls, list) else []
    text = as_text(text or "")
    back: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else "")}
    usage = answer.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return ChatTurn(
        back | ({"tool_calls": calls} if calls else {}),
        text,
        calls,
        choice.get("finish_reason") == "length",
        tokens if isinstance(tokens, int) and tokens >= 0 else None,
    )


def _checked(call: Any) -> dict[str, Any]:
    match call:
        case {"id": str(key), "function": {"name": str(name), "arguments": str(arguments)}}:
            function = {"name": as_text(name), "arguments": as_text(arguments)}
            return {"id": key, "type": "function", "function": function}
        case _:
            raise HttpError(f"no tool call: {json.dumps(call)[:200]}")
