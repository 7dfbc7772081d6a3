"""A small generated world: people, places and works, and the documents that describe them.

Every entity has two documents: a *profile* that links it to three entities of the next type, and *figures*
with three numbers, each under labels drawn from many.  Types follow each other in a circle (person, place,
work, person), so that a chain of questions never meets the same type twice within three hops, and so that a
search which names the type and the entity ("place Tolmouth") ranks the profile of exactly that entity first,
before the documents that only mention it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Relation:
    """One field of a document, which questions ask for by its label."""

    field: str
    owner: str  # type of the entity that has it
    target: str  # type of the entity it names; "" for a number

    @property
    def numeric(self) -> bool:
        return not self.target


TYPES = ("person", "place", "work")
FIGURES = "figures"
"""First word of the documents with numbers, as a type's name is the first word of its profiles."""

FIGURE_RANGE = range(20, 80)

_NEXT = {"person": "place", "place": "work", "work": "person"}
_LINKS = {
    "person": "birthplace home tomb school prison farm harbor temple court garden camp shop villa chapel "
    "studio tavern",
    "place": "anthem legend map statue mural chronicle ballad charter festival mosaic fresco opera pageant "
    "tapestry proverb carol",
    "work": "author hero critic patron editor singer villain printer translator narrator muse rival owner "
    "teacher painter witness",
}
_NUMBERS = {
    "person": "age medals debts horses letters rings votes wounds cousins journeys coins duels",
    "place": "towers bridges wells gates mills parks inns squares docks streets ovens bells",
    "work": "pages songs scenes chapters masks verses copies jokes riddles dreams battles storms",
}
LINKS = {t: tuple(Relation(f, t, _NEXT[t]) for f in _LINKS[t].split()) for t in TYPES}
"""What a profile may say, by the owner's type; each entity's says three of these."""
NUMBERS = {t: tuple(Relation(f, t, "") for f in _NUMBERS[t].split()) for t in TYPES}
"""What figures may say; each entity's say three of these."""

_SYLLABLES = {
    "person": (("Al", "Bren", "Cor", "Dar", "El", "Fen", "Gor", "Hal"), ("da", "ric", "win", "mira", "sa")),
    "place": (
        ("Tol", "Vas", "Kar", "Nor", "Pel", "Rud", "Sil", "Zan"),
        ("mouth", "keep", "ford", "holm", "dale"),
    ),
    "work": (
        ("Dusk", "Ember", "Frost", "Gale", "Iron", "Lark", "Moon", "Rain"),
        ("song", "fall", "gate", "wake", "light"),
    ),
}
NAMES = {t: tuple(a + b for a in _SYLLABLES[t][0] for b in _SYLLABLES[t][1]) for t in TYPES}
"""The inventory of names, the same for every seed (the tokenizer knows each as one token): 40 of each
type."""


@dataclass(frozen=True)
class World:
    """The facts."""

    links: dict[str, dict[Relation, str]]  # entity -> what its profile says, in order
    numbers: dict[str, dict[Relation, int]]  # entity -> what its figures say, in order

    def value(self, entity: str, relation: Relation) -> str:
        """What the documents say under ``relation`` about ``entity``, as text."""
        return str(self.numbers[entity][relation]) if relation.numeric else self.links[entity][relation]

    def relations(self, entity: str, numeric: bool) -> tuple[Relation, ...]:
        """The fields of an entity's figures (``numeric``) or profile, in the document's order."""
        return tuple(self.numbers[entity] if numeric else self.links[entity])

    def profile(self, kind: str, entity: str) -> dict[str, str]:
        """``person Alda: birthplace Tolmouth school Karkeep tomb Zandale``, as a document."""
        return _document(kind, entity, self.links[entity])

    def figures(self, entity: str) -> dict[str, str]:
        """``figures Alda: age 47 medals 22 debts 63``, as a document."""
        return _document(FIGURES, entity, self.numbers[entity])

    def documents(self) -> list[dict[str, str]]:
        """The corpus of the search server: ``{"id", "title", "text"}``, shown to the model as
        ``{title}: {text}``."""
        return [
            document
            for kind in TYPES
            for name in NAMES[kind]
            for document in (self.profile(kind, name), self.figures(name))
        ]


def _document(first_word: str, entity: str, fields: Mapping[Relation, object]) -> dict[str, str]:
    text = " ".join(f"{relation.field} {value}" for relation, value in fields.items())
    return {"id": f"{first_word}/{entity}", "title": f"{first_word} {entity}", "text": text}


def generate(seed: int) -> World:
    """Facts drawn from ``seed``: three links to different entities and three different numbers per entity."""
    rng = random.Random(f"world-{seed}")
    links: dict[str, dict[Relation, str]] = {}
    numbers: dict[str, dict[Relation, int]] = {}
    for kind in TYPES:
        for name in NAMES[kind]:
            links[name] = dict(
                zip(rng.sample(LINKS[kind], 3), rng.sample(NAMES[_NEXT[kind]], 3), strict=True)
            )
            numbers[name] = dict(zip(rng.sample(NUMBERS[kind], 3), rng.sample(FIGURE_RANGE, 3), strict=True))
    return World(links, numbers)
