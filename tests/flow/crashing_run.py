"""A ledger in a run that crashes, for the tests of the ledger and of the curriculum."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from system.flow.curriculum import PoolWeights
from system.flow.ledger import Ledger, State

PROMPTS = [f"q{i}" for i in range(7)]


class CrashingRun:
    """A run with crashes, beside a plain record of what the surviving weights were trained on."""

    def __init__(self, seed: int, weights: PoolWeights | None = None) -> None:
        self.weights = weights
        self.rng = np.random.default_rng(seed)
        self.log: list[dict[str, Any]] = []  # what is on disk
        self.pending: list[dict[str, Any]] = []  # what is on its way there
        self.ledger = self.replayed([], 0, self.pending.append)
        self.version = self.checkpoint = 0
        self.history: dict[int, list[tuple[int, str]]] = {}  # surviving updates
        self.abandoned: set[tuple[int, str]] = set()

    def replayed(
        self, log: list[dict[str, Any]], version: int, write: Callable[[Any], object] = lambda _: None
    ) -> Ledger:
        return Ledger.replay(PROMPTS, 5, log, version, 3, write, self.weights)

    @property
    def epoch(self) -> int:
        """The newest of which a prompt was issued."""
        return max((e["epoch"] for e in self.log + self.pending if e["event"] == "issue"), default=0)

    def write(self) -> None:
        self.log += json.loads(json.dumps(self.pending))
        self.pending.clear()

    def step(self, fresh: bool = True) -> None:
        """One random legal thing; without ``fresh`` only what brings trees in flight to an end."""
        ledger, rng = self.ledger, self.rng
        growing, queued, training = (ledger.numbers(s) for s in (State.GROWING, State.QUEUED, State.TRAINING))
        assert ledger.growing == set(growing)
        assert ledger.in_flight == len(growing + queued + training)
        act = rng.integers(0, 10)
        if act < 3 and fresh:
            ticket = ledger.next()
            assert ledger.state(ticket.epoch, ticket.prompt_id) == State.GROWING
        elif act < 5 and growing:
            rate = None if self.weights is None else float(rng.choice([0.0, 0.5, 1.0]))
            ledger.queue(int(rng.choice(growing)), rate)
        elif act < 6 and queued and not training:
            ledger.train(queued[: int(rng.integers(1, 4))], self.version + 1)
        elif act < 8 and training:
            self.version += 1
            self.history[self.version] = [(t.epoch, t.prompt_id) for t in map(ledger.ticket, training)]
            ledger.trained(training)
        elif act < 9 and growing + queued:
            ticket = ledger.ticket(int(rng.choice(growing + queued)))
            if not ledger.retry(ticket.number, str(rng.choice(["engine", "stale"]))):
                self.abandoned.add((ticket.epoch, ticket.prompt_id))
        if rng.random() < 0.3:
            self.write()
        if rng.random() < 0.1:
            self.write()  # the log is durable before the checkpoint
            self.checkpoint = self.version

    def crash(self) -> None:
        if self.rng.random() < 0.5:
            self.write()
        self.pending.clear()
        self.version = self.checkpoint
        self.history = {v: keys for v, keys in self.history.items() if v <= self.version}
        self.ledger = self.replayed(self.log, self.version, self.pending.append)
        kept = {key for key in self.abandoned if self.ledger.state(*key) == State.ABANDONED}
        self.abandoned = (
            kept  # an abandonment that was not yet on disk is forgotten: the prompt is grown again
        )

    def check(self) -> None:
        ledger = self.ledger
        survived = [key for keys in self.history.values() for key in keys]
        assert len(survived) == len(set(survived)), "trained twice"
        everything = [(e, p) for e in range(self.epoch + 1) for p in PROMPTS]
        states = {key: ledger.state(*key) for key in everything}
        assert {k for k, s in states.items() if s == State.TRAINED} == set(survived)
        assert {k for k, s in states.items() if s == State.ABANDONED} == self.abandoned
