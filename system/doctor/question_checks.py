"""Checks of what a run is to learn from: its task's questions, the rewards for them, and ``eval.sets``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from system.config import ChosenReward, Config, ConfigError, eval_sets, rewards, scored
from system.doctor.problem import Problem
from system.errors import EXPECTED, EspalierError, told
from system.evals.sets import read_set
from system.plugins import AGENTS, TASKS
from system.rollout.scorer import Scorer
from system.tasks.base import HasCorpus, HasDemonstrations, HasTokenizer, Task, make_task, own_reward
from system.tasks.vocabulary import unknown_tokens
from system.tools.search_index import read_corpus
from system.tree.prompt import Prompt

ROWS = 32  # of the data, that are read
_SIZES = ("train_size", "eval_size")  # settings of a task
T = TypeVar("T")


def task(config: Config) -> Iterator[Problem]:
    """The task's first questions, what else it must bring, and the reward that is made for it."""
    yield from _questions(config, training=True)


def held_out(config: Config) -> Iterator[Problem]:
    """The same of an evaluation, which needs no training questions."""
    yield from _questions(config, training=False)


def _questions(config: Config, *, training: bool) -> Iterator[Problem]:
    first = _first_rows(config)
    made = _own("task.name", config.task.name, lambda: make_task(first))
    main = "training" if training else "held-out"
    for what, questions in (("training", made.train), ("held-out", made.eval))[not training :]:
        rows: Sequence[Any] = _own("task.name", config.task.name, questions)
        if what == "training" and not len(rows):
            yield Problem(
                "task", f"{made.name} has no training questions", "correct task.path or its options"
            )
        if wrong := [row for row in rows[:ROWS] if not isinstance(row, Prompt)]:
            kind = type(wrong[0]).__name__
            yield Problem("task", f"a {what} question is a {kind}", "a task yields system.tree.prompt.Prompt")
        elif what == main:
            unknown = unknown_tokens(config.model.path, rows[:ROWS])
            if unknown and unknown.too_many:
                yield Problem("model.path", str(unknown), "take a model that can read them")
            for name in config.agent.columns if config.agent.on else ():
                if rows and not any(name in row.extra for row in rows[:ROWS]):
                    known = (
                        ", ".join(dict.fromkeys(key for row in rows[:ROWS] for key in row.extra)) or "none"
                    )
                    found = f"none of the first questions of {made.name} has a column {name!r}"
                    yield Problem("agent.columns", found, f"name columns that are there: {known}")
            for name in _needed(config):
                if rows and not any(name in row.extra for row in rows[:ROWS]):
                    found = f"it plays questions with a column {name!r}, which those of {made.name} have not"
                    named = name if name in TASKS.names else "a task that has it"
                    yield Problem(f"agent.run={config.agent.run}", found, f"set task.name={named}")
            if training and config.guide.shows and not any(row.actions for row in rows[:ROWS]):
                found = f"none of the first questions of {made.name} has a demonstration with actions"
                remedy = "name their column (task.columns.demonstration), or take the settings of guide out"
                yield Problem("guide", found, remedy)
    yield from (*(_started_from(config, made) if training else ()), *_searched(config, made))
    for reward in rewards(config.reward):
        _own(f"{reward.key}.name", reward.name, partial(_scorer, first, reward, made))


def _scorer(config: Config, chosen: ChosenReward, made: Task) -> Scorer:
    """As a rollout worker makes it, but for a task that scores itself, which is made already."""
    if chosen.name == "task":
        return Scorer.placed(config, chosen, own_reward(made))
    return Scorer.of(config, chosen)


def _needed(config: Config) -> tuple[str, ...]:
    """Columns of the data that the agent asks for by itself."""
    return tuple(getattr(AGENTS.find(config.agent.run), "columns", ())) if config.agent.run else ()


def _started_from(config: Config, made: Task) -> Iterator[Problem]:
    """What training takes from its task besides questions."""
    if not config.model.path and not isinstance(made, HasTokenizer):
        remedy = "set model.path to a Hugging Face directory"
        yield Problem(
            "model.path", f"empty, and task {made.name!r} brings no tokenizer for a new model", remedy
        )
    if config.warmstart.steps and not isinstance(made, HasDemonstrations):
        found = f"{config.warmstart.steps}, but task {made.name!r} has no demonstrations"
        yield Problem("warmstart.steps", found, "set warmstart.steps=0")


def _searched(config: Config, made: Task) -> Iterator[Problem]:
    """Where search finds something."""
    if "search" not in config.tools.names or config.tools.search_url:
        return
    if config.tools.corpus:
        if next(iter(read_corpus(config.tools.corpus, ROWS)), None) is None:
            yield Problem("tools.corpus", f"{config.tools.corpus} has no documents")
    elif not isinstance(made, HasCorpus):
        yield Problem(
            "tools.names",
            f"search has nothing to search: task {made.name!r} brings no corpus",
            "set tools.corpus, or tools.search_url, or take search out of tools.names",
        )


def evaluation_sets(config: Config) -> Iterator[Problem]:
    """The first questions of each of ``eval.sets``, and the rewards that are made for it."""
    for one in eval_sets(config.eval):
        few = replace(one, questions=_at_most(one.questions))
        if one.task:
            sizes = {name: _at_most(int(one.task.get(name, -1))) for name in _SIZES}
            few = replace(few, task={**one.task, **sizes})
        try:
            _own(one.key, one.name, partial(read_set, config, few))
            if (own := scored(config, few)) is not None:
                for reward in rewards(own.reward, f"{one.key}.reward"):
                    _own(f"{reward.key}.name", reward.name, partial(Scorer.of, own, reward))
        except ConfigError as error:
            for problem in Problem.several(error):
                yield problem if str(problem).startswith(one.key) else replace(problem, field=one.key)


def _first_rows(config: Config) -> Config:
    """The same run on the first few rows of its data."""
    small = copy.deepcopy(config)
    for name in _SIZES:
        setattr(small.task, name, _at_most(getattr(small.task, name)))
    return small


def _at_most(size: int) -> int:
    """So many rows, or fewer, of a setting that takes all where it is not positive."""
    return min(size, ROWS) if size > 0 else ROWS


def _own(field: str, name: str, call: Callable[[], T]) -> T:
    """``call``, which may be the user's own code.  Raises ConfigError for whatever it raises."""
    try:
        return call()
    except EXPECTED as error:
        ours = isinstance(error, EspalierError)
        raise ConfigError(told(error) if ours else f"{field}={name!r}: {told(error)}") from error
    except Exception as error:  # the user's own code
        raise ConfigError(f"{field}={name!r}: {type(error).__name__}: {error}") from error
