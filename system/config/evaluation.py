"""What an evaluation asks and how it scores, as the settings say."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Sequence

from system.config.fill import filled
from system.config.reward import section_problems, values_problems
from system.config.rule_checks import broken_rules
from system.config.schema import Config, TaskConfig
from system.config.schema_eval import EvalConfig, EvalSet, eval_sets
from system.config.schema_reward import ChosenReward, over, rewards
from system.config.settings import settings
from system.errors import ConfigError
from system.plugins import TASKS, PluginError


def set_task(config: Config, one: EvalSet) -> TaskConfig:
    """The task whose held-out questions a set asks.  Raises :class:`ConfigError` for keys that none has."""
    task = filled(f"{one.key}.task", "a task", TaskConfig(), one.task)
    system = one.system_prompt or config.task.system_prompt
    return dataclasses.replace(task, system_prompt=task.system_prompt or system)


def scored(config: Config, one: EvalSet) -> Config | None:
    """The configuration by which a set's answers are scored, which differs by ``reward``, and by ``task``
    where the set has one of its own; None: as those of the run.

    A set's own reward goes before its task's, and this before the run's.  Raises :class:`ConfigError`.
    """
    reward = over(config.reward, one.reward, f"{one.key}.reward") if one.reward is not None else config.reward
    if not one.task:
        return dataclasses.replace(config, reward=reward) if one.reward is not None else None
    of_set = dataclasses.replace(config, task=set_task(config, one), reward=reward)
    if one.reward is None and _scores_itself(of_set, one):
        return dataclasses.replace(of_set, reward=over(config.reward, "task", f"{one.key}.reward"))
    by_task = any(part.name == "task" for part in rewards(reward))
    return of_set if one.reward is not None or by_task else None


def _scores_itself(config: Config, one: EvalSet) -> bool:
    """Whether the task of ``config``, that of a set, scores its own answers."""
    kind, task = TASKS.at(f"{one.key}.task"), config.task
    found = kind.find(task.name)
    return hasattr(found if inspect.isclass(found) else kind.make(task.name, task.options, config), "score")


def all_rewards(config: Config) -> list[ChosenReward]:
    """Those of the run, and those of ``eval.sets`` that are scored by others, without those of a set whose
    task cannot be had: who reads its questions is told.  Raises ConfigError.
    """
    found = rewards(config.reward)
    for one in eval_sets(config.eval):
        try:
            own = scored(config, one)
        except PluginError:
            continue
        if own is not None:
            found += rewards(own.reward, f"{one.key}.reward")
    return found


def eval_problems(config: Config) -> Iterator[str]:
    """What does not go together."""
    section, sets = config.eval, list[EvalSet]()
    try:
        sets = eval_sets(section)
    except ConfigError as error:
        yield from str(error).splitlines()
    for one in sets:
        yield from _set_problems(config, one)
    yield from _choice_problems(section, sets)
    several = ["eval.samples"] * (section.samples > 1) + [
        f"{one.key}.samples" for one in sets if one.samples > 1
    ]
    if several and section.temperature == 0:
        yield (
            f"{several[0]} asks for several answers, but eval.temperature=0 gives the same one again: set "
            "eval.temperature=1 (or what the model's card advises), or ask once"
        )


def _set_problems(config: Config, one: EvalSet) -> Iterator[str]:
    """A set's reward and task against the rules of these sections."""
    try:
        reward = None if one.reward is None else over(config.reward, one.reward, f"{one.key}.reward")
        task = set_task(config, one) if one.task else None
    except ConfigError as error:
        yield from str(error).splitlines()
        return
    if reward is not None:
        wrong = [*values_problems(reward, f"{one.key}.reward")]
        yield from wrong or section_problems(reward, f"{one.key}.reward")
    for setting in settings().values() if task is not None else ():
        if setting.section == "task":
            rule = dataclasses.replace(
                setting.rule, registry=setting.rule.registry and TASKS.at(f"{one.key}.task")
            )
            there = dataclasses.replace(setting, section=f"{one.key}.task", rule=rule)
            yield from broken_rules(there, getattr(task, setting.name))


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
