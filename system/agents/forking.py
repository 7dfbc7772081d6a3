"""Where the agents of a group are forked: the branching policy's word on their turns, one after the other."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from system.agents.group import Turn
from system.agents.launch import command_problem
from system.agents.replay import RecordedTurn, ReplayingEngine, ReplayScript, RetoldTurn
from system.agents.session import AgentSession
from system.config import Config
from system.rollout.branching import Policy, Probe, TreeState, decided, make_policy
from system.rollout.probe import shared_start
from system.tree.record import Float32, ForkDecision, Int32


@dataclass(slots=True)
class _Growing:
    """An agent at work, as far as forks of it go."""

    script: ReplayScript
    baseline: float
    rng: np.random.Generator
    told: list[RetoldTurn] = field(default_factory=list[RetoldTurn])  # all its turns so far
    own: int = 0  # of them, those that were sampled for it, and are trained on
    streak: int = 0  # :attr:`TreeState.streak`


class Forking:
    """Decides, in one group, which agents are forked after which of their requests, by replay."""

    def __init__(
        self,
        policy: Policy,
        engine: ReplayingEngine,
        *,
        seed: int,
        budget: int,
        vocab_size: int,
        start: Callable[[ReplayScript, float], None],
    ) -> None:
        """``start``: starts an agent with what it is told again, and the baseline of the one it forks."""
        self._policy, self._engine, self._start = policy, engine, start
        self._seed, self._budget, self._log_vocab = seed, budget, math.log(vocab_size)
        self._growing: dict[int, _Growing] = {}
        self._beginnings: defaultdict[bytes, list[Int32]] = defaultdict(list)  # of turns, by their prompts
        self.started = self.live = self.forks = 0  # agents; of them those that have not ended, and forks
        self.same: dict[Turn, Turn] = {}  # turns that were told again -> those that were sampled
        self.decisions: list[tuple[Turn, ForkDecision]] = []
        self.failed: Exception | None = None  # what a policy raised first

    @property
    def remaining(self) -> int:
        """Of the budget, agents that have not been started."""
        return self._budget - self.started

    def begin(self) -> int:
        """One more agent is started; its number."""
        self.started, self.live = self.started + 1, self.live + 1
        return self.started - 1

    def watch(self, number: int, session: AgentSession, script: ReplayScript, baseline: float) -> None:
        """Agent ``number`` begins in ``session``."""
        if not self._policy.can_fork:
            return
        rng = np.random.default_rng(np.random.SeedSequence([self._seed, 0], spawn_key=(number,)))
        self._growing[number] = _Growing(script, baseline, rng)
        self._engine.scripts[session.route] = script

        def recorded(piece: int, rid: str, trains: bool) -> None:
            try:
                self._recorded(number, piece, rid, trains)
            except Exception as error:  # the session would take it for a fault of its own
                self.failed = self.failed or error

        session.when_recorded = recorded

    def end(self, number: int, session: AgentSession, script: ReplayScript) -> bool:
        """It has ended; whether it never came to its fork, as it asked for something else before."""
        self.live -= 1
        self._growing.pop(number, None)
        self._engine.forget(session.route)
        return not script.forked

    def _recorded(self, number: int, piece: int, rid: str, trains: bool) -> None:
        agent = self._growing[number]
        recorded, whose = self._engine.take(rid)
        before = list(agent.told)
        agent.told.append(RetoldTurn(whose or (number, piece), recorded))
        if whose is not None:
            self.same[number, piece] = whose
        elif trains:
            self._look(number, agent, piece, recorded, before)

    def _look(
        self, number: int, agent: _Growing, piece: int, recorded: RecordedTurn, before: list[RetoldTurn]
    ) -> None:
        """Let the policy look at a turn that was sampled, and fork before it."""
        k = self._policy.probe_tokens
        tokens = _joined(recorded, "tokens").astype(np.int32)[:k]
        entropies: Float32 = _joined(recorded, "entropy")[:k]
        others = self._beginnings[recorded.prompt.tobytes()]
        shared = tuple(shared_start(tokens, other) for other in others)
        others.append(tokens)
        entropy = self._policy.measure(entropies, self._log_vocab)
        agent.own += 1
        if not before or math.isnan(agent.baseline):
            agent.baseline = entropy
        if not before or (
            agent.own == 1 and not self._policy.asks_forks
        ):  # a root's, or a fork's, first turn
            return
        state = TreeState(
            budget=self._budget,
            started=self.started,
            live=self.live,
            forks=self.forks,
            calls=len(before),
            call_limit=len(before) + 1,  # an agent says itself when it is done
            streak=agent.streak,
        )
        probe = Probe(entropy, agent.baseline, entropies, _joined(recorded, "logprob")[:k], shared)
        decision = decided(self._policy, self._policy.decide(probe, state, agent.rng))
        forks = min(decision.forks, self.remaining)
        told = ForkDecision(0, decision.delta_h, decision.probability, decision.draw, forks)
        self.decisions.append(((number, piece), told))
        if not shared:
            agent.streak = agent.streak + 1 if forks else 0
        for _ in range(forks):
            self.forks += 1
            inherited = agent.baseline if self._policy.inherits else math.nan
            self._start(ReplayScript(before, recorded.prompt), inherited)


def _joined(recorded: RecordedTurn, name: str) -> Float32:
    return np.concatenate([np.zeros(0, np.float32), *(getattr(chunk, name) for chunk in recorded.chunks)])


def misfits(config: Config) -> Iterator[str]:
    """What is wrong with the agent's command, and what of the policy no agent can do: a line each with the
    remedy.
    """
    if problem := command_problem(config.agent):
        yield problem
    if not config.agent.on or config.agent.forks == "none":
        return
    policy, name = make_policy(config.branching), config.branching.name
    if not policy.can_fork and not policy.expands:
        yield f"agent.forks=replay, and branching={name} never forks: take another policy, or agent.forks out"
    if policy.expands or policy.lag:
        yield (
            f"agent.forks=replay: branching={name} forks where no request of an agent begins, or before it "
            "is answered: take a policy that looks at the turn after a result, such as arpo-calibrated"
        )
