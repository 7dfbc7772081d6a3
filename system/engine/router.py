"""Which server takes a request: a routing policy that knows trees.  Pure: no I/O, the clock is passed in.

A branch's next request begins with tokens whose keys and values (KV) one server holds already: the server
that generated the branch's last segment, or its parent's.  A child goes there (``affinity``), unless that
server's queue costs more than computing the prefix again elsewhere (``spill``).  A new tree goes to the least
loaded server (``new``).  A request whose server failed or is paused goes to another (``failover``).

**The estimate.**  The first token of a request of P prompt tokens appears on server s after about ::

    delay(s) = ahead(s) · L / (rows(s) · v(s))  +  (pending(s) + P - held(s)) / p(s)

The first term is the wait for a row.  ``rows`` sequences are decoded together, each at v tokens/s for L
tokens, so a full server frees rows·v/L rows per second; ``ahead`` = max(0, running + waiting + 1 - rows) of
them must become free first.  The second term is prefill: the prompts on their way that have no token yet
(``pending``) and what of this one the server does not hold, at p tokens/s.  The request goes where the delay
is smallest, and stays with its KV when that is no worse; so it spills exactly when computing the ``held``
tokens again elsewhere costs less than the queue that this avoids.  Where there is no queue to avoid it stays
whatever the rates say: one slow first token (a processor taken away for a moment) makes a server look slow
that is not.

v, p and L are moving averages of what the streams themselves show.  ``running``, ``waiting`` and ``rows``
come from the server's reports (other clients send there, too), brought up to date by what this client has
sent since.  A rate nobody has seen yet is taken from the other servers; while there is none at all, nothing
spills.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from system.engine.protocol import EngineInfo

MEMORY = 1 << 16  # requests and trees whose place is remembered; the least recently used are forgotten
RETRY_S = 10.0  # a failed server is tried again after this long even if it has sent no report
_KEEP = 0.9  # weight of the past in a moving average, per observation


class Routed(StrEnum):
    """Why a request went where it went."""

    AFFINITY = "affinity"  # to the server that holds its prefix
    SPILL = "spill"  # away from it: its queue costs more than a re-prefill
    NEW = "new"  # nobody holds its prefix: to the least loaded
    FAILOVER = "failover"  # the server that holds its prefix failed, or is paused


class Rate:
    """A moving ratio of sums, so that an observation weighs by its size.  NaN before the first one."""

    def __init__(self) -> None:
        self.amount, self.per = 0.0, 0.0

    def add(self, amount: float, per: float) -> None:
        self.amount = _KEEP * self.amount + amount
        self.per = _KEEP * self.per + per

    @property
    def value(self) -> float:
        return self.amount / self.per if self.per > 0 else math.nan


@dataclass(slots=True, eq=False)
class Assignment:
    """One request at one server, from the decision to its end."""

    url: str
    kind: Routed
    rid: str
    prompt: int  # tokens sent, or about to be
    prefill: int  # of them the server was expected to compute
    queued: bool  # the server was full when it was decided: its first token says nothing about prefill
    sent_s: float = math.nan
    first_s: float = math.nan
    last_s: float = math.nan
    first: int = 0  # tokens that arrived with the first one
    tokens: int = 0  # generated so far


@dataclass(slots=True)
class _Held:
    """A prefix in a server's KV cache."""

    tokens: int
    life: int  # of the server: a restart loses everything
    version: int  # weights it was computed with: an update makes it worthless


@dataclass(slots=True)
class _Server:
    url: str
    open: set[Assignment] = field(default_factory=set[Assignment])
    pending: int = 0  # tokens to prefill of the open requests that have no token yet
    placed: int = 0  # requests so far
    others: int = 0  # requests of other clients, by the last report
    rows: float = math.inf
    full: bool = False  # requests waited at the last report
    paused: bool = False
    failed_s: float = -math.inf
    life: int = 0
    version: int = 0
    decode: Rate = field(default_factory=Rate)  # tokens per second of one sequence
    prefill: Rate = field(default_factory=Rate)  # prompt tokens per second

    @property
    def occupancy(self) -> int:
        return self.others + len(self.open)

    @property
    def ahead(self) -> float:
        """Rows that must become free before one more request gets one."""
        return max(0.0, self.occupancy + 1 - self.rows)

    def up(self, now: float) -> bool:
        return now - self.failed_s >= RETRY_S


class Router:
    """Decides and counts; its owner tells it what the streams and the servers say.  Times are seconds of any
    one clock.  Not thread-safe.
    """

    def __init__(self, urls: Sequence[str], memory: int = MEMORY) -> None:
        self._servers = {url: _Server(url) for url in urls}
        self._memory = memory
        self._held: OrderedDict[str, dict[str, _Held]] = OrderedDict()  # request or tree -> server -> prefix
        self._length = Rate()  # L
        self.counts: Counter[Routed] = Counter()

    # Decisions

    def place(
        self,
        rid: str,
        prompt: int,
        now: float,
        *,
        tree: str = "",
        parent: str = "",
        avoid: Collection[str] = (),
    ) -> Assignment:
        """Choose a server for a request of ``prompt`` tokens.

        ``tree``: key of its tree, whose requests share at least their prompt.  ``parent``: id of the request
        whose tokens it goes on from.  ``avoid``: servers this request has just failed on.  The placement
        counts as load until :meth:`end`.
        """
        held, usable = self._prefixes(tree, parent), self._usable(now, avoid)

        def delay(url: str) -> float:
            return self._delay(url, prompt - self._in_cache(held, url))

        owners = self._held.get(parent) or self._held.get(tree) or {}
        if homes := [url for url in owners if url in usable]:
            home = max(homes, key=lambda url: (self._in_cache(held, url), -self._servers[url].occupancy))
            best = min(usable, key=delay) if self._queued(home) else home
            spill = best != home and delay(best) < delay(home) < math.inf
            url, kind = (best, Routed.SPILL) if spill else (home, Routed.AFFINITY)
        elif owners or avoid:
            url, kind = min(usable, key=lambda url: (delay(url), self._load(url))), Routed.FAILOVER
        else:
            url, kind = min(usable, key=self._load), Routed.NEW
        server = self._servers[url]
        missing = max(0, prompt - self._in_cache(held, url))
        placement = Assignment(url, kind, rid, prompt, missing, server.ahead > 0)
        server.open.add(placement)
        server.pending += missing
        server.placed += 1
        self.counts[kind] += 1
        if shared := prompt if not parent else self._prompt_of(tree):
            self._remember(tree, server, shared)
        self._remember(rid, server, prompt)
        return placement

    def usable(self, url: str, now: float) -> bool:
        """Whether ``url`` is neither failed nor paused, as far as is known."""
        server = self._servers[url]
        return server.up(now) and not server.paused

    def _usable(self, now: float, avoid: Collection[str]) -> list[str]:
        """The best servers there are: sound ones, else paused ones, else any but the avoided, else any."""
        others = [url for url in self._servers if url not in avoid]
        up = [url for url in others if self._servers[url].up(now)]
        sound = [url for url in up if not self._servers[url].paused]
        return sound or up or others or list(self._servers)

    def _load(self, url: str) -> tuple[float, int, int, int]:
        """Least loaded first; of equals, the one that has been given less so far."""
        server = self._servers[url]
        return server.ahead, server.occupancy, server.pending, server.placed

    def _queued(self, url: str) -> bool:
        """Whether a request sent there now waits for others: for a row, or for their prefill."""
        server = self._servers[url]
        return server.ahead > 0 or server.pending > 0

    def _delay(self, url: str, missing: int) -> float:
        """Seconds until the first token of one more request with ``missing`` tokens to prefill; infinite
        when it cannot be estimated yet.
        """
        server = self._servers[url]
        seconds = (server.pending + max(0, missing)) / self._rate("prefill", server)
        if server.ahead > 0:
            tokens_per_s = server.rows * self._rate("decode", server)
            seconds += server.ahead * self._length.value / tokens_per_s
        return math.inf if math.isnan(seconds) else seconds

    def _rate(self, name: Literal["decode", "prefill"], server: _Server) -> float:
        """The server's own rate, else that of all servers together, else NaN."""
        own: Rate = getattr(server, name)
        if own.per > 0:
            return own.value
        rates: list[Rate] = [getattr(other, name) for other in self._servers.values()]
        per = sum(rate.per for rate in rates)
        return sum(rate.amount for rate in rates) / per if per > 0 else math.nan

    # What the servers hold

    def _prefixes(self, tree: str, parent: str) -> dict[str, _Held]:
        """What each server holds of a request's prefix: its parent's tokens, or its tree's prompt."""
        found: dict[str, _Held] = {}
        for key in (tree, parent):
            if key and key in self._held:
                self._held.move_to_end(key)
                found |= {url: held for url, held in self._held[key].items() if url in self._servers}
        return found

    def _in_cache(self, held: dict[str, _Held], url: str) -> int:
        """Tokens that are still worth something: of the server's present life and weights."""
        one, server = held.get(url), self._servers[url]
        if one is None or one.life != server.life or one.version != server.version:
            return 0
        return one.tokens

    def _prompt_of(self, tree: str) -> int:
        """Tokens that all requests of ``tree`` share; 0 when it has been forgotten."""
        return max((held.tokens for held in self._held.get(tree, {}).values()), default=0)

    def _remember(self, key: str, server: _Server, tokens: int) -> None:
        if not key:
            return
        self._held.setdefault(key, {})[server.url] = _Held(tokens, server.life, server.version)
        self._held.move_to_end(key)
        while len(self._held) > self._memory:
            self._held.popitem(last=False)

    # What happens

    def sent(self, placement: Assignment, now: float) -> None:
        """The request goes out now (it may have waited for its turn in the client)."""
        placement.sent_s = now

    def streamed(self, placement: Assignment, tokens: int, cached: int, version: int, now: float) -> None:
        """``tokens`` more have arrived, of weight version ``version``.

        ``cached``: prompt tokens that the server had in its cache, as it says with the first ones.
        """
        if tokens == 0:
            return
        server = self._servers[placement.url]
        if math.isnan(placement.first_s):
            placement.first_s, placement.first = now, tokens
            server.pending -= placement.prefill
            self._saw_prefill(server, placement, tokens, cached)
        placement.tokens += tokens
        placement.last_s = now
        server.version = max(server.version, version)
        self._remember(placement.rid, server, placement.prompt + placement.tokens)

    def _saw_prefill(self, server: _Server, placement: Assignment, tokens: int, cached: int) -> None:
        """Time to the first tokens, less the decoding of all but one of them, is prefill."""
        computed = placement.prompt - cached
        if placement.queued or computed <= 0:
            return
        seconds = placement.first_s - placement.sent_s
        speed = server.decode.value
        if not math.isnan(speed):
            seconds = max(seconds - (tokens - 1) / speed, seconds / 10)
        server.prefill.add(computed, seconds)

    def end(self, placement: Assignment, finished: bool = False) -> None:
        """The request has left the server.  ``finished``: by itself, so its length counts."""
        server = self._servers[placement.url]
        if placement not in server.open:
            return
        server.open.remove(placement)
        if math.isnan(placement.first_s):
            server.pending -= placement.prefill
        if placement.tokens > placement.first:
            seconds = placement.last_s - placement.first_s
            server.decode.add(placement.tokens - placement.first, max(seconds, 1e-9))
        if finished:
            self._length.add(placement.tokens, 1.0)

    def failed(self, url: str, now: float) -> None:
        """A request broke there: go elsewhere until the server reports again."""
        self._servers[url].failed_s = now

    def lost(self, url: str, now: float) -> None:
        """Nobody listens there: what it held is gone."""
        self.failed(url, now)
        self._servers[url].life += 1

    def own(self, url: str) -> int:
        """Requests of this client that are at the server now."""
        return sum(not math.isnan(one.sent_s) for one in self._servers[url].open)

    def report(self, url: str, info: EngineInfo, own: int = 0) -> None:
        """What the server says about itself, just now.

        ``own``: :meth:`own` of when it was asked: a request that has ended since may be in what it says.
        """
        server = self._servers[url]
        server.failed_s = -math.inf
        server.paused = info.paused
        if info.weight_version < server.version:  # it was restarted with its first weights
            server.life += 1
        server.version = info.weight_version
        server.others = max(0, info.running + info.waiting - max(own, self.own(url)))
        server.rows = info.max_running or math.inf
        if info.waiting and server.full and info.running and not info.paused:
            # Twice in a row requests wait: it is full, of KV memory if not of rows.
            server.rows = min(server.rows, info.running)
        server.full = bool(info.waiting)
