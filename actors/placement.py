"""The places of a run's actors: a placement plan, claimed from Ray as one placement group.

On this machine alone nothing is claimed and every server listens on loopback.  In a cluster each actor is
pinned to its node, gets the GPUs of its seat to itself, and its servers listen on the node's address.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors import raylet
from actors.ray_support import ActorLost, NodeLost, answer, watched
from system.cluster.placement import Node, Only, Seat, place
from system.config import Config
from system.serving import free_port

T = TypeVar("T")

LOOPBACK = "127.0.0.1"
LOOK_S = 1.0  # between looks at the nodes
EXPLAIN_S = 20.0  # after an actor was lost, for Ray to notice that its node is
PORT_DEADLINE_S = 120.0
RANK_LABEL = "espalier-rank"  # a node's place in the job; slurm/lib.sh sets it
_PIN = 0.001  # of the resource that Ray gives every node under its address


@dataclass(frozen=True, slots=True)
class Place:
    """Where one actor goes: Ray's options for it, and the address its servers listen on."""

    host: str
    options: dict[str, Any] = field(default_factory=dict)

    async def port(self) -> int:
        """A port that is free at this place."""
        if not self.options:
            return free_port(self.host)
        finder: Any = ray.remote(free_port)
        reference = finder.options(**{**self.options, "num_cpus": 0, "num_gpus": 0}).remote(self.host)
        return int(await answer(reference, PORT_DEADLINE_S, f"a free port at {self.host}"))


@dataclass(slots=True)
class Placement:
    """Every actor's place, by the actor's name.

    ``spare`` is asked when a node (but the first) is lost with its actors: true if the run can do without.
    """

    nodes: Sequence[Node]
    seats: Sequence[Seat]
    places: dict[str, Place]
    joined: bool  # the nodes are those of a cluster, which may be lost one by one
    spare: Callable[[str, Sequence[str]], bool] = lambda _node, _actors: False
    gone: set[int] = field(default_factory=set)

    def __getitem__(self, actor: str) -> Place:
        return self.places[actor]

    @classmethod
    async def claim(cls, config: Config, *, joined: bool, only: Only = "") -> Placement:
        """Plan and reserve.  ``joined``: Ray's cluster is one we were given, not this machine alone.
        ``only``: as of :func:`place`.

        Raises PlacementError where the nodes cannot hold the run, ActorLost where they are not there, or not
        free, by ``cluster.join_deadline_s``.
        """
        if joined:
            nodes = await _joined_nodes(config)
        else:
            nodes = [Node(LOOPBACK, config.cluster.gpus_per_node, os.uname().nodename)]
        seats = place(config, nodes, only)
        if not joined and not config.cluster.gpus_per_node:
            hosts = {seat.actor: config.engine.host for seat in seats if "engine-" in seat.actor}
            return cls(nodes, seats, {it.actor: Place(hosts.get(it.actor, LOOPBACK)) for it in seats}, joined)
        bundles = [
            ({f"node:{nodes[seat.node].address}": _PIN} if joined else {"CPU": _PIN})
            | ({"GPU": float(seat.gpus)} if seat.gpus else {})
            for seat in seats
        ]
        group = placement_group(bundles, strategy="PACK")
        await answer(group.ready(), config.cluster.join_deadline_s, f"room for {len(seats)} actors in Ray")
        places = {
            seat.actor: Place(
                nodes[seat.node].address,
                {
                    "num_gpus": seat.gpus,
                    "scheduling_strategy": PlacementGroupSchedulingStrategy(
                        group, placement_group_bundle_index=number
                    ),
                },
            )
            for number, seat in enumerate(seats)
        }
        return cls(nodes, seats, places, joined)

    async def ports(self, actors: Iterable[str]) -> list[int]:
        """A free port for each of ``actors`` at its place."""
        return await asyncio.gather(*(self.places[actor].port() for actor in actors))

    async def watch(self) -> None:
        """Until cancelled.  Raises NodeLost when a node that we cannot spare is gone, or the local raylet."""
        while True:
            raylet.check()
            alive = {node["NodeManagerAddress"] for node in await _ray_nodes()}
            for number, node in enumerate(self.nodes if self.joined else ()):
                if node.address in alive or number in self.gone:
                    continue
                actors = [seat.actor for seat in self.seats if seat.node == number]
                if number == 0 or not self.spare(node.name, actors):
                    what = ", ".join(actors) or "no actors"
                    raise NodeLost(f"node {node.name} ({node.address}) was lost with {what}")
                self.gone.add(number)
            await asyncio.sleep(LOOK_S)

    async def watch_during(self, work: Coroutine[Any, Any, T]) -> T:
        """Do ``work``; the loss of a node that we cannot spare ends it.

        Raises NodeLost where that is what its failure comes from.
        """
        try:
            return await watched(work, self.watch())
        except* (ActorLost, RayError):
            await self.explain()
            raise

    async def explain(self) -> None:
        """After an actor was lost: raise NodeLost if its node is gone, of which Ray tells later."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EXPLAIN_S if self.joined else 2 * LOOK_S):
                await self.watch()


async def _joined_nodes(config: Config) -> list[Node]:
    """The cluster's nodes in the job's order, once ``cluster.nodes`` of them are there."""
    deadline = time.monotonic() + config.cluster.join_deadline_s
    while True:
        found = await _ray_nodes()
        if len(found) >= config.cluster.nodes:
            break
        if time.monotonic() > deadline:
            names = ", ".join(sorted(node["NodeManagerHostname"] for node in found))
            raise ActorLost(
                f"only {len(found)} of {config.cluster.nodes} nodes joined within "
                f"{config.cluster.join_deadline_s:.0f} s (cluster.join_deadline_s): {names}"
            )
        await asyncio.sleep(LOOK_S / 4)
    found.sort(key=lambda node: (int(node["Labels"].get(RANK_LABEL, 0)), node["NodeManagerAddress"]))
    gpus = config.cluster.gpus_per_node
    for node in found:
        if (has := int(node["Resources"].get("GPU", 0))) < gpus:
            raise ActorLost(
                f"node {node['NodeManagerHostname']} has {has} GPUs, not cluster.gpus_per_node={gpus}"
            )
    return [
        Node(
            node["NodeManagerAddress"], gpus, node["Labels"].get("espalier-name", node["NodeManagerHostname"])
        )
        for node in found
    ]


async def _ray_nodes() -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = await asyncio.to_thread(ray.nodes)
    return [node for node in nodes if node["Alive"]]
