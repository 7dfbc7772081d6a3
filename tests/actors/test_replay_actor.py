"""The replay actor's own promises: long polls, and a refill that loses and doubles nothing."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from actors import replay
from actors.replay import NotFilled, ReplayActor, ReplayHandle
from system.flow.replay import Entry


def entries(*numbers: int) -> list[Entry[object]]:
    return [Entry(number, version=0, item=[f"ref-{number}"], leaves=8) for number in numbers]


async def filled(batch_trees: int = 2, window: int = 2, max_staleness: int = 4) -> ReplayActor:
    actor = ReplayActor(batch_trees, window, max_staleness)
    await actor.fill(0, [], [])
    return actor


async def test_a_restarted_actor_refuses_until_it_is_filled() -> None:
    actor = ReplayActor(2, 2, 4)
    with pytest.raises(NotFilled):
        await actor.take(0, wait_s=1.0)
    with pytest.raises(NotFilled):
        await actor.put(entries(0), [])


async def test_take_waits_for_a_batch_and_wakes_on_the_put_that_fills_it() -> None:
    actor = await filled()
    taking = asyncio.create_task(actor.take(0, wait_s=30.0))
    await actor.put(entries(0), [])
    await asyncio.sleep(0)
    assert not taking.done()
    await actor.put(entries(1), [])
    batch = (await asyncio.wait_for(taking, 5)).batch
    assert batch is not None
    assert [entry.number for entry in batch] == [0, 1]


async def test_take_gives_up_after_its_wait() -> None:
    actor = await filled()
    taken = await actor.take(0, wait_s=0.01)
    assert taken.batch is None
    assert taken.evicted == ()


async def test_refill_restores_the_frontier_and_passes_over_a_late_put() -> None:
    actor = ReplayActor(2, 2, 4)
    # Tickets 3 and 5 are closed, 4 failed, 6 still grows; 0 to 2 are trained.
    await actor.fill(3, gone=[4], entries=entries(3, 5))
    await actor.put(entries(5), [4])  # on its way when the actor was restarted
    batch = (await actor.take(1, wait_s=1.0)).batch
    assert batch is not None
    assert [entry.number for entry in batch] == [3, 5]
    await actor.put(entries(6, 7), [])
    batch = (await actor.take(2, wait_s=1.0)).batch
    assert batch is not None
    assert [entry.number for entry in batch] == [6, 7]


async def test_stale_entries_come_back_at_once() -> None:
    actor = await filled(max_staleness=1)
    await actor.put(entries(0), [])
    taken = await actor.take(2, wait_s=30.0)
    assert taken.batch is None
    assert [eviction.entry.number for eviction in taken.evicted] == [0]


async def test_a_late_fill_does_not_bring_back_what_was_taken() -> None:
    actor = ReplayActor(2, 2, 4)
    await actor.fill(0, gone=[], entries=entries(0, 1))
    assert (await actor.take(0, wait_s=1.0)).batch is not None
    await actor.fill(0, gone=[], entries=entries(0, 1))  # computed before the take was answered
    assert (await actor.take(0, wait_s=0.01)).batch is None


class Owner:
    """Owns two closed trees, whatever the queue forgets."""

    def holdings(self) -> tuple[int, list[int], list[Entry[Any]]]:
        return 0, [], entries(0, 1)


class Mortal:
    """Stands in for the actor's handle; ``kill`` is a restart by Ray."""

    def __init__(self) -> None:
        self.kill()

    def kill(self) -> None:
        self._actor = ReplayActor(2, 2, 4)

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=getattr(self._actor, method))


async def test_a_restart_between_calls_loses_and_doubles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "RETRY_S", 0.01)
    mortal = Mortal()
    handle = ReplayHandle(mortal, Owner())
    await handle.fill()
    mortal.kill()
    # Both calls meet the fresh actor at once, and both refill it.
    taken, _ = await asyncio.gather(handle.take(0, 5.0), handle.put(entries(1)[0]))
    assert taken.batch is not None
    assert [entry.number for entry in taken.batch] == [0, 1]
    assert (await handle.take(1, 0.01)).batch is None
