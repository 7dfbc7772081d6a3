"""One tree's misfortune stays its own: whatever is raised while it grows becomes a failure with a name."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Generator
from contextlib import contextmanager

from system.errors import ConfigError
from system.rollout.failure import RolloutFailed
from system.rollout.snapshot import SnapshotError
from system.text import as_text, described, one_line

log = logging.getLogger(__name__)


@contextmanager
def one_tree(prompt_id: str) -> Generator[None]:
    """Turn any error of the block into a :class:`RolloutFailed`, its class being the reason.

    Two kinds pass: those that are told by name already, and a :class:`ConfigError`, for that is the same for
    every tree and ends the run.
    """
    try:
        yield
    except (RolloutFailed, SnapshotError, ConfigError):
        raise
    except Exception as error:
        log.error("tree of prompt %s\n%s", one_line(prompt_id), as_text(traceback.format_exc()))
        raise RolloutFailed(prompt_id, one_line(type(error).__name__), described(error)) from None
