"""The actors of a run: started together, stopped together."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from actors.engine import EngineActor, attached
from actors.inputs import corpus_file, make_model
from actors.learner import LearnerGroup
from actors.placement import Placement
from actors.ray_support import START_DEADLINE_S, answer, spawn
from actors.rollout import RolloutWorker
from actors.tools import ToolActor
from system.cluster.placement import learner_world, served_tools
from system.config import Config, to_dict
from system.observe.rundir import RunDir
from system.tasks.base import Task

CLOSE_DEADLINE_S = 10.0
ENGINE_CLOSE_DEADLINE_S = 30.0  # above the grace that an SGLang server is given
TREES_PER_WORKER = (
    4096  # calls a rollout worker takes at once; admission and evaluation bound them long before
)


@dataclass(frozen=True, slots=True)
class RolloutPool:
    """What grows trees: rollout workers, the engines they generate with, the tools they call."""

    workers: list[Any]
    engines: list[str]  # URLs
    hosts: list[Any]  # the engines' actors, which live as long as somebody holds them
    servers: list[Any]  # the tools' actors
    tools: dict[str, str]  # their URLs, by the tool's name
    names: dict[str, Any] = field(default_factory=dict)  # workers, and URLs by their engines' names

    @classmethod
    async def start(
        cls, config: Config, model_path: str, corpus: Path | None, places: Placement, logs: Path
    ) -> RolloutPool:
        """Start every actor at once and wait until each has said that it works.

        ``logs``: directory for what servers of other projects say.

        Raises what the first failing part raised: a tool that cannot work is named by its ToolStartError.
        """
        settings = to_dict(config)
        engines, hosts, waiting = await _engines(config, model_path, places, logs)
        servers, urls = [], {}
        tools = {f"tool-{name}": name for name in served_tools(config)}
        ports = await asyncio.gather(*(places[server_name].port() for server_name in tools))
        for (server_name, name), port in zip(tools.items(), ports, strict=True):
            place = places[server_name]
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
            rollout_worker(config, name, model_path, engines, urls, places[name].options)
            for name in (f"rollout-{number}" for number in range(config.rollout.workers))
        ]
        await asyncio.gather(*waiting)
        await check_tools(workers)
        names: dict[str, Any] = {f"engine-{number}": url for number, url in enumerate(engines)}
        names |= {f"rollout-{number}": worker for number, worker in enumerate(workers)}
        return cls(workers, engines, hosts, servers, urls, names)

    def lose(self, actors: Sequence[str]) -> bool:
        """Do without ``actors``, whose node is gone; false, and nothing is done, if one cannot be spared."""
        lost: list[Any] = [self.names.get(actor) for actor in actors]
        workers = [worker for worker in self.workers if worker not in lost]
        engines = [url for url in self.engines if url not in lost]
        if None in lost or not workers or not engines:
            return False
        for worker in self.workers:
            if worker in lost:
                ray.kill(worker)  # else Ray would look for room to restart it, for ever
        self.workers[:], self.engines[:] = workers, engines
        return True

    async def close(self) -> None:
        """Let the servers stop what they started; Ray ends the rest with the session."""
        closing = [answer(server.close.remote(), CLOSE_DEADLINE_S, "tool server") for server in self.servers]
        closing += [answer(engine.close.remote(), ENGINE_CLOSE_DEADLINE_S, "engine") for engine in self.hosts]
        await asyncio.gather(*closing, return_exceptions=True)


def rollout_worker(
    config: Config,
    name: str,
    model_path: str,
    engines: Sequence[str],
    tools: Mapping[str, str],
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Start a rollout worker.  ``engines``: URLs.  ``tools``: URLs by the tool's name."""
    arguments = (to_dict(config), model_path, list(engines), dict(tools))
    return spawn(RolloutWorker, name, *arguments, concurrency=TREES_PER_WORKER, options=options)


async def check_tools(workers: Iterable[Any]) -> None:
    """Raise ToolStartError if a tool of one of the rollout ``workers`` cannot work."""
    calls = [worker.check_tools.remote() for worker in workers]
    await asyncio.gather(*(answer(call, START_DEADLINE_S, "rollout worker") for call in calls))


async def _engines(
    config: Config, model_path: str, places: Placement, logs: Path
) -> tuple[list[str], list[Any], list[Coroutine[Any, Any, Any]]]:
    """URLs of the engines, the actors started for them, and what to wait for.

    Servers that run already (``engine.urls``) get no actor: nobody here starts, restarts or stops them.
    """
    engine = config.engine
    if engine.urls:
        return (
            list(engine.urls),
            [],
            [attached(engine.urls, engine.start_deadline_s, not engine.entropy_top_k)],
        )
    deadline = engine.start_deadline_s + START_DEADLINE_S  # of the server; of the actor's own process
    seats = [places[f"engine-{number}"] for number in range(engine.replicas)]
    ports = await asyncio.gather(*(seat.port() for seat in seats))
    urls, hosts, waiting = [], [], []
    for number, (seat, port) in enumerate(zip(seats, ports, strict=True)):
        urls.append(f"http://{seat.host}:{port}")
        log = str(logs / f"sglang-{number}.log")
        arguments = (to_dict(config), model_path, seat.host, port, number, log)
        hosts.append(spawn(EngineActor, f"engine-{number}", *arguments, options=seat.options))
        waiting.append(answer(hosts[-1].ready.remote(), deadline, f"engine-{number}"))
    return urls, hosts, waiting


@dataclass(frozen=True, slots=True)
class RunActors:
    """Everything that runs."""

    pool: RolloutPool
    learner: LearnerGroup

    @classmethod
    async def start(
        cls, config: Config, task: Task, model: Path, places: Placement, run_dir: RunDir
    ) -> RunActors:
        """Every actor of a run, at the weights in ``model``; a new model is made while the learner's
        processes load Megatron.
        """
        corpus = corpus_file(config, task, run_dir.root)
        learner = LearnerGroup(learner_world(config), places)
        await asyncio.to_thread(make_model, model, config, task)
        async with asyncio.TaskGroup() as starting:
            starting.create_task(learner.start(to_dict(config), str(model)))
            growing = starting.create_task(
                RolloutPool.start(config, str(model), corpus, places, run_dir.logs.resolve())
            )
        return cls(growing.result(), learner)

    async def close(self) -> None:
        await self.pool.close()
