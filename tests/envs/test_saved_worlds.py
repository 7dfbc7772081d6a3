"""Worlds that fork by what they save: a snapshot is of its moment, whatever the world goes on to do."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import threading
import weakref
from pathlib import Path
from typing import Any, ClassVar

import pytest

from system.config import EnvironmentConfig
from system.envs.live import BranchSession, TreeSessions
from system.envs.protocol import Acted, Action, Environment, ForkKind, Observation, Start, World
from system.envs.service import EnvironmentService
from system.tools.outcome import ToolSpec
from system.tree.prompt import Prompt

PROMPT = Prompt("p", ({"role": "user", "content": "?"},), ())


class Notes(World):
    """A list of what was written."""

    def __init__(self, there: list[str]) -> None:
        self.there = there

    def step(self, action: Action) -> Observation:
        self.there.append(action.calls[0].arguments["text"])
        return Observation.of(" ".join(self.there))

    def save(self) -> Any:
        return {"notes": self.there}


class NotesInSteps(Notes):
    async def step(self, action: Action) -> Observation:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().step(action)

    async def save(self) -> Any:
        return {"notes": self.there}


class Desk(Environment):
    """``opening``: set when worlds may be opened from what was saved."""

    tools: ClassVar = {"write": ToolSpec("write", "Write it down.", {"type": "object"}, "text")}
    forks = ForkKind.SNAPSHOT

    def __init__(self, kind: type[Notes]) -> None:
        self.kind, self.opening = kind, asyncio.Event()
        self.saved: list[Any] = []

    async def open(self, start: Start) -> World:
        if start.saved is None:
            return self.kind([])
        self.saved.append(start.saved)
        await self.opening.wait()
        return self.kind(self.read(start.saved))

    def read(self, saved: Any) -> list[str]:
        return saved["notes"]


async def write(session: BranchSession, text: str) -> str:
    (message,) = (await session.act([Acted("write", {"text": text})], "")).messages
    return message.text


async def grown(environment: Desk) -> tuple[TreeSessions, BranchSession, BranchSession]:
    """A root that wrote a and b, and a fork between the two, which opens once both are written."""
    sessions = TreeSessions(
        EnvironmentService(environment, EnvironmentConfig(), "r", "train"), PROMPT, "1", 0
    )
    await sessions.begin()
    root = sessions.root((0,))
    await write(root, "a")
    child = root.fork((0, 1), 1)
    assert await write(root, "b") == "a b"
    environment.opening.set()
    return sessions, root, child


@pytest.mark.parametrize("kind", [Notes, NotesInSteps])
async def test_later_steps_do_not_change_what_was_saved(kind: type[Notes]) -> None:
    sessions, root, child = await grown(Desk(kind))
    assert await write(child, "c") == "a c"
    assert await write(root, "d") == "a b d"
    counts = sessions.service.counts
    assert counts["forks_snapshot"] == 1
    assert not counts["forks_refused"]
    await sessions.close()


class Locked(Notes):
    lock = threading.Lock()

    def save(self) -> Any:
        return {"notes": self.there, "lock": self.lock}


class Forgetful(Notes):
    def save(self) -> Any:
        self.state = [*self.there]  # and no return


@pytest.mark.parametrize("kind", [Locked, Forgetful])
async def test_what_cannot_be_copied_is_replayed_and_counted(kind: type[Notes]) -> None:
    environment = Desk(kind)
    sessions, _, child = await grown(environment)
    assert await write(child, "c") == "a c"
    counts = sessions.service.counts
    assert (counts["forks_refused"], counts["forks_replay"], counts["forks_snapshot"]) == (1, 1, 0)
    assert not environment.saved
    await sessions.close()


class NoWorld(Desk):
    async def open(self, start: Start) -> World:
        return await super().open(start) if start.saved is None else None  # pyright: ignore[reportReturnType]


async def test_a_snapshot_of_which_no_world_comes_is_refused_and_replayed() -> None:
    sessions, _, child = await grown(NoWorld(Notes))
    assert await write(child, "c") == "a c"
    counts = sessions.service.counts
    assert (counts["forks_refused"], counts["forks_replay"], counts["forks_snapshot"]) == (1, 1, 0)
    await sessions.close()


class Folder:
    """A directory that goes when nobody holds it any more."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, self.path)


class Filed(Notes):
    def save(self) -> Any:
        folder = Folder()
        (folder.path / "notes").write_text("\n".join(self.there))
        return folder


class Files(Desk):
    def read(self, saved: Any) -> list[str]:
        return (saved.path / "notes").read_text().split("\n")


async def test_files_that_go_with_what_was_saved_are_there_until_a_world_is_opened() -> None:
    sessions, _, child = await grown(Files(Filed))
    assert await write(child, "c") == "a c"
    assert sessions.service.counts["forks_snapshot"] == 1
    await sessions.close()
