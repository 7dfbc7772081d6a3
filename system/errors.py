"""The errors of Espalier, and what follows from one: an exit code, and whether another try may succeed.

::

    EspalierError              the run cannot go on                            exit code 1
    ├── ConfigError            a configuration or command that cannot be used              2
    │   ├── PluginError        a part (tool, reward, credit, …) that cannot be had
    │   ├── RunDirError        a run directory that cannot be used
    │   ├── PlacementError     too few nodes or GPUs for what is asked
    │   ├── DataError          a data file with a bad row
    │   ├── EntropyUnknown     a policy needs entropies that the engine does not give
    │   └── UnsupportedModel   a model that is not computed here
    ├── EngineError            an inference engine, or its answer, is at fault
    │   └── EngineLost, Unreachable, MalformedStream, SglangMissing, ServerFailed
    ├── ActorLost              a process or a machine is gone                             75
    │   └── StartFailed        … before it ever worked                                     1
    ├── ToolStartError         a configured tool cannot work
    ├── CheckpointError, LedgerError, SavedTreesError, SnapshotError, JsonlError, StoreError, TreeError,
    │   WeightsError, ShardError, CorpusError     what was stored is damaged, or not what is expected
    ├── GaveUp, NeverFinite    a run that only fails, or learns nothing: another try would, too     1
    └── RolloutFailed, EngineFailed, SandboxUnavailable, …                        raised where they stand

A message names the field or the file, and the remedy, in one line.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Generator, Iterator
from typing import ClassVar

# Exit codes.  STOPPED: asked to stop before the end, a checkpoint was saved.  LOST: a machine or an actor
# failed, not the run itself (EX_TEMPFAIL of sysexits.h): going on from the checkpoint may well succeed.
DONE, FAILED, USAGE, STOPPED, LOST, INTERRUPTED = 0, 1, 2, 3, 75, 130


class EspalierError(Exception):
    """What a user can cause, or must be told: the command line prints the message, not a traceback."""

    exit_code: ClassVar[int] = FAILED


class ConfigError(EspalierError, ValueError):
    """A configuration that cannot be used; the message names the key and the remedy."""

    exit_code = USAGE


class CheckpointError(EspalierError, RuntimeError):
    """A checkpoint that is missing, damaged, or of another model; the message names it."""


EXPECTED = (EspalierError, OSError, UnicodeError)
"""What is told in a line: ours, and what the file system and text files of others bring about."""


OF_OTHERS = (Exception, SystemExit, KeyboardInterrupt, asyncio.CancelledError)
"""What a user's own part may raise: its call fails, and nothing else.  (The interpreter ends the event loop
for some of these, if they leave a task.)
"""


def asked_to_end() -> bool:
    """Whether somebody cancels the current task; else a ``CancelledError`` was raised by what it calls, a
    user's own part perhaps, and is an error like others.
    """
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def exit_code(error: BaseException, lost: tuple[type[BaseException], ...] = ()) -> int:
    """The exit code that ``error`` ends a process with; of a group, that of the part hardest to mend.

    ``lost``: errors of a library that mean a lost machine or process.
    """
    codes = {_code(leaf, lost) for leaf in leaves(error)}
    return next(code for code in (USAGE, FAILED, INTERRUPTED, LOST) if code in codes)


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors of a group, of any depth; an error that is no group is its own leaf."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Generator[None]:
    """For the length of the block, an error of the file system that names no file, as that of a full disk,
    names ``path``.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(path)
        raise


def told(error: BaseException) -> str:
    """The message for people; of the file system's errors, the path and what is wrong with it."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, UnicodeError):
        return f"a text is not UTF-8: {error}"
    return str(error) or type(error).__name__


def _code(error: BaseException, lost: tuple[type[BaseException], ...]) -> int:
    if isinstance(error, lost):
        return LOST
    if isinstance(error, EspalierError):
        return error.exit_code
    if isinstance(error, UnicodeError):
        return USAGE
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED
