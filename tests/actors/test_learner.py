"""What the group does around a step: all ranks are ready first, and a lost tree changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors import learner
from actors.learner import LearnerGroup, LearnerRank, TreesLost
from system.config import ClusterConfig, Config, PartConfig
from system.engine.weights.base import PushReport
from system.learn.batch import BatchPlanner
from system.learn.credit.base import Credit
from system.models.adapter import Adapter
from system.tree.builder import TreeBuilder
from system.tree.pack import PackedBatch
from system.tree.plan import BatchPlan
from system.tree.record import Kind, Origin, Outcome, Tree
from system.tree.stats import TreeStats


class Counting(Credit):
    """How many batches it saw, as every leaf's advantage."""

    def __init__(self) -> None:
        self.batches = 0

    def advantages(self, batch: Any) -> Any:
        self.batches += 1
        return [np.full(tree.leaves, self.batches) for tree in batch]


class FakeTrainer:
    """Plans like a trainer and remembers what it was given to step on."""

    def __init__(self, dp: int, rank: int) -> None:
        config = Config()
        config.learn.credit = PartConfig("test_learner:Counting")
        self.layout = SimpleNamespace(dp_rank=rank)
        self.planner = BatchPlanner(config, flat=False, dp=dp)
        self.stepped: list[list[list[PackedBatch]]] = []

    def train(self, plan: BatchPlan, updates: list[list[PackedBatch]], *, version: int) -> dict[str, float]:
        assert len(plan.updates) == len(updates)
        self.stepped.append(updates)
        return {"loss": float(version)}


class Called:
    """A rank's method as Ray would call it."""

    def __init__(self, method: Any) -> None:
        self._method = method

    def remote(self, *arguments: Any) -> Any:
        return self._method(*arguments)


def made(number: int) -> Tree:
    growth = TreeBuilder(f"p{number}", "t", [1, 2], budget=2)
    for reward in (0.0, 1.0):
        node = growth.node(growth.prompt, Kind.MODEL)
        growth.extend(node, [number] * 5, -0.1, None, 0)
        growth.score(growth.leaf(node, Outcome.STOPPED, Origin.ROOT), reward, reward > 0)
    return growth.close(0.0)


@pytest.fixture
def trees() -> list[SimpleNamespace]:
    """Four trees; a reference is an index into the store."""
    return [SimpleNamespace(reference=i, stats=TreeStats.of(made(i))) for i in range(4)]


def group(
    monkeypatch: pytest.MonkeyPatch, store: Mapping[int, Tree]
) -> tuple[LearnerGroup, list[Any], list[set[int]]]:
    """Two data-parallel ranks without processes, and what each of them fetched."""
    fetched: list[set[int]] = []

    def fetch(references: Mapping[int, int]) -> tuple[dict[int, Tree], dict[int, str]]:
        fetched.append(set(references.values()))
        found = {i: store[r] for i, r in references.items() if r in store}
        return found, {i: "OwnerDiedError" for i in references if i not in found}

    async def answers(values: list[Any], deadline_s: float, what: str) -> list[Any]:
        return values

    monkeypatch.setattr(learner, "_fetch", fetch)
    monkeypatch.setattr(learner, "answers", answers)
    ranks = [LearnerRank(rank, 2) for rank in range(2)]
    for number, rank in enumerate(ranks):
        rank._trainer = FakeTrainer(2, number)
    made_group = object.__new__(LearnerGroup)
    made_group._deadlines = ClusterConfig()
    made_group.ranks = {
        f"learner-{number}": SimpleNamespace(
            **{name: Called(getattr(rank, name)) for name in ("prepare", "discard", "step")}
        )
        for number, rank in enumerate(ranks)
    }
    return made_group, [rank._trainer for rank in ranks], fetched


async def test_each_rank_fetches_and_steps_on_its_own_trees(
    monkeypatch: pytest.MonkeyPatch, trees: list[SimpleNamespace]
) -> None:
    one, trainers, fetched = group(monkeypatch, {i: made(i) for i in range(4)})
    stats = await one.train(7, trees)
    assert stats["loss"] == 7
    assert {"seconds", "time_fetch_s", "time_pack_s", "trees_without_signal"} <= set(stats)
    assert sorted(fetched[0] | fetched[1]) == [0, 1, 2, 3]
    assert not fetched[0] & fetched[1]
    for trainer, own in zip(trainers, fetched, strict=True):
        (updates,) = trainer.stepped
        assert {int(t) for batch in updates[0] for t in batch.tokens[batch.mult > 0]} == own


async def test_a_lost_tree_is_named_and_nothing_has_changed(
    monkeypatch: pytest.MonkeyPatch, trees: list[SimpleNamespace]
) -> None:
    one, trainers, _ = group(monkeypatch, {i: made(i) for i in (0, 1, 3)})
    with pytest.raises(TreesLost, match="OwnerDiedError") as error:
        await one.train(7, trees)
    assert error.value.reasons == {2: "OwnerDiedError"}
    assert [trainer.stepped for trainer in trainers] == [[], []]
    assert [trainer.planner.credit.batches for trainer in trainers] == [0, 0]
    await one.train(7, [tree for tree in trees if tree.reference != 2])
    assert [trainer.planner.credit.batches for trainer in trainers] == [1, 1]
    assert all(trainer.stepped for trainer in trainers)


def test_a_transport_knows_the_run_by_its_directory_and_what_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    kinds: list[Any] = []  # of adapters that the transport takes
    apart: list[bool] = []  # whether they were exported by themselves

    class Transport:
        on_gpu = False

        async def push(self, *_: Any) -> PushReport:
            return PushReport(bytes=7)

    def export(on_gpu: bool, adapters: bool) -> Any:
        apart.append(adapters)
        return iter([])

    def make(*arguments: Any, adapter: Any) -> Transport:
        given.extend(arguments)
        kinds.append(adapter)
        return Transport()

    monkeypatch.setattr("system.engine.weights.make", make)
    monkeypatch.setattr(learner.ray.util, "get_node_ip_address", lambda: "10.0.0.1")
    rank: Any = object.__new__(LearnerRank)
    rank._rank, rank._transport, rank._model, rank._config = 0, None, "model", Config()
    rank._config.run.dir, rank._config.run.name = "/shared/runs", "mine-s0"
    kind = Adapter(4, 32.0, ("q", "v"))
    rank._trainer = SimpleNamespace(
        export=export, rounding=SimpleNamespace(kept=0.25), model=SimpleNamespace(adapter=kind)
    )
    assert rank.publish(["http://10.0.0.2:1"], 3, 5.0).bytes == 7
    assert given[-2:] == ["10.0.0.1", Path("/shared/runs/mine-s0")]
    for name, lora in (("embedded", 0), ("embedded", 4), ("sglang", 4)):  # which gets them merged
        rank._transport, rank._config.engine.name, rank._config.learn.lora.rank = None, name, lora
        report = rank.publish(["http://10.0.0.2:1"], 3, 5.0)
        assert report.lora_kept == (0.25 if name == "sglang" else None)
        rank._rank = 1  # another rank walks through the same
        rank.publish(["http://10.0.0.2:1"], 3, 5.0)
        rank._rank = 0
    assert kinds == [None, None, kind, None]
    assert apart == [False, False, False, True, True, False, False]
