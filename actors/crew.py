"""The actors of a run: started together, stopped together."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.engine import EngineActor
from actors.learner import LearnerGroup
from actors.replay import ReplayActor
from actors.rollout import RolloutWorker
from actors.serving import free_port
from actors.supervise import START_DEADLINE_S, answer, spawn
from actors.tools import SERVED, ToolActor
from system.config import Config, to_dict

CLOSE_DEADLINE_S = 10.0
TREES_PER_WORKER = (
    4096  # calls a rollout worker takes at once; admission and evaluation bound them long before
)


@dataclass(frozen=True, slots=True)
class Growers:
    """What grows trees: rollout workers, the engines they generate with, the tools they call."""

    workers: list[Any]
    engines: list[str]  # URLs
    hosts: list[Any]  # the engines' actors, which live as long as somebody holds them
    servers: list[Any]  # the tools' actors

    @classmethod
    async def start(cls, config: Config, model_path: str, corpus: Path | None) -> Growers:
        """Start every actor at once and wait until each has said that it works.

        Raises what the first failing part raised: a tool that cannot work is named by its ToolStartError.
        """
        settings, host = to_dict(config), config.engine.host
        waiting, engines, hosts, servers, urls = [], [], [], [], {}
        for number in range(config.engine.replicas):
            port = free_port(host)
            engines.append(f"http://{host}:{port}")
            engine = spawn(EngineActor, f"engine-{number}", settings, model_path, port)
            hosts.append(engine)
            waiting.append(answer(engine.ready.remote(), START_DEADLINE_S, f"engine-{number}"))
        for name in config.tools.names:
            if name in SERVED and not (name == "search" and config.tools.search_url):
                port = free_port()
                urls[name] = f"http://127.0.0.1:{port}"
                server = spawn(ToolActor, f"tool-{name}", name, settings, str(corpus or ""), port)
                servers.append(server)
                waiting.append(answer(server.ready.remote(), START_DEADLINE_S, f"tool {name}"))
        workers = [
            spawn(
                RolloutWorker,
                f"rollout-{number}",
                settings,
                model_path,
                engines,
                urls,
                concurrency=TREES_PER_WORKER,
            )
            for number in range(config.rollout.workers)
        ]
        await asyncio.gather(*waiting)
        checks = [answer(worker.check.remote(), START_DEADLINE_S, "rollout worker") for worker in workers]
        await asyncio.gather(*checks)
        return cls(workers, engines, hosts, servers)

    async def close(self) -> None:
        """Let the tool servers stop what they started; Ray ends the rest with the session."""
        closing = [answer(server.close.remote(), CLOSE_DEADLINE_S, "tool server") for server in self.servers]
        await asyncio.gather(*closing, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class Crew:
    """Everything that runs: growers, the queue between, and the learner."""

    growers: Growers
    learner: LearnerGroup
    replay: Any

    @classmethod
    async def start(cls, config: Config, model_path: str, corpus: Path | None) -> Crew:
        learn, flow = config.learn, config.flow
        learner = LearnerGroup(learn.tp * learn.pp * learn.dp)
        replay = spawn(
            ReplayActor,
            "replay",
            flow.batch_leaves // config.rollout.leaves,
            flow.window,
            flow.staleness
            + flow.window,  # the most that can happen: the bound holds by admission, not by waste
            concurrency=8,
        )
        async with asyncio.TaskGroup() as starting:
            starting.create_task(learner.start(to_dict(config), model_path))
            growing = starting.create_task(Growers.start(config, model_path, corpus))
        return cls(growing.result(), learner, replay)

    async def close(self) -> None:
        await self.growers.close()
