"""A discrete-event model of generation servers, to judge a router by what would have happened."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from system.engine.protocol import EngineInfo
from system.engine.router import Assignment, Routed, Router


@dataclass
class SimServer:
    """``rows`` requests at once, each at its own speed; more wait, first come, first served."""

    rows: int
    decode: float  # tokens/s of one sequence
    prefill: float  # prompt tokens/s
    ends: list[float] = field(default_factory=list)  # when each row becomes free
    held: int = 0

    def submit(self, now: float, prompt: int, held: int, length: int) -> tuple[float, float]:
        """(time of the first token, of the last)."""
        free = heapq.heappop(self.ends) if len(self.ends) >= self.rows else now
        first = max(now, free) + (prompt - held) / self.prefill
        end = first + (length - 1) / self.decode
        heapq.heappush(self.ends, end)
        return first, end


def steady_state(
    prefix: int, queue: int, *, rows: int, length: int, decode: float, prefill: float
) -> tuple[Router, SimServer, Callable[[int | None], float]]:
    """A router at time 100 whose first server is full, its rows evenly spread over their requests, with
    ``queue`` more waiting (below 0: with so many rows free), and holds a ``prefix`` that the idle second one
    lacks.

    The function says when the child's first token would come: at home (given what it holds) or there (None).
    """
    home, there = "http://home", "http://there"
    router = Router([home, there])
    for i in range(30):  # what the rates are learned from
        place = router.place(f"w{i}", 100, i * 1.0, tree=f"w{i}")
        router.sent(place, i * 1.0)
        router.streamed(place, 1, 0, 0, i + 100 / prefill)
        router.streamed(place, length - 1, 0, 0, i + 100 / prefill + (length - 1) / decode)
        router.end(place, finished=True)
    router.failed(there, 40.0)
    parent = router.place("parent", prefix - 10, 40.0, tree="t")
    assert parent.url == home
    router.sent(parent, 40.0)
    router.streamed(parent, 1, 0, 0, 40.0 + (prefix - 10) / prefill)
    router.streamed(parent, 9, 0, 0, 40.0 + (prefix - 10) / prefill + 9 / decode)
    router.end(parent)
    running = rows + min(queue, 0)
    router.report(home, EngineInfo(0, running=running, waiting=max(queue, 0), max_running=rows))
    router.report(there, EngineInfo(0, max_running=rows))
    lasting = length / decode

    def child(held: int | None) -> float:
        server = SimServer(rows, decode, prefill)
        if held is not None:
            server.ends = [100.0 + lasting * (i + 1) / rows for i in range(running)]
            heapq.heapify(server.ends)
            for _ in range(queue):
                server.submit(100.0, 0, 0, length + 1)
        return server.submit(100.0, prefix + 5, held or 0, length)[0] - 100.0

    return router, SimServer(rows, decode, prefill, held=prefix), child


@dataclass
class Outcome:
    first_token_s: float  # mean over requests, from submission
    prefilled: int
    kinds: Counter[Routed]


def route_all(policy: str, seed: int) -> Outcome:
    """200 trees on four servers: a root of 1500 tokens, then 1 to 60 children that go on from it."""
    rng = np.random.default_rng(seed)
    urls = [f"http://s{i}" for i in range(4)]
    servers = {url: SimServer(rows=8, decode=50.0, prefill=2000.0) for url in urls}
    router = Router(urls)
    events: list[tuple[float, int, str, object]] = []
    order = iter(range(10**9))
    at = 0.0
    for tree in range(200):
        at += float(rng.exponential(1.4))
        heapq.heappush(events, (at, next(order), "arrive", (f"t{tree}", "", 1500, int(rng.geometric(0.08)))))
    held: dict[str, dict[str, int]] = {}
    delays, prefilled, number = [], 0, 0
    kinds: Counter[Routed] = Counter()
    load: Counter[str] = Counter()
    homes: dict[str, str] = {}
    while events:
        now, _, what, value = heapq.heappop(events)
        if what == "arrive":
            tree, parent, prompt, children = value  # type: ignore[misc]
            number += 1
            rid = f"r{number}"
            place: Assignment = router.place(rid, prompt, now, tree=tree, parent=parent)
            url = place.url
            if policy == "sticky":
                url = homes.setdefault(tree, min(urls, key=lambda u: load[u]))
            elif policy == "least loaded":
                url = min(urls, key=lambda u: load[u])
            kinds[place.kind] += 1
            load[url] += 1
            known = min(prompt, max(held.get(tree, {}).get(url, 0), held.get(parent, {}).get(url, 0)))
            length = int(rng.integers(30, 90))
            first, end = servers[url].submit(now, prompt, known, length)
            router.sent(place, now)
            delays.append(first - now)
            prefilled += prompt - known
            if not parent:
                held.setdefault(tree, {})[url] = prompt
            held[rid] = {url: prompt + length}
            heapq.heappush(events, (first, next(order), "first", (place, known)))
            heapq.heappush(
                events, (end, next(order), "end", (place, length, url, tree, rid, prompt + length, children))
            )
        elif what == "first":
            place, known = value  # type: ignore[misc]
            router.streamed(place, 1, known, 0, now)
        else:
            place, length, url, tree, rid, size, children = value  # type: ignore[misc]
            router.streamed(place, length - 1, 0, 0, now)
            router.end(place, finished=True)
            load[url] -= 1
            for url, server in servers.items():
                busy = [e for e in server.ends if e > now]
                router.report(
                    url,
                    EngineInfo(0, running=min(len(busy), 8), waiting=max(0, load[url] - 8), max_running=8),
                )
            for _ in range(children):
                late = now + float(rng.exponential(0.3))
                heapq.heappush(events, (late, next(order), "arrive", (tree, rid, size + 20, 0)))
    return Outcome(float(np.mean(delays)), prefilled, kinds)
