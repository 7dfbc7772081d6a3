"""One simulated run of a model on a number of GPUs, and the search for the best way to split them.

The real control flow (``system.twin``) around a roofline of the hardware (``system.plan``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from system.config import Config, ConfigError, LearnConfig, load
from system.models.known import KNOWN
from system.models.shape import ModelShape
from system.plan.hardware import GPUS
from system.plan.memory import EngineLayout
from system.plan.speed import EngineRoofline, LearnerRoofline, PublishRoofline
from system.twin.agent import AgentModel
from system.twin.dist import Constant, Lognormal
from system.twin.records import TwinResult, mean_over_engines
from system.twin.tools import ToolModel
from system.twin.world import UNLIMITED, Models, simulate

GRAIN = 32  # tokens that one simulated token stands for
SKIP, CYCLES = 1, 3  # training steps left out at the start; periods of η + 1 steps simulated after that
IDLE = 0.10  # below this share of idle time a part counts as busy
GAIN = 1.005  # what counts as more, in the search
FULL = 1.4  # an engine is full when twice the sequences would bring less than so much more


@dataclass(frozen=True)
class Profile:
    """A model size, and how its ranks and engines are laid out."""

    name: str
    model: ModelShape
    learner: LearnConfig  # of one replica (dp = 1)
    engine: EngineLayout


def _replica(tp: int, pp: int = 1) -> LearnConfig:
    return LearnConfig(
        tp=tp,
        pp=pp,
        micro_tokens=16_384,
        sequence_parallel=True,
        recompute="full",
        distributed_optimizer=True,
    )


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("7B", KNOWN["qwen2.5-7b"], _replica(4), EngineLayout(tp=1)),
        Profile("14B", KNOWN["qwen2.5-14b"], _replica(8), EngineLayout(tp=1)),
        Profile("32B", KNOWN["qwen2.5-32b"], _replica(8, 2), EngineLayout(tp=2)),
    )
}


@dataclass(frozen=True)
class TrainingLoad:
    """What is trained on, after ARPO's recipes: 16 leaves, 8 roots, 3 calls at most; 64 prompts a step."""

    batch_trees: int = 64
    leaves: int = 16
    roots: int = 8
    staleness: int = 1
    prompt_tokens: float = 1024
    segment_tokens: float = 1024  # model tokens up to a call or the end, mean; lognormal, σ = 0.7
    result_tokens: float = 512
    p_call: float = 0.7
    call_limit: int = 3
    tool_s: float = 1.0  # mean; lognormal, σ = 1, and 5 % of calls take 30 times as long
    gpu: str = "h100"


@dataclass(frozen=True)
class Split:
    """One simulated run."""

    profile: Profile
    gpus: int
    learner_gpus: int
    engines: int
    workload: TrainingLoad
    result: TwinResult

    @property
    def replicas(self) -> int:
        """Of the learner."""
        return self.learner_gpus // self.profile.learner.ranks

    @property
    def trained_per_s(self) -> float:
        """Trained model tokens per second."""
        return self.result.trained_per_s * GRAIN

    @property
    def per_gpu(self) -> float:
        """Trained model tokens per second and GPU."""
        return self.trained_per_s / self.gpus

    @property
    def engine_idle(self) -> float:
        return mean_over_engines(self.result.idle)

    @property
    def learner_idle(self) -> float:
        return self.result.idle["learner"].get("no batch", 0.0)

    @property
    def bottleneck(self) -> str:
        """Which part has no time to spare; if each has, what they all wait for.

        "Taking turns": at η = 0 generation and training wait for each other.  "Few branches": engines decode
        fewer sequences than would fill them, so a step lasts as long as its longest trees.
        """
        if self.learner_idle < IDLE:
            return "training"
        if self.engine_idle < IDLE and self.crowding < FULL:
            return "generation"
        if self.workload.staleness == 0:
            return "taking turns"
        return "few branches"

    @property
    def crowding(self) -> float:
        """What twice as many sequences per engine would bring: 1 nothing, 2 twice the tokens per second."""
        roof = roofline(self.profile, self.workload.gpu)
        work, n = self.workload, self.result.running
        context = work.prompt_tokens + (work.segment_tokens + work.result_tokens) * (work.call_limit + 1) / 2
        if 2 * n * context > roof.kv_tokens:
            return 1.0
        return 2 * roof.step_s(n, n * context) / roof.step_s(2 * n, 2 * n * context)


def roofline(profile: Profile, gpu: str) -> EngineRoofline:
    """The speed of one of the profile's engines."""
    return EngineRoofline(profile.model, profile.engine, GPUS[gpu])


@dataclass(frozen=True, slots=True)
class _Grains:
    """An engine or learner that counts in grains of tokens."""

    engine: EngineRoofline
    learner: LearnerRoofline

    @property
    def kv_tokens(self) -> int:
        return self.engine.kv_tokens // GRAIN

    def step_s(self, running: float, context: float) -> float:
        return GRAIN * self.engine.step_s(running, context * GRAIN)

    def prefill_s(self, tokens: float) -> float:
        return self.engine.prefill_s(tokens * GRAIN)

    def train_s(self, tokens: float) -> float:
        return self.learner.train_s(tokens * GRAIN)


def simulate_split(profile: Profile, gpus: int, replicas: int, work: TrainingLoad) -> Split:
    """``gpus`` GPUs of which ``replicas`` learner replicas take theirs and engines the rest."""
    gpu, shape = GPUS[work.gpu], profile.model
    learner = replace(profile.learner, dp=replicas)
    taken = learner.ranks
    engines = (gpus - taken) // profile.engine.tp
    if engines < 1:
        raise ConfigError(f"{profile.name}: {gpus} GPUs leave none for engines beside the learner's {taken}")
    speed = _Grains(roofline(profile, work.gpu), LearnerRoofline(shape, learner, gpu))
    agent = AgentModel(
        prompt_tokens=Constant(work.prompt_tokens / GRAIN),
        segment_tokens=Lognormal(work.segment_tokens / GRAIN, 0.7),
        p_call=(work.p_call,),
    )
    tool = ToolModel(Lognormal(work.tool_s, 1.0, 0.05), Constant(work.result_tokens / GRAIN))
    publish = PublishRoofline(shape, learner, profile.engine, gpu)
    models = Models(
        engine=speed,
        learner=speed,
        agent=agent,
        tools={"search": tool},
        publish_s=publish.stage_s,
        update_s=publish.pause_s,
        vocab=shape.vocab,
    )
    skip = SKIP + work.staleness  # all trees that η permits begin at once; a period later they are spread
    result = simulate(_config(work, engines), models, steps=skip + CYCLES * (work.staleness + 1), skip=skip)
    return Split(profile, gpus, taken, engines, work, result)


def _config(work: TrainingLoad, engines: int) -> Config:
    longest = round((work.call_limit + 1) * 8 * (work.segment_tokens + work.result_tokens) / GRAIN)
    return load(
        None,
        [
            *UNLIMITED,
            f"rollout.leaves={work.leaves}",
            f"rollout.roots={work.roots}",
            f"rollout.call_limit={work.call_limit}",
            f"rollout.concurrency={(work.staleness + 1) * work.batch_trees}",
            f"rollout.max_response_tokens={longest}",
            f"rollout.max_tool_result_tokens={round(work.result_tokens / GRAIN) + 4}",
            "branching.probe_tokens=1",
            "engine.chunk_tokens=1",
            "engine.max_running=512",
            f"engine.max_context={2 * longest}",
            f"engine.replicas={engines}",
            f"flow.batch_leaves={work.leaves * work.batch_trees}",
            f"flow.staleness={work.staleness}",
        ],
    )


def best_split(profile: Profile, gpus: int, work: TrainingLoad) -> list[Split]:
    """All splits that the search looked at, the best first; empty where no split is possible.

    First the learner's replicas, at the profile's engines.  Then engines of twice the GPUs, as long as they
    bring more: half as many engines decode no more tokens together, but each sequence faster, which pays
    where branches are few.
    """
    narrow, *wider = engine_sizes(profile)
    found = _climb(narrow, gpus, work)
    for larger in wider if found else ():
        best = found[0]
        found = _ranked([*found, *_climb(larger, gpus, work, near=best.replicas)])
        if found[0] is best:
            break
    return found


def engine_sizes(profile: Profile) -> list[Profile]:
    """``profile``, and with engines of twice the GPUs each time, down to one key-value head per GPU."""
    sizes, tp = [profile], 2 * profile.engine.tp
    while tp <= profile.model.kv_heads:
        sizes.append(replace(profile, engine=replace(profile.engine, tp=tp)))
        tp *= 2
    return sizes


def _climb(profile: Profile, gpus: int, work: TrainingLoad, near: int = 0) -> list[Split]:
    """The best number of learner replicas: among the neighbours of ``near``, or in all.

    Throughput rises with replicas while training is the bottleneck and falls when engines get too few, so
    going uphill by steps that are halved finds the top.  Less than ``GAIN`` more is no step uphill.
    """
    most = (gpus - profile.engine.tp) // profile.learner.ranks
    if most < 1:
        return []
    seen: dict[int, Split] = {}

    def rate(replicas: int) -> float:
        if replicas not in seen:
            seen[replicas] = simulate_split(profile, gpus, replicas, work)
        return seen[replicas].result.trained_per_s

    count = min(near, most) or max(1, most // 2)
    rate(count)
    step = max(1, count // (4 if near else 2))
    while True:
        better = [c for c in (count - step, count + step) if 1 <= c <= most and rate(c) > GAIN * rate(count)]
        if better:
            count = max(better, key=rate)
        elif near or step == 1 or step <= count // 8:  # a finer split changes less than the seeds do
            break
        else:
            step = max(1, step // 2)
    return _ranked(list(seen.values()))


def _ranked(points: list[Split]) -> list[Split]:
    return sorted(points, key=lambda point: -point.result.trained_per_s)
