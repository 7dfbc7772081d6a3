"""One reward of a run: made by name, run where it belongs, under its deadline; what it returns is checked."""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeGuard

from system.awake import AwakeTimeout
from system.config import ChosenReward, Config, ConfigError
from system.config.schema_reward import ON_LOOP
from system.errors import OF_OTHERS, asked_to_end
from system.foreign import foreign
from system.plugins import REWARDS
from system.rollout.reward import BranchView, GroupReward, Score, ScoreFailed
from system.rollout.score_pool import ScorePool, Threads, late
from system.tree.prompt import Prompt

LARGEST = 3e38  # a record holds rewards as float32


def normalised(name: str, returned: Any) -> Score:
    """What a reward returned as a :class:`Score` of plain floats.

    A number (bool, int, float, a numpy scalar) is a value that is correct when it is at least 1.  Raises
    :class:`ScoreFailed` for anything else, and for a value or part that is not finite.
    """
    score = returned if isinstance(returned, Score) else Score(returned, False)
    value = _number(name, returned, score.value)
    if not isinstance(score.parts, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]: a user's
        raise ScoreFailed(f"reward {name}: parts are {score.parts!r:.200}, not a mapping", "number")
    parts = {str(key): _number(name, returned, part) for key, part in score.parts.items()}
    correct = _number(name, returned, score.correct) != 0 if isinstance(returned, Score) else value >= 1
    return Score(value, correct, parts)


def held(value: Any) -> float | None:
    """The number ``value`` (bool, int, float, a numpy scalar) as a record can hold it; None for anything
    else, and for one that is not finite or too large.
    """
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()  # a numpy scalar
    try:
        number = float(value) if isinstance(value, numbers.Real) else math.nan
    except OverflowError:  # an integer that no float can hold
        return None
    return number if abs(number) <= LARGEST else None


def _number(name: str, returned: Any, value: Any) -> float:
    if (number := held(value)) is None:
        what = f"reward {name} returned {returned!r:.200}: a finite number or a Score is needed"
        raise ScoreFailed(what, "number")
    return number


def each(name: str, returned: Any, wanted: int) -> list[Score | ScoreFailed]:
    """What a reward returned for ``wanted`` branches, one by one.

    Raises :class:`ScoreFailed` when it cannot be said which is whose.
    """
    try:
        values = list(returned)
    except TypeError:
        values = []
    if len(values) != wanted:
        raise ScoreFailed(f"reward {name} returned {returned!r:.200}: {wanted} scores are needed", "number")
    return [_one(name, value) for value in values]


def _one(name: str, value: Any) -> Score | ScoreFailed:
    try:
        return value if isinstance(value, ScoreFailed) else normalised(name, value)
    except ScoreFailed as failed:
        return failed


def groupwise(reward: object) -> TypeGuard[GroupReward]:
    """Whether it scores all leaves of a tree at once."""
    return callable(getattr(reward, "score_group", None))


def make_reward(config: Config, chosen: ChosenReward, **offered: Any) -> Any:
    """The reward, by its name.  Raises PluginError."""
    offered |= {"config": config, "deadline_s": chosen.deadline_s}
    return REWARDS.at(chosen.key).make(chosen.name, chosen.options, **offered)


class Scorer:
    """One of the rewards that a leaf's value is made of."""

    def __init__(
        self, reward: Any, chosen: ChosenReward | None = None, pool: ScorePool | None = None
    ) -> None:
        """``pool``: of the processes that it runs in, if it does."""
        chosen = chosen or ChosenReward(name=type(reward).__name__, run="loop")
        self.reward, self.chosen, self.pool = reward, chosen, pool
        self.group = groupwise(reward)
        self._method: Callable[..., Any] = reward.score_group if self.group else reward.score
        workers = chosen.concurrency or ON_LOOP
        self._slots = asyncio.Semaphore(workers)
        self._threads = Threads(workers) if chosen.run == "thread" else None
        # A rule of ours may know some scores without work that has to go elsewhere; None: it does not.
        self._quick: Callable[[Prompt, BranchView], Score | None] = getattr(reward, "quick", _not_quick)

    @classmethod
    def of(cls, config: Config, chosen: ChosenReward, **offered: Any) -> Scorer:
        """One of the rewards of ``config``.  ``offered``: as in :meth:`Registry.make`.

        Raises ConfigError for one that cannot be had, or would hold up the event loop.
        """
        return cls.placed(config, chosen, make_reward(config, chosen, **offered))

    @classmethod
    def placed(cls, config: Config, chosen: ChosenReward, reward: Any) -> Scorer:
        """``reward`` where ``chosen`` says.  Raises ConfigError for one that would hold up the event loop."""
        waits = inspect.iscoroutinefunction(reward.score_group if groupwise(reward) else reward.score)
        if chosen.run == "loop" and not waits:
            raise ConfigError(
                f"{chosen.key}.run=loop: {chosen.name} is no `async def`, and would hold up all branches "
                "while it computes: set thread or process"
            )
        if waits and chosen.run in ("thread", "process"):
            raise ConfigError(
                f"{chosen.key}.run={chosen.run}: {chosen.name} is an `async def`, which waits on the event "
                "loop: set loop or auto"
            )
        run = ("loop" if waits else "process") if chosen.run == "auto" else chosen.run
        workers = chosen.concurrency or (ON_LOOP if run == "loop" else config.reward.workers)
        settled = replace(chosen, run=run, concurrency=workers)
        return cls(reward, settled, ScorePool(config, settled) if run == "process" else None)

    @property
    def measured(self) -> list[str]:
        """The names of its numbers that are metrics: written in its code or the configuration, never by a
        model.
        """
        own = [str(name) for name in getattr(self.reward, "measured", ())]
        label = self.chosen.label
        return [label, *(f"{label}/{name}" for name in own)] if label else own

    async def score(self, prompt: Prompt, branches: Sequence[BranchView]) -> list[Score | ScoreFailed]:
        """A score for each branch; of a reward that is not group-wise, for the only one.

        Raises :class:`ScoreFailed` when there is none for any.
        """
        if not self.group and (score := self._quick(prompt, branches[0])) is not None:
            return [score]
        name, what = self.chosen.shown, branches if self.group else branches[0]
        call = partial(self._method, prompt, what)
        if self.pool is not None:
            returned = [self._read(one) for one in await self.pool.scores(prompt, branches)]
        elif self._threads is not None:
            await self._threads.place()
            returned = await self._in_time(partial(self._threads.run, call))
        else:
            async with self._slots:
                returned = await self._in_time(call)
        return each(name, returned if self.group or self.pool else [returned], len(branches))

    async def _in_time(self, call: Callable[[], Any]) -> Any:
        """What ``call``, the user's own code, returns or what is awaited of it.  Raises
        :class:`ScoreFailed`.
        """
        deadline = AwakeTimeout(self.chosen.deadline_s)
        try:
            async with deadline:
                returned = call()
                return await foreign(returned) if isinstance(returned, Awaitable) else returned
        except ScoreFailed:
            raise
        except OF_OTHERS as error:
            if isinstance(error, asyncio.CancelledError) and asked_to_end():
                raise
            if deadline.expired:
                raise late(self.chosen, self.chosen.deadline_s) from error
            raise ScoreFailed(f"reward {self.chosen.shown}: {type(error).__name__}: {error}") from error

    def _read(self, reply: Any) -> Any:
        """One of the scores that a child has answered: it may say anything."""
        match reply:
            case {"value": value, "correct": bool(correct), "parts": dict(parts)}:
                return Score(value, correct, parts)
            case {"error": error}:
                return ScoreFailed(f"{error}"[:1000], str(reply.get("reason")))
            case _:
                what = f"reward {self.chosen.shown}: its process answered {reply!r:.200}"
                return ScoreFailed(what, "process")

    @property
    def counters(self) -> dict[str, float]:
        """What the reward itself counts, as running totals."""
        return dict(getattr(self.reward, "counters", {}))

    async def close(self) -> None:
        """Let go of processes and connections."""
        if self.pool is not None:
            await self.pool.close()
        if inspect.iscoroutinefunction(close := getattr(self.reward, "close", None)):
            await close()


def _not_quick(prompt: Prompt, branch: BranchView) -> Score | None:
    return None
