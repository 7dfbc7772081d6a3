"""Tasks by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import cast

from system import plugins
from system.config import Config, ConfigError
from system.tasks.base import Task


def make_task(config: Config) -> Task:
    """The configured task: ``quickstart``, ``jsonl``, ``reasoning-gym``, or one's own as
    ``package.module:Name``.

    One's own is any callable that takes the :class:`Config` and returns a :class:`Task`.
    Raises :class:`ConfigError` naming the key and the remedy.
    """
    name = config.task.name
    if name in _BUILDERS:
        return _BUILDERS[name](config)
    if plugins.is_path(name):
        try:
            return cast(Task, plugins.load(name)(config))
        except plugins.PluginError as error:
            raise ConfigError(f"task.name={name!r}: {error}") from error
    close = difflib.get_close_matches(name, _BUILDERS, n=1)
    hint = f"did you mean {close[0]}?" if close else "write your own as package.module:Name"
    raise ConfigError(f"task.name={name!r}: choose one of {', '.join(_BUILDERS)}; {hint}")


def _quickstart(config: Config) -> Task:
    from system.tasks.quickstart import QuickstartTask
    from system.tasks.quickstart.expert import Skill

    try:
        skill = Skill(**config.task.options)
    except TypeError as error:
        raise ConfigError(f"task.options: the quickstart knows `right` and `slip` ({error})") from error
    except ValueError as error:
        raise ConfigError(f"task.options: {error}") from error
    try:
        return QuickstartTask(
            seed=config.run.seed,
            train_size=config.task.train_size,
            eval_size=config.task.eval_size,
            search_top_k=config.tools.search_top_k,
            skill=skill,
        )
    except ValueError as error:
        raise ConfigError(f"task.train_size, task.eval_size: {error}") from error


def _jsonl(config: Config) -> Task:
    from system.tasks.jsonl import JsonlTask

    return JsonlTask.from_config(config)


def _reasoning(config: Config) -> Task:
    from system.tasks.reasoning import ReasoningTask

    return ReasoningTask.from_config(config)


_BUILDERS: dict[str, Callable[[Config], Task]] = {
    "quickstart": _quickstart,
    "jsonl": _jsonl,
    "reasoning-gym": _reasoning,
}
