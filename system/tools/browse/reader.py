"""Starts the processes that read documents, and ends those that do not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import system
from system.errors import EspalierError
from system.tools.browse.document import WebDocument
from system.tools.browse.reading import Request

PROCESSES = 4  # at once, per worker
_ROOT = Path(system.__path__[0]).parent  # where the package is found


class ReadFailed(EspalierError):
    """A document that cannot be read; the message is for the model."""


class Reader:
    """Reads documents, each in a process of its own (:mod:`.reading`), for the tasks of one event loop."""

    def __init__(self) -> None:
        self._slots = asyncio.Semaphore(PROCESSES)

    async def read(self, request: Request, data: bytes) -> WebDocument:
        """Raises :class:`ReadFailed`.  When this is cancelled, at a deadline say, the process is killed."""
        async with self._slots:
            answer = await self._answer(json.dumps(asdict(request)).encode() + b"\n" + data)
        if error := answer.pop("error", ""):
            raise ReadFailed(error)
        return WebDocument(url=request.url, links=tuple(answer.pop("links")), **answer)

    async def _answer(self, request: bytes) -> dict[str, Any]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "system.tools.browse.reading"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            cwd=_ROOT,
            env={"PATH": os.defpath, "PYTHONPATH": str(_ROOT), "LANG": "C.UTF-8"},  # no key of the run's
        )
        try:
            answer, _ = await process.communicate(request)
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if process.returncode != 0:
            raise ReadFailed(f"its reader ended with {process.returncode}: it is too large, or damaged")
        return json.loads(answer)
