"""One question, asked of the agent several times: the episodes, their rewards, and the tree of them."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from system.agents.forest import Episode, Forest
from system.agents.forking import Forking
from system.agents.group import plant_group
from system.agents.launch import (
    AgentFailed,
    Ran,
    correct_of,
    parts_of,
    reward_of,
    told,
    turn_rewards_of,
)
from system.agents.replay import ReplayScript
from system.agents.runner import AgentRunner
from system.agents.session import AgentSession
from system.awake import AwakeTimeout
from system.errors import leaves
from system.rollout.branching import Never
from system.rollout.failure import ENGINE_LOST, too_few
from system.rollout.reward import BranchView, Score
from system.rollout.scorer import held
from system.rollout.scoring import Scoring, TreeScores
from system.text import one_line
from system.tree.prompt import Prompt
from system.tree.record import Kind, Mishap, Origin, Outcome, Tree

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Kept:
    """What is kept of an episode beside its tokens."""

    outcome: str
    seconds: float
    turns: int = 0
    rewrites: int = 0
    retries: int = 0
    output: str = ""


class GroupRollout:
    """One group, from its first session to its tree in :meth:`run`, once."""

    def __init__(
        self,
        runner: AgentRunner,
        prompt: Prompt,
        *,
        seed: int,
        ticket: int | str = "",
        greedy: bool = False,
        temperature: float | None = None,
        scoring: Scoring | None = None,
    ) -> None:
        """As of :class:`.TreeRollout`; ``greedy``: one episode; ``scoring``: None: the run's."""
        context = runner.context
        self.runner, self.context, self.prompt = runner, context, prompt
        self.seed, self.ticket = seed, ticket
        self.budget = 1 if greedy else context.config.leaves
        usual = 0.0 if greedy else context.config.temperature
        self.temperature = usual if temperature is None else temperature
        self.mishaps: list[Mishap] = []
        self._episodes: dict[int, Episode] = {}
        self._kept: dict[int, _Kept] = {}
        self._given: dict[int, Score] = {}  # by the agents themselves
        self._origins: list[Origin] = []
        policy = Never(1) if greedy else context.policy
        self._roots = min(context.config.roots, self.budget) if policy.can_fork else self.budget
        self._forking = Forking(
            policy,
            runner.engine,
            seed=seed,
            budget=self.budget,
            vocab_size=context.vocab_size,
            start=lambda script, baseline: self._start(Origin.FORK, script, baseline),
        )
        self._agents = asyncio.TaskGroup()
        self._beside = asyncio.TaskGroup()  # what scores; it outlives the episodes' deadline
        self._scores = TreeScores(scoring or context.scoring, prompt, self._beside, self.mishap)

    def mishap(self, kind: str, text: str) -> None:
        """Something has failed that does not end the group."""
        self.mishaps.append(Mishap(kind, text))

    async def run(self) -> Tree:
        """Run the agents, score their episodes, and make them one tree.

        Raises :class:`RolloutFailed` when fewer than min(2, budget) episodes are scored, or what they asked
        makes no tree; ``RewardBroken`` when too many scores fail.  Cancelling it ends every agent.
        """
        started_s = self.context.now()
        try:
            async with self._beside:
                cut = await self._run_agents()
                await self._scores.close()
        except ExceptionGroup as errors:
            raise next(leaves(errors)) from errors  # the groups have cancelled and awaited all others
        for failed in self._scores.failures.values():
            self.mishap("reward", str(failed))
        episodes = [self._episode(number) for number in range(self.budget)]
        scores = self._scores.scores | self._given
        for number, one in enumerate(episodes):
            one.reward, one.correct = math.nan, -1  # whatever a failed one reported
            if (score := scores.get(number)) is not None:
                one.reward, one.correct, one.parts = score.value, int(score.correct), score.parts
        if self._forking.failed is not None:
            raise self._forking.failed
        scored = sum(one.correct >= 0 for one in episodes)
        if scored < min(2, self.budget):
            outcomes = [one.outcome for one in episodes]
            raise too_few(self.prompt.id, outcomes, self.mishaps, scored, self.budget, cut)
        return plant_group(
            self.prompt,
            episodes,
            self.budget,
            meta=self._meta(episodes),
            started_s=started_s,
            closed_s=self.context.now(),
            origins=self._origins + [Origin.TOP_UP] * self._forking.remaining,
            same=self._forking.same,
            forks=self._forking.decisions,
        )

    async def _run_agents(self) -> bool:
        """Run all; returns whether the tree's deadline cut them off."""
        deadline = AwakeTimeout(self.context.config.tree_deadline_s)
        try:
            async with deadline, self._agents:
                for _ in range(self._roots):
                    self._start(Origin.ROOT)
        except TimeoutError:
            if not deadline.expired:
                raise
            return True
        return False

    def _start(self, origin: Origin, script: ReplayScript | None = None, baseline: float = math.nan) -> None:
        """Start one more agent of the budget; a fork with what it is told again."""
        number = self._forking.begin()
        self._origins.append(origin)
        work = self._run_agent(number, script or ReplayScript.none(), baseline)
        self._agents.create_task(work, name=f"agent {number} of {self.prompt.id}")

    async def _run_agent(self, number: int, script: ReplayScript, baseline: float) -> None:
        async with self.runner.limit:
            seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
            session = await self.runner.open(self.prompt.id, seed, self.temperature)
            self._forking.watch(number, session, script, baseline)
            clock = asyncio.get_running_loop().time
            began = clock()
            ran, outcome = Ran(), Outcome.DEADLINE  # also where the tree's own cuts it off
            try:
                ran, outcome = await self._agent(session)
            finally:
                episode = session.close(outcome)
                self._episodes[number] = episode
                if self._forking.end(number, session, script):
                    self._origins[number] = Origin.TOP_UP
                    episode.counters["diverged"] = 1
                self.runner.count(episode)
                self._kept[number] = _Kept(
                    outcome=episode.outcome.name.lower(),
                    seconds=round(clock() - began, 3),
                    turns=episode.counters.get("turns", 0),
                    rewrites=episode.rewrites,
                    retries=episode.retries,
                    output=ran.output,
                )
            if episode.counters.get("engine_lost"):
                self.mishap(ENGINE_LOST, f"an engine was lost under an agent of {self.prompt.id}")
            if episode.outcome.scored:
                self._score(number, episode, ran)
        if not self._forking.live:
            for _ in range(self._forking.remaining):
                self._start(Origin.TOP_UP)

    async def _agent(self, session: AgentSession) -> tuple[Ran, Outcome]:
        """Run the agent in ``session`` until it ends, or has to."""
        deadline = AwakeTimeout(self.runner.settings.deadline_s)
        try:
            async with deadline:
                task = told(self.prompt, self.runner.columns)
                return await self.runner.run(session, task), Outcome.ENDED
        except TimeoutError:
            if not deadline.expired:
                raise
            return Ran(), Outcome.DEADLINE
        except AgentFailed as error:
            if session.limit is None:  # else it failed at a limit of ours, as most do
                log.warning("prompt %s: %s", self.prompt.id, one_line(str(error)))
                self.mishap("agent", str(error))
            return Ran(output=error.output), Outcome.ENVIRONMENT

    def _score(self, number: int, episode: Episode, ran: Ran) -> None:
        """Take the agent's own word for it, or begin to score what it said.

        What it returned goes before what was reported to its session.
        """
        result = episode.result = episode.result | dict(ran.result)
        try:
            turns = _turns(episode.forest)
            earned = turn_rewards_of(result, len(turns))
            own, right = reward_of(result), correct_of(result)
            parts = {f"agent/{name}": value for name, value in parts_of(result).items()}
            if own is None and self.runner.judges:
                raise AgentFailed(f"an episode that ended by {episode.outcome.name} has no reward of its own")
            value = (own or 0.0) + sum(earned)
            if held(value) is None:
                raise AgentFailed(f"the agent's result has rewards that come to {value}")
        except AgentFailed as error:
            self.mishap("reward", str(error))
            return
        for piece, reward in zip(turns, earned, strict=False):  # later turns earned nothing by themselves
            episode.forest.pieces[piece].reward = reward
        if own is None:
            self._scores.begin(number, self._view(episode), None)
            return
        self._given[number] = Score(value, value >= 1 if right is None else right, {"agent": own, **parts})

    def _view(self, episode: Episode) -> BranchView:
        """The episode as a reward sees it: its last chain as text, or what the agent says it came to."""
        forest, chat = episode.forest, self.context.chat
        path = forest.path(max(episode.chosen)) if episode.chosen else []
        first = next((at for at, piece in enumerate(path) if forest.pieces[piece].kind == Kind.MODEL), 0)
        segments: list[tuple[Kind, str]] = []
        tokens = forest.tokens(path[-1]) if path else np.empty(0, np.int32)
        end = sum(forest.pieces[piece].tokens.size for piece in path[:first])
        asked = end
        for piece in path[first:]:
            one = forest.pieces[piece]
            begin, end = end, end + one.tokens.size
            segments.append((one.kind, chat.view(tokens[:end], begin, one.kind)))
        if isinstance(text := episode.result.get("text"), str):
            segments = [(Kind.MODEL, text)]
        return BranchView(
            segments=tuple(segments),
            outcome=episode.outcome,
            tools=tuple((call.tool, "ok") for call in episode.calls),
            tokens=int(tokens.size) - asked,
            steps=tuple(piece.reward for piece in forest.pieces if piece.trained and piece.reward),
            result=episode.result,
        )

    def _episode(self, number: int) -> Episode:
        """The episode; of an agent that the deadline left no time to begin, an empty one."""
        empty = Episode("", self.seed, self.prompt.id, Forest(), Outcome.DEADLINE, [])
        return self._episodes.get(number, empty)

    def _meta(self, episodes: Sequence[Episode]) -> dict[str, Any]:
        scores = self._scores.record(self.budget)
        for number, score in self._given.items():
            scores["parts"][number] = score.parts
        names = ["agent", *(name for score in self._given.values() for name in score.parts)]
        scores["measured"] = [*scores["measured"], *self.runner.measured(dict.fromkeys(names))]
        missing = _Kept(outcome=Outcome.DEADLINE.name.lower(), seconds=0.0)
        return {
            "question": self.prompt.messages[-1]["content"] if self.prompt.messages else "",
            "gold": list(self.prompt.answers),
            "seed": self.seed,
            "ticket": self.ticket,
            "agents": [asdict(self._kept.get(number, missing)) for number in range(len(episodes))],
            "mishaps": self.mishaps,
            **scores,
        }


def _turns(forest: Forest) -> list[int]:
    """The turns that were handed out, in the order they were sampled."""
    return [number for number, piece in enumerate(forest.pieces) if piece.trained]
