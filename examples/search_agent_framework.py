"""The agent of search_agent.py with a framework, OpenAI's Agents SDK; it, too, knows nothing of training.

espalier train search_agent.yaml agent.run=search_agent_framework:run
"""

import search_agent
from agents import Agent, OpenAIChatCompletionsModel, RunConfig, Runner, function_tool
from agents.exceptions import MaxTurnsExceeded


@function_tool
def search(query: str) -> str:
    """Look something up."""
    return search_agent.search(query)


@function_tool
def python(code: str) -> str:
    """Calculate: print(1+2)."""
    return search_agent.python(code)


async def run(session, task):
    """What ``agent.run`` names."""
    there = search_agent.client().with_options(base_url=session.openai_url, api_key=session.api_key)
    model = OpenAIChatCompletionsModel(model=session.model, openai_client=there)
    agent = Agent(name="searcher", tools=[search, python], model=model)
    try:
        await Runner.run(agent, task["question"], max_turns=5, run_config=RunConfig(tracing_disabled=True))
    except MaxTurnsExceeded:
        return  # what it said so far is scored
