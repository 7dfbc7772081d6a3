"""Questions of two or three hops over documents of which names do not say which is meant.

Persons live in places, places are told of in works, works are by persons; but the names are taken from one
pool, so that a name may be that of a place and a person.  A document names entities without their kind, and
shows some of its kind's fields in an order of its own::

    place Corwin: Corwin map: Almouth legend: Halkeep hymn: Corda

(It says its own name twice, which ranks it before those that mention a namesake.)
At every step the model chooses twice: of what kind the entity is that it searches for (a wrong kind finds a
namesake, or a document that mentions the name, if there is one), and which field of the document it follows,
or that it searches again because the field is not there.  Where that is hard follows from the documents.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerFast

from system.config import Config
from system.rollout.syntax.tags import TagSyntax
from system.tasks import tiny_tokenizer
from system.tasks.base import Demonstration
from system.tasks.generated import GeneratedTask, search_tool
from system.tasks.skill import Skill
from system.tree.prompt import Prompt

KINDS = ("person", "place", "work")  # of which each links to the next, the last to the first
FIELDS = {  # of a kind: label in the document -> word in the question
    "person": {"born": "birthplace", "home": "residence", "tomb": "grave", "school": "college"},
    "place": {"hymn": "anthem", "legend": "myth", "map": "chart", "play": "drama"},
    "work": {"author": "writer", "hero": "protagonist", "critic": "reviewer", "patron": "sponsor"},
}
AGAIN = "again"  # in place of a field: search once more
SHOWN = 3  # fields of a document
HOPS = (2, 2, 3)  # lengths of questions, each as likely
ENTITIES = 40  # of each kind
NAMES = tuple(
    first + last
    for first in ("Al", "Bren", "Cor", "Dar", "El", "Fen", "Gor", "Hal")
    for last in ("da", "mouth", "win", "keep", "fall", "song", "mira", "gate")
)


@dataclass(frozen=True, slots=True)
class Chain:
    """``start``, an entity of the kind ``kind``, and the labels of the fields to follow from it."""

    first: str
    start: str
    path: tuple[str, ...]

    @property
    def kind(self) -> str:
        return f"{len(self.path)} hops"

    @property
    def text(self) -> str:
        """``Q: person Corda 's residence 's myth ?``"""
        asked = (f" 's {FIELDS[kind][field]}" for kind, field in zip(self.kinds, self.path, strict=False))
        return f"Q: {self.first} {self.start}{''.join(asked)} ?"

    @property
    def kinds(self) -> list[str]:
        """Of every entity on the way, the answer included."""
        first = KINDS.index(self.first)
        return [KINDS[(first + hop) % len(KINDS)] for hop in range(len(self.path) + 1)]


class HopsTask(GeneratedTask[Chain]):
    name = "hops"

    def __init__(self, config: Config, right: float = 0.42, slip: float = 0.48) -> None:
        """``right``, ``slip``: the expert's chances, the same wherever it chooses."""
        super().__init__(config, Skill(right, slip))
        self.top_k, self.call_limit = config.tools.search_top_k, config.rollout.call_limit
        rng = random.Random(f"hops-world-{self.seed}")
        names = {kind: rng.sample(NAMES, ENTITIES) for kind in KINDS}
        self.facts: dict[tuple[str, str], dict[str, str]] = {}  # (kind, name) -> field -> name
        for kind, target in zip(KINDS, (*KINDS[1:], KINDS[0]), strict=True):
            for name in names[kind]:
                fields = rng.sample([*FIELDS[kind]], SHOWN)
                self.facts[kind, name] = dict(zip(fields, rng.sample(names[target], SHOWN), strict=True))

    def draw(self, rng: random.Random) -> Chain:
        first, start = rng.choice([*self.facts])
        kinds = Chain(first, start, ("",) * rng.choice(HOPS)).kinds
        name, path = start, list[str]()
        for kind in kinds[:-1]:
            path.append(rng.choice([*self.facts[kind, name]]))
            name = self.facts[kind, name][path[-1]]
        return Chain(first, start, tuple(path))

    def answer(self, question: Chain) -> str:
        name = question.start
        for kind, field in zip(question.kinds, question.path, strict=False):
            name = self.facts[kind, name][field]
        return name

    def corpus(self) -> list[dict[str, str]]:
        """Documents for the search server, shown to the model as ``{title}: {text}``."""
        return [
            {
                "id": f"{kind}/{name}",
                "title": f"{kind} {name}",
                "text": " ".join([name, *(f"{field}: {value}" for field, value in fields.items())]),
            }
            for (kind, name), fields in self.facts.items()
        ]

    def demonstrate(self, question: Chain, prompt: Prompt, skill: Skill, rng: random.Random) -> Demonstration:
        render = TagSyntax({}).render_result
        segments: list[tuple[str, str]] = []
        said, name, hop = f" <think> {question.start}", question.start, 0
        while hop < len(question.path) and len(segments) < 2 * self.call_limit:
            field = question.path[hop]
            kind = question.kinds[hop]
            if segments:  # else the question says it
                kind = skill.choose(kind, KINDS, rng)
            found = self.search(f"{kind} {name}")
            segments.append(("model", f"{said} </think> <search> {kind} {name} </search>"))
            segments.append(("tool", render(found)))
            shown = read(found)
            options = [known for fields in FIELDS.values() for known in fields if known in shown]
            taken = skill.choose(field if field in shown else AGAIN, [*options, AGAIN], rng)
            hop, name = (hop, name) if taken == AGAIN else (hop + 1, shown[taken])
            word = FIELDS[question.kinds[hop if taken == AGAIN else hop - 1]][field]
            said = f" <think> {word} {AGAIN if taken == AGAIN else f'{taken}:'} {name}"
        segments.append(("model", f"{said} </think> <answer> \\boxed{{ {name} }} </answer>"))
        return Demonstration(prompt, tuple(segments))

    def tokenizer(self) -> PreTrainedTokenizerFast:
        pieces = [*tiny_tokenizer.syntax("search"), "Q:", " 's", " ?", " \\boxed{", " }", ":", f" {AGAIN}"]
        for kind, fields in FIELDS.items():
            pieces += [kind, f" {kind}"]  # at the start of a document, and elsewhere
            pieces += [piece for field, word in fields.items() for piece in (f" {field}:", f" {word}")]
        return tiny_tokenizer.build([*pieces, *(f" {name}" for name in NAMES)])

    @cached_property
    def search(self) -> Callable[[str], str]:
        """Query -> what the search tool answers."""
        return search_tool(self.corpus(), self.top_k)


def read(found: str) -> dict[str, str]:
    """Field -> name, of the first document of a result of the search tool."""
    _, _, text = found.partition("\n")[0].partition(": ")
    _, *words = text.split()
    return {label.removesuffix(":"): name for label, name in zip(words[::2], words[1::2], strict=True)}
