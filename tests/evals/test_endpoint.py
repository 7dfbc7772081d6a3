"""Questions to a model behind chat completions: a local server that says what a test tells it to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web

from actors.ask_endpoint import Endpoint
from system.config import ConfigError, load, rewards
from system.evals.endpoint import Questions, read_turn
from system.evals.record import Answered, Asked
from system.http import HttpError
from system.rollout import completions
from system.rollout.completions import ChatCompletions
from system.rollout.reward import BranchView, Score
from system.rollout.scorer import Scorer
from system.rollout.scoring import Scoring
from system.serving import AppServer, serve
from system.tools.outcome import CallContext, ToolOutcome, ToolSpec, ToolStatus
from system.tree.prompt import Prompt

PROMPT = Prompt("q1", ({"role": "user", "content": "What is 6 × 7?"},), ("42",), kind="calc")
ASKED = Asked("aime", PROMPT, 2, 5)


def says(
    text: str | None, *calls: tuple[str, str], tokens: int | None = 4, end: str = "stop"
) -> web.Response:
    made = [
        {"id": f"c{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(calls)
    ]
    message = {"role": "assistant", "content": text, **({"tool_calls": made} if made else {})}
    usage = {} if tokens is None else {"usage": {"completion_tokens": tokens}}
    return web.json_response({"choices": [{"message": message, "finish_reason": end}], **usage})


class Scripted:
    """A server that answers with one response after the other."""

    def __init__(self) -> None:
        self.responses: list[web.Response] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.server: AppServer | None = None

    async def _answer(self, request: web.Request) -> web.Response:
        self.requests.append(await request.json())
        self.keys.append(request.headers.get("Authorization", ""))
        return self.responses.pop(0)

    async def start(self) -> str:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._answer)
        self.server = await serve(app)
        return f"{self.server.url}/v1"


class Calculator:
    """One tool, ``add``."""

    def __init__(self) -> None:
        self.specs = {"add": ToolSpec("add", "adds", {"type": "object", "properties": {}}, "a")}
        self.calls: list[tuple[str, dict[str, Any]]] = []

    async def call(self, tool: str, arguments: Any, context: CallContext) -> ToolOutcome:
        self.calls.append((tool, arguments))
        return ToolOutcome(ToolStatus.OK, "42" * 100)


class Exact:
    """Right is an answer whose last line is the gold one."""

    trusted = True

    def score(self, prompt: Prompt, branch: BranchView) -> Score:
        right = branch.model_text.splitlines()[-1] in prompt.answers
        return Score(float(right), right)


@pytest.fixture
async def scripted(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scripted]:
    monkeypatch.setattr(completions, "BACKOFF_S", 0.001)
    one = Scripted()
    yield one
    if one.server is not None:
        await one.server.close()


Ask = Callable[..., Any]


@pytest.fixture
def ask(scripted: Scripted) -> Ask:
    async def asked(
        *responses: web.Response, tools: Any = None, words: Any = ()
    ) -> tuple[Answered, list[str]]:
        """The answer to one question, and what was told."""
        url = await scripted.start()
        scripted.responses += responses
        config = load(None, ["rollout.max_tool_result_tokens=16", "rollout.call_limit=2", *words])
        server = ChatCompletions(url, "m", {"top_p": 0.9, "seed": None}, key="secret", retries=2)
        chosen = Scorer.of(config, rewards(config.reward)[0]).chosen
        scoring, told = Scoring([Scorer(Exact(), chosen)]), list[str]()  # type: ignore[arg-type]
        questions = Questions(
            config, server, tools or Calculator(), scoring, lambda kind, text: told.append(f"{kind}: {text}")
        )
        try:
            return await questions.ask(ASKED), told
        finally:
            await server.close()

    return asked


async def test_a_conversation_with_tools_is_the_rollouts(ask: Ask, scripted: Scripted) -> None:
    tools = Calculator()
    answer, told = await ask(
        says("I add.", ("add", '{"a": 6}'), ("add", "no json")), says("it is\n42", tokens=3), tools=tools
    )
    assert (answer.set, answer.id, answer.sample) == ("aime", "q1", 2)
    assert (answer.correct, answer.reward, answer.outcome) == (True, 1.0, "stopped")
    assert (answer.tool_calls, answer.tokens, told) == (2, 7, [])
    assert tools.calls == [("add", {"a": 6})]
    first, second = scripted.requests
    assert (first["model"], first["top_p"], first["temperature"]) == ("m", 0.9, 0.0)
    assert "seed" not in first, "null leaves a parameter out"
    assert first["tools"][0]["function"]["name"] == "add"
    assert second["max_tokens"] == first["max_tokens"] - 4
    said, *results = second["messages"][-3:]
    assert said["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 6}'}
    assert [one["tool_call_id"] for one in results] == ["c0", "c1"]
    assert len(results[0]["content"]) == 64, "cut as rollout.max_tool_result_tokens says"
    assert results[1]["content"] == "Error: the arguments are no JSON object"
    assert {*scripted.keys} == {"Bearer secret"}


async def test_the_limit_of_calls(ask: Ask, scripted: Scripted) -> None:
    call = ("add", "{}")
    answer, _ = await ask(says(None, call), says("", call, call), says("again", call))
    assert (answer.outcome, answer.tool_calls) == ("call_limit", 3)
    assert "the limit of 2 tool calls" in scripted.requests[2]["messages"][-1]["content"]


@pytest.mark.parametrize(
    ("response", "outcome", "tokens"),
    [
        (says("a long", end="length"), "length", 4),
        (says("42", tokens=None), "stopped", None),
    ],
)
async def test_how_it_ends(ask: Ask, response: web.Response, outcome: str, tokens: int | None) -> None:
    answer, _ = await ask(response)
    assert (answer.outcome, answer.tokens) == (outcome, tokens)


async def test_what_may_pass_is_tried_again(ask: Ask, scripted: Scripted) -> None:
    answer, told = await ask(web.Response(status=503), web.json_response({"odd": 1}), says("42"))
    assert (answer.correct, told, len(scripted.requests)) == (True, [], 3)


@pytest.mark.parametrize(("status", "tries"), [(400, 1), (429, 3)])
async def test_what_fails_is_told_and_asked_again_later(
    ask: Ask, scripted: Scripted, status: int, tries: int
) -> None:
    answer, told = await ask(*(web.Response(status=status, text="secret no") for _ in range(3)))
    assert (answer.outcome, answer.correct) == ("unanswered", None)
    assert len(scripted.requests) == tries
    assert f"HTTP {status}" in told[0]
    assert "secret" not in told[0]


@pytest.mark.parametrize(
    "message",
    [
        {"content": 3},
        {"content": None},
        {"content": None, "tool_calls": [{"id": "a"}]},
    ],
)
def test_answers_of_no_use(message: dict[str, Any]) -> None:
    with pytest.raises(HttpError):
        read_turn({"choices": [{"message": message}]})


@pytest.mark.parametrize(
    ("given", "words", "what"),
    [
        ({"url": "api.example.com"}, (), "begins with http"),
        ({"model": ""}, (), "needs --model"),
        ({"concurrency": 0}, (), "--concurrency is 1"),
        ({}, ("agent.command=x", "branching=none", "tools.names=[]"), "agent.command"),
    ],
)
def test_what_cannot_be_asked(given: dict[str, Any], words: tuple[str, ...], what: str) -> None:
    endpoint = replace(Endpoint("http://a/v1", "m"), **given)
    assert what in endpoint.problem(load(None, words))


def test_a_key_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(ConfigError, match="no such environment variable"):
        Endpoint("http://a/v1", "m", "NO_KEY").server(9.0)
