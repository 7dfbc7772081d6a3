"""A task of several commands: put files into the directories that they name.

    Q: tidy 271828 ?

    $ cat one                     red
    $ mv -t red one; cat two      blue
    $ mv -t blue two

The files are there for the model's commands alone, and stay moved: a branch that forks takes a copy of them
along.  Whether all is in its place, commands say that the model never sees::

    cd examples; espalier train tidy.yaml
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from system.config import Config
from system.rollout.syntax.tags import TagSyntax
from system.tasks import tiny_tokenizer
from system.tasks.base import Demonstration
from system.tasks.generated import GeneratedTask
from system.tasks.skill import Skill
from system.tree.prompt import Prompt

NAMES = ("one", "two")
PLACES = ("red", "green", "blue", "grey")


@dataclass(frozen=True, slots=True)
class Mess:
    """A question; all of it follows from its number."""

    number: int
    kind: str = "tidy"

    @property
    def places(self) -> dict[str, str]:
        """Where each file belongs, which is what it says."""
        rng = random.Random(f"tidy {self.number}")
        return {name: rng.choice(PLACES) for name in NAMES}

    @property
    def text(self) -> str:
        return f"Q: tidy {self.number} ?"


class Tidying(GeneratedTask[Mess]):
    """The task: questions with files, demonstrations of an imperfect expert, and a tokenizer."""

    name = "tidying"

    def __init__(self, config: Config, right: float = 0.4, slip: float = 0.45) -> None:
        """``right``, ``slip``: the chances of the expert to take the right place and, its habit, the next."""
        super().__init__(config, Skill(right, slip))

    def draw(self, rng: random.Random) -> Mess:
        return Mess(rng.randrange(100_000, 1_000_000))

    def answer(self, question: Mess) -> str:
        return "tidy"

    def extra(self, question: Mess) -> dict[str, Any]:
        """What ``environment=bash`` begins with, and how it finds out at the end whether it is right."""
        return {
            "files": question.places,
            "setup": f"mkdir {' '.join(PLACES)}",
            "check": " && ".join(f"test -f {place}/{name}" for name, place in question.places.items()),
        }

    def demonstrate(self, question: Mess, prompt: Prompt, skill: Skill, rng: random.Random) -> Demonstration:
        commands, answers = [f"cat {NAMES[0]}"], [*question.places.values()]
        for i, (name, place) in enumerate(question.places.items()):
            then = f"; cat {NAMES[i + 1]}" if i + 1 < len(NAMES) else ""
            commands.append(f"mv -t {skill.choose(place, PLACES, rng)} {name}{then}")
        segments = list[tuple[str, str]]()
        for command, answer in zip(commands, [*answers, ""], strict=True):
            segments.append(("model", f" <bash> {command} </bash>"))
            segments.append(("tool", TagSyntax({}).render_result(answer)))
        return Demonstration(prompt, (*segments, ("model", " <answer> tidy </answer>")))

    def tokenizer(self):
        words = [*NAMES, *PLACES, *(f" {word}" for word in (*NAMES, *PLACES, "cat", "mv -t", "tidy")), ";"]
        parts = [*tiny_tokenizer.syntax("bash"), *words, "Q: tidy ", " ?", " ", *tiny_tokenizer.numbers()]
        return tiny_tokenizer.build(parts)
