"""The agent of search_agent.py with Anthropic's client; it, too, knows nothing of training.

espalier train search_agent.yaml agent.run=search_agent_anthropic:run
"""

from functools import cache

from anthropic import AsyncAnthropic
from search_agent import TOOLS, python, search

CLAUDES = [
    {"name": one["name"], "description": one["description"], "input_schema": one["parameters"]}
    for one in (tool["function"] for tool in TOOLS)
]


async def answer(client, question, model="any"):
    messages = [{"role": "user", "content": question}]
    for _ in range(5):
        reply = await client.messages.create(model=model, max_tokens=160, messages=messages, tools=CLAUDES)
        if reply.stop_reason != "tool_use":
            return "".join(block.text for block in reply.content if block.type == "text")
        messages.append({"role": "assistant", "content": [block.model_dump() for block in reply.content]})
        results = []
        for call in reply.content:
            if call.type == "tool_use":
                use = {"search": search, "python": python}[call.name]
                told = use(*call.input.values())
                results.append({"type": "tool_result", "tool_use_id": call.id, "content": told})
        messages.append({"role": "user", "content": results})
    return "I do not know."


@cache
def client():
    return AsyncAnthropic(base_url="http://nowhere", api_key="none")


async def run(session, task):
    """What ``agent.run`` names."""
    there = client().with_options(base_url=session.anthropic_url, api_key=session.api_key)
    await answer(there, task["question"], session.model)
