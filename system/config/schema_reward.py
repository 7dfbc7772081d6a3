"""The section ``reward``: what a finished branch is worth, by one reward or by several weighted ones."""

# ruff: noqa: RUF009 -- `setting` makes a dataclass field
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from system.config.fill import filled
from system.config.rule import setting
from system.errors import ConfigError
from system.plugins import REWARDS

ON_LOOP = 256  # scores at once of one ``async`` reward, where nothing else is said


@dataclass
class RewardPart:
    """One reward: which, where it runs, how long it may take."""

    name: str = setting(
        "arpo",
        "which rule; task: the task scores its own answers; judge: a language model does. A list in place of "
        "the section gives several, see parts",
        registry=REWARDS,
    )
    options: dict[str, Any] = setting({}, "the rule's own options")
    weight: float = setting(
        1.0, "what its value is multiplied with; with several rewards, 0 only measures, below 0 punishes"
    )
    run: str = setting(
        "auto",
        "where it runs: loop (`async def`: it waits, and computes next to nothing), thread (plain Python "
        "that waits for others), process (all that computes, or runs what a model wrote); auto: loop for an "
        "`async def`, else process",
        choices=("auto", "loop", "thread", "process"),
        safe_on_resume=True,
    )
    deadline_s: float = setting(
        30.0,
        "one score, from when it begins; later, the leaf is unscored, and the process that is late replaced",
        above=0,
        safe_on_resume=True,
    )
    concurrency: int = setting(
        0,
        "scores at once, per rollout worker; others wait, which no deadline_s counts; 0: reward.workers in "
        "threads and processes, 256 on the loop",
        least=0,
        safe_on_resume=True,
    )
    on_failure: str = setting(
        "unscored",
        "a leaf that it fails to score is left unscored (and failure_limit watches), or stops the run",
        choices=("unscored", "stop"),
        safe_on_resume=True,
    )


@dataclass
class RewardConfig(RewardPart):
    """What a finished branch is worth, by one reward or several (`docs/rewards.md`)."""

    parts: list[dict[str, Any]] = setting(
        [],
        "several rewards, as `reward: [arpo, {name: judge, weight: 0.5}]` gives them: "
        "{name, options, weight, run, deadline_s, concurrency, on_failure, label}; the first says what is "
        "correct; what one leaves out is as in this section; label: its name in metrics, should two be alike",
    )
    close_deadline_s: float = setting(
        300.0,
        "a tree's wait for its scores after the end of its last branch; leaves without one then are unscored",
        above=0,
        safe_on_resume=True,
    )
    workers: int = setting(
        2, "processes (or threads) of a reward, per rollout worker", least=1, safe_on_resume=True
    )
    memory_mb: int = setting(1024, "of one such process, beyond its libraries", least=1, safe_on_resume=True)
    confined: bool = setting(
        True, "such a process writes no file and has no network; false: it may", safe_on_resume=True
    )
    overlong_buffer: int = setting(
        0,
        "tokens before rollout.max_response_tokens in which an answer's length begins to cost: a line from 0 "
        "to overlong_penalty (DAPO's soft punishment); 0: none",
        least=0,
    )
    overlong_penalty: float = setting(1.0, "what an answer at the limit loses", least=0)
    failure_limit: float = setting(
        0.2,
        "share of the last 100 leaves that may fail to be scored before the run stops with the reasons",
        least=0,
        most=1,
        safe_on_resume=True,
    )


@dataclass
class ChosenReward(RewardPart):
    """One of the rewards of a run."""

    label: str = ""  # in metrics and in a leaf's parts; "" where it is the only one
    key: str = "reward"  # of the settings, for messages

    @property
    def shown(self) -> str:
        """For messages."""
        return self.label or self.name


def rewards(config: RewardConfig, key: str = "reward") -> list[ChosenReward]:
    """The rewards of a section, in order; ``key``: where it stands.

    Raises :class:`ConfigError` with a line for each bad part.
    """
    names = [one.name for one in dataclasses.fields(RewardPart)]
    shared: dict[str, Any] = {name: getattr(config, name) for name in names}
    if not config.parts:
        return [ChosenReward(**shared, key=key)]
    shared |= {"name": "", "options": {}, "weight": 1.0}
    problems: list[str] = []
    chosen: list[ChosenReward] = []
    for number, given in enumerate(config.parts):
        try:
            chosen.append(_chosen(ChosenReward(**shared, key=f"{key}.parts[{number}]"), given))
        except ConfigError as error:
            problems.append(str(error))
    labels = [one.label for one in chosen]
    for one in chosen:
        if labels.count(one.label) > 1:
            problems.append(f"{one.key}.label: two rewards are called {one.label!r}: give one another label")
            break
    if problems:
        raise ConfigError("\n".join(problems))
    return chosen


def _chosen(shared: ChosenReward, given: Mapping[str, Any]) -> ChosenReward:
    one = filled(shared.key, "a reward", shared, given)
    if not one.name:
        raise ConfigError(f"{one.key}.name is missing: one of {', '.join(REWARDS.names)}, or your own")
    one.label = one.label or one.name.rpartition(":")[2]
    return one


def as_section(reward: Any) -> Any:
    """The ways to write the section, as its keys: one reward's name, a list of several, or keys already."""
    if isinstance(reward, str | int | float):
        return {"name": str(reward)}
    if isinstance(reward, list):
        reward = {"parts": reward}
    if isinstance(reward, dict) and isinstance(parts := reward.get("parts"), list):
        return {**reward, "parts": [{"name": one} if isinstance(one, str) else one for one in parts]}
    return reward


def over(config: RewardConfig, given: Any, key: str) -> RewardConfig:
    """The section ``config`` with what is ``given`` at ``key`` in its place, written in any of its ways.

    Another reward than the section's, or several, begin with options and a weight of their own.  Raises
    :class:`ConfigError` with a line for each misfit.
    """
    layer = as_section(given)
    if not isinstance(layer, dict):
        raise ConfigError(f"{key}={given!r}: name a reward, list several, or give keys of the section reward")
    parts, name = layer.get("parts"), layer.get("name")
    if isinstance(parts, list) and (wrong := [one for one in parts if not isinstance(one, dict)]):
        raise ConfigError(f"{key}.parts: {wrong[0]!r} must be a dictionary, or the name of a reward")
    start = config
    if parts or (name is not None and (config.parts or name != config.name)):
        start = dataclasses.replace(config, name="", parts=[], options={}, weight=1.0)
    if parts or start.parts:
        for one in ("options", "weight"):
            if layer.get(one, getattr(start, one)) != getattr(start, one):
                raise ConfigError(f"{key}.{one}: of several rewards each has its own: write {key}.parts")
    if isinstance(options := layer.get("options"), dict):
        layer = {**layer, "options": {**start.options, **options}}
    return filled(key, "the section reward", start, layer)
