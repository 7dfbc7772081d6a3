"""Trees as the flow sees them: a ticket, a reference that nobody may look into, statistics."""

from __future__ import annotations

from system.flow.ledger import Ticket
from system.flow.replay import TreeInFlight
from system.tree.builder import TreeBuilder
from system.tree.record import Kind, Origin, Outcome
from system.tree.stats import TreeStats


def stats(version: int = 0, leaves: int = 1) -> TreeStats:
    """Of a tree of one-token branches, sampled at ``version``."""
    builder = TreeBuilder("p", "t", [1, 2], leaves)
    for number in range(leaves):
        node = builder.node(0, Kind.MODEL)
        builder.extend(node, [3], [-1.0], None, version)
        builder.leaf(node, Outcome.STOPPED, Origin.ROOT)
        builder.score(number, 1.0, True)
    return TreeStats.of(builder.close(1.0))


STATS = stats()


def in_flight(ticket: Ticket) -> TreeInFlight:
    return TreeInFlight(ticket, None, STATS)


def tree(number: int, start_version: int = 0) -> TreeInFlight:
    return in_flight(Ticket(number, 0, f"q{number}", 1, start_version))
