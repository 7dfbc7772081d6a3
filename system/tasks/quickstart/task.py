"""The quickstart task: questions over a generated world, its search corpus, tokenizer and demonstrations."""

from __future__ import annotations

import random
from functools import cached_property

from transformers import PreTrainedTokenizerFast

from system.config import Config
from system.tasks.base import Demonstration
from system.tasks.generated import GeneratedTask, search_tool
from system.tasks.quickstart import questions, vocabulary
from system.tasks.quickstart.expert import demonstrate
from system.tasks.quickstart.world import GeneratedWorld, generate
from system.tasks.skill import Skill
from system.tree.prompt import Prompt


class QuickstartTask(GeneratedTask[questions.Question]):
    """See :mod:`.questions`."""

    name = "quickstart"

    def __init__(self, config: Config, right: float = 0.4, slip: float = 0.45) -> None:
        """``right``, ``slip``: the chances of the expert whose demonstrations warm the model up."""
        super().__init__(config, Skill(right, slip))
        self.search_top_k = config.tools.search_top_k  # for demonstrations
        self.world: GeneratedWorld = generate(self.seed)

    def draw(self, rng: random.Random) -> questions.Question:
        kinds = questions.KINDS
        return questions.draw(rng.choices(list(kinds), list(kinds.values()))[0], rng)

    def answer(self, question: questions.Question) -> str:
        return question.answer(self.world)

    def demonstrate(
        self, question: questions.Question, prompt: Prompt, skill: Skill, rng: random.Random
    ) -> Demonstration:
        return demonstrate(question, prompt, self.world, self._search, skill, rng)

    def corpus(self) -> list[dict[str, str]]:
        """Documents for the search server."""
        return self.world.documents()

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return vocabulary.build()

    @cached_property
    def _search(self):
        return search_tool(self.corpus(), self.search_top_k)
