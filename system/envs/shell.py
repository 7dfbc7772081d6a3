"""``environment=bash``: commands in directories that keep what was done, such as a repository to be mended.

A session is a file system of its own in the sandbox (:mod:`system.tools.sandbox.shell_warden`), copied where
the branch forks.  What a question brings along stands in its ``extra``:

- ``directory``: one below ``environment.options.directories``, of which ``/files`` is a copy;
- ``files``: ``{path: text}``, written there;
- ``setup``: commands that are run first (:meth:`.SessionEnvironment.prepare`);
- ``check``: commands that say at the end whether it is right, by their exit code: what ``reward=environment``
  takes; ``check_files``: ``{path: text}``, written before that, which the model never sees.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from shlex import quote
from typing import Any, ClassVar, cast

from system.envs.protocol import Start
from system.envs.sessions import SessionEnvironment, SessionWorld, text_of, wrong
from system.tools.outcome import ToolSpec, ToolStatus
from system.tools.sandbox.channel import SandboxUnavailable
from system.tools.sandbox.sandbox import Sandbox, SandboxLimits
from system.tools.sandbox.sessions import MAX_CODE_BYTES, NotForked, SandboxSession, SessionLost, TreeFull
from system.tools.sandbox.settings import Shell
from system.tools.tool import ToolUnavailable
from system.tree.prompt import Prompt

# A date, a time of day, the user id of a tree's commands, an object in memory: never the same twice.
_OF_THE_MOMENT = re.compile(
    r"\b\d{4}-\d\d-\d\d\b|\b(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec) +\d{1,2}\b"
    r"|\b\d{1,2}:\d\d(?::\d\d(?:\.\d+)?)?\b|\b18(?:79|8[0-3])\d{6}\b|\b0x[0-9a-f]{6,}\b"
)

_COPY_S = 0.5  # for the check: with check_s as it comes, within environment.result_s


class ShellEnvironment(SessionEnvironment):
    """Shells."""

    has_result = True
    spec = ToolSpec(
        "bash",
        "Run commands of bash in /files and get what they print. Files, variables, functions and the working "
        "directory are there in the next call; processes end with the call. There is no network.",
        {
            "type": "object",
            "properties": {"command": {"type": "string", "description": "the commands"}},
            "required": ["command"],
        },
        primary="command",
    )
    trial: ClassVar[tuple[str, str]] = ("echo $((6 * 7))", "42")

    def __init__(
        self,
        wall_s: float = 15.0,
        cpu_s: float = 15.0,
        memory_mb: int = 1024,
        output_chars: int = 4000,
        disk_mb: int = 256,
        processes: int = 64,
        readable: list[str] | None = None,
        directories: str = "",
        check_s: float = 8.0,
        concurrency: int = 16,
        live_sessions: int = 2000,
        live_mb: int = 8192,
        result_s: float = math.inf,
    ) -> None:
        """``wall_s``, ``cpu_s``, ``memory_mb``, ``output_chars``, ``processes``: of one call, with all that
        it starts; ``disk_mb``: files of one session, held in memory; ``readable``: directories beside the
        system's own that commands may read and run programs from; ``directories``: where those stand that a
        question may name; ``check_s``: of ``check``, within ``result_s``, the environment's; ``concurrency``:
        calls that run at once; ``live_sessions``, ``live_mb``: beyond so many sessions, or so much memory of
        their files, the one which was idle longest is given up, and built again when its branch goes on.
        """
        if check_s + _COPY_S > result_s:
            raise ValueError(
                f"environment.options.check_s={check_s:g}: environment.result_s={result_s:g} ends a check "
                f"before that, and its leaf is unscored: set environment.result_s={check_s + 2:g} or more"
            )
        limits = SandboxLimits(
            *(max(wall_s, check_s), cpu_s, memory_mb, output_chars),
            file_mb=disk_mb,
            disk_mb=disk_mb,
            open_files=256,
            threads=processes,
        )
        self._given = Path(directories).resolve() if directories else None
        for directory in (*(readable or ()), *([self._given] if self._given else ())):
            if not Path(directory).is_dir():
                raise ValueError(f"environment.options: {str(directory)!r} is no directory")
        shell = Shell(tuple(readable or ()), str(self._given or ""))
        sandbox = Sandbox(limits, concurrency=concurrency, namespaces=True, shell=shell)
        super().__init__(sandbox, live_sessions, live_mb, wall_s)
        self._check_s = check_s

    def begins(self, start: Start) -> dict[str, Any]:
        _check_of(start.prompt)  # what is wrong with it, the model's work should not come to nothing by
        more = {"given": self._directory(start.prompt), "files": _files(start.prompt, "files")}
        return super().begins(start) | more

    def world(self, key: tuple[str, str, str], session: SandboxSession) -> SessionWorld:
        return ShellWorld(self, key, session)

    async def checked(self, session: SandboxSession, prompt: Prompt) -> dict[str, Any] | None:
        """What the check of ``prompt`` says of ``session``, which it may change; None: there is none.

        It begins in /files without the session's variables and functions, and with an empty home (python runs
        what it finds in the home's site-packages): these could answer in its place.
        """
        if not (code := _check_of(prompt)):
            return None
        result = await session.run(code, deadline_s=self._check_s, fresh=True)
        return {"reward": float(result.status == ToolStatus.OK), "check": result.text}

    def _directory(self, prompt: Prompt) -> str:
        name = text_of(prompt, "directory")
        if not name:
            return ""
        if self._given is None:
            raise wrong(prompt, "directory", "environment.options.directories does not say where it stands")
        if _leads_out(name) or not (self._given / name).is_dir():
            raise wrong(prompt, "directory", f"{name!r} is no directory in {self._given}")
        return name

    def normalise(self, text: str) -> str:
        return _OF_THE_MOMENT.sub("…", text)


class ShellWorld(SessionWorld):
    """A shell's session, which is checked at the end."""

    async def result(self) -> dict[str, Any] | None:
        """The check runs in a copy, where there can be one soon: what it does is no part of the world.  Else
        it takes the session, which is built again should the branch go on: a model that leaves many files
        must not make its own check late."""
        try:
            return await self._checked()
        except (SessionLost, SandboxUnavailable) as error:
            raise ToolUnavailable(str(error)) from error

    async def _checked(self) -> dict[str, Any] | None:
        assert isinstance(self._environment, ShellEnvironment)
        prompt = self._environment.prompt(self._tree)
        if self._session is None:
            raise ToolUnavailable("its session is gone")
        try:
            copy = await self._session.fork(_COPY_S)
        except (NotForked, TreeFull):
            try:
                return await self._environment.checked(self._session, prompt)
            finally:
                await self.park()
        try:
            return await self._environment.checked(copy, prompt)
        finally:
            await copy.close()


def _check_of(prompt: Prompt) -> str:
    """The commands that check a question's answer; empty: there is no check.  Raises WorldFailed."""
    check, files = text_of(prompt, "check"), _files(prompt, "check_files")
    code = f"{_written(files)}HOME=$(mktemp -d) || exit 1\n{check}" if check else ""
    if len(code.encode(errors="replace")) > MAX_CODE_BYTES:
        raise wrong(prompt, "check_files", f"with the check they are longer than {MAX_CODE_BYTES} bytes")
    return code


def _written(files: Mapping[str, str]) -> str:
    """Commands that write ``files`` over whatever a session has put in their place.

    Where one cannot be written (a closed directory, a full disk) they end the check: what stands there is the
    session's own, which would pass.
    """
    return "".join(
        f"rm -rf -- {quote(path)} && mkdir -p -- {quote(str(PurePosixPath(path).parent))} "
        f"&& printf %s {quote(text)} > {quote(path)} "
        f"|| {{ echo {quote(f'The file of the check {path} could not be written.')} >&2; exit 1; }}\n"
        for path, text in files.items()
    )


def _leads_out(path: str) -> bool:
    found = PurePosixPath(path)
    return found.is_absolute() or ".." in found.parts


def _files(prompt: Prompt, name: str) -> dict[str, str]:
    files: Any = prompt.extra.get(name, {})
    if not isinstance(files, dict):
        raise wrong(prompt, name, f"{files!r:.200} is no object of paths and texts")
    named = cast("dict[Any, Any]", files)
    for path, text in named.items():
        if not isinstance(path, str) or not isinstance(text, str):
            raise wrong(prompt, name, f"{path!r:.200}: {text!r:.200} is no path with a text")
        if not path or "\0" in path or _leads_out(path):
            raise wrong(prompt, name, f"{path!r:.200} leads out of /files")
    return named
