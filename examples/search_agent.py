"""An agent as anybody would write it, with OpenAI's client: it knows nothing of training, and needs not to.

    espalier train search_agent.yaml

As a program it answers one question with whatever model OPENAI_BASE_URL leads to:
``python search_agent.py "Q: Galelight 's acts minus 13 ?"``.
"""

import asyncio
import json
import operator
import re
import sys
from functools import cache

from openai import AsyncOpenAI

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": told,
            "parameters": {"type": "object", "properties": {key: {"type": "string"}}, "required": [key]},
        },
    }
    for name, told, key in (
        ("search", "Look something up.", "query"),
        ("python", "Calculate: print(1+2).", "code"),
    )
]


@cache
def library():
    """What it searches: here the documents of the quickstart, where you have your own."""
    from system.tasks.generated import search_tool
    from system.tasks.quickstart.world import generate

    return search_tool(generate(seed=0).documents(), top_k=2)


def search(query):
    return library()(query)


def python(code):
    """Of a language, the little that the quickstart's questions need."""
    found = re.fullmatch(r"\s*print\(\s*(-?\d+)\s*(\+|-|\*|//)\s*(-?\d+)\s*\)\s*", code)
    if found is None:
        return "SyntaxError"
    left, sign, right = found.groups()
    return str(OPERATORS[sign](int(left), int(right)))


async def answer(client, question, model="any"):
    messages = [{"role": "user", "content": question}]
    for _ in range(5):
        reply = await client.chat.completions.create(model=model, messages=messages, tools=TOOLS)
        message = reply.choices[0].message
        if not message.tool_calls:
            return message.content
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls:
            arguments = json.loads(call.function.arguments)
            use = {"search": search, "python": python}[call.function.name]
            result = use(*arguments.values())
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return "I do not know."


@cache
def client():
    return AsyncOpenAI(base_url="http://nowhere", api_key="none")


async def run(session, task):
    """What ``agent.run`` names: the one function that knows where a session is.  Its reward is the run's."""
    there = client().with_options(base_url=session.openai_url, api_key=session.api_key)
    await answer(there, task["question"], session.model)


if __name__ == "__main__":
    print(asyncio.run(answer(AsyncOpenAI(), sys.argv[1])))
