"""Debian's chromium, driven by Playwright, which brings no browser of its own here."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

CHROMIUM = Path("/usr/bin/chromium")


class Unavailable(RuntimeError):
    """There is no chromium here, and none can be installed; the message says why."""


def install() -> None:
    """Install Debian's package if it is missing; raises :class:`Unavailable`."""
    if CHROMIUM.exists():
        return
    if os.geteuid() != 0:
        raise Unavailable("chromium is not installed, and only root can install it: apt-get install chromium")
    if not shutil.which("apt-get"):
        raise Unavailable("chromium is not installed, and this is no Debian: there is no apt-get")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update"], ["install", "-y", "--no-install-recommends", "chromium", "fonts-dejavu-core"]):
        try:
            done = subprocess.run(
                ["apt-get", "-qq", *words], capture_output=True, text=True, timeout=600, env=environment
            )
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"apt-get did not end within {error.timeout:.0f} s") from error
        if done.returncode:
            raise Unavailable(f"apt-get {words[0]} failed: {done.stderr.strip()[-300:]}")


class Watched:
    """A page of the browser, and everything it complained of or asked for."""

    def __init__(self, page: Any) -> None:
        self.page, self.complaints, self.asked = page, list[str](), list[str]()
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("requestfailed", lambda request: self.complaints.append(f"failed: {request.url}"))

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text}")

    def without_complaint(self, address: str) -> None:
        """Raises AssertionError for a word on the console, or a request to anybody but the server at
        ``address``.
        """
        own = urlsplit(address).netloc
        away = [url for url in self.asked if urlsplit(url).scheme != "data" and urlsplit(url).netloc != own]
        assert not away, away
        assert not self.complaints, self.complaints

    async def until(self, holds: str, seconds: float = 60) -> None:
        """Return once the JavaScript expression ``holds``; raises AssertionError after ``seconds``.

        Playwright's own ``wait_for_function`` compiles in the page, which the page's policy forbids.
        """
        deadline = time.monotonic() + seconds
        while not await self.page.evaluate(holds):
            assert time.monotonic() < deadline, holds
            await asyncio.sleep(0.05)

    async def overflow(self) -> int:
        """CSS pixels by which the page is wider than its window."""
        return await self.page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )


async def opened(browser: Any, address: str, scheme: str = "light", patience_s: float = 60) -> Watched:
    """The page at ``address``, in a window of 1280 pixels, which waits for so many seconds."""
    page = await browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(1000 * patience_s)
    watched = Watched(page)
    await page.goto(address)
    return watched
