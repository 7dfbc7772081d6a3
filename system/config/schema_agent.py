"""The configuration's section on agents of one's own, which are trained through an endpoint, unchanged."""

# ruff: noqa: RUF009 -- `setting` makes a dataclass field
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from system.config.rule import setting
from system.plugins import AGENTS


@dataclass
class AgentConfig:
    """The agent that is run, once for every leaf, and the limits around a run; none of command, run and
    listen: the branches of rollout.* are the agents.
    """

    command: str = setting(
        "",
        "a program, run for each episode: {prompt} in it is the path of a JSON file that tells the task, "
        "{question} the text of its last message (docs/agents.md)",
    )
    run: str = setting(
        "",
        "or a Python function, package.module:function, called with (session, task), or a class whose "
        "objects are called so; verifiers: an environment of verifiers' (docs/verifiers.md)",
        registry=AGENTS,
    )
    options: dict[str, Any] = setting({}, "further keywords of that function, or those of that class")
    listen: str = setting(
        "",
        "or HOST:PORT, where agents that somebody else starts ask for sessions, for each episode one "
        "(docs/agents.md)",
        safe_on_resume=True,
    )
    public_url: str = setting(
        "",
        "with agent.listen, the URL under which others reach it, behind a proxy or by a name: its host is "
        "answered to, and sessions' URLs begin with it; empty: the address that a request was sent to",
        safe_on_resume=True,
    )
    token_env: str = setting(
        "",
        "with agent.listen, the environment variable that holds what they have to show",
        safe_on_resume=True,
    )
    idle_s: float = setting(
        120.0,
        "with agent.listen, seconds without a request after which an agent is taken to be gone",
        above=0,
        safe_on_resume=True,
    )
    turns: int = setting(
        0,
        "answers of the model per episode, at most; 0: as many as it asks for",
        least=0,
        safe_on_resume=True,
    )
    deadline_s: float = setting(
        300.0, "seconds of one episode; then its processes are killed", above=0, safe_on_resume=True
    )
    concurrency: int = setting(
        64, "episodes at once, per rollout worker: rollout.leaves or more", least=1, safe_on_resume=True
    )
    forks: str = setting(
        "none",
        "replay: an agent is forked by starting another one, which is answered as the first was up to the "
        "fork; that needs tools that answer alike each time",
        choices=("none", "replay"),
    )
    columns: list[str] = setting(
        [], "columns of the data that the agent is told with its task; gold answers, it never is"
    )
    env: dict[str, str] = setting({}, "environment variables of the command, besides those it inherits")
    env_from: list[str] = setting(
        [],
        "variables that it inherits though they look like secrets (…KEY, …TOKEN, …): the others it does not",
    )

    @property
    def on(self) -> bool:
        """Whether an agent of one's own is trained."""
        return bool(self.command or self.run or self.listen)
