"""Do the nodes of an allocation agree?  Pure: from :class:`Nodes` to findings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from system.config import Config
from system.doctor.cluster_facts import Nodes, NodeSeen
from system.doctor.finding import Finding, finding

SKEW_S = 2.0  # between two clocks; what srun takes to forward a line is part of what is measured


def examine(nodes: Nodes, config: Config) -> Iterator[Finding]:
    """Every check's findings; none where nobody was asked."""
    if not nodes.asked:
        return
    yield answers(nodes)
    if nodes.seen:
        yield clocks(nodes.seen)
        yield shared(nodes.seen, config.run.dir)
    if config.cluster.gpus_per_node and nodes.seen:
        yield alike(nodes.seen, config.cluster.gpus_per_node)


def answers(nodes: Nodes) -> Finding:
    found = f"{len(nodes.seen)} of {nodes.asked} ran a program" + (f" ({nodes.error})" if nodes.error else "")
    remedy = (
        "the environment must be at the same path on every node, on a file system they share (slurm.venv); "
        "sinfo -R says which nodes are down"
    )
    return finding(len(nodes.seen) < nodes.asked, "nodes", found, remedy, stops=True)


def clocks(seen: Sequence[NodeSeen]) -> Finding:
    first, last = min(seen, key=_clock), max(seen, key=_clock)
    skew = last.clock_s - first.clock_s
    found = f"within {skew:.1f} s"
    if skew > SKEW_S:
        found = f"{last.name} is {skew:.1f} s ahead of {first.name}"
    remedy = "have chrony or ntpd set the clocks (timedatectl): deadlines and records of nodes are compared"
    return finding(skew > SKEW_S, "clocks", found, remedy, stops=False)


def shared(seen: Sequence[NodeSeen], place: str) -> Finding:
    blind = [node for node in seen if node.shares]
    found = f"all nodes read what is written in {place}"
    if blind:
        names = ", ".join(node.name for node in blind[:4])
        found = (
            f"{len(blind)} of {len(seen)} nodes do not read what is written in {place}: {names} "
            f"({blind[0].shares})"
        )
    remedy = "set run.dir to a file system that all nodes share"
    return finding(bool(blind), "shared files", found, remedy, stops=True)


def alike(seen: Sequence[NodeSeen], wanted: int) -> Finding:
    """GPUs and drivers of the nodes."""
    short = [f"{node.name} has {node.gpus}" for node in seen if node.gpus < wanted]
    drivers = {node.driver for node in seen if node.driver}
    found = f"{wanted} GPUs or more on each, driver {' and '.join(sorted(drivers)) or 'unknown'}"
    if short:
        found = f"of the {wanted} GPUs per node: {', '.join(short[:4])}"
    remedy = "ask for nodes of one kind (slurm.sbatch: [--constraint=…]), or leave nodes out (--exclude)"
    return finding(bool(short) or len(drivers) > 1, "nodes alike", found, remedy, stops=bool(short))


def _clock(node: NodeSeen) -> float:
    return node.clock_s
