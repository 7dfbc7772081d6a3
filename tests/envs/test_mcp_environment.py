"""An MCP server that others wrote, which remembers: one for each branch, forked by copy and by replay."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from system.config import EnvironmentConfig
from system.envs.live import BranchSession, TreeSessions
from system.envs.make import make_environment
from system.envs.mcp import McpEnvironment
from system.envs.protocol import Acted, Ids, Start
from system.envs.service import EnvironmentService
from system.errors import EspalierError
from system.scratch import sweep
from system.tree.prompt import Prompt

CLOCK = {"command": [sys.executable, "-m", "mcp_server_time"]}
Opened = Callable[..., TreeSessions]
Below = Callable[[], dict[int, list[str]]]


@pytest.fixture
async def opened(
    memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: Below
) -> AsyncIterator[Opened]:
    """``opened(fork=…)``: a tree of servers that remember, which are gone after the test."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    trees: list[TreeSessions] = []

    def make(**options: Any) -> TreeSessions:
        server = {
            "command": ["node", str(memory)],
            "env": {"MEMORY_FILE_PATH": "{directory}/memory.jsonl"},
            "include": ["create_entities", "read_graph"],
        }
        config = EnvironmentConfig(name="mcp", options={"server": server, **options})
        environment = make_environment(config)
        assert environment is not None
        prompt = Prompt("p", ({"role": "user", "content": "?"},), ())
        trees.append(TreeSessions(EnvironmentService(environment, config, "r", "train"), prompt, "1", 0))
        return trees[-1]

    before = below()
    yield make
    for tree in trees:
        await tree.close()
        await tree.service.settle()
    assert not below().keys() - before.keys(), "no server may outlive its branch"
    assert not [name for name in os.listdir(tmp_path) if name.startswith("espalier-mcp-")], "no directory"


async def remember(branch: BranchSession, name: str) -> str:
    entity = {"name": name, "entityType": "thing", "observations": []}
    seen = await branch.act([Acted("create_entities", {"entities": [entity]})], "")
    return seen.messages[0].status


async def remembered(branch: BranchSession) -> list[str]:
    seen = await branch.act([Acted("read_graph", {})], "")
    return [entity["name"] for entity in json.loads(seen.messages[0].text)["entities"]]


@pytest.mark.parametrize(("fork", "counted"), [("copy", "forks_native"), ("replay", "forks_replay")])
async def test_each_branch_remembers_its_own(opened: Opened, fork: str, counted: str) -> None:
    tree = opened(fork=fork)
    await tree.begin()
    root, other = tree.root((0,)), tree.root((1,))
    assert await remember(root, "a") == "ok"
    child = root.fork((0, 1), 1)
    assert await remember(root, "b") == "ok"
    assert await remember(child, "c") == "ok"
    assert await remembered(root) == ["a", "b"]
    assert await remembered(child) == ["a", "c"]
    assert await remembered(other) == []
    assert tree.service.counts[counted] == 1


async def test_a_killed_server_is_built_again_with_what_it_knew(opened: Opened, below: Below) -> None:
    tree = opened(fork="replay")
    await tree.begin()
    root = tree.root((0,))
    await remember(root, "a")
    for pid, words in below().items():
        if any("memory" in word for word in words):
            os.kill(pid, signal.SIGKILL)
    assert await remember(root, "b") == "ok"
    assert await remembered(root) == ["a", "b"]
    assert tree.service.counts["rebuilt"] == 1


async def test_a_refusal_is_the_models_to_mend(opened: Opened) -> None:
    tree = opened()
    await tree.begin()
    root = tree.root((0,))
    seen = await root.act([Acted("create_entities", {"entities": 5})], "")
    assert seen.messages[0].status == "rejected"
    assert await remembered(root) == []


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"server": CLOCK, "fork": "copy"}, "does not say {directory}"),
        ({"server": {**CLOCK, "pure": ["get_current_time"]}}, "environment.options.server.pure"),
        ({"server": {"comand": "x"}}, "environment.options.server.comand: no such key"),
        ({"server": CLOCK, "ignore": ["("]}, "environment.options.ignore"),
        ({}, "environment.options.server: name the command"),
    ],
)
def test_what_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(EspalierError) as caught:
        make_environment(EnvironmentConfig(name="mcp", options=options))
    assert why in str(caught.value)


async def test_what_may_differ_is_left_out_of_the_comparison() -> None:
    options = {"server": {**CLOCK, "include": ["get_current_time"]}, "ignore": [r"T\d\d:\d\d:\d\d"]}
    environment = make_environment(EnvironmentConfig(name="mcp", options=options))
    assert environment is not None
    assert environment.normalise("2026-01-01T10:11:12+01:00") == "2026-01-01…+01:00"


async def test_directories_do_not_outlive_who_wanted_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither one whose opening was given up, nor, for long, those of a process that was killed."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    server = {**CLOCK, "cwd": "{directory}", "include": ["get_current_time"]}
    environment = McpEnvironment(server)
    start = Start(Ids("r", "train", "1", "0", "", 1, 0), Prompt("p", (), ()), 0, 10.0, None)
    opening = asyncio.ensure_future(environment.open(start))
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    for _ in range(80):
        if os.listdir(tmp_path):
            await asyncio.sleep(0.05)
    assert not os.listdir(tmp_path)

    world = await environment.open(start)
    (directory,) = os.listdir(tmp_path)
    os.utime(tmp_path / directory, (0, 0))
    assert sweep(tmp_path) == [], "it has an owner"
    await world.close("")
    assert not os.listdir(tmp_path)
