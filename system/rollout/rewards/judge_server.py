"""The server of a judge: asked patiently, and never twice the same."""

from __future__ import annotations

import asyncio
import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from system.errors import ConfigError
from system.http import HttpError
from system.rollout.completions import ChatCompletions
from system.rollout.reward import ScoreFailed
from system.rollout.rewards.judge_prompt import Messages

_MILLION = 1e6  # tokens that a price is for


class JudgeServer(ChatCompletions):
    """The model that judges, and what it costs."""

    def __init__(
        self,
        base_url: str,
        model: str,
        parameters: Mapping[str, Any],
        *,
        key: str,
        retries: int,
        try_s: float,
        rate_per_s: float,
        deadline_s: float,
        prices: tuple[float, float],
    ) -> None:
        """As of :class:`.ChatCompletions`.  ``deadline_s``: of a score.  ``prices``: of a million tokens read
        and written.
        """
        limits: dict[str, Any] = {"retries": retries, "try_s": try_s, "rate_per_s": rate_per_s}
        limits["patience_s"] = deadline_s
        super().__init__(base_url, model, {"temperature": 0, **parameters}, key=key, **limits)
        self._prices = prices
        self.amounts: dict[str, float] = {"answer_s": 0.0, "cost": 0.0}

    async def ask(self, messages: Messages) -> str:
        """What the model replies.  Raises :class:`ScoreFailed` when all attempts have failed."""
        try:
            return await self.complete(self.body(messages), lambda answer: _content(answer, self.url))
        except HttpError as error:
            option, remedy = blamed(error)
            raise ScoreFailed(f"judge: {error}; {option}: {remedy}", "endpoint") from error

    async def check(self, messages: Messages, within_s: float) -> None:
        """Send it one request.  Raises HttpError for an answer that no later attempt will better; nothing for
        one that may pass, or none within so many seconds.
        """
        try:
            _content(await self._http.request("POST", self.url, self.body(messages), within_s), self.url)
        except HttpError as error:
            if not error.passing:
                raise

    def answered(self, answer: Mapping[str, Any], seconds: float) -> None:
        super().answered(answer, seconds)
        self.amounts["answer_s"] += seconds
        usage = answer.get("usage")
        for name, price in zip(("prompt_tokens", "completion_tokens"), self._prices, strict=True):
            tokens = usage.get(name) if isinstance(usage, dict) else None
            if isinstance(tokens, int) and tokens > 0:
                self.counts[name] += tokens
                self.amounts["cost"] += tokens * price / _MILLION


def blamed(error: HttpError) -> tuple[str, str]:
    """The option of the judge that is at fault, and the remedy."""
    if error.status in (401, 403):
        return "api_key_env", "name the variable with a key that this server takes"
    if error.status in (400, 413, 422):
        return "parameters", "take out what this server or its model does not take"
    if error.status == 429:
        return "rate_per_s", "ask less often (concurrency, too), or give the reward a longer deadline_s"
    if error.passing:
        return "base_url", "see whether this server is well, or raise try_s and retries"
    return "base_url", "end it before /chat/completions, often with /v1, and let model be one that it has"


def _content(answer: Mapping[str, Any], url: str) -> str:
    """The text of the first choice.  Raises HttpError for an answer that has none."""
    match answer:
        case {"choices": [{"message": {"content": str(text)}}, *_]}:
            return text
        case _:
            raise HttpError(f"no choices[0].message.content in the answer of {url}", passing=False)


class Verdicts:
    """Verdicts by request: of this run, of its earlier sessions, and those that are on their way.

    Each process appends to a file of its own in ``directory``, a line of JSON per verdict, and reads all of
    them when it starts.
    """

    def __init__(self, directory: Path | None) -> None:
        """None: they are kept for this process only.  Raises ConfigError if the directory cannot be made."""
        self._known: dict[str, tuple[float, ...]] = {}
        self._flights: dict[str, _Judging] = {}
        self._path: Path | None = None
        self.counts: Counter[str] = Counter()
        if directory is None:
            return
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for path in sorted(directory.glob("*.jsonl")):
                self._read(path)
        except OSError as error:
            raise ConfigError(
                f"{directory}: the judge's verdicts cannot be kept there ({error.strerror}): every rollout "
                "worker needs the run directory under the same name"
            ) from error
        self._path = directory / f"{uuid.uuid4().hex}.jsonl"

    def _read(self, path: Path) -> None:
        for line in path.read_bytes().splitlines():
            try:
                one = json.loads(line)
                self._known[str(one["key"])] = tuple(float(grade) for grade in one["grades"])
            except (ValueError, KeyError, TypeError):  # the last line of a process that was killed
                continue

    async def get(
        self, key: str, judge: Callable[[], Awaitable[tuple[tuple[float, ...], str]]]
    ) -> tuple[float, ...]:
        """The grades for the request ``key``; ``judge`` is asked for them, and its reply, if nobody has been.

        Equal requests share one flight, which ends early only when all who wait for it have gone.  A failure
        is not kept.
        """
        if (grades := self._known.get(key)) is not None:
            self.counts["cache_hits"] += 1
            return grades
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Judging(asyncio.ensure_future(self._fly(key, judge)))
        else:
            self.counts["joins"] += 1
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                flight.task.cancel()
                self._flights.pop(key, None)

    async def _fly(
        self, key: str, judge: Callable[[], Awaitable[tuple[tuple[float, ...], str]]]
    ) -> tuple[float, ...]:
        try:
            grades, reply = await judge()
            self._known[key] = grades
            if self._path is not None:
                line = json.dumps({"key": key, "grades": grades, "reply": reply})
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(f"{line}\n")
            return grades
        finally:
            flight = self._flights.get(key)
            if flight is not None and flight.task is asyncio.current_task():
                del self._flights[key]


class _Judging:
    """A request on its way, and how many wait for it."""

    def __init__(self, task: asyncio.Task[tuple[float, ...]]) -> None:
        self.task, self.waiting = task, 0


def request_key(url: str, body: Mapping[str, Any]) -> str:
    """A hash of all that a verdict depends on."""
    return hashlib.sha256(json.dumps([url, body], sort_keys=True).encode()).hexdigest()
