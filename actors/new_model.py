"""The start model of a run that is given none, made in a process of its own: torch and transformers would
stay in the driver's memory for the whole run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from actors.ray_support import answer
from actors.raylet import beside
from system.config import Config
from system.tasks.base import HasTokenizer, Task
from system.tasks.inputs import make_model


async def new_model(path: Path, config: Config, task: Task) -> None:
    """Make the model at ``path``, unless it is there.

    Raises ActorLost, or what :func:`make_model` raises.
    """
    if (making := _started(path, config, task)) is not None:
        await answer(making, config.cluster.start_deadline_s, "a new model")


def _started(path: Path, config: Config, task: Task) -> Any:
    """A reference to its end; None where it is there."""
    if (path / "config.json").is_file():
        return None
    assert isinstance(task, HasTokenizer)
    return beside(make_model, path.resolve(), config, task.tokenizer(), alone=True)
