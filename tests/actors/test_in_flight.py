"""What a checkpoint takes of the trees in flight, and what a resumed run makes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors import in_flight as module
from actors.in_flight import InFlightCheckpoint
from actors.ray_support import ActorLost
from system.config import Config
from system.flow.ledger import Ledger, State
from system.flow.replay import TreeInFlight
from system.rollout import in_flight
from system.rollout.in_flight import SavedTree, SavedTrees
from system.rollout.snapshot import fingerprint
from system.tree.builder import TreeBuilder
from system.tree.record import Kind, Origin, Outcome, Tree
from system.tree.stats import TreeStats

PROMPTS = [f"p{i}" for i in range(12)]


class RunEvents:
    """A recorder as far as it is asked."""

    def __init__(self) -> None:
        self.restored: Mapping[str, Any] = {}
        self.dropped: list[str] = []

    def state(self) -> dict[str, Any]:
        return {"step": 3}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.restored = state

    def tree_dropped(self, reason: str, leaves: int, text: str = "") -> None:
        self.dropped.append(reason)


def worker(found: dict[int, bytes] | Exception) -> Any:
    """A rollout worker's handle; the snapshots are their own reference."""

    async def tickets() -> list[int]:
        await asyncio.sleep(0)
        if isinstance(found, Exception):
            raise found
        return list(found)

    return SimpleNamespace(snapshots=SimpleNamespace(remote=lambda: (tickets(), found)))


def tree(prompt_id: str) -> Tree:
    growth = TreeBuilder(prompt_id, "t", [1, 2], 1)
    node = growth.node(0, Kind.MODEL)
    growth.extend(node, [3, 4], [-1.0, -2.0], None, 3)
    growth.leaf(node, Outcome.STOPPED, Origin.ROOT)
    return growth.close(1.0)


class Store:
    """An object store whose references say nothing of what they refer to."""

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}

    def put(self, value: Any) -> str:
        reference = f"object-{len(self.objects)}"
        self.objects[reference] = value
        return reference

    def fetch(self, reference: Any, _: float) -> Any:
        return self.objects.get(reference) if isinstance(reference, str) else reference


def checkpoint_of(
    ledger: Ledger, *workers: Any, config: Config | None = None
) -> tuple[InFlightCheckpoint, Store, RunEvents]:
    store, events = Store(), RunEvents()
    recorder: Any = events
    named = {f"rollout-{number}": one for number, one in enumerate(workers)}
    made = InFlightCheckpoint(config or Config(), ledger, named, recorder, store.put)
    return made, store, events


async def written(
    one: InFlightCheckpoint, store: Store, queue: Sequence[TreeInFlight], path: Path
) -> SavedTrees:
    """What a checkpoint holds."""
    module.write(path, await one.collect(queue), store.fetch)
    return in_flight.read(path)


def waiting(store: Store, ledger: Ledger, number: int) -> TreeInFlight:
    ticket = ledger.ticket(number)
    closed = tree(ticket.prompt_id)
    return TreeInFlight(ticket, store.put(closed), TreeStats.of(closed))


async def test_every_tree_in_flight_is_kept_once(tmp_path: Path) -> None:
    ledger = Ledger(PROMPTS, 0)
    tickets = [ledger.next(version) for version in (1, 2, 2, 3, 3)]
    one, store, _ = checkpoint_of(ledger, worker({0: b"zero", 2: b"two"}), worker({3: b"three"}))
    queue: list[TreeInFlight] = []

    def close(number: int) -> None:
        queue.append(waiting(store, ledger, number))
        ledger.queue(number)

    close(1)
    close(2)  # 2 was frozen and has closed since; 4 arrives only now
    asyncio.get_running_loop().call_later(0.05, close, 4)
    found = await written(one, store, queue, tmp_path / "v")
    trees = list(found.trees)
    state = {k.prompt_id: k for k in trees}
    assert len(trees) == 5
    assert state.keys() == {ticket.prompt_id for ticket in tickets}
    found_trees = [state[tickets[i].prompt_id].tree for i in range(5)]
    assert [isinstance(one, Tree) for one in found_trees] == [False, True, True, False, True]
    assert state[tickets[3].prompt_id] == SavedTree(0, tickets[3].prompt_id, 3, b"three")
    assert [state[tickets[i].prompt_id].start_version for i in range(5)] == [1, 2, 2, 3, 3]
    assert found.books == {"step": 3}


async def test_a_closed_tree_that_is_lost_is_left_out(tmp_path: Path) -> None:
    ledger = Ledger(PROMPTS, 0)
    one, store, _ = checkpoint_of(ledger)
    for _ in range(2):
        ledger.next()
    queue = [waiting(store, ledger, number) for number in range(2)]
    for number in range(2):
        ledger.queue(number)
    del store.objects[queue[0].reference]
    found = await written(one, store, queue, tmp_path / "v")
    assert [kept.prompt_id for kept in found.trees] == [queue[1].ticket.prompt_id]


async def test_a_lost_worker_costs_its_own_trees_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "SETTLE_S", 0.05)
    ledger = Ledger(PROMPTS, 0)
    tickets = [ledger.next() for _ in range(2)]
    one, store, _ = checkpoint_of(ledger, worker(ActorLost("gone")), worker({1: b"one"}))
    found = await written(one, store, [], tmp_path / "v")
    assert [kept.prompt_id for kept in found.trees] == [tickets[1].prompt_id]
    broken, _, _ = checkpoint_of(ledger, worker(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        await broken.collect([])


async def test_a_resumed_run_takes_them_up_in_the_ledgers_order(tmp_path: Path) -> None:
    """Each prompt is issued again once; what was kept of it is handed out then, and kept until then."""
    log: list[dict[str, Any]] = []
    before = Ledger.replay(PROMPTS, 0, [], 0, write=log.append)
    tickets = [before.next() for _ in range(4)]
    before.queue(1)
    before.abandon(3, "given up after the checkpoint")
    ledger = Ledger.replay(PROMPTS, 0, log, 0)
    path = tmp_path / "v000003.trees"
    versions = {0: 2, 1: 1, 3: 3}
    trees = tuple(
        SavedTree(0, tickets[i].prompt_id, versions[i], tree(tickets[i].prompt_id) if i == 1 else b"x")
        for i in (0, 1, 3)
    )
    in_flight.write(path, SavedTrees(fingerprint(Config()), {"step": 3}, trees))
    one, store, books = checkpoint_of(ledger)
    assert one.restore(path, {"step": 2}) == "1 trees go on growing, 1 wait to be trained on"
    assert books.restored == {"step": 3}
    assert books.dropped == ["kept, but its prompt is not pending"]
    again = ledger.next(9)
    assert (again.prompt_id, again.start_version) == (tickets[0].prompt_id, 2)
    taken = one.take(again.key)
    assert taken is not None
    assert (store.objects[taken.reference], taken.stats) == (b"x", None)
    assert one.take(again.key) is None
    # A checkpoint that comes before the second one's turn must not lose it.
    still = await written(one, store, [], tmp_path / "still")
    assert [(k.prompt_id, isinstance(k.tree, Tree), k.start_version) for k in still.trees] == [
        (tickets[1].prompt_id, True, 1)
    ]
    assert ledger.state(0, tickets[1].prompt_id) == State.PENDING
    closed = one.take((0, tickets[1].prompt_id))
    assert closed is not None
    assert closed.stats is not None


def test_other_settings_drop_everything_with_a_reason(tmp_path: Path) -> None:
    config = Config()
    config.rollout.leaves, config.branching.alpha = 16, 0.1
    path = tmp_path / "v.trees"
    in_flight.write(
        path,
        SavedTrees(fingerprint(Config()), {"step": 3}, tuple(SavedTree(0, p, 0, b"") for p in PROMPTS[:2])),
    )
    one, _, books = checkpoint_of(Ledger(PROMPTS, 0), config=config)
    assert one.restore(path, {}) == "the trees in flight are grown anew: rollout, branching changed"
    assert books.dropped == ["kept under other settings"] * 2
    assert all(one.take((0, prompt)) is None for prompt in PROMPTS[:2])


async def test_no_process_is_started_to_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []

    async def answer(*_: Any) -> None:
        started.append(1)

    monkeypatch.setattr(module, "beside", lambda *_: None)
    monkeypatch.setattr(module, "answer", answer)
    ledger, path = Ledger(PROMPTS, 0), tmp_path / "v000000.trees"
    one, store, _ = checkpoint_of(ledger)
    nothing = await one.collect([])
    path.write_bytes(b"of a session that was lost")
    await one.write(path, nothing, again=False)
    assert not started
    assert not path.exists(), "the checkpoint to come has no trees"
    await one.write(path, nothing, again=True)  # its books may be newer than those beside the weights
    ledger.next(1)
    await one.write(path, await one.collect([waiting(store, ledger, 0)]), again=False)
    assert len(started) == 2


def test_without_a_usable_file_the_checkpoints_own_books_count(tmp_path: Path) -> None:
    one, _, books = checkpoint_of(Ledger(PROMPTS, 0))
    assert "no trees" in one.restore(tmp_path / "none.trees", {"step": 2})
    assert books.restored == {"step": 2}
    (tmp_path / "bad.trees").write_bytes(np.zeros(100, np.uint8).tobytes())
    assert "grown anew" in one.restore(tmp_path / "bad.trees", {"step": 1})
    assert books.restored == {"step": 1}
