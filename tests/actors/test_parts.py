"""What the training loop gets from actors: tickets, references and statistics, and words for what is lost."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ObjectLostError, RayError, RayTaskError

from actors import engine_monitor
from actors.engine_monitor import EngineOutage, Publisher
from actors.in_flight import KeptTree
from actors.parts import ActorParts, Deaths
from actors.ray_support import ActorLost
from system.config import Config, ConfigError
from system.engine.control import EngineControl
from system.engine.weights.base import PushReport
from system.errors import FAILED, USAGE, exit_code
from system.flow.ledger import Ticket
from system.flow.loop import GaveUp, TreeLost, TreesLost
from system.flow.replay import TreeInFlight
from system.rollout.branching import EntropyUnknown
from system.rollout.failure import RolloutFailed
from system.rollout.snapshot import SnapshotError

TICKET = Ticket(3, 0, "p", 1, 5)
STATS: Any = object()


class Worker:
    """A rollout worker's handle: one reference to the tree, one to the statistics, which alone is awaited."""

    def __init__(self, outcome: Any = STATS) -> None:
        self.outcome, self.asked = outcome, ()

    @property
    def grow(self) -> Any:
        async def statistics() -> Any:
            if isinstance(self.outcome, Exception):
                raise self.outcome
            return self.outcome

        def remote(*asked: Any) -> tuple[str, Any]:
            self.asked = asked
            return "a tree", statistics()

        def options(num_returns: int) -> Any:
            assert num_returns == 2
            return SimpleNamespace(remote=remote)

        return SimpleNamespace(options=options)

    @property
    def check(self) -> Any:
        async def there() -> None: ...

        return SimpleNamespace(remote=there)


class Kept:
    """The trees of a checkpoint."""

    def __init__(self, tree: KeptTree | None = None) -> None:
        self.tree = tree

    def take(self, key: tuple[int, str]) -> KeptTree | None:
        assert key == (0, "p")
        return self.tree


class Learner:
    async def train(self, version: int, trees: Any) -> dict[str, float]:
        raise TreesLost({1: "its node died"})

    async def publish(self, urls: Any, version: int) -> PushReport:
        return PushReport(bytes=7, stage_s=1.0, failures={urls[0]: "it is starting"})


@pytest.fixture
def notes() -> list[str]:
    return []


def parts(notes: list[str], worker: Worker, kept: KeptTree | None = None) -> ActorParts:
    pool = SimpleNamespace(workers={"rollout-0": worker}, engines={"engine-0": "http://engine"})
    recorder = SimpleNamespace(weights_pushed=lambda *_: None)
    actors: Any = SimpleNamespace(pool=pool, learner=Learner())
    prompt: Any = "the prompt"
    publisher = Publisher(actors.learner, pool.engines, recorder)  # type: ignore[arg-type]
    progress, trees = SimpleNamespace(note=notes.append), Kept(kept)
    outage = EngineOutage(Config(), pool.engines)
    made: Any = ActorParts
    return made(Config(), actors, {"p": prompt}, trees, publisher, progress, outage, Deaths(2))


async def test_a_tree_stays_where_it_is(notes: list[str]) -> None:
    worker = Worker()
    grown = await parts(notes, worker).grow(TICKET, seed=9)
    assert (grown.ticket, grown.reference, grown.stats) == (TICKET, "a tree", STATS)
    assert worker.asked == ("the prompt", 3, 9, 1.0, None, 0)


async def test_a_ticket_says_how_many_actions_its_tree_is_told(notes: list[str]) -> None:
    worker = Worker()
    await parts(notes, worker).grow(replace(TICKET, guide=2), seed=9)
    assert worker.asked[-1] == 2


async def test_a_tree_grows_at_the_temperature_of_its_step(notes: list[str]) -> None:
    worker = Worker()
    one = parts(notes, worker)
    one.config.run.by_step = {"rollout.temperature": [[0, 1.0], [10, 0.8]]}
    await one.grow(TICKET, seed=9)
    assert worker.asked[3] == pytest.approx(0.9), "half of the way, at version 5"


async def test_a_kept_tree_goes_on_or_is_there_already(notes: list[str]) -> None:
    worker = Worker()
    await parts(notes, worker, KeptTree(5, "a snapshot", None)).grow(TICKET, seed=9)
    assert worker.asked[4] == "a snapshot"
    idle = Worker()
    grown = await parts(notes, idle, KeptTree(5, "closed long ago", STATS)).grow(TICKET, seed=9)
    assert (grown.reference, grown.stats, idle.asked) == ("closed long ago", STATS, ())
    assert grown.counted


@pytest.mark.parametrize(
    ("failure", "reason", "text", "blameless"),
    [
        (RolloutFailed("p", "deadline", "slow"), "deadline", "tree of prompt 'p': deadline: slow", False),
        (SnapshotError("torn"), "snapshot", "tree 3 cannot go on from its snapshot: torn", True),
        (ActorLost("it died"), "worker lost", "it died", True),
        (ObjectLostError("ab", "", ""), "worker lost", "ab", True),
        (
            RayTaskError("grow", "a traceback", TypeError("no pickle"), "", 1, ""),
            "answer",
            "no pickle",
            False,
        ),
        (OSError(28, "No space left on device", "/tmp/ray"), "answer", "No space left", False),
    ],
)
async def test_what_fails_has_a_word(
    notes: list[str], failure: Exception, reason: str, text: str, blameless: bool
) -> None:
    with pytest.raises(TreeLost) as lost:
        await parts(notes, Worker(failure)).grow(TICKET, seed=9)
    assert (str(lost.value), lost.value.blameless) == (reason, blameless)
    assert text in lost.value.text


@pytest.mark.parametrize("error", [EntropyUnknown("none"), ConfigError("reward")])
async def test_what_is_the_same_for_every_tree_ends_the_run(notes: list[str], error: Exception) -> None:
    """With its own message and exit code, whatever Ray wraps it in."""
    wrapped = RayTaskError("grow", "a traceback", error, "", 1, "").as_instanceof_cause()
    with pytest.raises(type(error)) as raised:
        await parts(notes, Worker(wrapped)).grow(TICKET, seed=9)
    assert raised.value is error
    assert exit_code(raised.value, lost=(RayError,)) == USAGE


async def test_a_tree_that_lost_its_engine_keeps_its_place_until_one_answers(
    notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_monitor, "LOOK_S", 0.0)
    answers = iter([False, False, True])
    asked: list[str] = []

    async def answers_now(self: EngineControl, path: str, limit_s: float) -> bool:
        asked.append(self.url + path)
        return next(answers)

    monkeypatch.setattr(EngineControl, "_answers", answers_now)
    one = parts(notes, Worker(RolloutFailed("p", "engine lost", "connection refused")))
    with pytest.raises(TreeLost) as lost:
        await one.grow(TICKET, seed=9)
    assert lost.value.blameless
    assert asked == ["http://engine/health"] * 3


async def test_engines_that_serve_nobody_end_the_run(
    notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though they answer, and say that they are well."""
    monkeypatch.setattr(engine_monitor, "LOOK_S", 0.0)

    async def answers_now(self: EngineControl, path: str, limit_s: float) -> bool:
        return True

    monkeypatch.setattr(EngineControl, "_answers", answers_now)
    worker = Worker(RolloutFailed("p", "engine lost", "connection refused"))
    one, now = parts(notes, worker), time.monotonic()
    monkeypatch.setattr(engine_monitor.time, "monotonic", lambda: now)
    with pytest.raises(TreeLost):
        await one.grow(TICKET, seed=9)
    now += 10_000
    with pytest.raises(ActorLost, match="no engine has served a tree for 1020 s: connection refused"):
        await one.grow(TICKET, seed=9)
    worker.outcome = STATS  # a tree closes: whatever comes now is another outage
    await one.grow(TICKET, seed=9)
    worker.outcome = RolloutFailed("p", "engine lost", "connection refused")
    with pytest.raises(TreeLost):
        await one.grow(TICKET, seed=9)


async def test_trees_that_no_rank_can_fetch_are_named(notes: list[str]) -> None:
    one = parts(notes, Worker())
    trees = [TreeInFlight(TICKET, "gone", STATS) for _ in range(2)]
    with pytest.raises(TreesLost) as lost:
        await one.train(5, trees)
    assert lost.value.reasons.keys() == {1}
    await one.publish(6)
    assert notes == ["weights 6 not taken yet: it is starting"]


async def test_a_worker_that_dies_again_and_again_ends_the_run_with_the_cause(notes: list[str]) -> None:
    """A death counts once, however many trees it costs; a training step forgives those before it."""
    worker = Worker(ActorLost("rollout-0: the actor died: SIGSEGV in the tokenizer"))
    one = parts(notes, worker)
    learner: Any = one.actors.learner
    trained = asyncio.Future[dict[str, float]]()
    trained.set_result({})
    learner.train = lambda *_: trained

    async def death() -> None:
        lost = await asyncio.gather(*(one.grow(TICKET, 0) for _ in range(5)), return_exceptions=True)
        for failure in lost:
            if not isinstance(failure, TreeLost):
                raise failure  # type: ignore[misc]

    await death()
    await death()
    await one.train(1, [])
    await death()
    await death()
    with pytest.raises(GaveUp, match=r"rollout-0 has died 3 times .*worker_restarts=2.*SIGSEGV") as ended:
        await death()
    assert exit_code(ended.value) == FAILED
