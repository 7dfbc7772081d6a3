"""Scores of leaves: each is made when its branch ends, beside the generation of the others.

A reward that is ``async`` runs on the event loop.  Any other runs in a pool of child processes
(:mod:`system.rollout.score_child`), confined unless ``reward.confined`` says otherwise: it may evaluate what
the model wrote.  A score that fails is an outcome: the leaf stays unscored, and the reason is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import math
import numbers
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from system.config import Config, to_dict
from system.errors import OF_OTHERS, ConfigError, EspalierError, asked_to_end
from system.foreign import foreign
from system.rollout.reward import BranchView, Reward, Score
from system.text import as_text
from system.tree.prompt import Prompt

LOST = (EOFError, OSError, ValueError, RecursionError)  # a child is gone, or what it says is no answer
WINDOW = 100  # leaves that ``reward.failure_limit`` looks back over
LARGEST = 3e38  # a record holds rewards as float32
MAX_REPLY = 1 << 20  # bytes of one answer of a child
_CHILD_ENVIRONMENT = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
# All of its parent's environment that a confined child gets: what it says is stored, and it may be hostile.
_KEPT = re.compile(r"PATH|HOME|USER|LANG|LC_\w+|TZ|TMPDIR|LD_LIBRARY_PATH|VIRTUAL_ENV|PYTHON\w+|HF_HOME")


class ScoreFailed(EspalierError):
    """One leaf has no score.  The message names the reward."""

    def __init__(self, text: str) -> None:
        super().__init__(as_text(text))  # it may quote the model's answer


class RewardBroken(ConfigError):
    """The reward cannot be used, or fails too often for a run to teach anything."""


def normalised(name: str, returned: Any) -> Score:
    """What a reward returned as a :class:`Score` of plain floats.

    A number (bool, int, float, a numpy scalar) is a value that is correct when it is at least 1.  Raises
    :class:`ScoreFailed` for anything else, and for a value or part that is not finite.
    """
    score = returned if isinstance(returned, Score) else Score(returned, False)
    value = _number(name, returned, score.value)
    if not isinstance(score.parts, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]: a user's
        raise ScoreFailed(f"reward {name}: parts are {score.parts!r:.200}, not a mapping")
    parts = {str(key): _number(name, returned, part) for key, part in score.parts.items()}
    correct = _number(name, returned, score.correct) != 0 if isinstance(returned, Score) else value >= 1
    return Score(value, correct, parts)


def _number(name: str, returned: Any, value: Any) -> float:
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()  # a numpy scalar
    try:
        number = float(value) if isinstance(value, numbers.Real) else math.nan
    except OverflowError:  # an integer that no float can hold
        number = math.inf
    if not abs(number) <= LARGEST:
        raise ScoreFailed(f"reward {name} returned {returned!r:.200}: a finite number or a Score is needed")
    return number


def overlong(tokens: int, *, limit: int, buffer: int, penalty: float) -> float:
    """DAPO's soft punishment of long answers (arXiv 2503.14476 §3.4): 0 up to ``limit - buffer`` tokens, from
    there a line that reaches -``penalty`` at the limit.  A ``buffer`` of 0 is none.
    """
    return min(0.0, (limit - buffer - tokens) / buffer * penalty) if buffer else 0.0


class Scoring:
    """Scores leaves with one reward, for all trees of a process."""

    def __init__(
        self,
        reward: Reward,
        name: str = "",
        *,
        deadline_s: float = 60.0,
        failure_limit: float = 1.0,
        pool: ScorePool | None = None,
        overlong: Callable[[int], float] = lambda _: 0.0,
    ) -> None:
        """``pool`` scores in place of ``reward`` unless that is ``async``; without one, a reward that is not
        ``async`` runs on the event loop.  ``overlong``: what is added for a branch of so many tokens.
        """
        self._overlong = overlong
        self.reward, self.name = reward, name or type(reward).__name__
        self.deadline_s, self.failure_limit = deadline_s, failure_limit
        self.pool = None if inspect.iscoroutinefunction(reward.score) else pool
        # A rule of ours may know some scores without work that has to go elsewhere; None: it does not.
        self._quick: Callable[[Prompt, BranchView], Score | None] = getattr(reward, "quick", _not_quick)
        self._failed: deque[bool] = deque(maxlen=WINDOW)

    @classmethod
    def of(cls, config: Config, reward: Reward) -> Scoring:
        """As ``config.reward`` says."""
        settings = config.reward
        return cls(
            reward,
            settings.name,
            deadline_s=settings.deadline_s,
            failure_limit=settings.failure_limit,
            pool=ScorePool(config),
            overlong=partial(
                overlong,
                limit=config.rollout.max_response_tokens,
                buffer=settings.overlong_buffer,
                penalty=settings.overlong_penalty,
            ),
        )

    async def score(self, prompt: Prompt, branch: BranchView) -> Score:
        """Raises :class:`ScoreFailed` for this leaf, :class:`RewardBroken` when too many failed."""
        try:
            score = await self._score(prompt, branch)
        except ScoreFailed as error:
            self._failed.append(True)
            if (failed := sum(self._failed)) > self.failure_limit * WINDOW:
                raise RewardBroken(
                    f"{failed} of the last {len(self._failed)} leaves could not be scored, more than "
                    f"reward.failure_limit={self.failure_limit:g} of {WINDOW}: {error}"
                ) from error
            raise
        self._failed.append(False)
        if added := self._overlong(branch.tokens):
            return Score(score.value + added, score.correct, {**score.parts, "overlong": added})
        return score

    async def _score(self, prompt: Prompt, branch: BranchView) -> Score:
        if (score := self._quick(prompt, branch)) is not None:
            return score
        if self.pool is not None:
            return await self.pool.score(prompt, branch)
        deadline = asyncio.timeout(self.deadline_s)
        try:
            async with deadline:
                returned: Any = self.reward.score(prompt, branch)
                if inspect.isawaitable(returned):
                    returned = await foreign(returned)
        except OF_OTHERS as error:  # the user's own code
            if isinstance(error, asyncio.CancelledError) and asked_to_end():
                raise
            if deadline.expired():
                raise ScoreFailed(_late(self.name, self.deadline_s)) from error
            raise ScoreFailed(f"reward {self.name}: {type(error).__name__}: {error}") from error
        return normalised(self.name, returned)


def _not_quick(prompt: Prompt, branch: BranchView) -> Score | None:
    return None


def _late(name: str, deadline_s: float) -> str:
    return f"reward {name}: no score within reward.deadline_s={deadline_s:g} s"


class ScorePool:
    """``reward.workers`` child processes, each started when it is first needed and after it was lost."""

    def __init__(self, config: Config) -> None:
        self.name, self.deadline_s = config.reward.name, config.reward.deadline_s
        self._config = json.dumps(to_dict(config))
        self._start_s = config.cluster.start_deadline_s  # it imports the reward's libraries
        self._confined = config.reward.confined
        self._free: asyncio.Queue[_Child | None] = asyncio.Queue()  # None: one that is not started
        for _ in range(config.reward.workers):
            self._free.put_nowait(None)

    async def score(self, prompt: Prompt, branch: BranchView) -> Score:
        """Raises :class:`ScoreFailed`, and :class:`RewardBroken` when no child can be started."""
        try:
            request = json.dumps({"prompt": asdict(prompt), "branch": asdict(branch)}).encode()
        except (TypeError, ValueError) as error:
            raise ScoreFailed(f"reward {self.name}: prompt {prompt.id!r} is not JSON: {error}") from error
        child = await self._free.get()
        try:
            if child is None:
                child = await self._start()
            reply = await child.ask(request, self.deadline_s)
        except BaseException as error:  # cancelled, too: what it would answer next is not known
            if child is not None:
                await child.end()
                child = None
            if isinstance(error, TimeoutError):
                raise ScoreFailed(_late(self.name, self.deadline_s)) from error
            if isinstance(error, LOST) and not isinstance(error, RewardBroken):
                raise ScoreFailed(f"reward {self.name}: its process was lost, restarted") from error
            raise
        finally:
            self._free.put_nowait(child)
        return self._read(reply)

    async def _start(self) -> _Child:
        kept = {k: v for k, v in os.environ.items() if not self._confined or _KEPT.fullmatch(k)}
        return await _Child.start(self.name, self._config, self._start_s, kept | _CHILD_ENVIRONMENT)

    async def close(self) -> None:
        """End the idle children.  All die with this process in any case."""
        for _ in range(self._free.qsize()):
            if (child := self._free.get_nowait()) is not None:
                await child.end()
            self._free.put_nowait(None)

    def _read(self, reply: Any) -> Score:
        match reply:
            case {"value": value, "correct": bool(correct), "parts": dict(parts)}:
                return normalised(self.name, Score(value, correct, parts))
            case {"error": error}:
                raise ScoreFailed(f"{error}"[:1000])
            case _:
                raise ScoreFailed(f"reward {self.name}: its process answered {reply!r:.200}")


class _Child:
    """One process that scores, one leaf after the other."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, name: str, config: str, deadline_s: float, environment: Mapping[str, str]) -> _Child:
        """Raises :class:`RewardBroken` with what the child said."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "system.rollout.score_child"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            limit=MAX_REPLY,
        )
        child = cls(process)
        try:
            ready = await child.ask(config.encode(), deadline_s)
        except (TimeoutError, *LOST) as error:
            await child.end()
            raise RewardBroken(f"reward {name}: its process does not start: {error!r}") from error
        except BaseException:
            await child.end()
            raise
        if ready != {"ready": True}:
            await child.end()
            raise RewardBroken(f"reward {name}: its process does not start: {ready!r:.500}")
        return child

    async def ask(self, line: bytes, deadline_s: float) -> Any:
        """Raises TimeoutError, EOFError (it is gone), OSError, or ValueError (no JSON, or too much)."""
        reader, writer = self._process.stdout, self._process.stdin
        assert reader is not None
        assert writer is not None
        async with asyncio.timeout(deadline_s):
            writer.write(line + b"\n")
            await writer.drain()
            reply = await reader.readline()
        if not reply.endswith(b"\n"):
            raise EOFError
        return json.loads(reply)

    async def end(self) -> None:
        """Kill it, and wait: SIGKILL takes effect at once."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        await self._process.wait()
