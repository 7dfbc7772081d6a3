"""What tests in several directories share."""

from __future__ import annotations

import gc
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL

import psutil
import pytest
from hypothesis import settings

from system.serving import free_port

# Seconds say nothing of what is computed: another process may have had the core meanwhile.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """All tests and what they import are a million objects, none of them garbage, which would be looked
    through dozens of times while they come, and again beside the tests.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script of MCP's own test server."""
    return mcp_server(tmp_path_factory, "server-everything")


@pytest.fixture(scope="session")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script of an MCP server that remembers what it is told, in the file $MEMORY_FILE_PATH."""
    return mcp_server(tmp_path_factory, "server-memory")


def mcp_server(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    """The script of one of npm's MCP servers, to run with ``node``: skipped by name where npm is not
    installed, and failed there if ``ESPALIER_REQUIRE_NPM`` is set.
    """
    npm = shutil.which("npm")
    if npm is None:
        missing = pytest.fail if os.environ.get("ESPALIER_REQUIRE_NPM") else pytest.skip
        missing("npm is not installed")
    there = tmp_path_factory.mktemp("npm")
    package = f"@modelcontextprotocol/{name}"
    command = [npm, "install", "--no-audit", "--no-fund", "--prefix", str(there), f"{package}@2026.8.31"]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    return there / "node_modules" / package / "dist" / "index.js"


def living() -> dict[int, list[str]]:
    """The processes below this one that have not ended, by what they were started with."""
    found: dict[int, list[str]] = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # a zombie is none, either
            if process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = process.cmdline()
    return found


@pytest.fixture
def below() -> Callable[[], dict[int, list[str]]]:
    """``below()``: the words of the processes below this one that have not ended, by their number."""
    return living


class HttpServer:
    """That server over HTTP, at one port, as often as it is started."""

    def __init__(self, script: Path) -> None:
        self._command = ["node", str(script), "streamableHttp"]
        self._process: subprocess.Popen[bytes] | None = None
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}/mcp"

    def start(self) -> None:
        """:attr:`listens` tells when it is there."""
        self._process = subprocess.Popen(
            self._command, env=os.environ | {"PORT": str(self._port)}, stdout=DEVNULL, stderr=DEVNULL
        )

    def listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)


@pytest.fixture
def mcp_http(everything: Path) -> Iterator[HttpServer]:
    server = HttpServer(everything)
    yield server
    server.kill()
