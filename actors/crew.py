"""The actors of a run: started together, stopped together."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.engine import EngineActor
from actors.learner import LearnerGroup
from actors.places import Places
from actors.replay import ReplayActor
from actors.rollout import RolloutWorker
from actors.supervise import START_DEADLINE_S, answer, spawn
from actors.tools import ToolActor
from system.cluster.placement import REPLAY, learner_world, served_tools
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
    async def start(cls, config: Config, model_path: str, corpus: Path | None, places: Places) -> Growers:
        """Start every actor at once and wait until each has said that it works.

        Raises what the first failing part raised: a tool that cannot work is named by its ToolStartError.
        """
        settings = to_dict(config)
        waiting, engines, hosts, servers, urls = [], [], [], [], {}
        replicas = [f"engine-{number}" for number in range(config.engine.replicas)]
        tools = {f"tool-{name}": name for name in served_tools(config)}
        listening = [*replicas, *tools]
        ports = dict(
            zip(listening, await asyncio.gather(*(places[it].port() for it in listening)), strict=True)
        )
        for replica in replicas:
            place, port = places[replica], ports[replica]
            engines.append(f"http://{place.host}:{port}")
            engine = spawn(
                EngineActor, replica, settings, model_path, place.host, port, options=place.options
            )
            hosts.append(engine)
            waiting.append(answer(engine.ready.remote(), START_DEADLINE_S, replica))
        for server_name, name in tools.items():
            place, port = places[server_name], ports[server_name]
            urls[name] = f"http://{place.host}:{port}"
            server = spawn(
                ToolActor,
                server_name,
                name,
                settings,
                str(corpus or ""),
                place.host,
                port,
                options=place.options,
            )
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
                options=places[f"rollout-{number}"].options,
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
    async def start(cls, config: Config, model_path: str, corpus: Path | None, places: Places) -> Crew:
        flow = config.flow
        learner = LearnerGroup(learner_world(config), places)
        replay = spawn(
            ReplayActor,
            "replay",
            flow.batch_leaves // config.rollout.leaves,
            flow.window,
            flow.staleness
            + flow.window,  # the most that can happen: the bound holds by admission, not by waste
            concurrency=8,
            options=places[REPLAY].options,
        )
        async with asyncio.TaskGroup() as starting:
            starting.create_task(learner.start(to_dict(config), model_path))
            growing = starting.create_task(Growers.start(config, model_path, corpus, places))
        return cls(growing.result(), learner, replay)

    async def close(self) -> None:
        await self.growers.close()
