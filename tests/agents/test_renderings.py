"""How requests become tokens: chat templates that do not tell of tools, and models without a template."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import openai
import pytest
from agent_models import ADD, CLOSE, DONE, END, OPEN, SAY, ScriptedEngine, make_tokenizer, served
from test_chat_sdk import TOOLS
from test_requests import ask, parents, said

from system.agents.endpoint import AgentEndpoint
from system.agents.model import PlainRendering, ServedModel
from system.engine.protocol import Finish
from system.rollout.syntax.tags import TagSyntax
from system.tasks.tiny_tokenizer import build, numbers, syntax
from system.tree.record import Outcome

Start = Callable[..., Awaitable[tuple[Any, Any]]]
USER: dict[str, Any] = {"role": "user", "content": "What is it?"}
CHATML = """\
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""


@pytest.mark.parametrize("own", ["", "Be exact."])
async def test_tools_that_the_template_leaves_out_are_told_in_words(stack: AsyncExitStack, own: str) -> None:
    engine = ScriptedEngine([f"{SAY}{OPEN}{ADD}{CLOSE}{END}", DONE + END])
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    endpoint = AgentEndpoint(served(engine, tokenizer))
    stack.push_async_callback(endpoint.stop)
    await endpoint.start()
    session = await endpoint.open("p", 0, deadline_s=60)
    messages = ([{"role": "system", "content": own}] if own else []) + [USER]
    first = await ask(session, messages)
    (call,) = first.message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": "3"}
    await ask(session, [*messages, said(first), result])
    episode = session.close(Outcome.ENDED)
    assert episode.rewrites == 0
    assert parents(episode) == [-1, 0, 1, 2]
    text = tokenizer.decode(engine.requests[0].input_ids)
    assert text.count("# Tools") == text.count('"name": "look"') == 1
    assert text.startswith(f"<|im_start|>system\n{own}")


async def test_a_thought_that_the_template_opens_is_a_thought(stack: AsyncExitStack) -> None:
    engine = ScriptedEngine(["Hm, what may it be?\n</think>\n\n" + DONE + END, DONE + END])
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML.replace("assistant\n'", "assistant\n<think>\n'")
    endpoint = AgentEndpoint(served(engine, tokenizer))
    stack.push_async_callback(endpoint.stop)
    await endpoint.start()
    session = await endpoint.open("p", 0, deadline_s=60)
    first = await ask(session, [USER], tools=[])
    assert (first.message.reasoning_content, first.message.content) == ("Hm, what may it be?", DONE)
    retold = {"role": "assistant", "content": DONE}  # without the thought
    await ask(session, [USER, retold, USER], tools=[])
    episode = session.close(Outcome.ENDED)
    assert episode.rewrites == 0
    text = tokenizer.decode(engine.requests[1].input_ids)
    assert text.count("Hm, what may it be?") == 1
    assert text.endswith("<|im_start|>assistant\n<think>\n")


async def test_tools_that_the_template_tells_are_told_once(scripted: Start) -> None:
    there, engine = await scripted(DONE + END)
    session = await there.open()
    await ask(session, [USER])
    text = engine.tokenizer.decode(engine.requests[0].input_ids)
    assert text.count('"name": "look"') == 1
    assert "# Tools" not in text


SEARCH: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Look it up.",
            "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
        },
    }
]


class TagEngine(ScriptedEngine):
    """As the quickstart's model writes: its turn ends with a stop string."""

    def __init__(self, lines: list[Any]) -> None:
        super().__init__(lines)
        self.tokenizer = build([*syntax("search"), *numbers(), "home: ", " home: "])

    async def generate(self, request: Any) -> Any:
        async for chunk in super().generate(request):
            met = [
                stop for stop in request.sampling.stop if self.tokenizer.decode(chunk.tokens).endswith(stop)
            ]
            if chunk.finish is not None and met:
                object.__setattr__(chunk, "finish", Finish("stop", met[0]))
            yield chunk


async def plain(stack: AsyncExitStack, *lines: str) -> tuple[Any, TagEngine]:
    engine = TagEngine(list(lines))
    tokenizer = engine.tokenizer
    model = ServedModel(
        engine, tokenizer, PlainRendering(tokenizer), TagSyntax, one_call=True, max_context=500
    )
    endpoint = AgentEndpoint(model)
    stack.push_async_callback(endpoint.stop)
    await endpoint.start()
    return await endpoint.open("p", 0, deadline_s=60), engine


async def test_the_quickstarts_model_calls_in_tags(stack: AsyncExitStack) -> None:
    call, answer = " <search> home: 12 </search>", " <answer>12 </answer><eos>"
    session, engine = await plain(stack, call, answer)
    question: dict[str, Any] = {"role": "user", "content": "home: 47"}
    first = await ask(session, [question], tools=SEARCH)
    assert first.finish_reason == "tool_calls"
    assert first.message.tool_calls[0].function.arguments == '{"query":"home: 12"}'
    assert engine.requests[0].sampling.stop == ("</search>",)
    tokenizer = engine.tokenizer
    assert engine.requests[0].input_ids.tolist() == tokenizer.encode("home: 47")
    result = {"role": "tool", "tool_call_id": first.message.tool_calls[0].id, "content": "home: 45"}
    last = await ask(session, [question, said(first), result], tools=SEARCH)
    assert last.message.content.strip() == "<answer>12 </answer>"
    asked = engine.requests[1].input_ids.tolist()
    assert tokenizer.decode(asked) == f"home: 47{call} <result>\nhome: 45\n</result>"
    episode = session.close(Outcome.ENDED)
    assert episode.rewrites == 0
    assert parents(episode) == [-1, 0, 1, 2]
    assert episode.calls[0].arguments == {"query": "home: 12"}


async def test_a_history_of_somebody_elses_is_rendered_as_it_would_have_been_said(
    stack: AsyncExitStack,
) -> None:
    session, engine = await plain(stack, " <answer>12 </answer><eos>")
    call = {
        "id": "x",
        "type": "function",
        "function": {"name": "search", "arguments": '{"query": "home: 12"}'},
    }
    history = [
        {"role": "user", "content": "home: 47"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "x", "content": "home: 45"},
    ]
    await ask(session, history, tools=SEARCH)
    text = engine.tokenizer.decode(engine.requests[0].input_ids)
    assert text == "home: 47 <search> home: 12 </search> <result>\nhome: 45\n</result>"
    session.close(Outcome.ENDED)


async def test_a_tool_that_tags_cannot_hold_is_refused_by_name(stack: AsyncExitStack) -> None:
    session, engine = await plain(stack)
    with pytest.raises(openai.BadRequestError, match="tools: the tool 'add' needs more than one argument"):
        await ask(session, [USER], tools=TOOLS)
    assert not engine.requests
    session.close(Outcome.ENDED)
