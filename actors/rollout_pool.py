"""The actors of a run: started together, stopped together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray

from actors.engine import EngineActor, attached, named
from actors.heartbeat import Watched
from actors.learner import LearnerGroup
from actors.new_model import new_model
from actors.placement import Placement
from actors.ray_support import answer, spawn
from actors.rollout import RolloutWorker
from actors.tools import ToolActor
from system.cluster.placement import EVALUATION, served_tools
from system.config import Config, to_dict
from system.engine.routes import RouteFormat
from system.observe.rundir import RunDir
from system.tasks.base import Task
from system.tasks.inputs import corpus_file

CLOSE_DEADLINE_S = 30.0  # above the grace that an SGLang server is given
Value = TypeVar("Value")
TREES_PER_WORKER = 4096  # calls that it takes at once; admission and evaluation bound them long before


class Arrivals:
    """Tells what a start still waits for."""

    def __init__(self, tell: Callable[[str], object] = lambda _: None) -> None:
        self._tell = tell
        self._awaited: list[str] = []

    async def of(self, what: str, waiting: Awaitable[Value]) -> Value:
        self._awaited.append(what)
        self._say()
        try:
            return await waiting
        finally:
            self._awaited.remove(what)
            self._say()

    async def all(self, waiting: Mapping[str, Awaitable[Any]]) -> None:
        """Raises what the first of them to fail raised."""
        await asyncio.gather(*(self.of(what, one) for what, one in waiting.items()))

    def _say(self) -> None:
        if self._awaited:
            self._tell(f"waiting for {', '.join(self._awaited)}")


@dataclass(frozen=True, slots=True)
class RolloutPool:
    """What grows trees: rollout workers, the engines they generate with, the tools they call.

    Workers and engines stand under their actors' names; those of a lost node are taken out.  ``evaluation``:
    a pool of its own (``eval.engines``), which calls the same tools.
    """

    workers: dict[str, Any]
    engines: dict[str, str]  # URLs
    servers: dict[str, Any]  # the actors of engines and tools, which live as long as somebody holds them
    evaluation: RolloutPool | None = None

    @classmethod
    async def start(
        cls,
        config: Config,
        model_path: str,
        corpus: Path | None,
        places: Placement,
        logs: Path,
        arrivals: Arrivals | None = None,
    ) -> RolloutPool:
        """Start every actor at once and wait until each has said that it works.

        ``logs``: directory for what servers of other projects say, in the run directory.  ``arrivals``: hears
        of each.

        Raises what the first failing part raised: a tool that cannot work is named by its ToolStartError.
        """
        settings, deadline_s = to_dict(config), config.cluster.start_deadline_s
        settings["run"]["name"] = config.run.name or logs.parent.name  # by which worlds know whose they are
        arrivals = arrivals or Arrivals()
        engines, servers, waiting = await _engines(config, model_path, places, logs)
        tools = {}
        names = {f"tool-{tool}": tool for tool in served_tools(config)}
        for (name, tool), port in zip(names.items(), await places.ports(names), strict=True):
            host, options = places[name].host, places[name].options
            tools[tool] = f"http://{host}:{port}"
            arguments = (tool, settings, str(corpus or ""), host, port)
            servers[name] = spawn(ToolActor, name, *arguments, options=options)
            waiting[f"tool {tool}"] = answer(servers[name].ready.remote(), deadline_s, f"tool {tool}")

        def start_worker(name: str, urls: Mapping[str, str]) -> Any:
            arguments = (settings, model_path, [*urls.values()], tools, logs.parent)
            place = places[name].options
            return spawn(RolloutWorker, name, *arguments, concurrency=TREES_PER_WORKER, options=place)

        names = [f"rollout-{number}" for number in range(config.rollout.workers)]
        workers = {name: start_worker(name, engines) for name in names}
        evaluation = None
        if config.eval.engines:
            urls, hosts, more = await _started(config, model_path, places, logs, EVALUATION)
            waiting |= more
            name = f"{EVALUATION}rollout-0"
            evaluation = cls({name: start_worker(name, urls)}, urls, hosts)
        await arrivals.all(waiting)
        checked = workers | (evaluation.workers if evaluation else {})
        calls = {name: worker.check_tools.remote() for name, worker in checked.items()}
        await arrivals.all({name: answer(call, deadline_s, name) for name, call in calls.items()})
        return cls(workers, engines, servers, evaluation)

    def lose(self, actors: Sequence[str]) -> bool:
        """Do without ``actors``, whose node is gone; false, and nothing is done, if one cannot be spared."""
        spared = {name for name in actors if name.startswith(EVALUATION)}
        lost, workers, engines = {*actors} - spared, self.workers.keys(), self.engines.keys()
        if not lost <= workers | engines or lost >= workers or lost >= engines:
            return False
        self._take_out(lost)
        if self.evaluation is not None:
            self.evaluation._take_out(spared)
        return True

    def _take_out(self, lost: Set[str]) -> None:
        for name in lost & self.workers.keys():
            ray.kill(self.workers.pop(name))  # else Ray would look for room to restart it, for ever
        for name in lost & self.engines.keys():
            del self.engines[name]
            if name in self.servers:
                ray.kill(self.servers.pop(name))

    async def close(self) -> None:
        """Let the servers stop what they started; Ray ends the rest with the session."""
        servers = self.servers | (self.evaluation.servers if self.evaluation else {})
        calls = [server.close.remote() for server in servers.values()]
        closing = (answer(call, CLOSE_DEADLINE_S, "server") for call in calls)
        await asyncio.gather(*closing, return_exceptions=True)


async def _engines(
    config: Config, model_path: str, places: Placement, logs: Path
) -> tuple[dict[str, str], dict[str, Any], dict[str, Coroutine[Any, Any, Any]]]:
    """The engines' URLs, the actors started for them, and what to wait for by name.

    Servers that run already (``engine.urls``) get no actor: nobody here starts, restarts or stops them.
    """
    engine = config.engine
    if engine.urls:
        urls = named(engine.urls)
        routes = config.rollout.replay_routes and RouteFormat.of_directory(model_path) is not None
        entropies = not engine.entropy_top_k
        ready = attached([*urls.values()], engine.start_deadline_s, entropies, routes)
        return urls, {}, {"engines": ready}
    return await _started(config, model_path, places, logs)


async def _started(
    config: Config, model_path: str, places: Placement, logs: Path, kind: str = ""
) -> tuple[dict[str, str], dict[str, Any], dict[str, Coroutine[Any, Any, Any]]]:
    """As :func:`_engines`, of those that the run starts; ``kind``: ``EVALUATION`` for ``eval.engines``."""
    # Of the server, and of the actor's own process.
    deadline = config.engine.start_deadline_s + config.cluster.start_deadline_s
    first, count = (config.engine.replicas, config.eval.engines) if kind else (0, config.engine.replicas)
    names = [f"{kind}engine-{number}" for number in range(count)]
    urls, hosts, waiting = {}, {}, {}
    for number, (name, port) in enumerate(zip(names, await places.ports(names), strict=True)):
        host, options = places[name].host, places[name].options
        urls[name] = f"http://{host}:{port}"
        log = str(logs / f"sglang-{kind}{number}.log")
        arguments = (to_dict(config), model_path, host, port, first + number, log)
        hosts[name] = spawn(EngineActor, name, *arguments, options=options)
        waiting[name] = answer(hosts[name].ready.remote(), deadline, name)
    return urls, hosts, waiting


@dataclass(frozen=True, slots=True)
class RunActors:
    """Everything that runs."""

    pool: RolloutPool
    learner: LearnerGroup
    places: Placement
    engine_start_s: float  # engine.start_deadline_s

    @classmethod
    async def start(
        cls,
        config: Config,
        task: Task,
        model: Path,
        places: Placement,
        run_dir: RunDir,
        tell: Callable[[str], object],
    ) -> RunActors:
        """Every actor of a run, at the weights in ``model``; a new model is made while the learner's
        processes load Megatron.  ``tell``: hears what is waited for.
        """
        arrivals = Arrivals(tell)
        corpus = corpus_file(config, task, run_dir.root)
        learner = LearnerGroup(config.learn.ranks, places, config.cluster)
        if not config.model.path:
            await arrivals.of("a new model", new_model(model, config, task))
        root, settings = run_dir.root.resolve(), to_dict(config)
        # By which a directory of weights that runs share knows whose is what.
        settings["run"] |= {"dir": str(root.parent), "name": root.name}
        async with asyncio.TaskGroup() as starting:
            starting.create_task(arrivals.of("learner", learner.start(settings, str(model))))
            growing = starting.create_task(
                RolloutPool.start(config, str(model), corpus, places, run_dir.logs.resolve(), arrivals)
            )
        return cls(growing.result(), learner, places, config.engine.start_deadline_s)

    def watched(self) -> dict[str, Watched]:
        """Every actor that has to answer heartbeats; a learner rank that is lost ends the run."""
        back = self.pool.workers | self.pool.servers
        spare = it.workers | it.servers if (it := self.pool.evaluation) else {}
        engines = self.pool.engines.keys() | (it.engines.keys() if it else ())
        return {
            name: Watched(
                actor,
                self.places[name].options,
                returns=name not in self.learner.ranks,
                spare=name in spare,
                server_s=self.engine_start_s if name in engines else 0.0,
            )
            for name, actor in (back | self.learner.ranks | spare).items()
        }
