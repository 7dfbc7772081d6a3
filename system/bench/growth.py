"""Growing trees on the virtual clock: the workload of the benchmarks of schedules, and what comes of it.

The digital twin (:mod:`system.twin`) runs a way's recipe: rollouts, policies, training loop, admission and
queue are the ones that train, agent, engine and tools are models, training takes no time.  So a day of tool
calls takes seconds.
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass, replace

from system.bench.baselines import Way
from system.bench.critical_path import CriticalPath
from system.config import Config
from system.rollout.schedule import Lockstep
from system.twin.agent import AgentModel, LeafAgent
from system.twin.clock import run as run_virtually
from system.twin.dist import Constant, Lognormal
from system.twin.lean import LeanTwin
from system.twin.records import TwinResult
from system.twin.speeds import LinearEngine, LinearLearner
from system.twin.tools import ToolModel
from system.twin.world import UNLIMITED, Models, Twin

SIGMAS = (0.0, 0.5, 1.0, 1.5)
STRAGGLERS = 0.05


@dataclass(frozen=True)
class Scenario:
    """The workload, and what serves it."""

    agent: AgentModel
    latency: Lognormal
    leaves: int = 16  # n; this and the next two as in ARPO's released 7B recipe
    roots: int = 8  # N
    call_limit: int = 3
    trees: int = 32  # per batch
    slots: int = 256  # sequences that the engine decodes at once, first come first served
    token_s: float = 0.02  # seconds per token of each of them
    window: int = 20  # tokens that a policy looks at

    def config(self, way: Way, seed: int) -> Config:
        """The way's recipe for this workload."""
        config = deepcopy(way.config(*UNLIMITED, "rollout.concurrency=1000000"))
        config.run.seed = seed
        rollout, engine = config.rollout, config.engine
        rollout.leaves, rollout.roots, rollout.call_limit = self.leaves, self.roots, self.call_limit
        rollout.max_response_tokens = 1 << 20
        engine.max_running, engine.max_context, engine.chunk_tokens = self.slots, 1 << 21, 1
        config.branching.probe_tokens = self.window
        config.flow.batch_leaves = self.trees * self.leaves
        return config


@dataclass(frozen=True)
class Grown:
    """What came of growing trees."""

    result: TwinResult
    critical_path_s: float
    work_s: float  # slot-seconds of decoding
    rounds: int  # barriers, in lockstep
    slots: int
    longest_step_s: float  # between two training steps

    @property
    def bound_s(self) -> float:
        """No schedule ends this work earlier: its longest chain, and its decoding on all slots."""
        return max(self.critical_path_s, self.work_s / self.slots)

    @property
    def busy(self) -> float:
        """Share of the engine's slots that decode."""
        return self.work_s / (self.result.seconds * self.slots)

    @property
    def said_yes(self) -> float:
        """Share of the forks at results at which the policy asked for one; NaN where there are none."""
        forks = self.result.totals["forks"]
        return 1 - self.result.totals["forks_unasked"] / forks if forks else math.nan

    @property
    def per_tree(self) -> dict[str, float]:
        """Forks, tool calls and tokens, over all trees."""
        totals = self.result.totals
        return {
            "fork_share": totals["forks"] / totals["leaves"],
            "tool_calls": self.result.per_tree("tool_calls"),
            "generated": totals["tokens"]["generated"] / totals["trees"],
        }


def agent(
    p_call: float = 0.5, tokens: float = 120, sigma: float = 0.5, kind: type[AgentModel] = AgentModel
) -> AgentModel:
    """One whose entropy never changes: a fork is a coin's throw.  ``tokens``: of a segment, on average."""
    return kind(
        prompt_tokens=Constant(1),
        segment_tokens=Lognormal(tokens, sigma),
        p_call=(p_call,),
        root_entropy=1.0,
        rise=0.0,
        entropy_spread=0.0,
    )


def twin(scenario: Scenario, way: Way, steps: int, seed: int = 0, *, lean: bool = False) -> Twin:
    """The simulation of so many training steps, to be run once.

    ``lean``: with trees without tokens (:mod:`system.twin.lean`).
    """
    speaker, kind = scenario.agent, LeanTwin if lean else Twin
    models = Models(
        engine=LinearEngine(scenario.token_s, 0.0),
        learner=LinearLearner(0.0, 0.0),
        agent=replace(speaker, seed=seed) if isinstance(speaker, LeafAgent) else speaker,
        tools={name: ToolModel(scenario.latency) for name in scenario.agent.tools},
        vocab=100_000,
        mixed=True,
    )
    return kind(scenario.config(way, seed), models, steps)


def grow(
    scenario: Scenario, way: Way, batches: int, seed: int = 0, skip: int = 0, *, lean: bool = False
) -> Grown:
    """Simulate ``batches`` training batches after ``skip`` that are left out of the figures.

    ``lean``: see :func:`twin`; no longest chain is told then.
    """
    world = twin(scenario, way, skip + batches, seed, lean=lean)
    path = CriticalPath(world.context.engine, scenario.token_s, world.context.tools)
    world.context = replace(world.context, engine=path, tools=path)
    run_virtually(world.run())
    schedule = world.context.schedule
    return Grown(
        result=world.result(skip),
        critical_path_s=math.nan if lean else path.seconds,
        work_s=sum(engine.generated for engine in world.engines) * scenario.token_s,
        rounds=schedule.rounds if isinstance(schedule, Lockstep) else 0,
        slots=scenario.slots,
        longest_step_s=max(record["time/window_s"] for record in world.records[skip:]),
    )


def latencies() -> list[Lognormal]:
    """Every σ, without stragglers and with."""
    return [Lognormal(2.0, sigma, share) for share in (0.0, STRAGGLERS) for sigma in SIGMAS]
