"""Documents that were read, on disk: by URL, shared by the workers of a run, there after a restart."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from system.tools.browse.document import WebDocument

FORMAT = 1  # of the files and of the text in them: a change of either reads the documents anew
SUFFIX = ".page"
LOOK_EVERY = 32  # writes between two looks at the size of the directory


class DocumentCache:
    """At most ``most_bytes`` in ``directory``; those that nobody asked for longest go first.

    The first to keep a document under a key wins: whoever comes second gets the first one's text, so that all
    workers read the same.  Methods block: call them in a thread.
    """

    def __init__(self, directory: Path, most_bytes: int):
        self.directory, self._most = directory, most_bytes
        self._writes = 0

    def path(self, key: str) -> Path:
        return self.directory / (hashlib.sha256(f"{FORMAT} {key}".encode()).hexdigest() + SUFFIX)

    def get(self, key: str) -> WebDocument | None:
        """None for what is not there, or damaged."""
        path = self.path(key)
        try:
            kept: dict[str, Any] = json.loads(zlib.decompress(path.read_bytes()))
            document = WebDocument(links=tuple(kept.pop("links")), **kept)
            os.utime(path)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, zlib.error):
            path.unlink(missing_ok=True)
            return None
        return document

    def put(self, key: str, document: WebDocument) -> WebDocument:
        """Keep ``document``; the one to go on with, which may be another's.  Raises OSError."""
        self.directory.mkdir(parents=True, exist_ok=True)
        data = zlib.compress(json.dumps(asdict(document)).encode())
        with tempfile.NamedTemporaryFile(dir=self.directory, prefix=".new-") as new:
            new.write(data)
            new.flush()
            try:
                os.link(new.name, self.path(key))
            except FileExistsError:
                return self.get(key) or document
        if self._writes % LOOK_EVERY == 0:
            self._make_room()
        self._writes += 1
        return document

    def check(self) -> None:
        """Raises OSError if nothing can be kept there."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.directory, prefix=".new-") as new:
            linked = Path(f"{new.name}.linked")
            os.link(new.name, linked)
            linked.unlink()

    def _make_room(self) -> None:
        """Remove the oldest until a tenth of the room is free again, if there is too much."""
        files = [(stat.st_mtime_ns, stat.st_size, path) for path, stat in self._stats()]
        size = sum(one for _, one, _ in files)
        if size <= self._most:
            return
        for _, one, path in sorted(files):
            path.unlink(missing_ok=True)
            size -= one
            if size <= 0.9 * self._most:
                return

    def _stats(self) -> list[tuple[Path, os.stat_result]]:
        found: list[tuple[Path, os.stat_result]] = []
        for path in self.directory.glob(f"*{SUFFIX}"):
            try:
                found.append((path, path.stat()))
            except FileNotFoundError:
                continue  # another worker made room
        return found
