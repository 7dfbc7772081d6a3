"""Who runs where: a pure function from a configuration and its nodes to one seat per actor.

The learner's ranks fill their nodes' GPUs in order, so that the ranks of one tensor-parallel group, which
talk most, are neighbours.  Engines go to the rollout nodes with the most free GPUs; rollout workers take
turns over those nodes.  Nothing is placed across nodes but the learner.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from system.config import Config, ConfigError

SERVED_TOOLS = ("search", "python")  # tools that have a server of ours
EVALUATION = "eval-"  # begins the names of the actors that only evaluate
Only = Literal["", "learner", "rollout"]


class PlacementError(ConfigError):
    """The nodes cannot hold the run; the message says what is missing and what to change."""


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster; ``gpus`` are those the run may use (0: none, everything runs on CPU)."""

    address: str  # IP address its servers listen on
    gpus: int = 0
    name: str = ""  # host name, for people


@dataclass(frozen=True, slots=True)
class Seat:
    """One actor's place: the node (index into the nodes) and the GPUs it gets to itself."""

    actor: str  # learner-<rank>, engine-<replica>, rollout-<worker>, tool-<name>, or eval-… (EVALUATION)
    node: int
    gpus: int = 0


def paper_nodes(config: Config) -> list[Node]:
    """The nodes that the configuration asks for, before anybody has granted them."""
    cluster = config.cluster
    return [Node(f"node-{i}", cluster.gpus_per_node, f"node-{i}") for i in range(cluster.nodes)]


def engine_gpus(config: Config) -> int:
    """GPUs of one engine replica on nodes that have GPUs."""
    if config.engine.device == "cpu":
        return 0
    return config.engine.tp if config.engine.name == "sglang" else 1


def served_tools(config: Config) -> list[str]:
    """Tools that this run starts a server for."""
    return [
        name
        for name in config.tools.names
        if name in SERVED_TOOLS and not (name == "search" and config.tools.search_url)
    ]


def place(config: Config, nodes: Sequence[Node], only: Only = "") -> list[Seat]:
    """A seat for every actor of a training run; raises :class:`PlacementError` where there are too few GPUs.

    ``nodes[:cluster.learner_nodes]`` are the learner's alone; with 0 all nodes are shared.  ``only``: the
    learner runs by itself, or what answers questions does, on all nodes.
    """
    everywhere = [*range(len(nodes))]
    free = Counter({number: node.gpus for number, node in enumerate(nodes)})
    if only == "learner":
        return _learner(config, nodes, everywhere, free)
    if only == "rollout":
        return _rollout(config, nodes, everywhere, free)
    split = config.cluster.learner_nodes
    learner = list(range(split or len(nodes)))
    rollout = list(range(split, len(nodes)))
    if not rollout or split > len(nodes):
        raise PlacementError(f"cluster.learner_nodes={split}, but there are {len(nodes)} nodes")
    return _learner(config, nodes, learner, free) + _rollout(config, nodes, rollout, free)


def _rollout(config: Config, nodes: Sequence[Node], rollout: list[int], free: Counter[int]) -> list[Seat]:
    """Engines, rollout workers and the servers of tools; behind them what only evaluates."""
    seats = _engines(config, nodes, rollout, free)
    evaluating = _evaluating(config, nodes, rollout, free)
    # The driver sits on the first node, so the turns begin at the other end.
    turns = rollout[::-1]
    seats += [Seat(f"rollout-{n}", turns[n % len(turns)]) for n in range(config.rollout.workers)]
    # There is one server per tool: together on one node, so that the run can do without any other.
    return seats + [Seat(f"tool-{name}", rollout[0]) for name in served_tools(config)] + evaluating


def _evaluating(config: Config, nodes: Sequence[Node], rollout: list[int], free: Counter[int]) -> list[Seat]:
    """The engines of ``eval.engines``, and a rollout worker beside the first."""
    engines = _seated(config, nodes, rollout, free, config.eval.engines, "eval.engines", EVALUATION)
    return engines + [Seat(f"{EVALUATION}rollout-0", one.node) for one in engines[:1]]


def _learner(config: Config, nodes: Sequence[Node], where: list[int], free: Counter[int]) -> list[Seat]:
    world = config.learn.ranks
    if not any(nodes[number].gpus for number in where):  # on CPU: equal blocks
        block = -(-world // len(where))
        return [Seat(f"learner-{rank}", where[rank // block]) for rank in range(world)]
    slots = [number for number in where for _ in range(free[number])]
    if world > len(slots):
        learn = config.learn
        raise PlacementError(
            f"the learner needs {world} GPUs (tp={learn.tp} x pp={learn.pp} x cp={learn.cp} x "
            f"dp={learn.dp}), but its {len(where)} nodes have {len(slots)}: lower learn.dp, or raise "
            f"{'cluster.learner_nodes' if config.cluster.learner_nodes else 'cluster.nodes'}"
        )
    free.subtract(slots[:world])
    return [Seat(f"learner-{rank}", slots[rank], 1) for rank in range(world)]


def _engines(config: Config, nodes: Sequence[Node], where: list[int], free: Counter[int]) -> list[Seat]:
    replicas = 0 if config.engine.urls else config.engine.replicas  # servers of others take none of our GPUs
    return _seated(config, nodes, where, free, replicas, "engine.replicas")


def _seated(
    config: Config,
    nodes: Sequence[Node],
    where: list[int],
    free: Counter[int],
    replicas: int,
    setting: str,
    kind: str = "",
) -> list[Seat]:
    """So many engines, as ``setting`` says; ``kind`` begins their names."""
    need = engine_gpus(config) if any(node.gpus for node in nodes) else 0
    if not need:
        return [Seat(f"{kind}engine-{it}", where[::-1][it % len(where)]) for it in range(replicas)]
    seats: list[Seat] = []
    for number in range(replicas):
        node = max(where, key=lambda candidate: free[candidate])  # the first of equals
        if free[node] < need:
            room = sum(free[candidate] // need for candidate in where) + number
            raise PlacementError(
                f"{setting}={replicas} of {need} GPUs each do not fit: the {len(where)} rollout nodes "
                f"have room for {room}, each on one node; lower {setting} or raise cluster.nodes"
            )
        free[node] -= need
        seats.append(Seat(f"{kind}engine-{number}", node, need))
    return seats


def spare_gpus(seats: Sequence[Seat], nodes: Sequence[Node]) -> int:
    """GPUs that nobody uses."""
    return sum(node.gpus for node in nodes) - sum(seat.gpus for seat in seats)


def by_node(seats: Sequence[Seat], nodes: Sequence[Node]) -> list[str]:
    """One line per node: who runs there, in how many GPUs."""
    lines: list[str] = []
    for number, node in enumerate(nodes):
        here = [seat for seat in seats if seat.node == number]
        parts = Counter(seat.actor.rsplit("-", 1)[0] for seat in here if not seat.actor.startswith("tool-"))
        ranks = [int(seat.actor.split("-")[1]) for seat in here if seat.actor.startswith("learner-")]
        words = ["driver"] if number == 0 else []
        if ranks:
            words.append(
                f"learner ranks {ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else f"learner rank {ranks[0]}"
            )
        kinds = ("engine", "rollout", f"{EVALUATION}engine", f"{EVALUATION}rollout")
        words += [f"{parts[kind]} {kind}" for kind in kinds if parts[kind]]
        words += [seat.actor for seat in here if seat.actor.startswith("tool-")]
        used = sum(seat.gpus for seat in here)
        gpus = f" [{used}/{node.gpus} GPUs]" if node.gpus else ""
        lines.append(f"{node.name or node.address}{gpus}: {', '.join(words) or 'nothing'}")
    return lines
