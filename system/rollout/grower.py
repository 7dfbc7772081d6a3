"""The barrier-free grower: one tree, one asyncio task per live branch, nobody waits for anybody.

A branch generates until it stops; if it stopped at a tool call the tool runs, its answer is appended, and
the branch generates on.  Tokens stream in with their entropies, so once the k-th token after a tool's answer
is there the policy decides; a fork is a new task at the end of that TOOL node, while the parent's
generation, which no one stopped, goes on.

The budget is exact: roots + forks + top-ups == n at every normal close.  N roots start together, forks draw
on n - N, and as soon as no live branch can bring another fork the rest starts as fresh roots, all at once.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from system.config import RolloutConfig
from system.engine.protocol import Chunk, Engine, EngineError, Finish, GenerateRequest, Sampling
from system.rollout.branching import Never, Policy, Probe, TreeState
from system.rollout.encode import Tokenizer, decode, encode_prompt, encode_text
from system.rollout.probe import EntropyProbe
from system.rollout.reward import BranchView, Reward
from system.rollout.syntax import MalformedCall, ParsedCall, Syntax
from system.tasks.base import Prompt
from system.tools.outcome import CallContext, ToolOutcome, Tools, ToolStatus
from system.tree.growth import Growth
from system.tree.record import ForkDecision, Int32, Kind, Origin, Outcome, ToolCall, Tree

log = logging.getLogger(__name__)

CHARS_PER_TOKEN = 32  # a tool's answer is cut to this many characters per allowed token before it is encoded


class GrowthFailed(RuntimeError):
    """Too few branches ended with a score for the tree to teach anything.

    ``reason`` is a word for counters: "deadline" (the tree's), else the commonest outcome of its branches
    in lower case ("engine_error", "deadline", "cancelled").
    """

    def __init__(self, prompt_id: str, reason: str, detail: str) -> None:
        super().__init__(prompt_id, reason, detail)  # its own arguments, so that it can be pickled
        self.prompt_id, self.reason, self.detail = prompt_id, reason, detail

    def __str__(self) -> str:
        return f"tree of prompt {self.prompt_id!r}: {self.reason}: {self.detail}"


@dataclass(frozen=True)
class Grower:
    """Grows trees; holds no state of any one of them, so one grower serves any number at once."""

    engine: Engine
    tools: Tools
    syntax: Syntax
    policy: Policy
    reward: Reward
    tokenizer: Tokenizer
    config: RolloutConfig
    vocab_size: int  # V, of which ln V is the unit of entropy
    now: Callable[[], float] = time.time  # unix time, for the record

    def __post_init__(self) -> None:
        wrapping = sum(encode_text(self.tokenizer, part).size for part in self._wrapping)
        if self.config.max_tool_result_tokens <= wrapping:
            raise ValueError(
                f"rollout.max_tool_result_tokens={self.config.max_tool_result_tokens}: "
                f"the result's own tags take {wrapping} tokens"
            )

    @property
    def _wrapping(self) -> tuple[str, str]:
        return self.syntax.result_open, self.syntax.result_close

    async def grow(
        self,
        prompt: Prompt,
        *,
        seed: int,
        ticket: int | str = "",
        n: int | None = None,
        greedy: bool = False,
        temperature: float | None = None,
    ) -> Tree:
        """Grow one tree from ``prompt`` and score its leaves.

        ``seed`` (≥ 0) drives sampling and branching: every branch has its own streams, so what a branch draws
        does not depend on the order of events.  ``ticket`` names this attempt (in ``meta`` and as the
        engine's route).  ``n`` overrides the leaf budget.  ``greedy`` is evaluation: one leaf (or ``n``), no
        forks, temperature 0 unless ``temperature`` says otherwise.

        Raises :class:`GrowthFailed` when fewer than min(2, n) leaves are scored, ``EntropyUnknown`` when
        the policy needs entropies that the engine does not give.  Cancelling it cancels every branch and
        aborts its request.
        """
        budget = n if n is not None else 1 if greedy else self.config.leaves
        if temperature is None:
            temperature = 0.0 if greedy else self.config.temperature
        policy = Never(self.policy.window) if greedy else self.policy
        growing = _GrowingTree(self, prompt, policy, budget, temperature, seed, ticket)
        return await growing.run()

    def encode_result(self, text: str, room: int) -> Int32:
        """Token ids of a tool's answer in its tags, at most ``room`` and ``max_tool_result_tokens``."""
        limit = self.config.max_tool_result_tokens
        before, after = (encode_text(self.tokenizer, part) for part in self._wrapping)
        inner = encode_text(self.tokenizer, text[: limit * CHARS_PER_TOKEN], trusted=False)
        return np.concatenate([before, inner[: limit - before.size - after.size], after])[:room]


@dataclass(slots=True)
class _Branch:
    """A live branch; the tokens themselves are in the growth."""

    key: tuple[int, ...]  # (root number, fork number, ...): its identity, whatever the order of events
    origin: Origin
    node: int  # its newest node
    rng: np.random.Generator  # branching decisions
    seeds: np.random.Generator  # sampling seeds
    number: int = 0  # in the order of starting, within its tree
    calls: int = 0  # on its path
    tools: tuple[tuple[str, str], ...] = ()  # (tool, status) of each call on its path
    segments: tuple[tuple[Kind, str], ...] = ()  # its path as text, after the prompt
    entropy: float = math.nan  # H of its newest measured segment
    baseline: float = math.nan  # H_init
    has_baseline: bool = False
    undecided: bool = False  # a tool call is under way or its answer has not been decided upon
    answer: int | None = None  # the TOOL node whose probe is being collected
    forked: int = 0


@dataclass
class _GrowingTree:
    grower: Grower
    prompt: Prompt
    policy: Policy
    budget: int
    temperature: float
    seed: int
    ticket: int | str
    started: Counter[Origin] = field(default_factory=Counter)
    live: dict[tuple[int, ...], _Branch] = field(default_factory=dict)
    ended: list[tuple[_Branch, Outcome]] = field(default_factory=list)  # in the order of the growth's leaves
    seconds: dict[str, float] = field(default_factory=lambda: {"engine": 0.0, "tool": 0.0, "waiting": 0.0})
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.config = self.grower.config
        tokens = encode_prompt(self.grower.tokenizer, self.prompt.messages)
        self.growth = Growth(
            self.prompt.id, self.prompt.kind, tokens, self.budget, started_s=self.grower.now()
        )
        self.log_vocab = math.log(self.grower.vocab_size)
        self.call_limit = self.config.call_limit if self.grower.tools.specs else 0
        self.group = asyncio.TaskGroup()

    async def run(self) -> Tree:
        roots = min(self.config.roots, self.budget) if self.policy.can_fork else self.budget
        cut, deadline = False, asyncio.timeout(self.config.tree_deadline_s)
        try:
            async with deadline, self.group:
                for _ in range(roots):
                    self._start_root(Origin.ROOT)
                self._top_up()
        except TimeoutError:
            if not deadline.expired():
                raise
            cut = True
            for branch in list(self.live.values()):
                self._end(branch, Outcome.DEADLINE)
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors  # the group has cancelled and awaited every other branch
        scored = sum(outcome.scored for _, outcome in self.ended)
        if scored < min(2, self.budget):
            commonest = Counter(outcome for _, outcome in self.ended).most_common(1)[0][0]
            reason = "deadline" if cut else commonest.name.lower()
            detail = "; ".join([f"{scored} of {self.budget} leaves scored", *self.errors[:1]])
            raise GrowthFailed(self.prompt.id, reason, detail)
        return self._close()

    # The budget

    @property
    def _remaining(self) -> int:
        return self.budget - self.started.total()

    def _start_root(self, origin: Origin) -> None:
        key = (self.started[Origin.ROOT] + self.started[Origin.TOP_UP],)
        self._start(_Branch(key, origin, self.growth.prompt, *self._streams(key)))

    def _start_fork(self, parent: _Branch, node: int) -> None:
        """A sibling of what ``parent`` has written since ``node``."""
        key = (*parent.key, parent.forked)
        parent.forked += 1
        child = _Branch(key, Origin.FORK, node, *self._streams(key))
        child.calls, child.tools, child.segments = parent.calls, parent.tools, parent.segments
        if self.policy.inherits:
            child.baseline, child.has_baseline = parent.baseline, parent.has_baseline
        self._start(child)

    def _start(self, branch: _Branch) -> None:
        branch.number = self.started.total()
        self.started[branch.origin] += 1
        self.live[branch.key] = branch
        self.group.create_task(self._grow(branch), name=f"branch {branch.key} of {self.prompt.id}")

    def _streams(self, key: tuple[int, ...]) -> tuple[np.random.Generator, np.random.Generator]:
        decisions, sampling = (np.random.SeedSequence([self.seed, i], spawn_key=key) for i in (0, 1))
        return np.random.default_rng(decisions), np.random.default_rng(sampling)

    def _top_up(self) -> None:
        """Start what is left of the budget as fresh roots once nothing alive can fork any more."""
        if any(b.undecided or b.calls < self.call_limit for b in self.live.values()):
            return
        for _ in range(self._remaining):
            self._start_root(Origin.TOP_UP)

    # One branch

    async def _grow(self, branch: _Branch) -> None:
        deadline = asyncio.timeout(self.config.branch_deadline_s)
        try:
            async with deadline:
                outcome = await self._write(branch)
        except TimeoutError:
            if not deadline.expired():
                raise
            outcome = Outcome.DEADLINE
        except EngineError as error:
            log.warning("prompt %s, branch %s: %s", self.prompt.id, branch.key, error)
            self.errors.append(str(error))
            outcome = Outcome.ENGINE_ERROR
        self._end(branch, outcome)
        self._top_up()

    def _end(self, branch: _Branch, outcome: Outcome) -> None:
        del self.live[branch.key]
        self.growth.leaf(branch.node, outcome, branch.origin)
        self.ended.append((branch, outcome))

    async def _write(self, branch: _Branch) -> Outcome:
        """Alternate between the model and the tools until the branch ends."""
        while True:
            finish = await self._generate(branch)
            match finish:
                case Finish("abort"):
                    return Outcome.CANCELLED
                case Finish("length"):
                    return Outcome.LENGTH
                case Finish("stop", str()):
                    if branch.calls >= self.call_limit:
                        return Outcome.CALL_LIMIT
                    await self._call(branch)
                    if self._room(branch) == 0:
                        return Outcome.LENGTH
                case _:
                    return Outcome.STOPPED

    def _room(self, branch: _Branch) -> int:
        """Tokens the branch may still take, the model's and the tools' alike."""
        used = self.growth.depth(branch.node) - self.growth.depth(self.growth.prompt)
        return self.config.max_response_tokens - used

    async def _generate(self, branch: _Branch) -> Finish:
        """One model segment, streamed into a new MODEL node and through the entropy probe."""
        config, path = self.config, self.growth.path_tokens(branch.node)
        request = GenerateRequest(
            rid=f"{self.prompt.id}:{'.'.join(map(str, branch.key))}:{uuid.uuid4().hex[:12]}",
            input_ids=path,
            sampling=Sampling(
                max_new_tokens=self._room(branch),
                temperature=self.temperature,
                top_p=config.top_p,
                top_k=config.top_k,
                stop=self.grower.syntax.stops,
                seed=int(branch.seeds.integers(2**31)),
            ),
            route=f"{self.prompt.id}:{self.ticket}",
        )
        branch.node = self.growth.node(branch.node, Kind.MODEL)
        probe: EntropyProbe | None = EntropyProbe(self.policy.window)
        finish: Finish | None = None
        clock = _Stopwatch(self.seconds, "waiting")
        deadline = asyncio.timeout(config.generate_deadline_s)
        try:
            async with deadline:
                stream = cast(AsyncGenerator[Chunk, None], self.grower.engine.generate(request))
                async with aclosing(stream):
                    async for chunk in stream:
                        clock.switch("engine")
                        self.growth.extend(
                            branch.node, chunk.tokens, chunk.logprob, chunk.entropy, chunk.version
                        )
                        if probe is not None:
                            probe.add(chunk.entropy)
                            if probe.full or (chunk.finish is not None and chunk.finish.type != "abort"):
                                self._measured(branch, probe)
                                probe = None
                        finish = chunk.finish  # read on to the end: closing the stream early is an abort
        except TimeoutError:
            if not deadline.expired():
                raise
            raise EngineError(f"no end of generation within {config.generate_deadline_s:g} s") from None
        finally:
            clock.stop()
        if finish is None:
            raise EngineError("the stream ended without a finish reason")
        self._read(branch, Kind.MODEL, path.size)
        return finish

    def _read(self, branch: _Branch, kind: Kind, begin: int) -> None:
        """Add the newest node, the tokens from ``begin`` on, to the branch's text view."""
        text = decode(self.grower.tokenizer, self.growth.path_tokens(branch.node)[begin:])
        branch.segments = (*branch.segments, (kind, text))

    # Forks

    def _measured(self, branch: _Branch, probe: EntropyProbe) -> None:
        """The start of a segment is there: k tokens of it, or all of it if it is shorter."""
        if probe.values.size == 0:
            return
        branch.entropy = self.policy.measure(probe.values, self.log_vocab)
        if not branch.has_baseline:
            branch.baseline, branch.has_baseline = branch.entropy, True
        if branch.answer is not None:
            self._decide(branch, branch.answer)

    def _decide(self, branch: _Branch, node: int) -> None:
        """Let the policy fork at the end of TOOL node ``node``.

        It is asked even when the budget is spent: its draws must not depend on how fast the other branches
        were.
        """
        state = TreeState(
            budget=self.budget,
            started=self.started.total(),
            live=len(self.live),
            forks=self.started[Origin.FORK],
            calls=branch.calls,
            call_limit=self.call_limit,
        )
        decision = self.policy.decide(Probe(branch.entropy, branch.baseline), state, branch.rng)
        forks = min(decision.forks, self._remaining)
        self.growth.fork(ForkDecision(node, decision.delta_h, decision.probability, decision.draw, forks))
        branch.answer, branch.undecided = None, False
        for _ in range(forks):
            self._start_fork(branch, node)
        self._top_up()

    # Tools

    async def _call(self, branch: _Branch) -> None:
        """Make the call that the newest segment ends with and append what came of it, whatever it is."""
        branch.calls += 1
        branch.undecided = True
        call = self.grower.syntax.parse(branch.segments[-1][1])
        match call:
            case ParsedCall(tool, arguments):
                outcome = await self._run_tool(branch, tool, arguments)
            case MalformedCall(reason):
                tool, arguments, outcome = "", {}, ToolOutcome(ToolStatus.REJECTED, f"Error: {reason}")
            case None:
                tool, arguments, outcome = "", {}, ToolOutcome(ToolStatus.REJECTED, "Error: no tool call")
        begin = self.growth.depth(branch.node)
        node = self.growth.node(branch.node, Kind.TOOL)
        self.growth.extend(node, self.grower.encode_result(outcome.text, self._room(branch)))
        self.growth.call(
            ToolCall(
                node,
                tool,
                arguments,
                str(outcome.status),
                outcome.latency_s,
                outcome.cached,
                outcome.attempts,
            )
        )
        branch.node = branch.answer = node
        branch.tools = (*branch.tools, (tool, str(outcome.status)))
        self._read(branch, Kind.TOOL, begin)
        if self.policy.lag and self._room(branch) > 0:
            self._decide(branch, node)

    async def _run_tool(self, branch: _Branch, tool: str, arguments: dict[str, Any]) -> ToolOutcome:
        clock = _Stopwatch(self.seconds, "tool")
        context = CallContext(prompt_id=self.prompt.id, branch=branch.number)
        try:
            return await self.grower.tools.call(tool, arguments, context)
        except Exception as error:  # the service promises not to raise; if it does, the agent still goes on
            log.exception("prompt %s: tool %s raised", self.prompt.id, tool)
            return ToolOutcome(
                ToolStatus.UNAVAILABLE, "Error: the tool is unavailable", clock.lap(), detail=repr(error)
            )
        finally:
            clock.stop()

    # The close

    def _close(self) -> Tree:
        parts: list[dict[str, float] | None] = []
        for leaf, (branch, outcome) in enumerate(self.ended):
            if not outcome.scored:
                parts.append(None)
                continue
            view = BranchView(branch.segments, outcome, branch.tools)
            score = self.grower.reward.score(self.prompt, view)
            self.growth.score(leaf, score.value, score.correct)
            parts.append(score.parts)
        self.growth.meta.update(
            question=self.prompt.messages[-1]["content"] if self.prompt.messages else "",
            gold=list(self.prompt.answers),
            seed=self.seed,
            ticket=self.ticket,
            seconds={cause: round(value, 6) for cause, value in self.seconds.items()},
            parts=parts,
            errors=self.errors,
        )
        return self.growth.close(self.grower.now())


class _Stopwatch:
    """Adds the time that passes (the event loop's, seconds) to one of several causes."""

    def __init__(self, seconds: dict[str, float], cause: str) -> None:
        self._seconds, self._cause = seconds, cause
        self._clock = asyncio.get_running_loop().time
        self._since = self._clock()

    def lap(self) -> float:
        return self._clock() - self._since

    def switch(self, cause: str) -> None:
        self.stop()
        self._cause = cause

    def stop(self) -> None:
        now = self._clock()
        self._seconds[self._cause] += now - self._since
        self._since = now
