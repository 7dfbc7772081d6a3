"""What an agent of one's own does not go with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import urlsplit

from system.config.schema import Config
from system.plugins import AGENTS

OURS = (  # variables in which a command finds its session
    "OPENAI_BASE_URL", "OPENAI_API_KEY", "ANTHROPIC_BASE_URL", "ANTHROPIC_API_KEY",
    "ESPALIER_SESSION", "ESPALIER_MODEL", "ESPALIER_PROMPT", "ESPALIER_SEED",
)  # fmt: skip
_NAME = re.compile(r"[^=\0]+")


def listening(address: str) -> tuple[str, int]:
    """``HOST:PORT`` (``[HOST]:PORT`` for an IPv6 address).  Raises ValueError."""
    match = re.fullmatch(r"\[([0-9a-fA-F:.]+)\]:(\d{1,5})|([\w.-]+):(\d{1,5})", address)
    if match is None or not 0 < (port := int(match[2] or match[4])) < 1 << 16:
        raise ValueError(f"{address!r} is no HOST:PORT")
    return match[1] or match[3], port


def public_host(url: str) -> str:
    """The host of ``agent.public_url``, as clients name it, without the port.  Raises ValueError."""
    if odd := re.search(r"[?#\s\x00-\x20\x7f]", url):  # urlsplit forgets some of them
        raise ValueError(f"{url!r} is no http(s)://HOST[:PORT][/PATH]: it has {odd[0]!r} in it")
    parts = urlsplit(url)
    plain = parts.scheme in ("http", "https") and "@" not in parts.netloc
    if not plain or not re.fullmatch(r"[a-z0-9._:-]+", parts.hostname or ""):
        raise ValueError(f"{url!r} is no http(s)://HOST[:PORT][/PATH]")
    _ = parts.port  # which raises, too
    return str(parts.hostname)


def _listening_problems(config: Config) -> Iterator[str]:
    agent = config.agent
    try:
        listening(agent.listen)
    except ValueError as error:
        yield f"agent.listen: {error}: 127.0.0.1:8200, say, for agents on this machine"
    try:
        if agent.public_url:
            public_host(agent.public_url)
    except ValueError as error:
        yield f"agent.public_url: {error}: https://agents.example.org/espalier, say, of a proxy before it"
    if not re.fullmatch(r"[A-Za-z_]\w*", agent.token_env):
        yield (
            "agent.listen needs agent.token_env: name the environment variable that holds the token (not the "
            "token itself), or whoever reaches the port could answer for your agents"
        )
    if agent.forks != "none":
        yield f"agent.forks={agent.forks} starts agents, and those of agent.listen are started by others"
    if config.rollout.workers > 1:
        yield (
            f"agent.listen={agent.listen}: one worker can listen there, and there are rollout.workers="
            f"{config.rollout.workers}: set rollout.workers=1"
        )
    if config.eval.engines:
        yield (
            f"agent.listen={agent.listen}: one worker can listen there, and eval.engines start another: set "
            "eval.engines=0"
        )


def agent_problems(config: Config) -> Iterator[str]:
    """A line each, with the remedy: an agent cannot have all that the trees that are grown here have."""
    agent, rollout = config.agent, config.rollout
    if not agent.on:
        return
    key, *others = (
        f"agent.{name}={value!r}" if name == "command" else f"agent.{name}={value}"
        for name in ("command", "run", "listen")
        if (value := getattr(agent, name))
    )
    if others:
        yield f"{key} and {others[0]}: which agent is it? take out either"
    if agent.options and not agent.run:
        yield "agent.options are keywords of a function: a command has words, and agent.env"
    if agent.listen:
        yield from _listening_problems(config)
    else:
        for name in ("token_env", "public_url"):
            if getattr(agent, name):
                yield f"agent.{name} is for agents that ask for sessions: set agent.listen, or take it out"
    starts = agent.command or agent.run in AGENTS.names  # of ours, those that start programs
    if not starts and (unused := [name for name in ("env", "env_from") if getattr(agent, name)]):
        other = "none" if agent.listen else "a function, which has the worker's"
        yield f"agent.{unused[0]} is the environment of a command, and {key} is {other}: take it out"
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
