"""Trees without tokens: a simulation of the same events, several times as fast.

In :class:`.world.Twin` the rollout is the real one, and most of a simulation's time goes into what only a
real one needs: arrays of tokens, parsing, the guards around tools, rewards, the tree's record.  Here a branch
is no more than what its tree, the engine and the clock see of it: requests, first tokens, ends, calls, forks.
Engine model, agent, the tools' latencies, schedule, policy, budget, training loop, admission and replay queue
are the twin's own.  ``tests/twin/test_lean.py`` holds it to the twin, event by event; only events of one
moment, as constant latencies make them, may come in another order.

For worlds in which no limit and no failure plays a part: no tree outgrows ``rollout.max_response_tokens``, no
deadline passes, no two calls of a tree ask the same, no engine dies.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache

import numpy as np

from system.engine.protocol import EngineError
from system.envs.protocol import Message
from system.flow.ledger import Ticket
from system.rollout.branching import Probe, TreeState, decided
from system.rollout.budget import Budget
from system.tools.outcome import ToolOutcome, ToolStatus
from system.tree.builder import TreeBuilder
from system.tree.prompt import Prompt
from system.tree.record import Float32, Kind, Origin, Outcome, ToolCall
from system.tree.stats import TreeStats
from system.twin.agent import SEGMENT, SEGMENTS, Utterance, tool_of
from system.twin.prefix import Path
from system.twin.world import Twin
from system.twin.writing import Writing


class LeanTwin(Twin):
    """A run whose trees have no tokens.  Of a tree's nodes its :class:`TreeStats` know nothing."""

    def __post_init__(self) -> None:
        """Raises ValueError for a schedule or a policy that decides by more than is known here."""
        super().__post_init__()
        policy, schedule = self.context.policy, self.context.schedule
        if not schedule.streaming or policy.lag or policy.expands or policy.asks_forks:
            raise ValueError(
                f"rollout.schedule={self.config.rollout.schedule}, branching={self.config.branching.name}: "
                "trees without tokens know schedules barrier-free and eager, and policies that decide by the "
                "start of the segment after a result"
            )
        if self.config.tools.cache_size or any(one.failures for one in self.models.tools.values()):
            raise ValueError("trees without tokens know no tools that fail; set tools.cache_size=0")
        self.result_tokens, self.looked_at = cache(self._result_tokens), lru_cache(self._looked_at)

    async def rollout(self, prompt: Prompt, ticket: Ticket, seed: int) -> tuple[None, TreeStats]:
        tree = LeanTree(self, prompt, ticket, seed)
        await tree.run()
        return None, tree.stats()

    def _result_tokens(self, size: int) -> int:
        """Tokens that an answer of ``size`` takes in a tree."""
        return self.context.encode_answer((Message(str(size)),), 1 << 30, ended=False).size

    def _looked_at(self, tokens: int, entropy: float) -> tuple[float, Float32, Float32]:
        """H of so many tokens of one entropy, their entropies and their log-probabilities."""
        entropies = np.full(tokens, entropy, np.float32)
        measured = self.context.policy.measure(entropies, math.log(self.context.vocab_size))
        return measured, entropies, np.full(tokens, -1.0, np.float32)


@dataclass(eq=False, slots=True, kw_only=True)
class _Counted(Writing):
    """A segment whose reader waits for milestones."""

    waiter: asyncio.Future[None] | None = None

    async def milestone(self) -> None:
        self.waiter = asyncio.get_running_loop().create_future()
        await self.waiter

    def reached(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def failed(self, error: EngineError) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_exception(error)


@dataclass(eq=False, slots=True)
class LeanBranch:
    """A live branch; see :class:`system.rollout.branch.Branch`."""

    key: tuple[int, ...]
    origin: Origin
    number: int
    path: Path  # up to its newest result
    length: int  # tokens of it
    written: int = 0  # MODEL tokens of it
    said: tuple[int, ...] = ()  # the calls' tokens
    calls: int = 0
    baseline: float = math.nan
    answered: bool = False  # by a result that the policy has not decided upon
    calling: bool = False
    late: bool = False
    forked: int = 0
    streak: int = 0
    unit: int = 0  # of the prefix cache: its newest segment's
    rng: np.random.Generator | None = None  # of its decisions, once there is one
    seeds: np.random.Generator | None = None

    @property
    def undecided(self) -> bool:
        return self.calling or self.answered


@dataclass(slots=True)
class _Known:
    """What a tree has come to so far."""

    tokens: int = 0  # of all kinds, each once
    generated: int = 0
    flat: int = 0  # once for each leaf
    nats: float = 0.0  # entropies of all generated tokens
    unasked: int = 0
    versions: list[int] = field(default_factory=list[int])
    calls: list[ToolCall] = field(default_factory=list[ToolCall])
    decisions: list[tuple[float, float, bool]] = field(default_factory=list[tuple[float, float, bool]])
    # Of each leaf: (outcome, whether it is right, MODEL tokens, calls).
    leaves: list[tuple[Outcome, bool, int, int]] = field(default_factory=list[tuple[Outcome, bool, int, int]])


class LeanTree:
    """One tree, grown once by :meth:`run`: :class:`system.rollout.tree_rollout.TreeRollout` in outline."""

    def __init__(self, twin: LeanTwin, prompt: Prompt, ticket: Ticket, seed: int) -> None:
        context, config = twin.context, twin.config.rollout
        self.twin, self.policy, self.schedule = twin, context.policy, context.schedule
        self.prompt_id, self.route, self.seed = prompt.id, f"{prompt.id}:{ticket.number}", seed
        leaves = config.leaves
        self.budget = Budget(leaves, min(config.roots, leaves) if self.policy.can_fork else leaves)
        self.call_limit = config.call_limit
        self.prompt_tokens = int(context.encode_prompt(prompt).size)
        self.known = _Known(tokens=self.prompt_tokens)
        self.live: dict[tuple[int, ...], LeanBranch] = {}
        self.group = asyncio.TaskGroup()
        self.time = asyncio.get_running_loop().time
        self.began_s = self.time()

    async def run(self) -> None:
        async with self.group:
            self._start_roots(self.budget.roots, Origin.ROOT)
            self._top_up()

    def stats(self) -> TreeStats:
        """Of the tree, now that it has closed."""
        known, started = self.known, self.budget.started
        outcomes, right, written, calls = zip(*known.leaves, strict=True)
        deltas, chances, forked = zip(*known.decisions, strict=True) if known.decisions else ((), (), ())
        return replace(
            _nodeless(),
            prompt_id=self.prompt_id,
            reward=np.array(right, np.float32),
            outcome=np.array(outcomes, np.int8),
            calls=tuple(known.calls),
            leaves=len(known.leaves),
            roots=started[Origin.ROOT],
            forks=started[Origin.FORK],
            top_ups=started[Origin.TOP_UP],
            unasked=known.unasked,
            correct=np.array(right, np.bool_),
            response_tokens=np.array(written, np.int64),
            calls_per_leaf=np.array(calls, np.int64),
            generated=known.generated,
            trainable=known.generated,
            unique=known.tokens,
            flat=known.flat,
            entropy=known.nats / known.generated,
            delta_h=np.array(deltas, np.float64),
            probability=np.array(chances, np.float64),
            forked=np.array(forked, np.bool_),
            version_min=min(known.versions),
            version_max=max(known.versions),
            seconds=self.time() - self.began_s,
        )

    # The budget

    def _start_roots(self, count: int, origin: Origin) -> None:
        for _ in range(count):
            key = (self.budget.started[Origin.ROOT] + self.budget.started[Origin.TOP_UP],)
            path = ((self.route, self.prompt_tokens),)
            self._start(LeanBranch(key, origin, self.budget.started.total(), path, self.prompt_tokens))

    def _start(self, branch: LeanBranch) -> None:
        self.budget.started[branch.origin] += 1
        self.live[branch.key] = branch
        self.group.create_task(self._grow(branch))

    def _top_up(self) -> None:
        count = self.schedule.top_ups(self.live.values(), self.budget.remaining, self.call_limit)
        self._start_roots(count, Origin.TOP_UP)

    def _late(self, branch: LeanBranch) -> None:
        branch.late = True
        self._top_up()

    # One branch

    async def _grow(self, branch: LeanBranch) -> None:
        segment = await self._write(branch)
        while segment.call and branch.calls < self.call_limit:
            await self._call(branch, segment)
            segment = await self._write(branch)
        outcome = Outcome.CALL_LIMIT if segment.call else Outcome.STOPPED
        known = self.known
        known.flat += branch.length + segment.tokens
        right = segment.right and not segment.call
        known.leaves.append((outcome, right, branch.written + segment.tokens, branch.calls))
        del self.live[branch.key]
        self._top_up()

    async def _write(self, branch: LeanBranch) -> Utterance:
        """One segment; its path does not yet hold it."""
        twin = self.twin
        engine = twin.fleet.choose(self.route)
        segment = twin.agent.speak(self._request_seed(branch), self.route, branch.said)
        writing = _Counted(
            name=f"{self.prompt_id}:{'.'.join(map(str, branch.key))}",
            segment=segment,
            path=branch.path,
            length=branch.length,
            limit=segment.tokens,
            milestones=engine.milestones(segment.tokens),
        )
        chunks = len(writing.milestones)
        engine.serve(writing)
        await writing.milestone()
        self._measure(branch, segment, writing.done)
        if chunks > 1:
            await writing.milestone()
        self.known.generated += segment.tokens
        self.known.tokens += segment.tokens
        self.known.nats += segment.entropy * segment.tokens
        self.known.versions += (writing.versions[0][1], writing.versions[-1][1])
        branch.unit = SEGMENT + writing.number % SEGMENTS
        return segment

    def _request_seed(self, branch: LeanBranch) -> int:
        if not self.twin.agent.draws_by_request:
            return 0
        if branch.seeds is None:
            branch.seeds = np.random.default_rng(np.random.SeedSequence([self.seed, 1], spawn_key=branch.key))
        return int(branch.seeds.integers(2**31))

    def _measure(self, branch: LeanBranch, segment: Utterance, done: int) -> None:
        """The first ``done`` tokens of a segment are there: enough to look at, or all of them."""
        if not self.policy.can_fork:
            return
        size = min(done, self.policy.probe_tokens)
        entropy, entropies, logprobs = self.twin.looked_at(size, segment.entropy)
        if math.isnan(branch.baseline):
            branch.baseline = entropy
        if branch.answered:
            self._decide(branch, Probe(entropy, branch.baseline, entropies, logprobs))

    def _decide(self, branch: LeanBranch, seen: Probe) -> None:
        started, budget = self.budget.started, self.budget
        state = TreeState(
            budget=budget.leaves,
            started=started.total(),
            live=len(self.live),
            forks=started[Origin.FORK],
            calls=branch.calls,
            call_limit=self.call_limit,
            streak=branch.streak,
        )
        if branch.rng is None:
            branch.rng = np.random.default_rng(np.random.SeedSequence([self.seed, 0], spawn_key=branch.key))
        decision = decided(self.policy, self.policy.decide(seen, state, branch.rng))
        asked = min(decision.forks, budget.remaining)
        branch.answered = False
        lends = self.policy.lends
        lent = self.schedule.lent(asked, self.live.values(), budget, self.call_limit) if lends else 0
        self.known.unasked += 0 if asked else lent
        self.known.decisions.append((decision.delta_h, decision.probability, asked > 0))
        branch.streak = branch.streak + 1 if asked + lent else 0
        for _ in range(asked + lent):
            self._start(
                LeanBranch(
                    (*branch.key, branch.forked),
                    Origin.FORK,
                    started.total(),
                    branch.path,
                    branch.length,
                    branch.written,
                    branch.said,
                    branch.calls,
                    branch.baseline if self.policy.inherits else math.nan,
                    streak=branch.streak,
                )
            )
            branch.forked += 1
        self._top_up()

    async def _call(self, branch: LeanBranch, segment: Utterance) -> None:
        """The call that the newest segment ends with; both it and its answer are then on the path."""
        twin, began = self.twin, self.time()
        tool = twin.agent.tools[tool_of(segment.call)]
        branch.said, branch.calling = (*branch.said, segment.call), True
        branch.calls += 1
        patience_s = self.schedule.patience_s(tool)
        loop = asyncio.get_running_loop()
        watch = loop.call_later(patience_s, self._late, branch) if patience_s < math.inf else None
        latency, size = twin.tools.drawn(tool, self.prompt_id, twin.agent.query(segment.call), branch.number)
        try:
            await asyncio.sleep(latency)
        finally:
            if watch is not None:
                watch.cancel()
        twin.trace.note("tool", tool, self.prompt_id, branch.number)
        took = self.time() - began
        self.schedule.answered(tool, ToolOutcome(ToolStatus.OK, "", took))
        branch.late = branch.calling = False
        branch.answered = self.policy.can_fork
        self.known.calls.append(ToolCall(0, tool, {}, str(ToolStatus.OK), took))
        result = twin.result_tokens(size)
        self.known.tokens += result
        branch.path = (*branch.path, (branch.unit, segment.tokens + result))
        branch.length += segment.tokens + result
        branch.written += segment.tokens


@cache
def _nodeless() -> TreeStats:
    """Of a tree of one token, in place of what is not known of a tree's nodes."""
    tree = TreeBuilder("", "", [1], 1)
    node = tree.node(tree.prompt, Kind.MODEL)
    tree.extend(node, [1], -1.0, math.nan, 0)
    tree.score(tree.leaf(node, Outcome.STOPPED, Origin.ROOT), 0.0, False)
    return TreeStats.of(tree.close(0.0))
