"""Section ``eval``: what is asked to see how good a model is."""

# ruff: noqa: RUF009 -- `setting` makes a dataclass field

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from system.config.fill import filled
from system.config.rule import setting
from system.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass
class EvalConfig:
    """Answers to held-out questions.  Any of it may change on resume."""

    every: int = setting(0, "training steps between evaluations; 0: before and after only", least=0)
    every_s: float = setting(
        0.0, "seconds between evaluations, also where a run was resumed meanwhile; 0: by steps only", least=0
    )
    engines: int = setting(
        0,
        "engines that do nothing but evaluations, which then keep the weights of their step while training "
        "goes on; 0: the engines of training, while the learner waits",
        least=0,
    )
    questions: int = setting(-1, "of the held-out ones, the first so many; -1: all", least=-1)
    samples: int = setting(
        1, "answers to each, for pass@k and maj@k; more than one need a temperature", least=1, most=1024
    )
    temperature: float = setting(0.0, "of sampling; 0: greedy", least=0, most=100)
    choose: str = setting(
        "last",
        "which model the run leaves: last; or that of the best evaluation during or after training, by "
        "accuracy, majority, reward or pass@k of the task's own questions, or <set>/<metric> of one of "
        "eval.sets",
    )
    sets: list[dict[str, Any]] = setting(
        [],
        "further sets of held-out questions: {name, path (a data file) or task (as in the section task), "
        "columns, system_prompt, questions, samples, reward (as the section reward)}; what one leaves out is "
        "as in this section, and scored by its task if that scores its own answers, else as the run",
    )


@dataclass
class EvalSet:
    """One of ``eval.sets``, checked."""

    name: str = ""
    path: str = ""
    task: dict[str, Any] = field(default_factory=dict[str, Any])
    columns: dict[str, str] = field(default_factory=dict[str, str])
    system_prompt: str = ""
    questions: int = -1
    samples: int = 1
    reward: Any = None  # as the section reward may be written; None: the run's, or its task's own
    key: str = ""  # for messages


def eval_sets(config: EvalConfig) -> list[EvalSet]:
    """``config.sets`` in their order.  Raises :class:`ConfigError` with a line for each bad one.

    Messages call a set by its name, which stays where others are left out (``--sets``), and by its number,
    from 0, where it has none that can be taken.
    """
    found: list[EvalSet] = []
    problems: list[str] = []
    for number, given in enumerate(config.sets):
        try:
            found.append(_checked(number, config, given))
        except ConfigError as error:
            problems.append(str(error))
    names = [one.name for one in found]
    problems += [
        f"{one.key}.name: {one.name!r} stands there twice" for one in found if names.count(one.name) > 1
    ][1:]
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def _checked(number: int, config: EvalConfig, given: Mapping[str, Any]) -> EvalSet:
    name, task = given.get("name"), given.get("task")
    proper = isinstance(name, str) and _NAME.fullmatch(name)
    key = f"eval.sets[{name if proper else number}]"
    named = {**given, "task": {"name": task}} if isinstance(task, str) else given
    one = filled(
        key, "a set", EvalSet(questions=config.questions, samples=config.samples, key=key), named, ("key",)
    )
    if not proper:
        raise ConfigError(
            f"{key}.name={one.name!r}: letters, digits, and - . _ between them: it names metrics"
        )
    if one.name == "held-out":
        raise ConfigError(f"{key}.name={one.name!r} is the name of the task's own questions: choose another")
    if one.path.startswith("~"):
        raise ConfigError(f"{key}.path={one.path}: `~` stands for nothing here: write the whole path")
    if bool(one.path) == bool(one.task):
        raise ConfigError(f"{key} needs either a path (a data file) or a task (as in the section task)")
    if one.columns and one.task:
        raise ConfigError(f"{key}.columns: of a task they stand in {key}.task")
    if one.questions < -1 or one.samples < 1:
        raise ConfigError(f"{key}: questions are -1 (all) or more, samples 1 or more")
    return one
