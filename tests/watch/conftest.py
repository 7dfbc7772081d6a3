"""A browser, the recorded run, and a place for screenshots: ``$ESPALIER_SCREENSHOTS``, if that is set, else
pytest's directory.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Unavailable, install

from system.watch.demo import unpacked


@pytest.fixture(scope="session")
def demo() -> Iterator[Path]:
    with unpacked() as root:
        yield root


@pytest.fixture
async def browser() -> AsyncIterator[Any]:
    """Skipped by name without chromium, and failed there if ``ESPALIER_REQUIRE_CHROMIUM`` is set."""
    from playwright.async_api import async_playwright

    try:
        install()
    except Unavailable as why:
        (pytest.fail if os.environ.get("ESPALIER_REQUIRE_CHROMIUM") else pytest.skip)(str(why))
    async with async_playwright() as playwright:
        found = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        await found.close()


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    place = Path(os.environ.get("ESPALIER_SCREENSHOTS", tmp_path))
    place.mkdir(parents=True, exist_ok=True)
    return place
