"""Counts and latencies of one tool."""

from __future__ import annotations

import math
from collections import Counter, deque
from typing import Any

from system.tools.outcome import ToolOutcome

_WINDOW = 1024  # newest calls over which the 95th percentile is taken


class ToolMetrics:
    def __init__(self) -> None:
        self.in_flight = 0
        self.retries = 0
        self.joined = 0  # calls that shared another's flight
        self._status: Counter[str] = Counter()
        self._cache_hits = 0
        self._total_s = 0.0
        self._max_s = 0.0
        self._newest: deque[float] = deque(maxlen=_WINDOW)

    def record(self, outcome: ToolOutcome) -> None:
        self._status[outcome.status.value] += 1
        self._cache_hits += outcome.cached
        self._total_s += outcome.latency_s
        self._max_s = max(self._max_s, outcome.latency_s)
        self._newest.append(outcome.latency_s)

    def snapshot(self) -> dict[str, Any]:
        """JSON-able.  Latencies in seconds, cache hits included."""
        calls = self._status.total()
        newest = sorted(self._newest)
        return {
            "calls": calls,
            "status": dict(self._status),
            "latency_mean_s": self._total_s / calls if calls else 0.0,
            "latency_max_s": self._max_s,
            "latency_p95_s": newest[math.ceil(0.95 * len(newest)) - 1] if newest else 0.0,
            "cache_hits": self._cache_hits,
            "joined": self.joined,
            "retries": self.retries,
            "in_flight": self.in_flight,
        }
