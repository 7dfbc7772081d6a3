"""Tasks whose questions are drawn from a seed: splits that share none, and an expert's demonstrations."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import cache, cached_property
from typing import Any, Generic, Protocol, TypeVar

from system.config import Config, ConfigError
from system.tasks.base import Demonstration, sizes
from system.tasks.skill import Skill
from system.tools.search_index import Document, SearchIndex
from system.tree.prompt import Prompt

_MOST_MISSES = 10_000  # repeated questions in a row, after which there are taken to be no others


class Drawn(Protocol):
    @property
    def kind(self) -> str: ...

    @property
    def text(self) -> str:
        """What the prompt says; questions of one text are one question."""
        ...


Q = TypeVar("Q", bound=Drawn)


class GeneratedTask(ABC, Generic[Q]):
    """All follows from ``run.seed``.  Held-out questions are drawn first; no other split repeats one."""

    name: str

    def __init__(self, config: Config, skill: Skill) -> None:
        """``skill``: of the expert whose demonstrations warm the model up."""
        self.seed, self.skill, self.guided = config.run.seed, skill, config.guide.shows
        self.train_size, self.eval_size = sizes(config)

    @abstractmethod
    def draw(self, rng: random.Random) -> Q:
        """A random question."""

    @abstractmethod
    def answer(self, question: Q) -> str:
        """The right answer."""

    @abstractmethod
    def demonstrate(self, question: Q, prompt: Prompt, skill: Skill, rng: random.Random) -> Demonstration:
        """How an expert of ``skill`` answers, with the texts that the real tools return."""

    def extra(self, question: Q) -> dict[str, Any]:
        """What an environment is told of the question; as JSON."""
        return {}

    def key(self, question: Q, index: int) -> str:
        """The end of the prompt's id: what a tool may know of the question."""
        return str(index)

    @cached_property
    def held_out(self) -> list[Q]:
        return self._different(f"eval-{self.seed}", self.eval_size)

    def eval(self) -> list[Prompt]:
        return self._prompts("eval", self.held_out)

    def train(self) -> list[Prompt]:
        """Where trees may be guided, each with a demonstration of an expert that makes no mistake."""
        questions = self._new(f"train-{self.seed}", self.train_size)
        prompts = self._prompts("train", questions)
        if not self.guided:
            return prompts
        perfect, rng = Skill(right=1.0), random.Random(f"guide-{self.seed}")
        shown = (self.demonstrate(q, p, perfect, rng) for q, p in zip(questions, prompts, strict=True))
        return [replace(one.prompt, demonstration=one.segments) for one in shown]

    def demonstrations(self, n: int, seed: int) -> list[Demonstration]:
        """``n`` trajectories of the imperfect expert on questions that are not held out."""
        drawn = self._new(f"demonstrations-{self.seed}-{seed}", n)
        rng = random.Random(f"expert-{self.seed}-{seed}")
        prompts = self._prompts(f"demonstration-{seed}", drawn)
        return [self.demonstrate(q, p, self.skill, rng) for q, p in zip(drawn, prompts, strict=True)]

    def _prompts(self, split: str, questions: list[Q]) -> list[Prompt]:
        return [
            Prompt(
                id=f"{self.name}/{split}/{self.key(question, i)}",
                messages=({"role": "user", "content": question.text},),
                answers=(self.answer(question),),
                kind=question.kind,
                extra=self.extra(question),
            )
            for i, question in enumerate(questions)
        ]

    def _new(self, seed: str, n: int) -> list[Q]:
        return self._different(seed, n, frozenset(question.text for question in self.held_out))

    def _different(self, seed: str, n: int, exclude: frozenset[str] = frozenset()) -> list[Q]:
        """``n`` different questions, none of whose texts is in ``exclude``.

        Raises ConfigError when too few are found.
        """
        rng = random.Random(seed)
        seen = set(exclude)
        found: list[Q] = []
        misses = 0
        while len(found) < n:
            question = self.draw(rng)
            if question.text in seen:
                misses += 1
                if misses == _MOST_MISSES:
                    raise ConfigError(
                        f"cannot draw {n} different questions, only {len(found)} found: lower "
                        "task.train_size, task.eval_size or warmstart.demos"
                    )
                continue
            misses = 0
            seen.add(question.text)
            found.append(question)
        return found


def search_tool(corpus: list[dict[str, str]], top_k: int) -> Callable[[str], str]:
    """Query -> text of the search tool, by the search server's index and in the tool's default form."""
    index = SearchIndex.build(Document(**row) for row in corpus)

    @cache
    def search(query: str) -> str:
        hits = index.search(query, top_k)
        return "\n".join(f"{hit.document.title}: {hit.document.text}" for hit in hits)

    return search
