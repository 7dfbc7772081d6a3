"""The held-out questions of a run: its task's own, and those of ``eval.sets``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from system.config import Config, ConfigError, EvalSet, RewardConfig, eval_sets, scored, set_task
from system.evals.record import OWN, Asked
from system.plugins import nearest
from system.tasks.base import Task, first, make_task
from system.tasks.columns import Columns
from system.tasks.files import data_files
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


def only(config: Config, names: Sequence[str]) -> Config:
    """``config`` with these of its ``eval.sets`` alone; ``held-out`` names the task's own questions.

    Raises :class:`ConfigError` for a name that there is not.
    """
    known = [OWN, *(one.name for one in eval_sets(config.eval))]
    if unknown := [name for name in names if name not in known]:
        near = nearest(unknown[0], known)
        raise ConfigError(f"--sets {unknown[0]}: there are {', '.join(known)}{near}")
    section = config.eval
    # What a set leaves out is as in the section, of which the task's own questions may be taken out here.
    rest = {"questions": section.questions}
    sets = [{**rest, **one} for one in section.sets if str(one["name"]) in names]
    left = dataclasses.replace(section, sets=sets)
    if OWN in names:
        return dataclasses.replace(config, eval=left)
    task = dataclasses.replace(config.task, eval_path="")
    return dataclasses.replace(config, eval=dataclasses.replace(left, questions=0), task=task)


def without_idle_reward(config: Config) -> Config:
    """``config`` for an evaluation: a reward of the run that scores nothing, because all that is asked has
    its own, is done without, so that its judge need not be there.
    """
    own = [scored(config, one) for one in eval_sets(config.eval)]
    if config.eval.questions != 0 or not own or None in own:
        return config
    # What a set has of its own is merged over the run's: each gets the whole of it.
    whole = [{"reward": dataclasses.asdict(one.reward)} for one in own if one is not None]
    sets = [one | reward for one, reward in zip(config.eval.sets, whole, strict=True)]
    section = dataclasses.replace(config.eval, sets=sets)
    return dataclasses.replace(config, eval=section, reward=RewardConfig())


def without_training_data(config: Config) -> tuple[Config, str]:
    """``config`` for an evaluation: files of training questions that are not there are done without, and then
    what is to be said of that.
    """
    task = config.task
    if task.name != "jsonl" or not task.path:
        return config, ""
    try:
        data_files(task.path)
    except (DataError, OSError) as error:
        told = f"task.path: {error}: whether held-out questions are among the training data is not looked at"
        return dataclasses.replace(config, task=dataclasses.replace(task, path="")), told
    return config, ""


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
        of_set = dataclasses.replace(config, task=set_task(config, chosen))
        questions = make_task(of_set).eval()
    except (DataError, ConfigError, OSError) as error:
        raise ConfigError(f"{chosen.key}: {error}") from error
    if not questions:
        raise ConfigError(f"{chosen.key}: the task has no held-out questions")
    return QuestionSet(chosen.name, first(questions, chosen.questions), chosen.samples)
