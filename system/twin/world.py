"""The digital twin: a whole run on the virtual clock.

Real: rollouts with their schedules and branching policies, the training loop with admission, ledger and
replay queue (``system.flow.loop``, the loop that drives the actors too).  Models: the engine, the tools, the
agent, the learner.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from system.config import ChosenReward, Config
from system.errors import EspalierError
from system.flow.curriculum import PoolWeights
from system.flow.ledger import Event, Ledger, Ticket
from system.flow.loop import TrainingLoop, TreeLost
from system.flow.replay import TreeInFlight
from system.observe.recorder import Recorder
from system.observe.rundir import RunDir
from system.rollout.branching import make_policy
from system.rollout.context import RolloutContext
from system.rollout.failure import RolloutFailed
from system.rollout.scorer import Scorer
from system.rollout.scoring import Scoring
from system.rollout.syntax.tags import TagSyntax
from system.rollout.tree_rollout import TreeRollout
from system.tree.prompt import Prompt
from system.tree.record import Tree
from system.tree.stats import TreeStats
from system.twin.agent import Agent, AgentModel, AnswerReward, TwinTokenizer
from system.twin.clock import Trace
from system.twin.clock import run as run_virtually
from system.twin.engine_model import EngineModel, EngineSpeed
from system.twin.engine_models import EngineModels
from system.twin.judge import JudgeModel
from system.twin.records import TwinResult
from system.twin.speeds import LearnerSpeed
from system.twin.tools import ToolModel, TwinTools

# Settings under which no deadline, no limit of the tools and no cache of theirs plays a part.
UNLIMITED = (
    *(f"rollout.{name}_deadline_s=1e9" for name in ("generate", "branch", "tree")),
    "tools.deadline_s=1e9",
    "tools.concurrency=1000000",
    "tools.cache_size=0",
)


_PROMPTS = 4096


@dataclass(frozen=True)
class Models:
    """What stands in for the parts that are not simulated by running them."""

    engine: EngineSpeed
    learner: LearnerSpeed
    agent: Agent = field(default_factory=AgentModel)
    tools: Mapping[str, ToolModel] = field(default_factory=lambda: {"search": ToolModel()})
    publish_s: float = 0.0  # weights on their way, while engines generate
    update_s: float = 0.0  # pause of every engine for the swap
    request_s: float = 0.0  # a request's way to the engine and back, and the host's work on a segment
    vocab: int = 151_936  # V: ln V is the unit of ΔH
    mixed: bool = False  # a prefill is part of a decode step


class Stuck(EspalierError, RuntimeError):
    """No training step was finished for ``Twin.patience_s`` virtual seconds: somebody waits for ever."""


@dataclass
class Twin:
    """One run under ``config`` with ``models``, to be simulated once by :meth:`run`."""

    config: Config
    models: Models
    steps: int  # training steps
    judge: JudgeModel | None = None  # beside the rule that rewards all answers; None: the rule alone
    patience_s: float = 1e7  # virtual
    log: list[Event] = field(default_factory=list)  # the ledger's
    records: list[dict[str, Any]] = field(default_factory=list)  # one per training step, as in metrics.jsonl
    closed: list[tuple[float, float]] = field(default_factory=list)  # (when, duration) of each tree

    def __post_init__(self) -> None:
        config, models = self.config, self.models
        self.trace = Trace()
        self.agent = models.agent
        self.prompt_ids = [f"q{number}" for number in range(_PROMPTS)]
        known = {name: models.tools[name] for name in self.agent.tools}  # in the agent's order
        together = replace(config.tools, concurrency=config.tools.concurrency * config.rollout.workers)
        self.tools = TwinTools(known, together, config.run.seed, self.trace)
        syntax = TagSyntax(self.tools.specs)
        policy = make_policy(config.branching)
        chunk = config.engine.chunk_tokens
        self.engines = [
            EngineModel(
                f"engine-{number}",
                models.engine,
                self.agent,
                first_tokens=-(-policy.probe_tokens // chunk) * chunk,
                max_running=config.engine.max_running,
                stops=dict(enumerate(syntax.stops)),
                request_s=models.request_s,
                mixed=models.mixed,
                trace=self.trace,
            )
            for number in range(config.engine.replicas)
        ]
        self.fleet = EngineModels(self.engines)
        self.context = RolloutContext(
            engine=self.fleet,
            tools=self.tools,
            syntax=syntax,
            policy=policy,
            scoring=Scoring(self._scorers()),
            tokenizer=TwinTokenizer(self.agent),
            config=config.rollout,
            vocab_size=models.vocab,
            now=lambda: asyncio.get_running_loop().time(),
        )

    def _scorers(self) -> list[Scorer]:
        chosen = ChosenReward(name="judge", label="judge", weight=0.5, run="loop", deadline_s=1e9)
        return [Scorer(AnswerReward()), *([Scorer(self.judge, chosen)] if self.judge else [])]

    async def run(self) -> None:
        """Simulate to the end."""
        time = asyncio.get_running_loop().time
        self.recorder = Recorder(RunDir(Path()), self.config, (), clock=time, now=time)  # it writes no file
        self.recorder.training_began()
        await self.session()
        self.totals = self.recorder.summary()

    def result(self, skip: int = 0) -> TwinResult:
        """The finished simulation in figures, without its first ``skip`` training steps."""
        ends = [0.0, *(record["time/wall_s"] for record in self.records)]
        durations = np.array([took for at, took in self.closed if ends[skip] < at <= ends[-1]] or [np.nan])
        engines = self.engines
        percentiles = {f"p{q}": float(np.percentile(durations, q)) for q in (50, 90, 99, 100)}
        return TwinResult.of(
            self.records[skip:],
            steps=len(self.records),
            seconds=ends[-1],
            tree_s={"mean": float(durations.mean()), **percentiles},
            totals=self.totals,
            running=sum(one.generated for one in engines) / max(sum(one.steps for one in engines), 1),
            events=self.trace.events,
            digest=self.trace.digest,
        )

    async def session(self, version: int = 0) -> None:
        """From weights ``version``, and what ``log`` says of them, to the end of the run."""
        config = self.config
        ledger = Ledger.replay(
            self.prompt_ids,
            config.run.seed,
            self.log,
            version,
            config.flow.max_attempts,
            self._logged,
            PoolWeights.of(config),
        )
        self.loop = loop = TrainingLoop(
            config, ledger, self, self.recorder, version=version, clock=asyncio.get_running_loop().time
        )
        for engine in self.engines:
            if engine.alive:
                await engine.update(version, 0.0)
        async with asyncio.TaskGroup() as tasks:
            admitting = tasks.create_task(loop.admit(), name="admission")
            try:
                while loop.version < self.steps:
                    await self.step(loop)
            finally:
                loop.stop()
                admitting.cancel()

    async def step(self, loop: TrainingLoop) -> None:
        patience = asyncio.timeout(self.patience_s)
        try:
            async with patience:
                await loop.step()
                self.records.append(self.recorder.flush(loop.version))
        except TimeoutError:
            if not patience.expired():
                raise
            load = {engine.name: engine.load for engine in self.engines}
            raise Stuck(
                f"step {loop.version + 1}: {len(loop.ledger.growing)} trees grow, {len(loop.replay)} closed, "
                f"{self.tools.running} tools run, requests at the engines: {load}"
            ) from None

    # What the loop asks for (system.flow.loop.Parts)

    async def grow(self, ticket: Ticket, seed: int) -> TreeInFlight:
        prompt = self.agent.prompt(ticket.prompt_id, self.config.run.seed)
        try:
            tree, stats = await self.rollout(prompt, ticket, seed)
        except RolloutFailed as failure:
            raise TreeLost(failure.reason, failure.detail, blameless=failure.blameless) from failure
        finally:
            tree_id = f"{prompt.id}:{ticket.number}"
            self.fleet.forget(tree_id)
            self.agent.forget(tree_id)
        self.closed.append((asyncio.get_running_loop().time(), stats.seconds))
        return TreeInFlight(ticket, tree, stats)

    async def rollout(self, prompt: Prompt, ticket: Ticket, seed: int) -> tuple[Tree | None, TreeStats]:
        """The work of :meth:`grow`: a tree, if it is kept, and its numbers."""
        tree = await TreeRollout(self.context, prompt, ticket=ticket.number, seed=seed).run()
        return tree, TreeStats.of(tree)

    async def train(self, version: int, trees: Sequence[TreeInFlight]) -> Mapping[str, float]:
        seconds = self.models.learner.train_s(sum(tree.stats.unique for tree in trees))
        # A timer even for 0 s, unlike sleep(0): what else is due at this moment comes first.
        await asyncio.wait({asyncio.get_running_loop().create_future()}, timeout=seconds)
        return {"seconds": seconds}

    async def publish(self, version: int) -> None:
        await asyncio.sleep(self.models.publish_s)
        keep = self.config.engine.kv_after_update == "keep"
        async with asyncio.TaskGroup() as tasks:
            for engine in self.engines:
                tasks.create_task(engine.update(version, self.models.update_s, keep))
        for engine in self.engines:
            engine.settle()
            for cause, seconds in engine.idle_s.items():
                self.recorder.idle_total(engine.name, cause, seconds)
        for name, count in self.context.scoring.counters.items():
            self.recorder.running_total("rollout", name, count)

    def _logged(self, event: Event) -> None:
        self.log.append(event)
        self.trace.note("ledger", *event.items())


def simulate(config: Config, models: Models, *, steps: int, skip: int = 0) -> TwinResult:
    """Simulate ``steps`` training steps and sum up all but the first ``skip``.

    Deterministic in ``config.run.seed``.  Starts an event loop of its own.
    """
    twin = Twin(config, models, steps)
    run_virtually(twin.run())
    return twin.result(skip)
