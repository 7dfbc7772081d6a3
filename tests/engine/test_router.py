"""The routing policy: who gets which request, and spilling exactly when it pays."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from router_sim import SimServer, route_all, steady_state

from system.engine.protocol import EngineInfo
from system.engine.router import RETRY_S, Assignment, Routed, Router

A, B, C = "http://a", "http://b", "http://c"


def serve(router: Router, place: Assignment, tokens: int = 10, cached: int = 0, now: float = 0.0) -> None:
    """The whole life of a request: prefill 1000 tokens/s, decoding 100 tokens/s."""
    router.sent(place, now)
    first = now + (place.prompt - cached) / 1000
    router.streamed(place, 1, cached, 0, first)
    end = first + (tokens - 1) / 100
    router.streamed(place, tokens - 1, cached, 0, end)
    router.end(place, finished=True)


def info(
    running: int = 0, waiting: int = 0, rows: int = 4, paused: bool = False, version: int = 0
) -> EngineInfo:
    return EngineInfo(version, running, waiting, rows, paused)


def test_a_child_follows_its_parent_and_a_root_its_tree() -> None:
    router = Router([A, B, C])
    first = router.place("r0", 50, 0.0, tree="t")
    assert first.kind is Routed.NEW
    sibling = router.place("r1", 50, 0.0, tree="t")
    assert (sibling.url, sibling.kind) == (first.url, Routed.AFFINITY)
    other = router.place("s0", 50, 0.0, tree="u")
    assert (other.kind, other.url != first.url) == (Routed.NEW, True)
    serve(router, first)
    after_tool = router.place("r0b", 80, 1.0, tree="t", parent="r0")
    assert (after_tool.url, after_tool.kind) == (first.url, Routed.AFFINITY)
    assert after_tool.prefill == 80 - (50 + 10)
    assert router.counts == {Routed.NEW: 2, Routed.AFFINITY: 2}


def test_new_trees_spread_evenly() -> None:
    router = Router([A, B, C])
    placed = Counter(router.place(f"r{i}", 50, 0.0, tree=f"t{i}").url for i in range(30))
    assert placed == {A: 10, B: 10, C: 10}


def test_load_of_other_clients_counts_once() -> None:
    """A report counts our own request, too; what we send after it comes on top."""
    router = Router([A, B])
    mine = router.place("r0", 50, 0.0, tree="t0")
    router.sent(mine, 0.0)
    router.report(mine.url, info(running=1))  # that one is mine
    other = B if mine.url == A else A
    router.report(other, info(running=3))
    assert [router.place(f"n{i}", 50, 1.0, tree=f"n{i}").url for i in range(2)] == [mine.url, mine.url]


def test_a_request_that_ends_while_a_report_is_on_its_way_is_nobody_elses() -> None:
    router = Router([A, B])
    mine = router.place("r0", 50, 0.0, tree="t0")
    router.sent(mine, 0.0)
    asked = router.own(mine.url)
    router.end(mine, finished=True)
    router.report(mine.url, info(running=1), asked)
    placed = set[str]()
    for i in range(2):
        placed.add((new := router.place(f"n{i}", 50, 1.0, tree=f"n{i}")).url)
        router.end(new)
    assert placed == {A, B}, "neither is busier than the other"


def test_failed_and_paused_servers_are_left_and_come_back() -> None:
    router = Router([A, B])
    first = router.place("r0", 50, 0.0, tree="t")
    serve(router, first)
    home, other = first.url, B if first.url == A else A
    router.failed(home, 1.0)
    moved = router.place("r0b", 80, 1.0, tree="t", parent="r0")
    assert (moved.url, moved.kind) == (other, Routed.FAILOVER)
    router.report(home, info())
    again = router.place("r0c", 80, 2.0, tree="t", parent="r0")
    assert (again.url, again.kind) == (home, Routed.AFFINITY), "it answers again, and nothing was lost"
    router.report(home, info(paused=True))
    assert router.place("r0d", 80, 3.0, tree="t", parent="r0").url == other
    router.report(home, info())
    router.lost(home, 4.0)
    router.report(home, info())
    fresh = router.place("r0e", 80, 5.0, tree="t", parent="r0")
    assert fresh.prefill == 80, "a restart loses the cache"
    router.failed(home, 6.0)
    assert not router.usable(home, 6.0 + RETRY_S / 2)
    assert router.usable(home, 6.0 + RETRY_S), "tried again without any report"


def test_weights_make_a_prefix_worthless() -> None:
    router = Router([A, B])
    first = router.place("r0", 50, 0.0, tree="t")
    serve(router, first)
    assert router.place("r1", 80, 1.0, tree="t", parent="r0").prefill == 20
    router.report(first.url, info(version=1))
    assert router.place("r2", 80, 1.0, tree="t", parent="r0").prefill == 80


def test_when_every_server_is_out_something_is_still_chosen() -> None:
    router = Router([A, B])
    for url in (A, B):
        router.failed(url, 0.0)
    assert router.place("r", 10, 0.0, avoid=(A,)).url == B
    assert router.place("s", 10, 0.0, avoid=(A, B)).url in (A, B)
    single = Router([A])
    single.failed(A, 0.0)
    assert single.place("r", 10, 0.0, avoid=(A,)).url == A


def test_one_slow_first_token_does_not_drive_a_tree_from_an_idle_server() -> None:
    router = Router([A, B])
    for i in range(2):  # each server is as fast as the other
        serve(router, router.place(f"w{i}", 50, 0.0, tree=f"w{i}"))
    home = router.place("r0", 500, 1.0, tree="t")
    router.sent(home, 1.0)
    router.streamed(home, 1, 0, 0, 1.0 + 100.0)  # the process stood still
    router.end(home, finished=True)
    child = router.place("r1", 505, 102.0, tree="t", parent="r0")
    assert (child.url, child.kind) == (home.url, Routed.AFFINITY)
    # A request that is computed there now is a queue, and costs what the server has shown.
    assert router.place("r2", 505, 102.0, tree="t", parent="r0").kind is Routed.SPILL


def test_memory_is_bounded() -> None:
    router = Router([A, B], memory=10)
    for i in range(100):
        router.end(router.place(f"r{i}", 5, 0.0, tree=f"t{i}"))
    assert router.place("late", 9, 0.0, tree="t0", parent="r0").kind is Routed.NEW
    assert router.place("soon", 9, 0.0, tree="t99", parent="r99").kind is Routed.AFFINITY


@pytest.mark.parametrize("prefix", [20, 100, 400, 2000])
def test_it_spills_exactly_when_the_queue_costs_more_than_a_prefill(prefix: int) -> None:
    """Two servers of 4 rows, one of them with ``queue`` requests waiting (below 0: with so many free rows);
    where is the first token sooner?

    The answer of the estimate is compared with what a simulation of both choices yields.  Requests of 50
    tokens at 100 tokens/s free a row every 0.125 s, so within that the two may disagree.
    """
    kinds = set()
    for queue in range(-2, 40):
        router, home, child = steady_state(prefix, queue, rows=4, length=50, decode=100.0, prefill=1000.0)
        place = router.place("child", prefix + 5, 100.0, tree="t", parent="parent")
        stay, leave = child(home.held), child(None)
        kinds.add(place.kind)
        if abs(stay - leave) > 0.125 + 1e-9:
            assert place.kind is (Routed.AFFINITY if stay < leave else Routed.SPILL), (queue, stay, leave)
    assert kinds == {Routed.AFFINITY, Routed.SPILL}


def test_routing_beats_pure_affinity_and_pure_balancing() -> None:
    """Trees of very different width on four servers: mean time to the first token, prefilled tokens."""
    ours = route_all("router", seed=0)
    sticky = route_all("sticky", seed=0)
    balanced = route_all("least loaded", seed=0)
    assert ours.first_token_s < 0.9 * min(sticky.first_token_s, balanced.first_token_s)
    assert ours.prefilled < 0.7 * balanced.prefilled
    assert ours.kinds[Routed.SPILL] > 0
    assert ours.kinds.total() == sticky.kinds.total() == balanced.kinds.total()


Step = tuple[str, int, int]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["place", "retry", "stream", "end", "fail", "lose", "report", "pause"]),
            st.integers(0, 30),
            st.integers(1, 300),
        ),
        max_size=80,
    ),
    st.integers(1, 4),
)
def test_whatever_happens_the_books_balance(steps: list[Step], servers: int) -> None:
    urls = [f"http://s{i}" for i in range(servers)]
    router, now = Router(urls), 0.0
    live: list[Assignment] = []
    bad: dict[str, float] = {}  # failed, with the time; or paused for ever, until a report
    placed = 0
    for what, which, amount in steps:
        now += 0.1
        url = urls[which % servers]
        sound = {u for u in urls if u not in bad or now - bad[u] >= RETRY_S}
        match what:
            case "place" | "retry":
                avoid = (url,) if what == "retry" else ()
                parent = f"r{which}" if amount % 2 else ""
                place = router.place(
                    f"r{placed}", amount, now, tree=f"t{which % 5}", parent=parent, avoid=avoid
                )
                if sound - set(avoid):
                    assert place.url in sound - set(avoid)
                elif set(urls) - set(avoid):
                    assert place.url not in avoid
                assert 0 <= place.prefill <= amount
                router.sent(place, now)
                live.append(place)
                placed += 1
            case "stream" if live:
                router.streamed(live[which % len(live)], amount, 0, 0, now)
            case "end" if live:
                router.end(live.pop(which % len(live)), finished=bool(amount % 2))
            case "fail" | "lose":
                (router.failed if what == "fail" else router.lost)(url, now)
                bad[url] = now
            case "report":
                router.report(url, info(running=which, waiting=amount % 3))
                bad.pop(url, None)
            case "pause":
                router.report(url, info(paused=True))
                bad[url] = float("inf")
            case _:
                pass
    assert router.counts.total() == placed
    for place in live:
        router.end(place)
        router.end(place)  # twice is once
    assert all(not server.open and server.pending == 0 for server in router._servers.values())


def test_the_simulated_server_is_what_the_estimate_assumes() -> None:
    """A full server of 2 rows: the third request waits for the first row, then prefills, then decodes."""
    server = SimServer(rows=2, decode=10.0, prefill=100.0)
    times = [server.submit(0.0, prompt=100, held=0, length=11) for _ in range(3)]
    assert [first for first, _ in times] == pytest.approx([1.0, 1.0, 3.0])
    assert [end for _, end in times] == pytest.approx([2.0, 2.0, 4.0])
