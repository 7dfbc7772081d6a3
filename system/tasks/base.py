"""What a task gives the system, prompts with verifiable answers in a fixed order for a seed; and by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

from system import plugins
from system.config import Config, ConfigError
from system.rollout.reward import Reward
from system.tasks.vocabulary import unknown_tokens
from system.tree.prompt import Prompt


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A supervised trajectory: alternating model and tool text after the prompt."""

    prompt: Prompt
    segments: tuple[tuple[str, str], ...]  # (("model", text), ("tool", text), ...)


class Task(Protocol):
    """A source of prompts."""

    name: str

    def train(self) -> Sequence[Prompt]:
        """Training prompts; the run shuffles them by its own seed, epoch by epoch."""
        ...

    def eval(self) -> Sequence[Prompt]:
        """Held-out prompts."""
        ...


def make_task(config: Config) -> Task:
    """The configured task, one of :data:`plugins.TASKS` or one's own as ``package.module:Name``.

    One's own is any callable that takes the :class:`Config`, and ``task.options`` as keywords, and returns a
    :class:`Task`.  Raises :class:`ConfigError` naming the key and the remedy.
    """
    return cast(Task, plugins.TASKS.make(config.task.name, config.task.options, config))


def first(questions: Sequence[Prompt], most: int) -> Sequence[Prompt]:
    """The first so many; below 0: all."""
    return questions if most < 0 else questions[:most]


def sizes(config: Config) -> tuple[int, int]:
    """How many training and held-out questions a task is to make that makes them itself."""
    train, held_out = config.task.train_size, config.task.eval_size
    enough = max(200, config.eval.questions)
    return (4096 if train < 0 else train), (enough if held_out < 0 else held_out)


def notes(config: Config, task: Task, *, training: bool = True) -> list[str]:
    """What is to be said of a task's data, before a run begins, or an evaluation alone: a line each."""
    told = task.notes() if isinstance(task, HasNotes) else []
    # A task that makes its questions makes them when asked: only where there is something to look at.
    wanted = config.eval.questions
    if wanted > 0 and (held_out := len(task.eval())) < wanted:
        told.append(
            f"eval.questions={wanted}: there are only {held_out} held-out questions, and all are asked"
        )
    asked = task.train if training else task.eval
    if config.model.path and (unknown := unknown_tokens(config.model.path, asked())):
        told.append(str(unknown))
    return told


def task_reward(config: Config) -> Reward:
    """``reward.name=task``: the task scores its own answers."""
    return own_reward(make_task(config))


def own_reward(task: Task) -> Reward:
    """``task`` as the reward that it is.  Raises :class:`ConfigError` for one that is none."""
    if not hasattr(task, "score"):
        raise ConfigError(f"reward.name=task, but the task {task.name!r} has no score(prompt, branch)")
    return cast(Reward, task)


# What a task may bring besides its prompts.


@runtime_checkable
class HasCorpus(Protocol):
    def corpus(self) -> list[dict[str, str]]:
        """Documents {"id", "title", "text"} for the search tool."""
        ...


@runtime_checkable
class HasTokenizer(Protocol):
    def tokenizer(self) -> Any:
        """A Hugging Face tokenizer made for this task, for a new tiny model."""
        ...


@runtime_checkable
class HasNotes(Protocol):
    def notes(self) -> list[str]:
        """What was taken of the data and what was left out, a line each, for people."""
        ...


@runtime_checkable
class HasDemonstrations(Protocol):
    def demonstrations(self, n: int, seed: int) -> list[Demonstration]:
        """Supervised trajectories for a warm start."""
        ...
