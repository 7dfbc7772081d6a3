"""A task of one's own: sums that python does and the model has to set up.

    Q: 47 plus 8 less 6 ?

The model writes one program for the first step, reads what it printed, and writes another for the second.
The demonstrations take the wrong operator more often than not, so there is something to learn::

    cd examples; espalier train sums.yaml
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from system.config import Config
from system.rollout.reward import BranchView, Score
from system.rollout.syntax.tags import TagSyntax
from system.tasks import tiny_tokenizer
from system.tasks.base import Demonstration
from system.tasks.generated import GeneratedTask
from system.tasks.skill import Skill
from system.tree.prompt import Prompt

OPERATORS = {"plus": "+", "less": "-", "over": "//"}


@dataclass(frozen=True, slots=True)
class Sum:
    """A question: three numbers and the two words between them."""

    numbers: tuple[int, int, int]
    words: tuple[str, str]

    @property
    def kind(self) -> str:  # accuracy is told apart by it
        return self.words[1]

    @property
    def text(self) -> str:
        (a, b, c), (first, second) = self.numbers, self.words
        return f"Q: {a} {first} {b} {second} {c} ?"


class Sums(GeneratedTask[Sum]):
    """Questions, gold answers, a score; and, for a tiny model made here, demonstrations and a tokenizer."""

    name = "sums"

    def __init__(self, config: Config, right: float = 0.45, slip: float = 0.35) -> None:
        """``task.options``: how often the demonstrations take the right operator, and the next one."""
        super().__init__(config, Skill(right, slip))

    def draw(self, rng: random.Random) -> Sum:
        numbers = (rng.randint(20, 80), rng.randint(2, 9), rng.randint(2, 9))
        return Sum(numbers, (rng.choice([*OPERATORS]), rng.choice([*OPERATORS])))

    def answer(self, question: Sum) -> str:
        (a, b, c), (first, second) = question.numbers, question.words
        return str(calculate(calculate(a, OPERATORS[first], b), OPERATORS[second], c))

    def score(self, prompt: Prompt, branch: BranchView) -> Score:
        """What ``reward=task`` asks: 1 for the gold answer, and a tenth for any answer at all."""
        given = re.findall(r"\\boxed\{(-?\d+) ?\}", branch.model_text)
        right = given[-1:] == [prompt.answers[0]]
        return Score(1.0 if right else 0.1 if given else 0.0, right)

    def demonstrate(self, question: Sum, prompt: Prompt, skill: Skill, rng: random.Random) -> Demonstration:
        value, *others = question.numbers
        segments: list[tuple[str, str]] = []
        for word, number in zip(question.words, others, strict=True):
            taken = skill.choose(OPERATORS[word], [*OPERATORS.values()], rng)
            segments.append(("model", f" <python> print({value}{taken}{number}) </python>"))
            value = calculate(value, taken, number)
            segments.append(("tool", TagSyntax({}).render_result(str(value))))
        segments.append(("model", f" <answer> \\boxed{{{value} }} </answer>"))
        return Demonstration(prompt, tuple(segments))

    def tokenizer(self):
        words = ["Q:", *(f" {word}" for word in OPERATORS), " ?", " print(", *OPERATORS.values(), ")"]
        words += [" ", " \\boxed{", " }"]
        return tiny_tokenizer.build([*tiny_tokenizer.syntax("python"), *words, *tiny_tokenizer.numbers()])


def calculate(left: int, operator: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "//": left // right}[operator]
