"""Harm to what a run keeps on disk."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Generator
from pathlib import Path

DISK_MB = 500


def damage(directory: Path, target: str) -> bool:
    """Harm what a crash can harm: the newest checkpoint or tree file, cut in half; a torn line in the ledger.

    False if there is nothing to harm.
    """
    if target == "ledger":
        with (directory / "ledger.jsonl").open("ab") as file:
            file.write(b'{"event": "issue", "num')
        return True
    if target == "trees":
        files = sorted((directory / "trees").glob("*.parquet"))
    else:
        whole = sorted(path for path in (directory / "checkpoints").glob("v??????"))
        if len(whole) < 2:  # nothing to fall back to
            return False
        files = sorted((p for p in whole[-1].rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    if not files:
        return False
    with files[-1].open("r+b") as file:
        file.truncate(files[-1].stat().st_size // 2)
    return True


def fill(disk: Path, seconds: float) -> None:
    """Leave no byte free on the file system of ``disk`` for ``seconds``."""
    ballast = disk / "ballast"
    block = bytes(1 << 20)
    with ballast.open("wb", buffering=0) as file:
        while block:
            try:
                file.write(block)
            except OSError:
                block = block[: len(block) // 2]
        time.sleep(seconds)
    ballast.unlink()


@contextlib.contextmanager
def small_disk(at: Path) -> Generator[Path | None]:
    """A file system in memory, mounted at ``at``; None where that is not allowed."""
    at.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(at)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        at.rmdir()
        yield None
        return
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=False)
