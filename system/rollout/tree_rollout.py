"""The rollout: one tree from a prompt, one asyncio task per live branch.

A branch generates until it stops; if it stopped at a tool call the tool runs, its answer is appended, and
the branch generates on.  Tokens stream in with their entropies, so once the k-th token after a tool's answer
is there the policy decides; a fork is a new task at the end of that TOOL node, while the parent's
generation, which no one stopped, goes on.

The budget is exact (:mod:`.budget`): N roots start together, forks draw on n - N, and as soon as no live
branch can bring another fork the rest starts as fresh roots, all at once.

That is the barrier-free schedule; ``rollout.schedule`` has others (:mod:`system.rollout.schedule`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import sys
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, cast

from system.awake import AwakeTimeout, awake_s
from system.engine.protocol import Chunk, EngineError, EngineLost, Finish
from system.envs.live import TreeSessions
from system.envs.protocol import WorldFailed
from system.errors import leaves
from system.rollout.branch import Branch, Stopwatch
from system.rollout.branching import Never, TreeState, decided
from system.rollout.budget import Budget
from system.rollout.calls import Calls
from system.rollout.codec import TemplateRefused
from system.rollout.context import RolloutContext
from system.rollout.expansion import Beginning, expansion
from system.rollout.expert import beginnings, led, prefixes
from system.rollout.failure import ENGINE_LOST, too_few
from system.rollout.probe import probe
from system.rollout.request import GivenTokens, segment_request, take
from system.rollout.reward import BranchView
from system.rollout.schedule import BarrierFree
from system.rollout.scoring import TreeScores
from system.rollout.teacher import Lessons
from system.tree.builder import TreeBuilder
from system.tree.prompt import Prompt
from system.tree.record import ForkDecision, Kind, Mishap, Origin, Outcome, Tree

log = logging.getLogger(__name__)

# Where a branch's time goes: tokens come, a tool runs, the first token is awaited, others are awaited.
CAUSES = ("engine", "tool", "waiting", "barrier")


class TreeRollout:
    """One tree, from its planting to its close in :meth:`run`, once."""

    def __init__(
        self,
        context: RolloutContext,
        prompt: Prompt,
        *,
        seed: int,
        ticket: int | str = "",
        n: int | None = None,
        greedy: bool = False,
        temperature: float | None = None,
        guide: int = 0,
        growth: TreeBuilder | None = None,
        sessions: TreeSessions | None = None,
    ) -> None:
        """``seed`` (≥ 0) drives sampling and branching: every branch has its own streams, so what a branch
        draws does not depend on the order of events.  ``ticket`` names this attempt (in ``meta`` and as the
        engine's route).  ``n`` overrides the leaf budget.  ``greedy`` is evaluation: one leaf (or ``n``), no
        forks, no barriers, temperature 0 unless ``temperature`` says otherwise.  ``guide``: actions of the
        prompt's demonstration that the engine is told and the learner is not (:mod:`system.flow.guidance`).
        ``growth``: what was built before the run was resumed (see :mod:`system.rollout.snapshot`), its guide
        included; None for a new tree.  ``sessions``: what its branches act in, if there is an environment
        (:mod:`system.rollout.planting`).
        """
        config = context.config
        self.context, self.config, self.prompt, self.seed, self.ticket = context, config, prompt, seed, ticket
        self.policy = Never(context.policy.probe_tokens) if greedy else context.policy
        self.schedule = BarrierFree() if greedy else context.schedule
        leaves = n if n is not None else 1 if greedy else config.leaves
        roots = min(config.roots, leaves) if self.policy.can_fork else leaves
        self.budget = Budget(leaves, roots)
        usual = 0.0 if greedy else config.temperature
        self.temperature = usual if temperature is None else temperature
        self.route = f"{prompt.id}:{ticket}"
        self.rescores = config.rescore and not greedy
        self.scores_answer = config.score_answer and not greedy
        self.records_routes = context.routes and not greedy
        self.resumed = growth is not None
        self.growth = growth or context.plant(prompt, leaves, guide)
        about = (prompt.id, self.route, self.temperature, next(iter(prompt.answers), ""))
        self.given = GivenTokens(context, self.growth, *about, self.mishap)
        alone = greedy or self.resumed
        self.prefixes = () if alone else prefixes(context, self.growth, prompt, seed, roots)
        self.live: dict[tuple[int, ...], Branch] = {}
        self.ended: list[tuple[Branch, Outcome]] = []  # in the order of the growth's leaves
        self.seconds: dict[str, float] = dict.fromkeys(CAUSES, 0.0)
        self.mishaps: list[Mishap] = []
        self.spent_s = 0.0  # of the deadline, before the run was resumed
        self.began_s = math.nan  # as of awake_s(); NaN: not yet
        self.log_vocab = math.log(context.vocab_size)
        self.sessions = sessions
        self.lessons = Lessons(None if greedy else context.teacher, self.growth, self.route, self.mishap)
        self.group = asyncio.TaskGroup()
        self.beside = asyncio.TaskGroup()  # what scores; it outlives the branches' deadline
        known = (context, self.growth, self.schedule, self.seconds, self.mishap)
        self.calls = Calls(*known, self.group.create_task, self._top_up, sessions)
        scored = (context.scoring, prompt, self.beside, self.mishap, self.calls.since_start)
        self.scores = TreeScores(*scored)
        self.call_limit = config.call_limit if self.calls.tools else 0
        self.turn_limit = sessions.turn_limit if sessions is not None else 0
        # Calls after which no branch forks any more; what a user says may come at any time.
        self.last_fork = sys.maxsize if self.turn_limit else self.call_limit

    async def run(self) -> Tree:
        """Grow, score and close the tree.

        Raises ``RolloutFailed`` when fewer than min(2, budget) leaves are scored, ``EntropyUnknown``
        when the policy needs entropies that the engine does not give, ``RewardBroken`` when too many scores
        fail.  Cancelling it cancels every branch and aborts its request.
        """
        self.began_s = awake_s()
        try:
            async with self.beside:
                for leaf in range(len(self.ended)):  # of a resumed tree
                    self._begin_score(leaf)
                if self.scores_answer and not self.resumed:
                    self.beside.create_task(self.given.answers(beginnings(self.growth, self.prefixes)))
                cut = await self._branches()
                await self.lessons.rest()
                await self.scores.close()
        except ExceptionGroup as errors:
            raise next(leaves(errors)) from errors  # the groups have cancelled and awaited all others
        finally:
            if self.sessions is not None:
                await self.sessions.close()
        for failed in self.scores.failures.values():
            self.mishap("reward", str(failed))
        if (scored := len(self.scores.scores)) < min(2, self.budget.leaves):
            outcomes = [outcome for _, outcome in self.ended]
            raise too_few(self.prompt.id, outcomes, self.mishaps, scored, self.budget.leaves, cut)
        self.lessons.over()
        return self._close()

    async def _branches(self) -> bool:
        """Grow until every branch has ended; returns whether the tree's deadline cut them off."""
        deadline = AwakeTimeout(max(self.config.tree_deadline_s - self.spent_s, 0.0))
        try:
            async with deadline, self.group:
                for branch in self.live.values():
                    self._spawn(branch)
                if not self.resumed:
                    self._start_roots(self.budget.roots, Origin.ROOT)
                self._top_up()
        except TimeoutError:
            if not deadline.expired:
                raise
            for branch in list(self.live.values()):
                self._end(branch, Outcome.DEADLINE)
            return True
        return False

    def mishap(self, kind: str, text: str) -> None:
        """Something has failed that does not end the tree."""
        self.mishaps.append(Mishap(kind, text))

    # The budget

    def _start_roots(self, count: int, origin: Origin) -> None:
        for _ in range(count):
            key = (self.budget.started[Origin.ROOT] + self.budget.started[Origin.TOP_UP],)
            branch = led(Branch.planted(self.seed, key, origin, self.growth.prompt), self.prefixes)
            branch.session = self.sessions.root(key) if self.sessions is not None else None
            self._start(branch)

    def _start(self, branch: Branch) -> None:
        branch.number = self.budget.started.total()
        self.budget.started[branch.origin] += 1
        self.live[branch.key] = branch
        self._spawn(branch)

    def _spawn(self, branch: Branch) -> None:
        self.group.create_task(self._grow(branch), name=f"branch {branch.key} of {self.prompt.id}")

    def _top_up(self) -> None:
        """Start what may start of the rest of the budget: fresh roots, or turns written once more."""
        count = self.schedule.top_ups(self.live.values(), self.budget.remaining, self.last_fork)
        if count and self.policy.expands:
            if self.live:
                return
            seeds = [self.seed, 2, self.budget.started.total()]
            places = expansion(self.policy, self.growth, self.ended, count, seeds)
            for place in places:
                self._start_again(place)
            count = 0 if places else count
        self._start_roots(count, Origin.TOP_UP)

    def _start_again(self, place: Beginning) -> None:
        """A branch that writes a turn once more; the prompt's, if all of it, as a fresh root."""
        if place.above == self.growth.prompt:
            self._start_roots(1, Origin.TOP_UP)
            return
        branch = place.branch.fork(self.seed, place.above, place.before, self.policy.inherits)
        if self.growth.kind(place.above) == Kind.MODEL:
            self._begin(branch, place.at)
        self._start(branch)

    # One branch

    async def _grow(self, branch: Branch) -> None:
        branch.began_s = awake_s()
        deadline = AwakeTimeout(max(self.config.branch_deadline_s - branch.spent_s, 0.0))
        try:
            async with deadline:
                await self._wait(self.schedule.join(branch))
                outcome = await self._write(branch)
        except TimeoutError:
            if not deadline.expired:
                raise
            outcome = Outcome.DEADLINE
        except EngineError as error:
            log.warning("prompt %s, branch %s: %s", self.prompt.id, branch.key, error)
            kind = ENGINE_LOST if isinstance(error, EngineLost) else "engine"
            self.mishap(kind, str(error))
            outcome = Outcome.ENGINE_ERROR
        except WorldFailed as error:
            log.warning("prompt %s: %s", self.prompt.id, error)
            self.mishap(error.reason, error.detail)
            outcome = Outcome.ENVIRONMENT
        except TemplateRefused as error:
            log.warning("prompt %s: %s", self.prompt.id, error)
            self.mishap("template", str(error))
            outcome = Outcome.ENVIRONMENT
        except BaseException:  # cancelled: the tree is at its end, but others may be waiting for this branch
            self.schedule.leave(branch)
            raise
        self._end(branch, outcome)
        self._top_up()
        self.schedule.leave(branch)

    def _end(self, branch: Branch, outcome: Outcome) -> None:
        del self.live[branch.key]
        self.growth.leaf(branch.node, outcome, branch.origin)
        self.ended.append((branch, outcome))
        self._begin_score(len(self.ended) - 1)

    def _begin_score(self, leaf: int) -> None:
        """Score an ended branch while others grow, if its end says something about the policy."""
        branch, outcome = self.ended[leaf]
        if outcome.scored:
            tokens = self.growth.depth(branch.node) - self.growth.depth(self.growth.prompt)
            steps = self.growth.rewards(branch.node)
            self.scores.begin(
                leaf, BranchView(branch.segments, outcome, branch.tools, tokens, steps), branch.session
            )
        elif branch.session is not None:
            branch.session.end("its branch has ended")

    async def _write(self, branch: Branch) -> Outcome:
        """Alternate between the model and the tools until the branch ends."""
        while True:
            if not branch.calling:  # else a resumed run makes the call again
                match await self._generate(branch):
                    case Finish("abort"):
                        return Outcome.CANCELLED
                    case Finish("length"):
                        return Outcome.LENGTH
                    case finish if self.calls.asked(branch, finish):
                        if branch.calls >= self.call_limit:
                            return Outcome.CALL_LIMIT
                    case _ if not self.turn_limit:
                        return Outcome.STOPPED
                    case _:
                        if branch.messages >= self.turn_limit:
                            return Outcome.TURN_LIMIT
                        branch.says = True
            await self._call(branch)
            if branch.over:
                return Outcome.ENDED
            if self._room(branch) == 0:
                return Outcome.LENGTH

    async def _wait(self, barrier: Coroutine[Any, Any, None]) -> None:
        with Stopwatch(self.seconds, "barrier"):
            await barrier

    def _room(self, branch: Branch) -> int:
        """Tokens the branch may still take, the model's and the tools' alike."""
        depth, prompt = self.growth.depth(branch.node), self.growth.depth(self.growth.prompt)
        return max(0, min(self.config.max_response_tokens + prompt, self.context.max_context) - depth)

    async def _generate(self, branch: Branch) -> Finish:
        """One model segment.  One that a resumed run finds begun goes on where it was."""
        begin = self._open(branch)
        if branch.finish is None:
            await self._stream(branch, begin)
        finish = branch.finish
        if finish is None:
            raise EngineError("the stream ended without a finish reason")
        await self._wait(self.schedule.meet(branch))
        branch.finish = None
        if finish.type != "abort":
            self._measure(branch)
            if self.rescores:
                self.beside.create_task(self.given.closed(branch.node, branch.request))
            if self.lessons.on:
                self.beside.create_task(self.lessons.node(branch.node))
        self._read(branch, Kind.MODEL, begin)
        return finish

    def _open(self, branch: Branch) -> int:
        """A MODEL node to write in; returns the number of tokens before its first one."""
        above, branch.measured = branch.node, False
        if self.growth.kind(above) == Kind.MODEL:  # begun before the run was resumed, or inside a turn
            branch.measured = self._measurable(branch)
            return self.growth.turn(above)
        self._begin(branch, self.growth.depth(above))
        return self.growth.depth(above)

    def _begin(self, branch: Branch, at: int) -> None:
        branch.seed = int(branch.seeds.integers(2**31))
        branch.node = self.growth.node(branch.node, Kind.MODEL, at)

    def _measurable(self, branch: Branch) -> bool:
        """Whether enough of the segment is there to look at, while it is still being written."""
        return self.schedule.streaming and self.growth.n_tokens(branch.node) >= self.policy.probe_tokens

    async def _stream(self, branch: Branch, begin: int) -> None:
        """Tokens into the newest node until ``branch.finish`` is there; the first k are looked at at once."""
        config = self.config
        if (room := self._room(branch)) == 0:  # a resumed run has all of it but the message that says so
            branch.finish = Finish("length")
            return
        how = (self.temperature, self.route, self.records_routes)
        request = segment_request(self.context, self.growth, branch, begin, room, *how)
        branch.request = request.rid
        stream = cast(AsyncGenerator[Chunk, None], self.context.engine.generate(request))
        deadline = AwakeTimeout(config.generate_deadline_s)
        try:
            with Stopwatch(self.seconds, "waiting") as clock:
                async with deadline, aclosing(stream):
                    async for chunk in stream:
                        clock.switch("engine")
                        take(self.growth, branch.node, request, chunk)
                        if not branch.measured and self._measurable(branch):
                            self._measure(branch)
                        branch.finish = chunk.finish  # read on to the end: closing early is an abort
        except TimeoutError:
            if not deadline.expired:
                raise
            raise EngineError(f"no end of generation within {config.generate_deadline_s:g} s") from None

    def _read(self, branch: Branch, kind: Kind, begin: int) -> None:
        """Add the newest node, the tokens from ``begin`` on, to the branch's text view."""
        text = self.context.chat.view(self.growth.path_tokens(branch.node), begin, kind)
        branch.segments = (*branch.segments, (kind, text))

    # Forks

    def _measure(self, branch: Branch) -> None:
        """The start of a segment is there, k tokens of it or all of it if it is shorter: look at it once.

        That costs no token and no forward pass: sampled tokens carry their entropies.
        """
        if branch.measured:
            return
        branch.measured = True
        entropies = self.growth.entropies(branch.node)[: self.policy.probe_tokens]
        if entropies.size == 0:
            return
        branch.entropy = self.policy.measure(entropies, self.log_vocab)
        if not branch.has_baseline:
            branch.baseline, branch.has_baseline = branch.entropy, True
        if branch.answer is not None:
            self._decide(branch, branch.answer)

    def _decide(self, branch: Branch, node: int) -> None:
        """Let the policy fork at the end of TOOL node ``node``.

        It is asked even when the budget is spent: its draws must not depend on how fast the other branches
        were.
        """
        state = TreeState(
            budget=self.budget.leaves,
            started=self.budget.started.total(),
            live=len(self.live),
            forks=self.budget.started[Origin.FORK],
            calls=branch.calls,
            call_limit=self.call_limit,
            streak=branch.streak,
        )
        seen = probe(self.growth, branch, node, self.policy.probe_tokens)
        decision = decided(self.policy, self.policy.decide(seen, state, branch.rng))
        asked = min(decision.forks, self.budget.remaining)
        branch.answer = None  # decided upon: it may fork later, or not, as any other branch
        lent = 0
        if self.policy.lends:
            lent = self.schedule.lent(asked, self.live.values(), self.budget, self.last_fork)
        forks = asked + lent
        what = (decision.delta_h, decision.probability, decision.draw, forks, lent)
        self.growth.fork(ForkDecision(node, *what))
        if not seen.shared:  # else the tree has forked here before, and the streak counts that
            branch.streak = branch.streak + 1 if forks else 0
        for _ in range(forks):
            fork = branch.fork(self.seed, node, len(branch.segments), self.policy.inherits)
            fork.answer = node if self.policy.asks_forks else None
            self._start(fork)
        self._top_up()

    # Tools

    async def _call(self, branch: Branch) -> None:
        """Make the call that the newest segment ends with, or pass it on as a message, and append what came
        of it, whatever it is.
        """
        made = await self.calls.make(branch)
        await self._wait(self.schedule.meet(branch))
        begin = self.growth.depth(branch.node)
        self.calls.write(branch, made, self._room(branch))
        if self.scores_answer:
            self.beside.create_task(self.given.answer(branch.node, branch.request))
        self._read(branch, Kind.TOOL, begin)
        if branch.over or self._room(branch) == 0:
            return
        if branch.first:
            told = self.context.told(self.prompt, self.growth.guide)
            self.context.drift.look(told, branch, self.growth.path_tokens(branch.node))
        if self.policy.lag:
            self._decide(branch, branch.node)

    # The close

    def _close(self) -> Tree:
        self.growth.meta.update(
            question=self.prompt.messages[-1]["content"] if self.prompt.messages else "",
            gold=list(self.prompt.answers),
            seed=self.seed,
            ticket=self.ticket,
            seconds={cause: round(value, 6) for cause, value in self.seconds.items()},
            mishaps=self.mishaps,
            **self.scores.record(len(self.ended)),
        )
        for leaf, score in self.scores.scores.items():
            self.growth.score(leaf, score.value, score.correct)
        return self.growth.close(self.context.now())
