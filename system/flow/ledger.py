"""What became of every prompt.  A pure state machine with an append-only log, from which it can be rebuilt.

Each (epoch, prompt id) is in exactly one state.  Every change is an event, a JSON-able dictionary, written to
a log as it happens; :meth:`Ledger.replay` rebuilds the ledger from the log after a crash.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from system.errors import EspalierError
from system.flow.curriculum import Curriculum, PoolWeights
from system.flow.guidance import Guidance, Guides

Event = dict[str, Any]
Key = tuple[int, str]  # epoch (with a curriculum: how often it was drawn before), prompt id
Update = tuple[int, list[int]]  # weight version, numbers of the tickets whose trees made it


class LedgerError(EspalierError, ValueError):
    """An illegal transition, or a log that does not belong to this run."""


def surviving_updates(events: Iterable[Event]) -> list[Update]:
    """Every update that no return to a checkpoint took back, in order.  Raises LedgerError for a line that is
    no event of ours.
    """
    updates: list[Update] = []
    for event in events:
        match event:
            case {"event": "train", "version": int(version), "numbers": list(numbers)}:
                updates.append((version, numbers))
            case {"event": "restore", "trained_through": int(version)}:
                updates = [update for update in updates if update[0] <= version]
            case {"event": str(other)} if other not in ("train", "restore"):
                pass
            case _:
                raise LedgerError(f"a line of the ledger is no event of ours: {str(event)[:100]}")
    return updates


def accounted(events: Iterable[Event]) -> int:
    """The weight version up to which a log knows what every version was trained on."""
    known = 0
    for version, _ in surviving_updates(events):
        if version != known + 1:
            break
        known = version
    return known


def lineage(updates: Iterable[Update], version: int) -> str:
    """A digest of what weight version ``version`` and those before it were trained on.

    A checkpoint keeps its own: ticket numbers are never reused, so two that were made of different trees, one
    before a return to an older checkpoint and one after it, differ.
    """
    own = [update for update in updates if update[0] <= version]
    return hashlib.sha256(json.dumps(own).encode()).hexdigest()


class State(StrEnum):
    PENDING = "pending"  # to be grown
    GROWING = "growing"
    QUEUED = "queued"  # its tree is closed and waits for the learner
    TRAINING = "training"
    TRAINED = "trained"
    ABANDONED = "abandoned"  # given up, with a reason
    SILENT = "silent"  # its tree had nothing to teach: all leaves earned the same


@dataclass(frozen=True, slots=True)
class Ticket:
    """Leave to grow one tree."""

    number: int  # order of issue over the whole run, never reused
    epoch: int
    prompt_id: str
    attempt: int  # 1 for the first
    start_version: int = 0  # the learner's version when the tree started
    guide: int = 0  # actions of a demonstration that its prompt tells while it is sampled; 0: not guided

    @property
    def key(self) -> Key:
        return self.epoch, self.prompt_id


@dataclass(slots=True)
class _Record:
    """A prompt of one epoch that has been issued at least once."""

    state: State = State.PENDING
    number: int = -1  # of its latest ticket
    attempt: int = 0  # of its latest ticket
    start_version: int | None = None  # of the tree that its next ticket goes on with, if there is one
    version: int = -1  # weight version that its update makes, once TRAINING
    guide: int = 0  # as in its tickets


_IN_FLIGHT = (State.GROWING, State.QUEUED, State.TRAINING)


class Ledger:
    """Hands out prompts, epoch by epoch, each epoch in its own seeded order, or by what they earned before
    (a curriculum), and follows each to its end.

    A prompt that comes back (``retry``) goes before new ones.
    """

    def __init__(
        self,
        prompt_ids: Sequence[str],
        seed: int,
        max_attempts: int = 3,
        weights: PoolWeights | None = None,
        guides: Guides | None = None,
    ) -> None:
        """``weights``: of the curriculum; None: there is none.  ``guides``: None: no tree is guided."""
        if not prompt_ids or max_attempts < 1:
            raise LedgerError(
                f"{len(prompt_ids)} prompts and max_attempts={max_attempts}: need at least one of each"
            )
        if len(set(prompt_ids)) != len(prompt_ids):
            twice = next(p for p, count in Counter(prompt_ids).items() if count > 1)
            raise LedgerError(f"prompt id {twice!r} is not unique")
        self._prompts = list(prompt_ids)
        self._seed, self.max_attempts = seed, max_attempts
        self._records: dict[Key, _Record] = {}
        self._tickets: dict[int, Ticket] = {}  # of trees that grow, wait for the learner, or are trained on
        self.growing: set[int] = set()  # those of them whose trees have not closed
        self.updates: list[Update] = []  # that made the weights
        self._returned: deque[Key] = deque()  # pending again
        self._weights, self.curriculum = weights, None
        if weights is not None:
            self.curriculum = Curriculum(self._epoch(0), seed, weights)
        self._guides = guides
        self._guidance = None if guides is None else Guidance(guides, seed)
        self._fresh = self._in_order()
        self.next_number = 0
        self._write: Callable[[Event], object] = lambda _: None

    def next(self, version: int = 0) -> Ticket:
        """Issue the next prompt: pending -> growing.  ``version``: the learner's."""
        if self._returned:
            key = self._returned.popleft()
            record = self._records[key]
        else:
            key = next(self._fresh)
            record = self._records[key] = _Record(guide=self._guide(key[1]))
        record.state, record.number, record.attempt = State.GROWING, self.next_number, record.attempt + 1
        start = version if record.start_version is None else record.start_version
        record.start_version = None
        ticket = self._tickets[record.number] = Ticket(
            record.number, *key, record.attempt, start, record.guide
        )
        self.growing.add(record.number)
        self.next_number += 1
        about = {"number": ticket.number, "epoch": ticket.epoch, "prompt": ticket.prompt_id}
        self._log("issue", **about, attempt=ticket.attempt, **_known(guide=ticket.guide or None))
        return ticket

    def resume(self, key: Key, start_version: int) -> bool:
        """A checkpoint has a tree of this prompt, started at ``start_version``: the prompt's next ticket says
        so.  False, and nothing is done, unless the prompt has been issued and is pending again.
        """
        record = self._records.get(key)
        if record is None or record.state != State.PENDING:
            return False
        record.start_version = start_version
        return True

    @property
    def wants_rates(self) -> bool:
        """Whether it matters how many answers of a closed tree are right."""
        return self.curriculum is not None or self._guidance is not None

    def queue(self, number: int, rate: float | None = None) -> None:
        """Its tree has closed: growing -> queued.  ``rate``: see :meth:`Curriculum.back`."""
        self._close(number, State.QUEUED, rate)

    def train(self, numbers: Sequence[int], version: int) -> None:
        """The learner has made weight version ``version`` of these trees: queued -> training."""
        for number in numbers:
            self._move(number, (State.QUEUED,), State.TRAINING).version = version
        self.updates.append((version, [*numbers]))
        self._log("train", numbers=numbers, version=version)

    def trained(self, numbers: Sequence[int]) -> None:
        """That version is out: training -> trained."""
        for number in numbers:
            self._move(number, (State.TRAINING,), State.TRAINED)
        self._log("trained", numbers=numbers)

    def retry(self, number: int, reason: str, *, blameless: bool = False) -> bool:
        """Its tree is lost: back to pending, or abandoned if ``max_attempts`` are used up (then False).

        ``blameless``: a machine or a server was lost, which is no failed attempt.
        """
        if not blameless and self.ticket(number).attempt >= self.max_attempts:
            self.abandon(number, reason)
            return False
        self._move(number, _IN_FLIGHT, State.PENDING).attempt -= blameless
        self._log("retry", number=number, reason=reason, **({"blameless": True} if blameless else {}))
        return True

    def abandon(self, number: int, reason: str) -> None:
        """Give the prompt up for this epoch."""
        key = self.ticket(number).key
        self._move(number, _IN_FLIGHT, State.ABANDONED)
        if self.curriculum is not None:
            self.curriculum.back(*key, None)
        self._log("abandon", number=number, reason=reason)

    def silent(self, number: int, rate: float | None = None) -> None:
        """Its tree has closed and is left out: growing -> silent.  ``rate`` as in :meth:`queue`."""
        self._close(number, State.SILENT, rate)

    def ticket(self, number: int) -> Ticket:
        """The ticket of a tree in flight."""
        if number not in self._tickets:
            raise LedgerError(f"no tree in flight has number {number}")
        return self._tickets[number]

    def state(self, epoch: int, prompt_id: str) -> State:
        record = self._records.get((epoch, prompt_id))
        return record.state if record else State.PENDING

    def numbers(self, state: State) -> list[int]:
        """Tickets in flight in ``state``, oldest first."""
        return sorted(n for n, ticket in self._tickets.items() if self._records[ticket.key].state == state)

    @property
    def in_flight(self) -> int:
        """How many trees grow, wait for the learner, or are trained on now."""
        return len(self._tickets)

    @property
    def oldest_growing(self) -> int:
        """Number of the oldest tree that has not closed; the next one's, where all have."""
        return min(self.growing, default=self.next_number)

    @classmethod
    def replay(
        cls,
        prompt_ids: Sequence[str],
        seed: int,
        events: Iterable[Event],
        trained_through: int,
        max_attempts: int = 3,
        write: Callable[[Event], object] = lambda _: None,
        weights: PoolWeights | None = None,
        guides: Guides | None = None,
    ) -> Ledger:
        """The ledger after a restart from the checkpoint of weight version ``trained_through``.

        Trees in flight were lost with the process and updates after the checkpoint with the weights: their
        prompts are pending again (which is no failed attempt), except those whose update the checkpoint
        contains.  The restore is itself an event, so the log stays valid through any number of restarts.
        What a curriculum has learned of a lost tree stands until the prompt's next tree closes.
        Raises LedgerError for a log of another seed or data set, for one that does not account for every
        version that was trained, and for one with an event that cannot be.

        ``write`` appends an event to the log, which must be durable before a checkpoint is: it is never
        behind the weights.
        """
        ledger = cls(prompt_ids, seed, max_attempts, weights, guides)
        opening, events = ledger._opening(), list(events)
        if (known := accounted(events)) < trained_through:
            raise LedgerError(
                f"the log accounts for steps up to {known}, the checkpoint for {trained_through}"
            )
        log = iter(events)
        first = next(log, None)
        if first is None:  # a new run, or one that was killed before anything was written
            write(opening)
        elif first != opening:
            raise LedgerError(f"this log belongs to another run: it opens with {first}, not {opening}")
        else:
            for number, event in enumerate(log, 2):
                try:
                    ledger._apply(event)
                except (LedgerError, LookupError, TypeError) as error:
                    raise LedgerError(
                        f"event {number} of the ledger cannot be ({error}): lines before it were taken out "
                        "or changed; put the ledger back as it was, or start a new run"
                    ) from error
            ledger._restore(trained_through)
            write({"event": "restore", "trained_through": trained_through})
        ledger._write = write
        return ledger

    def _apply(self, event: Event) -> None:
        """Repeat a logged event.  Fields are checked against what the ledger would do itself."""
        match event:
            case {"event": "issue"}:
                ticket = self.next()
                about = (event[name] for name in ("number", "epoch", "prompt", "attempt"))
                logged = Ticket(*about, guide=event.get("guide", 0))
                if ticket != logged:
                    raise LedgerError(f"the log issues {logged} where this run would issue {ticket}")
            case {"event": "queue" | "train" | "trained" | "abandon" | "silent" as method, **fields}:
                getattr(self, method)(**fields)
            case {"event": "retry"}:
                back = self._move(event["number"], _IN_FLIGHT, State.PENDING)
                back.attempt -= event.get("blameless", False)
            case {"event": "restore", **fields}:
                self._restore(**fields)
            case _:
                raise LedgerError(f"unknown event {event['event']!r} in the log")

    def _restore(self, trained_through: int) -> None:
        lost = []
        for key, record in self._records.items():
            updated = record.state in (State.TRAINING, State.TRAINED)
            if updated and record.version <= trained_through:
                record.state = State.TRAINED
            elif updated or record.state in _IN_FLIGHT:
                record.state, record.version = State.PENDING, -1
                record.attempt -= 1
                lost.append(key)
        self.updates = [update for update in self.updates if update[0] <= trained_through]
        self._tickets.clear()
        self.growing.clear()
        self._returned.extendleft(sorted(lost, key=lambda key: self._records[key].number, reverse=True))

    def _move(self, number: int, allowed: tuple[State, ...], to: State) -> _Record:
        ticket = self._tickets.get(number)
        if ticket is None:
            raise LedgerError(f"tree {number} is not in flight: it cannot become {to}")
        record = self._records[ticket.key]
        if record.state not in allowed:
            raise LedgerError(f"tree {number} is {record.state}: it cannot become {to}")
        record.state = to
        self.growing.discard(number)  # none begins to grow but by `next`
        if to not in _IN_FLIGHT:
            del self._tickets[number]
        if to == State.PENDING:
            self._returned.append(ticket.key)
        return record

    def _close(self, number: int, to: State, rate: float | None) -> None:
        key = self.ticket(number).key
        guide = self._move(number, (State.GROWING,), to).guide
        if self.curriculum is not None:  # what a guided tree earned does not say what the question is
            self.curriculum.back(*key, None if guide else rate)
        if self._guidance is not None and guide:
            self._guidance.told(key[1], key[0], guide, rate)
        self._log("queue" if to == State.QUEUED else "silent", number=number, **_known(rate=rate))

    def _guide(self, question: str) -> int:
        """How many actions a new tree of ``question`` is told."""
        if self._guidance is None:
            return 0
        return self._guidance.actions(question, self.curriculum and self.curriculum.pool(question))

    def _in_order(self) -> Iterator[Key]:
        """Every prompt that is issued for the first time in its epoch."""
        if self.curriculum is not None:
            while True:
                yield self.curriculum.draw()
        for epoch in itertools.count():
            for prompt in self._epoch(epoch):
                yield epoch, prompt

    def _epoch(self, epoch: int) -> list[str]:
        """Every prompt, in the seeded order of an epoch."""
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._prompts))
        return [self._prompts[number] for number in order]

    def _opening(self) -> Event:
        digest = hashlib.sha256("\0".join(self._prompts).encode("utf-8", "surrogatepass")).hexdigest()
        opening = {"event": "open", "seed": self._seed, "prompts": len(self._prompts), "digest": digest}
        guides = self._guides and self._guides.opening()
        return opening | _known(curriculum=self._weights and asdict(self._weights), guide=guides)

    def _log(self, kind: str, **fields: Any) -> None:
        self._write({"event": kind, **fields})


def _known(**fields: Any) -> Event:
    """Those that are not None."""
    return {name: value for name, value in fields.items() if value is not None}
