"""A patient client of OpenAI's ``/chat/completions``, on any server that speaks them."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from system.http import HttpClient, HttpError
from system.tools.service import throttler

BACKOFF_S, MOST_BACKOFF_S = 0.5, 30.0  # before the first retry, doubling; the wait is drawn in [half, whole]
T = TypeVar("T")


def back_off_s(attempt: int, rng: random.Random) -> float:
    """Seconds to wait after attempt number ``attempt`` (from 0) has failed."""
    return min(BACKOFF_S * 2**attempt, MOST_BACKOFF_S) * rng.uniform(0.5, 1.0)


class ChatCompletions:
    """A model behind such a server."""

    def __init__(
        self,
        base_url: str,
        model: str,
        parameters: Mapping[str, Any],
        *,
        key: str = "",
        retries: int = 5,
        try_s: float = 20.0,
        rate_per_s: float = 0.0,
        patience_s: float = math.inf,
    ) -> None:
        """``base_url``: up to and without ``/chat/completions``.  ``parameters``: of the request, besides
        model and messages.  ``retries``: after a failure that may pass; ``try_s``: seconds of one attempt;
        ``rate_per_s``: requests, at most; 0: no bound.  ``patience_s``: the longest Retry-After that is
        waited for; a request that is told a longer one fails, and others are sent after so long.
        """
        self.url = f"{base_url.rstrip('/')}/chat/completions"
        self._model, self._parameters = model, parameters
        self._http = HttpClient(keys={self.url: key})
        self._retries, self._try_s, self._patience_s = retries, try_s, patience_s
        self._throttle, self._rng = throttler(rate_per_s), random.Random()
        self._quiet_until = 0.0  # on the event loop's clock: a Retry-After is meant for all requests
        self.counts: Counter[str] = Counter()

    def body(self, messages: Any, **more: Any) -> dict[str, Any]:
        """The request; the ``parameters`` go before ``more``, and null leaves one out."""
        whole = {"model": self._model, "messages": messages, **more, **self._parameters}
        return {name: value for name, value in whole.items() if value is not None}

    async def complete(self, body: Mapping[str, Any], read: Callable[[dict[str, Any]], T]) -> T:
        """What ``read`` makes of the answer; it raises HttpError for one that is of no use, which is asked
        for again.  Raises HttpError when all attempts have failed.
        """
        attempt = 0
        while True:
            try:
                return read(await self._attempt(body))
            except HttpError as error:
                # No JSON with a good status: a proxy's page, perhaps; another attempt may fare better.
                passing = error.passing or error.status == 0
                asked_s = error.retry_after_s if passing else 0.0
                self._hold_back(asked_s)
                if not passing or attempt >= self._retries or asked_s > self._patience_s:
                    told = f"{error} (attempt {attempt + 1})" if attempt else str(error)
                    if asked_s > self._patience_s:
                        told += f"; it asks for {asked_s:.0f} s of quiet, longer than {self._patience_s:g} s"
                    raise HttpError(
                        told, passing=error.passing, status=error.status, retry_after_s=asked_s
                    ) from error
                await asyncio.sleep(back_off_s(attempt, self._rng))
            attempt += 1
            self.counts["retries"] += 1

    async def _attempt(self, body: Mapping[str, Any]) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        if (quiet_s := self._quiet_until - loop.time()) > 0:
            await asyncio.sleep(quiet_s * self._rng.uniform(1.0, 1.25))  # not all at the same moment
        if self._throttle is not None:
            await self._throttle.acquire()
        self.counts["requests"] += 1
        began = loop.time()
        try:
            answer = await self._http.request("POST", self.url, body, self._try_s)
        except HttpError as error:
            self.counts["refused"] += error.status == 429
            raise
        self.answered(answer, loop.time() - began)
        return answer

    def answered(self, answer: Mapping[str, Any], seconds: float) -> None:
        """An attempt brought ``answer``, whatever it says."""
        self.counts["answers"] += 1

    def _hold_back(self, asked_s: float) -> None:
        """Send no request for so long."""
        until = asyncio.get_running_loop().time() + min(asked_s, self._patience_s)
        self._quiet_until = max(self._quiet_until, until)

    async def close(self) -> None:
        await self._http.close()
