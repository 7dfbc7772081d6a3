"""The service around every tool: what makes a tool call safe to await.

Around each call, from the outside in: argument check, cache and single flight (pure tools only), deadline,
circuit breaker, concurrency limit, then per attempt the rate limit and the tool itself, with retries between
attempts. A failing tool is an outcome, never an exception. Deadlines do not count time in which the process
stands still (:mod:`system.awake`).
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from asyncio_throttle.throttler import Throttler

from system.awake import AwakeTimeout
from system.config import ToolsConfig
from system.errors import OF_OTHERS, ConfigError, EspalierError, asked_to_end
from system.foreign import TooLate, foreign
from system.http import HttpClient
from system.plugins import TOOLS, PluginError, is_path
from system.text import as_text, named
from system.tools.breaker import CircuitBreaker
from system.tools.outcome import CallContext, ToolOutcome, ToolSpec, ToolStatus
from system.tools.tool import CallRefused, Tool, ToolUnavailable, argument_error
from system.tools.wanted import as_wanted


class ToolStartError(EspalierError, RuntimeError):
    """A configured tool cannot work; the message names it, the reason and the remedy."""


@dataclass(frozen=True, slots=True)
class Patience:
    """With a tool that does not work, the same for each; times in seconds."""

    backoff_s: float = 0.5  # before the first retry, doubling; the actual wait is uniform in [half, whole]
    breaker_threshold: int = 5
    breaker_pause_s: float = 1.0
    breaker_max_pause_s: float = 30.0


class ToolService:
    """Implements :class:`system.tools.outcome.Tools` for the tasks of one event loop; ``close`` it."""

    def __init__(
        self,
        tools: Iterable[Tool],
        limits: ToolsConfig,
        *,
        own: Mapping[str, ToolsConfig] | None = None,
        patience: Patience | None = None,
        http: HttpClient | None = None,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """``limits``: deadline, concurrency, rate, retries and cache size, for each tool that has none of its
        ``own``; ``http``: a client to close with the service; ``seed``: of the back-off's jitter."""
        patience, rng = patience or Patience(), random.Random(seed)
        self._guarded: dict[str, _Guarded] = {}
        for tool in tools:
            if tool.spec.name in self._guarded:
                raise ToolStartError(f"tool {tool.spec.name!r}: configured twice")
            its = (own or {}).get(tool.spec.name, limits)
            self._guarded[tool.spec.name] = _Guarded(tool, its, patience, rng, clock)
        self._http = http

    @property
    def specs(self) -> Mapping[str, ToolSpec]:
        return {name: guarded.tool.spec for name, guarded in self._guarded.items()}

    async def call(self, tool: str, arguments: Mapping[str, Any], context: CallContext) -> ToolOutcome:
        """Never raises for a failing tool; cancelling the caller cancels the call (unless others share
        it)."""
        guarded = self._guarded.get(tool)
        if guarded is None:
            known = ", ".join(self._guarded) or "none"
            return ToolOutcome(
                ToolStatus.REJECTED, f"There is no tool named {tool!r}. Known tools: {known}.", attempts=0
            )
        return await guarded.call(arguments, context)

    async def check(self) -> None:
        """Try every tool.  Raises :class:`ToolStartError` naming each that cannot work."""
        problems = await asyncio.gather(*(guarded.problem() for guarded in self._guarded.values()))
        if any(problems):
            named = zip(self._guarded, problems, strict=True)
            raise ToolStartError("; ".join(f"tool {name!r}: {problem}" for name, problem in named if problem))

    @property
    def counters(self) -> dict[str, float]:
        """Running totals, as ``tools/<name>/…``: ``retries``, ``joins`` (calls that shared another's flight),
        ``cache_hits``, ``breaker_opened`` and ``breaker_rejected`` (calls that an open circuit refused)."""
        return {
            f"tools/{name}/{what}": float(count)
            for name, guarded in self._guarded.items()
            for what, count in guarded.counters.items()
        }

    async def close(self) -> None:
        for guarded in self._guarded.values():
            await guarded.close()
        if self._http is not None:
            await self._http.close()


def build_tools(
    config: ToolsConfig,
    urls: Mapping[str, str],
    keys: Mapping[str, str] | None = None,
    run_directory: Path | None = None,
) -> ToolService:
    """The tools of ``config.names`` (of :data:`TOOLS`, or one's own as "package.module:Class"), with their
    ``config.options`` and ``config.limits``.

    ``urls`` says where the servers are: {"search": …, "python": …}; ``config.search_url`` goes before
    ``urls["search"]``.  ``keys``: what the tools' servers want to be shown; ``run_directory``: what tools
    keep for a run's workers and its resumption goes below it.  Raises :class:`ToolStartError` for a name
    that cannot be made into a tool.
    """
    known = {"search": config.search_url or urls.get("search", ""), "python": urls.get("python", "")}
    shown = {url: keys[tool] for tool, url in known.items() if url and keys and tool in keys}
    http = HttpClient(connections=256, keys=shown)
    tools: list[Tool] = []
    own: dict[str, ToolsConfig] = {}
    for name in config.names:
        if known.get(name) == "":
            remedy = "set tools.search_url, or " if name == "search" else ""
            raise ToolStartError(
                f"tool {name!r}: no server is known: {remedy}let the run start its own {name} server"
            )
        try:
            tool = TOOLS.make(
                name,
                config.options.get(name, {}),
                url=known.get(name),
                top_k=config.search_top_k,
                http=http,
                tools_config=replace(config, **config.limits.get(name, {})),
                run_directory=run_directory,
            )
        except PluginError as error:
            what = "cannot be made" if is_path(name) else "unknown"
            reason = str(error).removeprefix(f"tools.names={name!r}: ")
            raise ToolStartError(f"tool {name!r}: {what}: {reason}") from error
        if not isinstance(tool, Tool):
            raise ToolStartError(
                f"tool {name!r}: not a tool: it needs spec, run and check (system.tools.tool.Tool)"
            )
        tools.append(tool)
        own[tool.spec.name] = replace(config, **config.limits.get(name, {}))
    for tool in _of_mcp(config):
        tools.append(tool)
        own[tool.spec.name] = replace(config, **config.limits.get(tool.spec.name, {}))
    if unknown := config.limits.keys() - {*config.names, *own}:
        raise ToolStartError(f"tools.limits.{min(unknown)}: no such tool; there are {', '.join(own)}")
    return ToolService(tools, config, own=own, http=http)


def _of_mcp(config: ToolsConfig) -> list[Tool]:
    if not config.mcp:
        return []
    from system.tools.mcp.tools import mcp_tools  # the SDK need not be there

    try:
        return [*mcp_tools(config.mcp)]
    except (ToolUnavailable, ConfigError) as error:
        raise ToolStartError(str(error)) from error


class _Guarded:
    """One tool with everything around it."""

    def __init__(
        self,
        tool: Tool,
        limits: ToolsConfig,
        patience: Patience,
        rng: random.Random,
        clock: Callable[[], float],
    ):
        self.tool = tool
        self._limits, self._backoff_s, self._rng, self._clock = limits, patience.backoff_s, rng, clock
        self._retries = self._joins = self._cache_hits = 0
        self._slots = asyncio.Semaphore(limits.concurrency)
        self._throttle = throttler(limits.rate_per_s)
        self.breaker = CircuitBreaker(
            patience.breaker_threshold, patience.breaker_pause_s, patience.breaker_max_pause_s, clock
        )
        self._cache: OrderedDict[str, ToolOutcome] = OrderedDict()
        self._flights: dict[str, _Flight] = {}

    async def call(self, arguments: Mapping[str, Any], context: CallContext) -> ToolOutcome:
        started = self._clock()
        outcome = await self._answer(as_wanted(self.tool.spec.parameters, cleaned(arguments)), context)
        return replace(outcome, text=as_text(outcome.text), latency_s=self._clock() - started)

    async def problem(self) -> str:
        """Why calls cannot work, "" if they can."""
        try:
            await foreign(self.tool.check(), self._limits.deadline_s)
        except TooLate:
            return f"its check did not end within {self._limits.deadline_s:g} s"
        except ToolUnavailable as error:
            return str(error)
        except Exception as error:
            return f"its check failed: {type(error).__name__}: {error}"
        return ""

    @property
    def counters(self) -> dict[str, int]:
        return {
            "retries": self._retries,
            "joins": self._joins,
            "cache_hits": self._cache_hits,
            "breaker_opened": self.breaker.openings,
            "breaker_rejected": self.breaker.rejections,
        }

    async def close(self) -> None:
        flights = [flight.task for flight in self._flights.values()]
        for task in flights:
            task.cancel()
        await asyncio.gather(*flights, return_exceptions=True)
        if (close := getattr(self.tool, "close", None)) is not None:
            await close()

    async def _answer(self, arguments: Mapping[str, Any], context: CallContext) -> ToolOutcome:
        spec = self.tool.spec
        if problem := argument_error(spec.parameters, arguments, spec.patterns):
            return ToolOutcome(ToolStatus.REJECTED, f"{spec.name}: {problem}.", attempts=0)
        if context.again and not spec.repeatable:
            return ToolOutcome(ToolStatus.UNAVAILABLE, self._sent_once("was interrupted"), attempts=0)
        limit = self._limits.deadline_s
        deadline_s = limit if context.deadline_s is None else min(limit, context.deadline_s)
        if not spec.pure:
            return await self._within(deadline_s, arguments, context)
        key = json.dumps(arguments, sort_keys=True, default=repr)
        if (hit := self._cache.get(key)) is not None:
            self._cache.move_to_end(key)
            self._cache_hits += 1
            return replace(hit, cached=True, attempts=0)
        return await self._share(key, deadline_s, arguments, context)

    async def _share(
        self, key: str, deadline_s: float, arguments: Mapping[str, Any], context: CallContext
    ) -> ToolOutcome:
        """Join the flight of an equal call, or start one.  It belongs to nobody: it ends early only when all
        who wait for it have gone, and its deadline is the tool's, not that of whoever came first."""
        flight = self._flights.get(key)
        if flight is None:
            task = asyncio.ensure_future(self._fly(key, arguments, replace(context, deadline_s=None)))
            flight = self._flights[key] = _Flight(task)
        else:
            self._joins += 1
        flight.waiting += 1
        try:
            async with AwakeTimeout(deadline_s):
                return await asyncio.shield(flight.task)
        except TimeoutError:
            return self._timed_out(deadline_s)
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                flight.task.cancel()
                self._flights.pop(key, None)

    async def _fly(self, key: str, arguments: Mapping[str, Any], context: CallContext) -> ToolOutcome:
        try:
            outcome = await self._within(self._limits.deadline_s, arguments, context)
            if outcome.status is ToolStatus.OK and self._limits.cache_size > 0:
                self._cache[key] = outcome
                while len(self._cache) > self._limits.cache_size:
                    self._cache.popitem(last=False)
            return outcome
        finally:
            flight = self._flights.get(key)
            if flight is not None and flight.task is asyncio.current_task():
                del self._flights[key]

    async def _within(
        self, deadline_s: float, arguments: Mapping[str, Any], context: CallContext
    ) -> ToolOutcome:
        """The call under its deadline, waiting for a slot and retries included."""
        limit = AwakeTimeout(deadline_s)
        try:
            async with limit, self._slots:
                return await self._attempts(arguments, context, limit)
        except TimeoutError:  # or the tool's own, of a client that it asks
            return self._timed_out(deadline_s if limit.expired else None)

    async def _attempts(
        self, arguments: Mapping[str, Any], context: CallContext, limit: AwakeTimeout
    ) -> ToolOutcome:
        name = self.tool.spec.name
        if not self.breaker.allow():
            text = f"The tool {name!r} is not available at the moment."
            return ToolOutcome(ToolStatus.UNAVAILABLE, text, attempts=0, detail="circuit open")
        try:
            for attempt in range(1, self._limits.retries + 2):
                if self._throttle is not None:
                    await self._throttle.acquire()
                left = replace(context, deadline_s=limit.left_s)
                try:
                    outcome = _checked(await foreign(self.tool.run(arguments, left)), attempt)
                except CallRefused as refusal:  # says nothing about whether the tool works for others
                    text = f"The tool {name!r} refused the call: {refusal}"
                    return ToolOutcome(ToolStatus.REJECTED, text, attempts=attempt)
                except ToolUnavailable as error:
                    once = error.delivered and not self.tool.spec.repeatable
                    if error.retryable and not once and attempt <= self._limits.retries:
                        self._retries += 1
                        await asyncio.sleep(self._backoff(attempt))
                        continue
                    self.breaker.failure()
                    text = f"The tool {name!r} is not available at the moment."
                    text = self._sent_once("failed") if once else text
                    return ToolOutcome(ToolStatus.UNAVAILABLE, text, attempts=attempt, detail=str(error))
                self.breaker.success()
                return outcome
        except TimeoutError:
            raise
        except OF_OTHERS as error:
            if isinstance(error, asyncio.CancelledError) and asked_to_end():
                raise
            text = f"The tool {name!r} failed: {named(error)}"
            return ToolOutcome(ToolStatus.ERROR, text, detail=traceback.format_exc())
        finally:
            self.breaker.abandon()
        raise AssertionError("unreachable: the last attempt returns")

    def _backoff(self, attempt: int) -> float:
        whole = self._backoff_s * 2 ** (attempt - 1)
        return whole * self._rng.uniform(0.5, 1.0)

    def _sent_once(self, ended: str) -> str:
        """For the model, of a call that may have had its effect: to send it again is its decision."""
        name = self.tool.spec.name
        return f"The call of the tool {name!r} {ended}. It may have taken effect; it was not sent again."

    def _timed_out(self, deadline_s: float | None) -> ToolOutcome:
        within = "in time" if deadline_s is None else f"within {deadline_s:g} s"
        text = f"The tool {self.tool.spec.name!r} did not answer {within}."
        if not self.tool.spec.repeatable:
            text += " The call may have taken effect."
        return ToolOutcome(ToolStatus.TIMEOUT, text)


@dataclass(eq=False)
class _Flight:
    """A pure call on its way, and how many wait for it."""

    task: asyncio.Task[ToolOutcome]
    waiting: int = 0


def _checked(outcome: object, attempts: int) -> ToolOutcome:
    """What a tool returned, as an outcome after so many attempts.  Raises TypeError or ValueError for what is
    none.
    """
    if not isinstance(outcome, ToolOutcome):
        raise TypeError(f"it returned a {type(outcome).__name__}, not a ToolOutcome")
    status, text = ToolStatus(outcome.status), as_text(outcome.text)
    return replace(outcome, status=status, text=text, attempts=attempts)


def cleaned(arguments: Any) -> Any:
    """``arguments``, JSON from a model, with texts that can be sent: JSON may spell lone surrogates."""
    if isinstance(arguments, Mapping):
        return {as_text(key): cleaned(value) for key, value in arguments.items()}
    if isinstance(arguments, list):
        return [cleaned(value) for value in arguments]
    return as_text(arguments) if isinstance(arguments, str) else arguments


def throttler(rate_per_s: float) -> Throttler | None:
    """At most ``rate_per_s`` starts a second on average, also for rates below one or with a fraction."""
    if rate_per_s <= 0:
        return None
    burst = math.ceil(rate_per_s)
    return Throttler(rate_limit=burst, period=burst / rate_per_s)
