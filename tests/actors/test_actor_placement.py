"""Lost nodes: which end a run, which it goes on without, and what the exit code says of it."""

import asyncio
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from actors import placement as module
from actors import raylet
from actors.placement import Place, Placement
from actors.ray_support import ActorLost, NodeLost, StartFailed
from actors.rollout_pool import RolloutPool
from system.cluster.placement import Node, Seat
from system.errors import FAILED, LOST, exit_code
from system.tools.service import ToolStartError

NODES = [Node("10.0.0.1", name="a"), Node("10.0.0.2", name="b"), Node("10.0.0.3", name="c")]
SEATS = [Seat("learner-0", 0), Seat("tool-python", 1), Seat("engine-0", 1), Seat("engine-1", 2)]


class Cluster:
    """What Ray would say of the nodes."""

    def __init__(self) -> None:
        self.alive = {node.address for node in NODES}

    async def __call__(self) -> list[dict[str, Any]]:
        return [{"NodeManagerAddress": address} for address in self.alive]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster()
    monkeypatch.setattr(module, "_ray_nodes", made)
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    monkeypatch.setattr(module, "EXPLAIN_S", 0.2)
    return made


def places(joined: bool = True) -> Placement:
    return Placement(NODES, SEATS, {seat.actor: Place(NODES[seat.node].address) for seat in SEATS}, joined)


async def test_a_lost_node_is_named_with_its_actors(cluster: Cluster) -> None:
    watching = asyncio.create_task(places().watch())
    await asyncio.sleep(0.05)
    assert not watching.done()
    cluster.alive.discard("10.0.0.2")
    with pytest.raises(NodeLost, match=r"node b \(10.0.0.2\) was lost with tool-python, engine-0"):
        await asyncio.wait_for(watching, 30)


async def test_a_node_that_can_be_spared_ends_nothing_but_the_first_always_does(cluster: Cluster) -> None:
    asked: list[tuple[str, list[str]]] = []

    def spare(node: str, actors: Sequence[str]) -> bool:
        asked.append((node, list(actors)))
        return True

    watched = places()
    watched.spare = spare
    watching = asyncio.create_task(watched.watch())
    cluster.alive.discard("10.0.0.3")
    await asyncio.sleep(0.1)
    assert not watching.done()
    assert asked == [("c", ["engine-1"])]  # once
    cluster.alive.discard("10.0.0.1")
    with pytest.raises(NodeLost, match="node a"):
        await asyncio.wait_for(watching, 30)
    assert len(asked) == 1


async def test_an_actors_death_is_explained_by_its_node_if_that_is_gone(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    await places().explain()  # all nodes are there: nothing to add
    monkeypatch.setattr(module, "EXPLAIN_S", 60.0)
    asyncio.get_running_loop().call_later(0.05, cluster.alive.discard, "10.0.0.2")
    with pytest.raises(NodeLost, match="node b"):
        await places().explain()
    await places(joined=False).explain()  # this machine alone has no nodes to lose


def pool() -> RolloutPool:
    return RolloutPool({"rollout-0": object()}, {"engine-0": "http://a:1", "engine-1": "http://b:1"}, [])


@pytest.mark.parametrize(
    ("actors", "spared"),
    [
        (["engine-1"], True),
        ([], True),
        (["engine-0", "engine-1"], False),  # no engine would be left
        (["rollout-0"], False),
        (["engine-1", "tool-python"], False),
        (["learner-1"], False),
    ],
)
def test_what_a_run_can_do_without(actors: list[str], spared: bool) -> None:
    made = pool()
    made = replace(made, evaluation=RolloutPool({}, {"eval-engine-0": "http://c:1"}, {}))
    own = made.evaluation
    assert made.lose(["eval-engine-0"])
    assert own is not None
    assert not own.engines, "training goes on without those of evaluations"
    assert made.lose(actors) is spared
    assert [*made.engines] == (["engine-0"] if spared and actors else ["engine-0", "engine-1"])
    assert len(made.workers) == 1


@pytest.mark.parametrize(
    ("errors", "code"),
    [
        ([NodeLost("n")], LOST),
        ([ActorLost("a"), NodeLost("n")], LOST),
        ([StartFailed("s")], FAILED),
        ([ActorLost("a"), ToolStartError("python", "no memory")], FAILED),
    ],
)
def test_only_what_may_pass_is_tried_again(errors: list[Exception], code: int) -> None:
    assert exit_code(ExceptionGroup("", errors)) == code


async def test_the_end_of_this_machines_raylet_is_seen_before_ray_tells(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = subprocess.Popen(["sleep", "60"])  # noqa: ASYNC220
    monkeypatch.setattr(raylet, "_found", lambda _: psutil.Process(process.pid))
    monkeypatch.setattr(
        raylet, "global_worker", SimpleNamespace(node=SimpleNamespace(raylet_socket_name="s"))
    )
    watching = asyncio.create_task(places(joined=False).watch())
    await asyncio.sleep(0.05)
    assert not watching.done()
    process.kill()  # and not waited for: it stays as a zombie
    with pytest.raises(NodeLost, match="raylet"):
        await asyncio.wait_for(watching, 30)
    with pytest.raises(NodeLost, match="raylet"):
        raylet.beside(print)
    process.wait()
