"""Tasks by name."""

from __future__ import annotations

from typing import cast

from system import plugins
from system.config import Config, ConfigError
from system.rollout.reward import Reward
from system.tasks.base import Task


def make_task(config: Config) -> Task:
    """The configured task, one of :data:`plugins.TASKS` or one's own as ``package.module:Name``.

    One's own is any callable that takes the :class:`Config`, and ``task.options`` as keywords, and returns a
    :class:`Task`.  Raises :class:`ConfigError` naming the key and the remedy.
    """
    return cast(Task, plugins.TASKS.make(config.task.name, config.task.options, config))


def task_reward(config: Config) -> Reward:
    """``reward.name=task``: the task scores its own answers."""
    task = make_task(config)
    if not hasattr(task, "score"):
        raise ConfigError(f"reward.name=task, but the task {task.name!r} has no score(prompt, branch)")
    return cast(Reward, task)
