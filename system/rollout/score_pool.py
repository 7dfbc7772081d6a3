"""Where a reward runs that must not run on the event loop: child processes, or threads."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from system.awake import AwakeTimeout
from system.config import ChosenReward, Config, to_dict
from system.errors import ConfigError
from system.foreign import OwnThreads
from system.rollout.reward import BranchView, ScoreFailed
from system.tree.prompt import Prompt

T = TypeVar("T")
LOST = (EOFError, OSError, ValueError, RecursionError)  # a child is gone, or what it says is no answer
MAX_REPLY = 1 << 20  # bytes of one answer of a child
_CHILD_ENVIRONMENT = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
# All of its parent's environment that a confined child gets: what it says is stored, and it may be hostile.
_KEPT = re.compile(r"PATH|HOME|USER|LANG|LC_\w+|TZ|TMPDIR|LD_LIBRARY_PATH|VIRTUAL_ENV|PYTHON\w+|HF_HOME")


class RewardBroken(ConfigError):
    """The reward cannot be used, or fails too often for a run to teach anything."""


def late(reward: ChosenReward, deadline_s: float) -> ScoreFailed:
    said = f"reward {reward.shown}: no score within {reward.key}.deadline_s={deadline_s:g} s"
    return ScoreFailed(said, "deadline")


class Threads:
    """Plain calls in threads of their own, so many at once.

    A thread cannot be ended.  One whose caller has given up keeps its place until it returns, so that calls
    that never do cannot pile up; it does not keep the process from ending.
    """

    def __init__(self, most: int) -> None:
        self._places = asyncio.Semaphore(most)

    async def place(self) -> None:
        """Wait for one; :meth:`run` gives it back."""
        await self._places.acquire()

    def run(self, call: Callable[[], T]) -> asyncio.Future[T]:
        """What ``call`` returns or raises, in the place that was waited for."""
        loop = asyncio.get_running_loop()

        def give_back(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
                loop.call_soon_threadsafe(self._places.release)

        thread = OwnThreads("reward").submit(call)
        thread.add_done_callback(give_back)
        return asyncio.wrap_future(thread)


class ScorePool:
    """Child processes (:mod:`system.rollout.score_child`), each started when it is first needed and after it
    was lost.
    """

    def __init__(self, config: Config, reward: ChosenReward) -> None:
        """``reward``: what the children make, one of those of ``config``."""
        self.reward, self.name, self.deadline_s = reward, reward.shown, reward.deadline_s
        self._config = json.dumps({"config": to_dict(config), "reward": asdict(reward)})
        self._start_s = config.cluster.start_deadline_s  # it imports the reward's libraries
        self._confined = config.reward.confined
        self._free: asyncio.Queue[_Child | None] = asyncio.Queue()  # None: one that is not started
        for _ in range(reward.concurrency or config.reward.workers):
            self._free.put_nowait(None)

    async def scores(self, prompt: Prompt, branches: Sequence[BranchView]) -> list[Any]:
        """What the child says of each branch, unchecked: {"value": …} or {"error": …}.

        Raises :class:`ScoreFailed`, and :class:`RewardBroken` when no child can be started.
        """
        try:
            views = [asdict(branch) for branch in branches]
            request = json.dumps({"prompt": asdict(prompt), "branches": views}).encode()
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
                raise late(self.reward, self.deadline_s) from error
            if isinstance(error, LOST) and not isinstance(error, RewardBroken):
                text = f"reward {self.name}: its process was lost, restarted"
                raise ScoreFailed(text, "process") from error
            raise
        finally:
            self._free.put_nowait(child)
        match reply:
            case {"error": error}:
                raise ScoreFailed(f"{error}"[:1000], str(reply.get("reason")))
            case {"scores": list(scores)}:
                return list(scores)
            case _:
                raise ScoreFailed(f"reward {self.name}: its process answered {reply!r:.200}", "process")

    async def _start(self) -> _Child:
        kept = {k: v for k, v in os.environ.items() if not self._confined or _KEPT.fullmatch(k)}
        return await _Child.start(self.name, self._config, self._start_s, kept | _CHILD_ENVIRONMENT)

    async def close(self) -> None:
        """End the idle children.  All die with this process in any case."""
        for _ in range(self._free.qsize()):
            if (child := self._free.get_nowait()) is not None:
                await child.end()
            self._free.put_nowait(None)


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
        async with AwakeTimeout(deadline_s):
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
