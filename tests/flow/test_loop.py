"""The training loop over parts whose trees are opaque: what it decides, tells, and may not hold."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flow_trees import stats

from system.config import Config, ConfigError, load
from system.errors import FAILED, exit_code
from system.flow.ledger import Ledger, State, Ticket
from system.flow.loop import FinishedStep, GaveUp, TrainingLoop, TreeLost, TreesLost
from system.flow.replay import TreeInFlight
from system.tree.stats import TreeStats
from system.twin.clock import run


class Opaque:
    """Stands for an object reference: the loop can carry it and nothing else."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"somebody looked into a tree: {name}")


class World:
    """Trees take a second each, but for those in ``slow``; training takes as long as it is told to."""

    def __init__(self, config: Config, slow: Mapping[int, float] | None = None, train_s: float = 1.0) -> None:
        self.config, self.slow, self.train_s = config, slow or {}, train_s
        self.log: list[dict[str, Any]] = []
        self.ledger = Ledger.replay([f"q{i}" for i in range(200)], 0, [], 0, 3, self.log.append)
        self.loop = TrainingLoop(config, self.ledger, self, self, clock=self.now)
        self.failing: Container[int] = set()  # tickets whose trees do not come ...
        self.failure = TreeLost("engine")  # ... and why
        self.gone: set[int] = set()  # tickets whose trees are lost after their close
        self.tickets: dict[int, Ticket] = {}
        self.batches: list[list[int]] = []
        self.lag: list[int] = []  # versions between start and training
        self.pools: list[Mapping[str, float]] = []
        self.closed = 0
        self.counted: set[tuple[int, str]] = set()  # (epoch, prompt) of trees that closed before a resume
        self.dropped: Counter[str] = Counter()
        self.texts: set[str] = set()
        self.mixed: Container[int] = range(0)  # tickets whose leaves earn something to learn from
        self.claimed: dict[int, int] = {}  # ticket -> the weights that its engine says it used

    @staticmethod
    def now() -> float:
        return asyncio.get_running_loop().time()

    async def grow(self, ticket: Ticket, seed: int) -> TreeInFlight:
        self.tickets[ticket.number] = ticket
        await asyncio.sleep(self.slow.get(ticket.number, 1.0))
        if ticket.number in self.failing:
            raise self.failure
        counted = ticket.key in self.counted
        version = self.claimed.get(ticket.number, ticket.start_version)
        reward = np.array([1.0, float(ticket.number not in self.mixed)], np.float32)
        told = replace(stats(version, leaves=2), reward=reward)
        return TreeInFlight(ticket, Opaque(ticket.number), told, counted)

    async def train(self, version: int, trees: Sequence[TreeInFlight]) -> Mapping[str, float]:
        numbers = [tree.ticket.number for tree in trees]
        if lost := {index: "gone" for index, number in enumerate(numbers) if number in self.gone}:
            raise TreesLost(lost)
        await asyncio.sleep(self.train_s)
        self.batches.append(numbers)
        self.lag += [version - tree.ticket.start_version for tree in trees]
        return {"loss": 0.0}

    async def publish(self, version: int) -> None:
        await asyncio.sleep(0.1)

    def tree_closed(self, tree: TreeStats, version_now: int) -> None:
        self.closed += 1

    def tree_dropped(self, reason: str, leaves: int, text: str = "") -> None:
        self.dropped[reason] += 1
        self.texts |= {text} - {""}

    def idle_total(self, actor: str, cause: str, total_s: float) -> None: ...

    def train_step(self, step: FinishedStep) -> None:
        assert all(isinstance(tree, TreeStats) for tree in step.trees)
        self.pools.append(step.pools)

    async def run(self, steps: int) -> None:
        async with asyncio.TaskGroup() as tasks:
            admitting = tasks.create_task(self.loop.admit())
            async with asyncio.timeout(10_000):
                for _ in range(steps):
                    await self.loop.step()
            self.loop.stop()
            admitting.cancel()


def settings(*overrides: str) -> Config:
    return load(None, ["rollout.leaves=4", "rollout.roots=2", "flow.batch_leaves=8", *overrides])


def test_the_driver_holds_no_tree() -> None:
    """Whole training steps, with trees of which only tickets, references and statistics can be had."""
    world = World(settings("flow.staleness=1"))
    run(world.run(5))
    assert world.batches == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert max(world.lag) == 1
    assert world.dropped == {}
    assert len(world.ledger.numbers(State.QUEUED)) == len(world.loop.replay)


def test_stale_trees_are_evicted_with_a_reason_and_grown_again() -> None:
    """A straggler is overtaken by the window, and too stale when it closes at last."""
    slow = {0: 30.0}
    calm = World(settings("flow.staleness=1", "flow.window=4"), slow)
    run(calm.run(10))
    assert calm.dropped == {}
    assert max(calm.lag) > 2
    strict = World(settings("flow.staleness=1", "flow.window=4", "flow.max_staleness=2"), slow)
    run(strict.run(10))
    assert strict.dropped == {"stale": 1}
    assert max(strict.lag) <= 2
    trained = [strict.tickets[number] for batch in strict.batches for number in batch]
    again = [ticket for ticket in trained if ticket.prompt_id == strict.tickets[0].prompt_id]
    assert [ticket.attempt for ticket in again] == [2]
    assert [e for e in strict.log if e["event"] == "retry"] == [
        {"event": "retry", "number": 0, "reason": "stale"}
    ]


def test_a_limit_below_the_bound_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"flow\.max_staleness=1 is below flow\.staleness=2"):
        settings("flow.staleness=2", "flow.max_staleness=1")
    settings("flow.staleness=2", "flow.max_staleness=0")


def test_trees_lost_after_their_close_are_grown_again_and_the_run_goes_on() -> None:
    world = World(settings("flow.staleness=1"))
    world.gone = {1, 2, 3, 6}
    run(world.run(6))
    assert world.dropped == {"lost after its close": 4}
    trained = [number for batch in world.batches for number in batch]
    assert len(trained) == len(set(trained)) == 12
    assert not world.gone & set(trained)
    prompts = [world.tickets[number].prompt_id for number in trained]
    assert {world.tickets[number].prompt_id for number in world.gone} <= set(prompts)
    assert [event["version"] for event in world.log if event["event"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert world.ledger.in_flight == len(world.ledger.growing) + len(world.loop.replay)


def test_a_tree_that_fails_is_not_waited_for() -> None:
    world = World(settings("flow.staleness=0"))
    world.failing = {0}
    run(world.run(2))
    assert world.batches == [[1, 2], [3, 4]]
    assert world.dropped == {"engine": 1}


def test_no_tree_starts_after_the_last_step_has_said_so() -> None:
    """Synchronous training grows nothing ahead of the learner, however long the end of the run takes."""
    world = World(settings("flow.staleness=0"))

    async def main() -> None:
        async with asyncio.TaskGroup() as tasks:
            admitting = tasks.create_task(world.loop.admit())
            assert await world.loop.step() is not None
            world.loop.start_no_more()
            await asyncio.sleep(10)
            admitting.cancel()

    run(main())
    assert world.batches == [[0, 1]]
    assert world.closed == 2


def test_who_waits_for_a_batch_can_be_stopped() -> None:
    world = World(settings(), slow=dict.fromkeys(range(100), 1000000.0))

    async def main() -> None:
        stepping = asyncio.create_task(world.loop.step())
        await asyncio.sleep(1)
        world.loop.stop()
        assert await asyncio.wait_for(stepping, 5) is None

    run(main())


def test_a_tree_that_closed_before_a_resume_is_not_counted_again() -> None:
    world = World(settings("flow.staleness=0"))
    for _ in range(3):
        world.ledger.next(0)
    world.ledger = Ledger.replay([f"q{i}" for i in range(200)], 0, world.log, 0)
    again = world.tickets
    world.loop = TrainingLoop(world.config, world.ledger, world, world, clock=world.now)
    first = world.log[1]["prompt"]
    assert world.ledger.resume((0, first), 7)
    world.counted = {(0, first)}
    run(world.run(1))
    assert world.closed == 1
    assert world.batches == [[3, 4]]
    assert [again[number].start_version for number in (3, 4)] == [7, 0]
    assert not world.ledger.resume((0, first), 7), "it is not pending any more"


def test_a_run_that_only_fails_gives_up_with_the_cause() -> None:
    world = World(settings("flow.give_up_after=7"))
    world.failing, world.failure = range(1000), TreeLost("KeyError", "KeyError: 'gold' (mine.py:3)")
    with pytest.raises(ExceptionGroup) as ended:
        run(world.run(1))
    (error,) = ended.value.exceptions
    assert isinstance(error, GaveUp)
    assert exit_code(error) == FAILED  # which nobody starts again
    assert "flow.give_up_after=7" in str(error)
    assert "KeyError: 'gold' (mine.py:3)" in str(error)
    assert 7 <= world.dropped["KeyError"] < 20
    assert world.texts == {"KeyError: 'gold' (mine.py:3)"}


def test_failures_among_trees_that_close_give_nothing_up() -> None:
    """They count from the last training step on."""
    world = World(settings("flow.give_up_after=7", "flow.staleness=1"))
    world.failing = range(0, 1000, 2)
    run(world.run(12))
    assert world.dropped["engine"] > 14


@pytest.mark.parametrize("limit", [7, 0])
def test_what_a_machine_or_an_engine_loses_is_no_failure(limit: int) -> None:
    """Neither the prompt's nor the run's; without a limit a run that only fails goes on."""
    world = World(settings(f"flow.give_up_after={limit}"))
    world.failing, world.failure = range(100), TreeLost("engine lost", blameless=limit > 0)
    run(world.run(1))
    assert world.dropped == {"engine lost": 100}
    abandoned = [event for event in world.log if event["event"] == "abandon"]
    if limit:
        assert not abandoned
        assert {ticket.attempt for ticket in world.tickets.values()} == {1}
    else:
        assert abandoned


def test_a_tree_of_weights_that_nobody_has_made_is_lost() -> None:
    """What an engine says of its version goes into bounds and losses."""
    world = World(settings())
    world.claimed = {1: 2**31 - 1}
    run(world.run(1))
    assert world.dropped == {"weight_version": 1}
    assert world.texts == {"tokens of weights 2147483647, while 0 are trained"}
    assert max(world.lag) <= 1


def test_trees_without_a_signal_are_left_out_and_others_fill_the_batch() -> None:
    """Every third tree has something to teach."""
    world = World(settings("flow.staleness=0", "flow.skip_silent=20"))
    world.mixed = range(0, 1000, 3)
    run(world.run(4))
    assert world.batches == [[0, 3], [6, 9], [12, 15], [18, 21]]
    left_out = [n for n in range(22) if n % 3]
    assert world.dropped == {"no signal": len(left_out)}
    assert all(world.ledger.state(0, world.tickets[n].prompt_id) == State.SILENT for n in left_out)
    again = Ledger.replay([f"q{i}" for i in range(200)], 0, world.log, 4)
    assert all(again.state(0, world.tickets[n].prompt_id) == State.SILENT for n in left_out)


def test_no_run_waits_for_ever_for_a_signal() -> None:
    """Beyond ``flow.skip_silent`` per step, trees are trained on as they are."""
    world = World(settings("flow.staleness=0", "flow.skip_silent=3"))
    run(world.run(2))
    assert world.batches == [[3, 4], [8, 9]]
    assert world.dropped == {"no signal": 6}
    assert run_of(settings("flow.staleness=0")).batches == [[0, 1], [2, 3]], "by default none is left out"


def run_of(config: Config) -> World:
    world = World(config)
    run(world.run(2))
    return world
