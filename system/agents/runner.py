"""What a rollout worker runs agents with: the endpoint, the launcher, the limits; the same for all groups."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Self

from system.agents.desk import SessionDesk
from system.agents.endpoint import NAME, AgentEndpoint
from system.agents.forest import Episode
from system.agents.launch import (
    MOST_PARTS,
    AgentFailed,
    FunctionAgent,
    Launch,
    Ran,
    SessionAddress,
    make_launch,
)
from system.agents.model import PlainRendering, Rendering, ServedModel
from system.agents.replay import ReplayingEngine
from system.agents.session import AgentSession
from system.config import Config, ConfigError
from system.config.agent import listening
from system.plugins import SYNTAXES
from system.rollout.codec import ChatCodec
from system.rollout.context import RolloutContext
from system.scratch import Scratch
from system.tree.record import Outcome


class AgentRunner:
    """Opens sessions and runs agents in them, ``agent.concurrency`` at once."""

    def __init__(
        self,
        config: Config,
        context: RolloutContext,
        launch: Launch | SessionDesk,
        model: ServedModel,
    ) -> None:
        """``launch``: what starts an agent, or the desk that those come to which somebody else starts."""
        self.settings, self.context, self.launch = config.agent, context, launch
        self.columns = [*config.agent.columns, *getattr(launch, "columns", ())]
        self.judges = bool(getattr(launch, "judges", False))  # no other reward scores
        self._parts: dict[str, None] = {}  # of agents' own rewards, that are measured
        self.limit = asyncio.Semaphore(config.agent.concurrency)
        self.engine = ReplayingEngine(model.engine)
        self._desk = launch if isinstance(launch, SessionDesk) else None
        host, port = listening(config.agent.listen) if self._desk else ("127.0.0.1", 0)
        own = replace(model, engine=self.engine)
        self._endpoint = AgentEndpoint(
            own, host=host, port=port, desk=self._desk, public_url=config.agent.public_url
        )
        self._starting = asyncio.Lock()
        self._started = False
        self._counts: Counter[str] = Counter()

    @classmethod
    def of(cls, config: Config, context: RolloutContext, token: str) -> Self:
        """``token``: what agents that somebody else starts must show.

        Raises :class:`ConfigError` for a function that cannot be had, and a model that cannot be asked.
        """
        if config.agent.listen:
            launch = SessionDesk(token, config.agent.idle_s)
        else:
            launch = make_launch(config.agent, Scratch.make("agents").path)
        return cls(config, context, launch, served(config, context))

    async def check(self) -> None:
        """Raises what keeps the agent from working, as far as it can tell."""
        if isinstance(self.launch, FunctionAgent):
            await self.launch.check()
        if self._desk is not None:
            try:
                await self._start()
            except OSError as error:
                listen = self.settings.listen
                raise ConfigError(f"agent.listen={listen}: it cannot be listened there: {error}") from error

    async def _start(self) -> None:
        async with self._starting:
            if not self._started:
                await self._endpoint.start()
                self._started = True

    async def open(self, prompt_id: str, seed: int, temperature: float) -> AgentSession:
        """A session for one episode, once there is an agent for it; the endpoint starts with the first."""
        await self._start()
        caller = await self._desk.come() if self._desk is not None else None
        session = await self._endpoint.open(
            prompt_id,
            seed,
            deadline_s=self.settings.deadline_s,
            turns=self.settings.turns,
            temperature=temperature,
        )
        if self._desk is not None and caller is not None:
            self._desk.seat(session, caller)
        return session

    async def run(self, session: AgentSession, task: Mapping[str, Any]) -> Ran:
        """The agent in ``session``, to its end.  Raises :class:`AgentFailed`."""
        if isinstance(self.launch, SessionDesk):
            ran = await self.launch.run(session, task)
        else:
            ran = await self.launch(address(session), task)
        if session.failed:
            raise AgentFailed(f"the agent says that it failed: {session.failed}", ran.output)
        return ran

    async def close(self) -> None:
        """Serve no more."""
        await self._endpoint.stop()

    def count(self, episode: Episode) -> None:
        """One more episode has ended."""
        own = {name: count for name, count in episode.counters.items() if count}
        own |= {"episodes": 1, "rewrites": episode.rewrites, "retries": episode.retries}
        own["failed"] = int(episode.outcome == Outcome.ENVIRONMENT)
        own["late"] = int(episode.outcome == Outcome.DEADLINE)
        self._counts.update(own)

    def measured(self, parts: Iterable[str]) -> list[str]:
        """Of the names, those that become metrics: the first few of the run."""
        for name in parts:
            if len(self._parts) < MOST_PARTS:
                self._parts[name] = None
        return [name for name in parts if name in self._parts]

    @property
    def counters(self) -> dict[str, float]:
        """Running totals, as ``agent/…``."""
        return {f"agent/{name}": float(count) for name, count in self._counts.items()}


def address(session: AgentSession) -> SessionAddress:
    """What the agent of ``session`` is told of it."""
    return SessionAddress(session.openai_url, session.anthropic_url, session.key, NAME, session.seed)


def served(config: Config, context: RolloutContext) -> ServedModel:
    """The run's model, as sessions speak with it."""
    tokenizer = context.tokenizer
    rendering: Rendering = PlainRendering(tokenizer)
    if tokenizer.chat_template:
        rendering = ChatCodec(tokenizer, arguments=config.task.template, ends=context.chat.ends)
    return ServedModel(
        engine=context.engine,
        tokenizer=tokenizer,
        rendering=rendering,
        syntax=partial(SYNTAXES.make, config.rollout.syntax.name, config.rollout.syntax.options),
        one_call=not context.syntax.new_turn,
        max_context=context.max_context,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        top_k=config.rollout.top_k,
    )
