"""Section ``eval``: what is asked to see how good a model is."""

# ruff: noqa: RUF009 -- `setting` makes a dataclass field

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from system.config.rule import setting
from system.errors import ConfigError
from system.plugins import escape, nearest


@dataclass
class EvalConfig:
    """Answers to held-out questions.  Any of it may change on resume."""

    every: int = setting(0, "training steps between evaluations; 0: before and after only", least=0)
    every_s: float = setting(0.0, "seconds of training between evaluations; 0: by steps only", least=0)
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
        "columns, system_prompt, questions, samples}; what one leaves out is as in this section",
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
    key: str = ""  # for messages


def eval_sets(config: EvalConfig) -> list[EvalSet]:
    """``config.sets`` in their order.  Raises :class:`ConfigError` with a line for each bad one."""
    found: list[EvalSet] = []
    problems: list[str] = []
    for number, given in enumerate(config.sets):
        try:
            found.append(_checked(f"eval.sets[{number}]", config, given))
        except ConfigError as error:
            problems.append(str(error))
    names = [one.name for one in found]
    problems += [
        f"{one.key}.name: {one.name!r} stands there twice" for one in found if names.count(one.name) > 1
    ][1:]
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def _checked(key: str, config: EvalConfig, given: Mapping[str, Any]) -> EvalSet:
    known = [one.name for one in fields(EvalSet) if one.name != "key"]
    if unknown := [str(name) for name in given if name not in known]:
        raise ConfigError(f"{key}.{unknown[0]}: a set has {', '.join(known)}{nearest(unknown[0], known)}")
    try:
        schema = OmegaConf.structured(EvalSet(questions=config.questions, samples=config.samples, key=key))
        one: Any = OmegaConf.to_object(OmegaConf.merge(schema, escape(dict(given))))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from error
    assert isinstance(one, EvalSet)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", one.name):
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


def eval_problems(config: EvalConfig) -> Iterator[str]:
    """What does not go together."""
    sets: list[EvalSet] = []
    try:
        sets = eval_sets(config)
    except ConfigError as error:
        yield from str(error).splitlines()
    yield from _choice_problems(config, sets)
    several = ["eval.samples"] * (config.samples > 1) + [
        f"{one.key}.samples" for one in sets if one.samples > 1
    ]
    if several and config.temperature == 0:
        yield (
            f"{several[0]} asks for several answers, but eval.temperature=0 gives the same one again: set "
            "eval.temperature=1 (or what the model's card advises), or ask once"
        )


def _choice_problems(config: EvalConfig, sets: Sequence[EvalSet]) -> Iterator[str]:
    """Whether an evaluation has what ``eval.choose`` names."""
    if config.choose == "last":
        return
    of_set, _, metric = config.choose.rpartition("/")
    samples = {one.name: one.samples for one in sets} | {"": config.samples}
    if of_set not in samples:
        known = ", ".join(one.name for one in sets) or "none"
        yield f"eval.choose={config.choose}: eval.sets has no {of_set!r} (there are: {known})"
        return
    count = samples[of_set]
    ks = {2**power for power in range(1, count.bit_length())} | {count}
    measured = ["accuracy", "reward"]
    measured += ["majority", *(f"pass@{k}" for k in sorted(ks))] if count > 1 else []
    if metric not in measured:
        yield f"eval.choose={config.choose}: choose last, or by one of {', '.join(measured)}"
    if not config.every and not config.every_s:
        yield (
            f"eval.choose={config.choose} has the last model alone to choose of: set eval.every or "
            "eval.every_s, or eval.choose=last"
        )
