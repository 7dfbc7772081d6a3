"""The actors of a run: started together, stopped together."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
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

CLOSE_DEADLINE_S = 30.0  # above the grace that an SGLang server is given
TREES_PER_WORKER = 4096  # calls that it takes at once; admission and evaluation bound them long before


@dataclass(frozen=True, slots=True)
class RolloutPool:
    """What grows trees: rollout workers, the engines they generate with, the tools they call.

    Workers and engines stand under their actors' names; those of a lost node are taken out.
    """

    workers: dict[str, Any]
    engines: dict[str, str]  # URLs
    servers: list[Any]  # the actors of engines and tools, which live as long as somebody holds them

    @classmethod
    async def start(
        cls, config: Config, model_path: str, corpus: Path | None, places: Placement, logs: Path
    ) -> RolloutPool:
        """Start every actor at once and wait until each has said that it works.

        ``logs``: directory for what servers of other projects say.

        Raises what the first failing part raised: a tool that cannot work is named by its ToolStartError.
        """
        settings = to_dict(config)
        engines, servers, waiting = await _engines(config, model_path, places, logs)
        tools = {}
        names = {f"tool-{tool}": tool for tool in served_tools(config)}
        for (name, tool), port in zip(names.items(), await places.ports(names), strict=True):
            host, options = places[name].host, places[name].options
            tools[tool] = f"http://{host}:{port}"
            arguments = (tool, settings, str(corpus or ""), host, port)
            servers.append(spawn(ToolActor, name, *arguments, options=options))
            waiting.append(answer(servers[-1].ready.remote(), START_DEADLINE_S, f"tool {tool}"))
        arguments = (settings, model_path, [*engines.values()], tools)
        workers = {
            name: spawn(
                RolloutWorker, name, *arguments, concurrency=TREES_PER_WORKER, options=places[name].options
            )
            for name in (f"rollout-{number}" for number in range(config.rollout.workers))
        }
        await asyncio.gather(*waiting)
        calls = (worker.check_tools.remote() for worker in workers.values())
        await asyncio.gather(*(answer(call, START_DEADLINE_S, "rollout worker") for call in calls))
        return cls(workers, engines, servers)

    def lose(self, actors: Sequence[str]) -> bool:
        """Do without ``actors``, whose node is gone; false, and nothing is done, if one cannot be spared."""
        lost, workers, engines = {*actors}, self.workers.keys(), self.engines.keys()
        if not lost <= workers | engines or lost >= workers or lost >= engines:
            return False
        for name in lost & workers:
            ray.kill(self.workers.pop(name))  # else Ray would look for room to restart it, for ever
        for name in lost & engines:
            del self.engines[name]
        return True

    async def close(self) -> None:
        """Let the servers stop what they started; Ray ends the rest with the session."""
        closing = (answer(server.close.remote(), CLOSE_DEADLINE_S, "server") for server in self.servers)
        await asyncio.gather(*closing, return_exceptions=True)


async def _engines(
    config: Config, model_path: str, places: Placement, logs: Path
) -> tuple[dict[str, str], list[Any], list[Coroutine[Any, Any, Any]]]:
    """The engines' URLs, the actors started for them, and what to wait for.

    Servers that run already (``engine.urls``) get no actor: nobody here starts, restarts or stops them.
    """
    engine = config.engine
    if engine.urls:
        ready = attached(engine.urls, engine.start_deadline_s, not engine.entropy_top_k)
        return {f"engine-{number}": url for number, url in enumerate(engine.urls)}, [], [ready]
    deadline = engine.start_deadline_s + START_DEADLINE_S  # of the server; of the actor's own process
    names = [f"engine-{number}" for number in range(engine.replicas)]
    urls, hosts, waiting = {}, [], []
    for number, (name, port) in enumerate(zip(names, await places.ports(names), strict=True)):
        host, options = places[name].host, places[name].options
        urls[name] = f"http://{host}:{port}"
        arguments = (to_dict(config), model_path, host, port, number, str(logs / f"sglang-{number}.log"))
        hosts.append(spawn(EngineActor, name, *arguments, options=options))
        waiting.append(answer(hosts[-1].ready.remote(), deadline, name))
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
