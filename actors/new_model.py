"""The start model of a run that is given none, made in a process of its own: torch and transformers would
stay in the driver's memory for the whole run.
"""

from __future__ import annotations

from collections.abc import Awaitable
from pathlib import Path

from actors.ray_support import answer
from actors.raylet import beside
from system.config import Config
from system.tasks.base import HasTokenizer, Task
from system.tasks.inputs import make_model


def new_model(path: Path, config: Config, task: Task) -> Awaitable[None]:
    """Begin to make the model at ``path``, unless it is there; await the end.

    Raises ActorLost, or what :func:`make_model` raises.
    """
    assert isinstance(task, HasTokenizer)
    making = beside(make_model, path.resolve(), config, task.tokenizer(), alone=True)
    return answer(making, config.cluster.start_deadline_s, "a new model")
