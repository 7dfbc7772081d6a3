"""The quickstart task: questions over a generated world, its search corpus, tokenizer and demonstrations."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache, cached_property

from transformers import PreTrainedTokenizerFast

from system.config import Config
from system.tasks.base import Demonstration, sizes
from system.tasks.quickstart import questions, vocabulary
from system.tasks.quickstart.expert import Skill, demonstrate
from system.tasks.quickstart.world import GeneratedWorld, generate
from system.tools.search_index import Document, SearchIndex
from system.tree.prompt import Prompt


class QuickstartTask:
    """Everything follows from ``seed``.  Held-out questions are drawn first; no other split repeats one."""

    name = "quickstart"

    def __init__(self, config: Config, right: float = 0.4, slip: float = 0.45) -> None:
        """``right``, ``slip``: the chances of the expert whose demonstrations warm the model up."""
        self.seed = config.run.seed
        self.train_size, self.eval_size = sizes(config)
        self.search_top_k = config.tools.search_top_k  # for demonstrations
        self.skill = Skill(right, slip)
        self.world: GeneratedWorld = generate(self.seed)

    @cached_property
    def _held_out(self) -> list[questions.Question]:
        return questions.sample(f"eval-{self.seed}", self.eval_size)

    def eval(self) -> list[Prompt]:
        return [questions.prompt(q, self.world, "eval", i) for i, q in enumerate(self._held_out)]

    def train(self) -> list[Prompt]:
        drawn = questions.sample(f"train-{self.seed}", self.train_size, self._held_out_texts())
        return [questions.prompt(q, self.world, "train", i) for i, q in enumerate(drawn)]

    def corpus(self) -> list[dict[str, str]]:
        """Documents for the search server."""
        return self.world.documents()

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return vocabulary.build()

    def demonstrations(self, n: int, seed: int) -> list[Demonstration]:
        """``n`` trajectories of the imperfect expert on questions that are not held out."""
        drawn = questions.sample(f"demonstrations-{self.seed}-{seed}", n, self._held_out_texts())
        rng = random.Random(f"expert-{self.seed}-{seed}")
        world, search, split = self.world, self._search_tool(), f"demonstration-{seed}"
        return [
            demonstrate(question, questions.prompt(question, world, split, i), world, search, self.skill, rng)
            for i, question in enumerate(drawn)
        ]

    def _held_out_texts(self) -> frozenset[str]:
        return frozenset(question.text for question in self._held_out)

    def _search_tool(self) -> Callable[[str], str]:
        """Query -> text of the search tool, by the search server's index and in the tool's default form."""
        index = SearchIndex.build(Document(**row) for row in self.corpus())

        @cache
        def search(query: str) -> str:
            hits = index.search(query, self.search_top_k)
            return "\n".join(f"{hit.document.title}: {hit.document.text}" for hit in hits)

        return search
