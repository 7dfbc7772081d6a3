"""The held-out questions of a run: its task's own, and those of ``eval.sets``."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from system.config import Config, ConfigError, EvalSet, TaskConfig, eval_sets
from system.evals.record import Asked
from system.tasks.base import Task, first, make_task
from system.tasks.columns import Columns
from system.tasks.jsonl import DataError, read
from system.tree.prompt import Prompt


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """Questions, and how many answers each is to get."""

    name: str  # "": the task's own
    questions: Sequence[Prompt]
    samples: int

    def asked(self, seed: int) -> Iterator[Asked]:
        """Every question as often as it is to be answered; seeds count up from ``seed``."""
        for number, prompt in enumerate(self.questions):
            for sample in range(self.samples):
                yield Asked(self.name, prompt, sample, seed + number * self.samples + sample)


def question_sets(config: Config, task: Task) -> list[QuestionSet]:
    """All sets of a run, the task's own first, without those that have no questions.

    Raises :class:`ConfigError` for a set that cannot be read, by its place in the settings.
    """
    own = QuestionSet("", first(task.eval(), config.eval.questions), config.eval.samples)
    return [own, *(read_set(config, one) for one in eval_sets(config.eval))]


def to_ask(sets: Sequence[QuestionSet]) -> list[Asked]:
    """What an evaluation asks, each with a seed of its own, which depends on nothing but ``sets``."""
    found: list[Asked] = []
    for one in sets:
        found += one.asked(len(found))
    return found


def read_set(config: Config, chosen: EvalSet) -> QuestionSet:
    """The questions of one of ``eval.sets``.  Raises :class:`ConfigError` where they cannot be read."""
    system = chosen.system_prompt or config.task.system_prompt
    try:
        if chosen.path:
            data = read(chosen.path, system, chosen.questions, Columns(chosen.columns))
            return QuestionSet(chosen.name, data.prompts, chosen.samples)
        of_set = copy.deepcopy(config)
        merged = OmegaConf.merge(OmegaConf.structured(TaskConfig()), chosen.task)
        of_set.task = OmegaConf.to_object(merged)  # pyright: ignore[reportAttributeAccessIssue]
        of_set.task.system_prompt = of_set.task.system_prompt or system
        questions = make_task(of_set).eval()
    except (DataError, ConfigError, OmegaConfBaseException, OSError) as error:
        raise ConfigError(f"{chosen.key}: {error}") from error
    if not questions:
        raise ConfigError(f"{chosen.key}: the task has no held-out questions")
    return QuestionSet(chosen.name, first(questions, chosen.questions), chosen.samples)
