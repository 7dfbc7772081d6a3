"""The service around an environment: what makes it safe to await what an author wrote.

Each thing that a world is asked has a deadline and a place among those that are done at once, and is counted.
What comes of it is a value or one of a few errors with a name.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from system.config import Config, EnvironmentConfig
from system.envs.calling import Caller, told
from system.envs.make import make_environment
from system.envs.protocol import CannotFork, Effects, Environment, ForkKind, Start, Undone, World, WorldFailed
from system.errors import OF_OTHERS, EspalierError, asked_to_end
from system.foreign import TooLate
from system.text import as_text, named, shown
from system.tools.tool import CallRefused, ToolUnavailable
from system.tree.values import MOST_DEPTH, too_deep

log = logging.getLogger(__name__)

PLAIN_ERRORS = (
    CallRefused,
    CannotFork,
    ToolUnavailable,
    Undone,
    WorldFailed,
)  # that an author raises to say something


_RUNS = ("open", "step", "result")  # that :attr:`.Environment.runs_at_once` bounds


class Raised(EspalierError):
    """The author's code raised an error of its own."""


class Held:
    """A live world, and the one way to ask it something."""

    def __init__(self, world: World, opening: str = "") -> None:
        """``opening``: what the model reads at its beginning."""
        self.world, self.opening, self.caller = world, opening, Caller()


class EnvironmentService:
    """Serves all trees of a rollout worker, or its evaluations; these have one of their own."""

    def __init__(self, environment: Environment, limits: EnvironmentConfig, run: str, purpose: str) -> None:
        """``run``, ``purpose`` (train | eval): what the worlds are told (:class:`.Ids`)."""
        self.environment, self.limits, self.run, self.purpose = environment, limits, run, purpose
        self.counts: Counter[str] = Counter()
        self._slots = asyncio.Semaphore(limits.concurrency)
        most = environment.runs_at_once
        self._runs = asyncio.Semaphore(most) if most else contextlib.nullcontext()
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def rebuilds(self) -> bool:
        """Whether a world may be brought to where another one was by doing its actions again."""
        return self.environment.forks != ForkKind.NONE and self.environment.effects != Effects.OUTSIDE

    @property
    def counters(self) -> dict[str, float]:
        """Running totals as ``environment/<purpose>/…``."""
        return {f"environment/{self.purpose}/{what}": float(n) for what, n in sorted(self.counts.items())}

    async def check(self) -> None:
        """Raise what the environment has against being used."""
        await self.ask(Caller(), self.limits.open_s, "check", self.environment.check)

    async def opened(self, start: Start) -> Held:
        """A new world.  Raises as :meth:`world` does."""
        return await self.world(Caller(), self.limits.open_s, "open", self.environment.open, start)

    async def world(
        self, caller: Caller, deadline_s: float, what: str, function: Callable[..., Any], *arguments: Any
    ) -> Held:
        """The world that the author's ``function`` returns; one that comes when nobody waits any more is
        closed.  Raises as :meth:`ask` does, and :class:`WorldFailed` for what is no world.
        """
        came: list[Any] = []
        gone = False

        def take(world: Any) -> None:
            if gone:
                self._turn_away(world)
            else:
                came.append(world)

        try:
            world = await self.ask(caller, deadline_s, what, told(function, take), *arguments)
        except BaseException:
            gone = True
            for one in came:
                self._turn_away(one)
            raise
        if not isinstance(world, World):
            raise WorldFailed(f"{what}_failed", f"{what}() returned {shown(world)}, no World")
        self.counts["worlds"] += 1
        try:
            return Held(world, as_text(world.opening))
        except Exception as error:  # of an author's property, or of what has no text
            self._turn_away(world)
            raise WorldFailed(f"{what}_failed", f"its opening cannot be read: {named(error)}") from error

    async def ask(
        self, caller: Caller, deadline_s: float, what: str, function: Callable[..., Any], *arguments: Any
    ) -> Any:
        """What the author's ``function`` returns.  ``what``: it, in errors.

        Raises :class:`TooLate`, :class:`Raised`, or one of :data:`PLAIN_ERRORS`.
        """
        async with self._runs if what in _RUNS else contextlib.nullcontext(), self._slots:
            try:
                return await caller.call(deadline_s, function, *arguments)
            except TooLate:
                raise TooLate(f"{what} did not end within {deadline_s:g} s") from None
            except PLAIN_ERRORS:
                raise
            except OF_OTHERS as error:
                if isinstance(error, asyncio.CancelledError) and asked_to_end():
                    raise
                raise Raised(named(error)) from error

    def normalised(self, text: str) -> str:
        """``text`` as replays compare it.  Raises :class:`WorldFailed` where the author's hook fails."""
        try:
            made: Any = self.environment.normalise(text)
        except (*OF_OTHERS, GeneratorExit) as error:
            fault = f"raised {named(error)}"
        else:
            if isinstance(made, str):
                return made
            fault = f"returned {shown(made)}"
        remedy = "let it take one text and return one (of a plain class: a static method)"
        raise WorldFailed("bad_normalise", f"normalise({text!r:.100}) {fault}: {remedy}")

    def _turn_away(self, world: Any) -> None:
        if isinstance(world, World):
            self.retire(Held(world), "it came too late")

    def retire(self, held: Held, why: str) -> None:
        """Close a world that nobody acts in any more, once nothing of it runs; nobody waits for that."""
        task = asyncio.create_task(self._close(held, why))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _close(self, held: Held, why: str) -> None:
        if not await held.caller.idle(self.limits.close_s):
            self.counts["left_running"] += 1
            log.warning("a world was left running after %g s: %s", self.limits.close_s, why)
            return
        try:
            await self.ask(held.caller, self.limits.close_s, "close", held.world.close, why)
        except (TooLate, Raised, *PLAIN_ERRORS) as error:
            self.counts["close_failed"] += 1
            log.warning("a world was not closed: %s", error)

    async def settle(self) -> None:
        """Return when all worlds that were retired are closed."""
        while self._closing:
            await asyncio.wait(self._closing)


@dataclass(frozen=True, slots=True)
class Environments:
    """The environment that trains and, apart from it, the one in which is evaluated."""

    train: EnvironmentService
    eval: EnvironmentService

    @classmethod
    def of(cls, config: Config) -> Environments | None:
        """As configured; None where the tools keep no state.  Raises :class:`.PluginError`."""
        made = [make_environment(config.environment) for _ in range(2)]
        train, evaluation = made
        if train is None or evaluation is None:
            return None
        limits, run = config.environment, config.run.name
        return cls(
            EnvironmentService(train, limits, run, "train"),
            EnvironmentService(evaluation, limits, run, "eval"),
        )

    @property
    def counters(self) -> dict[str, float]:
        return self.train.counters | self.eval.counters

    async def check(self) -> None:
        """Raise what the environment has against being used."""
        await self.train.check()
        await self.eval.check()

    async def settle(self) -> None:
        """Return when all worlds that were retired are closed."""
        await self.train.settle()
        await self.eval.settle()


def apart(saved: Any) -> Any:
    """A copy of what ``save()`` returned, which later steps do not change.  Raises :class:`.CannotFork`."""
    if saved is None:
        raise CannotFork("save() returned None, from which no world can be opened")
    try:
        return copy.deepcopy(saved)
    except Exception as error:
        why = f"which has no copy ({named(error)}): return texts, numbers, lists and dicts of them"
        raise CannotFork(f"save() returned {shown(saved)}, {why}") from error


def plain(value: Any) -> Any:
    """``value`` as JSON gives it back, numpy's numbers and arrays as plain ones.

    Raises ValueError for what JSON does not know.
    """
    try:
        made = json.loads(json.dumps(value, allow_nan=False, default=_without_numpy))
        if too_deep(made):
            raise ValueError(f"nested more than {MOST_DEPTH} deep")
        return made
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"result() returned {shown(value)}: {error}") from error


def _without_numpy(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{shown(value)} is none of JSON's values")
