"""A running sandbox, in each way of confinement that this machine permits."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from sandboxes import running

from system.tools.sandbox.sandbox import Sandbox, SandboxLimits

LIMITS = SandboxLimits(
    wall_s=20.0, cpu_s=5.0, memory_mb=128, output_chars=2000, file_mb=4, disk_mb=16, threads=8
)


@pytest_asyncio.fixture(
    scope="module", loop_scope="module", params=[True, False], ids=["namespaces", "landlock"]
)
async def sandbox(request: pytest.FixtureRequest) -> AsyncIterator[Sandbox]:
    async with running(Sandbox(LIMITS, namespaces=request.param)) as box:
        yield box


@pytest.fixture
def outside() -> Iterator[Path]:
    """A directory that anyone may read and write: only the sandbox protects it."""
    with tempfile.TemporaryDirectory(prefix="sandbox-test-") as name:
        directory = Path(name)
        directory.chmod(0o777)
        yield directory
