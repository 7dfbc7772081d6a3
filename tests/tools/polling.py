"""Waiting for what other processes do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

PAUSE_S = 0.02


async def eventually(condition: Callable[[], object], seconds: float, failure: str) -> None:
    """Wait until ``condition`` is true; fail the test with ``failure`` if it is not within ``seconds``.

    Looks are counted rather than seconds: a machine that stands still for a while spends none of them.
    """
    for _ in range(round(seconds / PAUSE_S)):
        if condition():
            return
        await asyncio.sleep(PAUSE_S)
    pytest.fail(failure)
