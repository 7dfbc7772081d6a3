"""Running sandboxes for tests in several directories, or a skip that says why this machine has none."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from system.tools.sandbox.sandbox import Sandbox, SandboxUnavailable


@asynccontextmanager
async def running(box: Sandbox) -> AsyncIterator[Sandbox]:
    """``box``, started, and closed after the block."""
    try:
        try:
            await box.start()
        except SandboxUnavailable as error:
            pytest.skip(str(error))
        yield box
    finally:
        await box.close()


def children(pid: int) -> list[int]:
    """Of a fork server: its wardens; of a warden: its program."""
    try:
        return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []
