"""A game with state: walk through a city to a place that only a compass shows.

    Q: walk 271828 ?

    north

The environment keeps where the walker stands; nothing in a call tells it.  The compass shows, from there, the
way on which most is left to go.  A branch that forks takes a copy of its walker along, so siblings walk on
from the same crossing, each by itself::

    cd examples; espalier train walk.yaml
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal

from system.config import Config
from system.envs.protocol import Message, Observation
from system.rollout.planting import opened
from system.rollout.syntax.tags import TagSyntax
from system.tasks import tiny_tokenizer
from system.tasks.base import Demonstration
from system.tasks.generated import GeneratedTask
from system.tasks.skill import Skill
from system.tree.prompt import Prompt

STEPS = 5  # rollout.call_limit of walk.yaml
WAYS = {"north": (0, 1), "east": (1, 0), "south": (0, -1), "west": (-1, 0)}


class City:
    """The environment: a plain class.  ``walk`` is its tool; other methods have a meaning of their own."""

    fork = "deepcopy"

    def reset(self, prompt: Prompt) -> str:
        """Put the walker at the start; what is returned joins the prompt."""
        self.east, self.north = Walk(int(prompt.id.rpartition("/")[2])).way  # what is left to go
        return self.compass

    def walk(self, way: Literal["north", "east", "south", "west"]) -> Observation:
        """Go to the next crossing and look at the compass.

        way: where to
        """
        east, north = WAYS[way]
        before = self.left
        self.east, self.north = self.east - east, self.north - north
        shown = "there" if self.done else self.compass
        return Observation((Message(shown),), reward=0.1 * (before - self.left))  # or only the text

    @property
    def done(self) -> bool:
        """The walker has arrived: the branch ends here."""
        return self.left == 0

    def reward(self) -> float:
        """What ``reward=environment`` takes of the world as the branch left it."""
        return float(self.done)

    @property
    def left(self) -> int:
        return abs(self.east) + abs(self.north)

    @property
    def compass(self) -> str:
        if abs(self.north) >= abs(self.east):
            return "north" if self.north > 0 else "south"
        return "east" if self.east > 0 else "west"


@dataclass(frozen=True, slots=True)
class Walk:
    """A question; all of it follows from its number."""

    number: int

    @property
    def way(self) -> tuple[int, int]:
        """How far to the east and to the north, 2 to 4 crossings together."""
        rng = random.Random(f"walk {self.number}")
        far = rng.randint(2, STEPS - 1)
        east = rng.randint(0, far)
        return east * rng.choice((-1, 1)), (far - east) * rng.choice((-1, 1))

    @property
    def kind(self) -> str:
        return f"{sum(map(abs, self.way))} crossings"

    @property
    def text(self) -> str:
        return f"Q: walk {self.number} ?"


class Walks(GeneratedTask[Walk]):
    """The task: questions, demonstrations of an imperfect expert, and a tokenizer for a tiny model."""

    name = "walks"

    def __init__(self, config: Config, right: float = 0.4, slip: float = 0.45) -> None:
        """``right``, ``slip``: the chances of the expert to follow the compass and, its habit, to turn right
        from there.
        """
        super().__init__(config, Skill(right, slip))

    def draw(self, rng: random.Random) -> Walk:
        return Walk(rng.randrange(100_000, 1_000_000))

    def answer(self, question: Walk) -> str:
        return "there"

    def key(self, question: Walk, index: int) -> str:
        return str(question.number)  # by which the environment knows the way

    def demonstrate(self, question: Walk, prompt: Prompt, skill: Skill, rng: random.Random) -> Demonstration:
        city, segments = City(), list[tuple[str, str]]()
        prompt = opened(prompt, city.reset(prompt))  # as the environment will have it
        while not city.done and len(segments) < 2 * STEPS:
            way = skill.choose(city.compass, list(WAYS), rng)
            shown = city.walk(way).messages[0].text
            segments.append(("model", f" <walk> {way} </walk>"))
            segments.append(("tool", TagSyntax({}).render_result(shown)))
        return Demonstration(prompt, tuple(segments[:-1]))  # it ends with the last step

    def tokenizer(self):
        words = [*WAYS, *(f" {way}" for way in WAYS), "there", "\n\n", "Q: walk ", " ?", " "]
        return tiny_tokenizer.build([*tiny_tokenizer.syntax("walk"), *words, *tiny_tokenizer.numbers()])


_SETUP = """
east, north = {way}

def look():
    if not (east or north):
        print({house})
    elif abs(north) >= abs(east):
        print("north" if north > 0 else "south")
    else:
        print("east" if east > 0 else "west")

def walk(way):
    global east, north
    to_east, to_north = {ways}[way]
    east, north = east - to_east, north - to_north
    look()
"""


class PythonWalks(Walks):
    """The same walk in the interpreter of ``environment=python``, which keeps where the walker stands; at the
    end the number of a house is seen, which is the answer (walk_python.yaml).
    """

    def answer(self, question: Walk) -> str:
        return str(random.Random(f"house {question.number}").randint(1, 9))

    def extra(self, question: Walk) -> dict[str, Any]:
        setup = _SETUP.format(way=question.way, house=self.answer(question), ways=WAYS)
        return {"setup": setup}

    def demonstrate(self, question: Walk, prompt: Prompt, skill: Skill, rng: random.Random) -> Demonstration:
        city, render, segments = City(), TagSyntax({}).render_result, list[tuple[str, str]]()
        shown = city.reset(prompt)
        segments += [("model", " <think> </think> <python> look() </python>"), ("tool", render(shown))]
        while not city.done and len(segments) < 2 * (STEPS + 2):
            way = skill.choose(city.compass, list(WAYS), rng)
            city.walk(way)
            shown = self.answer(question) if city.done else city.compass
            segments += [("model", f" <python> walk('{way}') </python>"), ("tool", render(shown))]
        house = shown if city.done else "0"
        return Demonstration(prompt, (*segments, ("model", f" <answer> \\boxed{{{house}}} </answer>")))

    def tokenizer(self):
        words = [*WAYS, " look()", " walk('", "')", "Q: walk ", " ?", " ", " \\boxed{", "}"]
        return tiny_tokenizer.build([*tiny_tokenizer.syntax("python"), *words, *tiny_tokenizer.numbers()])
