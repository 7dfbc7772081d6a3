"""What an agent of one's own does not go with."""

from __future__ import annotations

import re
from collections.abc import Iterator

from system.config.schema import Config
from system.plugins import AGENTS

OURS = (  # variables in which a command finds its session
    "OPENAI_BASE_URL", "OPENAI_API_KEY", "ANTHROPIC_BASE_URL", "ANTHROPIC_API_KEY",
    "ESPALIER_SESSION", "ESPALIER_MODEL", "ESPALIER_PROMPT", "ESPALIER_SEED",
)  # fmt: skip
_NAME = re.compile(r"[^=\0]+")


def agent_problems(config: Config) -> Iterator[str]:
    """A line each, with the remedy: an agent cannot have all that the trees that are grown here have."""
    agent, rollout = config.agent, config.rollout
    if not agent.on:
        return
    key = f"agent.command={agent.command!r}" if agent.command else f"agent.run={agent.run}"
    if agent.command and agent.run:
        yield f"agent.command and agent.run={agent.run}: which agent is it? take out either"
    if agent.options and not agent.run:
        yield "agent.options are keywords of a function: a command has words, and agent.env"
    starts = agent.command or agent.run in AGENTS.names  # of ours, those that start programs
    if not starts and (unused := [name for name in ("env", "env_from") if getattr(agent, name)]):
        yield (
            f"agent.{unused[0]} is the environment of a command, and {key} is a function, which has the "
            "worker's: take it out, or give agent.options"
        )
    for name in sorted({*agent.env, *agent.env_from}):
        if name in OURS:
            yield f"agent.env and .env_from: {name} says where the session is, and is set anew: take it out"
        elif not _NAME.fullmatch(name):
            yield f"agent.env and .env_from: {name!r} is no name of a variable: correct it"
    if config.branching.name != "none" and agent.forks == "none":
        yield (
            f"{key}: what such an agent remembers is out of reach, so it cannot be forked, and "
            f"branching={config.branching.name} forks: set branching=none, or agent.forks=replay if its "
            "tools answer alike each time"
        )
    if config.tools.names or config.tools.mcp:
        yield f"{key}: an agent brings its own tools: set tools.names=[] and no tools.mcp"
    if config.environment.name != "tools":
        yield f"{key}: an agent acts in its own world: take environment.name={config.environment.name!r} out"
    if config.guide.shows:
        yield f"{key}: it says itself what the model is told: set guide.hopeless, .others and .expert to 0"
    if asks := [name for name in ("rescore", "score_answer") if getattr(rollout, name)]:
        yield f"{key}: rollout.{asks[0]}=true is for branches that grow here: take it out"
    if rollout.schedule != "barrier-free":
        yield f"{key}: rollout.schedule={rollout.schedule} is for branches that grow here: take it out"
    if agent.concurrency < rollout.leaves:
        yield (
            f"agent.concurrency={agent.concurrency} is below rollout.leaves={rollout.leaves}, and the "
            "episodes of a question run together: raise the former"
        )
    if agent.deadline_s > rollout.tree_deadline_s:
        yield (
            f"agent.deadline_s={agent.deadline_s:g} exceeds rollout.tree_deadline_s="
            f"{rollout.tree_deadline_s:g}, in which all episodes of a question have to end: raise the latter"
        )
