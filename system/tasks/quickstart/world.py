"""A small generated world: people, places and works, and the documents that describe them.

Every entity has two documents: a *profile* that links it to three entities of the next type, and *figures*
with three numbers.  Types follow each other in a circle (person -> place -> work -> person), so that a chain
of questions never meets the same type twice within three hops, and so that a search which names the type and
the entity ("place Tolm") ranks the profile of exactly that entity first, before the documents that only
mention it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Relation:
    """One field of a document, and the word by which questions ask for it."""

    field: str  # label in the document
    word: str  # word in the question
    owner: str  # type of the entity that has it
    target: str  # type of the entity it names; "" for a number

    @property
    def numeric(self) -> bool:
        return not self.target


TYPES = ("person", "place", "work")
FIGURES = "figures"
"""First word of the documents with numbers, as a type's name is the first word of its profiles."""

FIGURE_RANGE = range(20, 80)

_FIELDS = {
    "person": (("born", "birthplace"), ("home", "residence"), ("tomb", "grave")),
    "place": (("hymn", "anthem"), ("legend", "myth"), ("map", "chart")),
    "work": (("author", "writer"), ("hero", "protagonist"), ("critic", "reviewer")),
}
_NUMBERS = {
    "person": (("age", "years"), ("medals", "prizes"), ("debts", "loans")),
    "place": (("towers", "spires"), ("bridges", "crossings"), ("wells", "springs")),
    "work": (("pages", "leaves"), ("songs", "tunes"), ("scenes", "acts")),
}
_NEXT = {"person": "place", "place": "work", "work": "person"}

LINKS = {t: tuple(Relation(f, w, t, _NEXT[t]) for f, w in _FIELDS[t]) for t in TYPES}
NUMBERS = {t: tuple(Relation(f, w, t, "") for f, w in _NUMBERS[t]) for t in TYPES}

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
class GeneratedWorld:
    """The facts.  ``links`` and ``numbers`` map (entity, field) to another entity's name or to a number."""

    links: dict[tuple[str, str], str]
    numbers: dict[tuple[str, str], int]

    def value(self, entity: str, relation: Relation) -> str:
        """What the documents say under ``relation`` about ``entity``, as text."""
        key = (entity, relation.field)
        return str(self.numbers[key]) if relation.numeric else self.links[key]

    def profile(self, kind: str, entity: str) -> dict[str, str]:
        """``person Alda: born: Tolmouth home: Karkeep tomb: Zandale``, as a document."""
        fields = " ".join(f"{r.field}: {self.links[entity, r.field]}" for r in LINKS[kind])
        return {"id": f"{kind}/{entity}", "title": f"{kind} {entity}", "text": fields}

    def figures(self, kind: str, entity: str) -> dict[str, str]:
        """``figures Alda: age:47 medals:22 debts:63``, as a document."""
        fields = " ".join(f"{r.field}:{self.numbers[entity, r.field]}" for r in NUMBERS[kind])
        return {"id": f"{FIGURES}/{entity}", "title": f"{FIGURES} {entity}", "text": fields}

    def documents(self) -> list[dict[str, str]]:
        """The corpus of the search server: ``{"id", "title", "text"}``, shown to the model as
        ``{title}: {text}``."""
        return [
            document
            for kind in TYPES
            for name in NAMES[kind]
            for document in (self.profile(kind, name), self.figures(kind, name))
        ]


def generate(seed: int) -> GeneratedWorld:
    """Facts drawn from ``seed``; an entity's three links differ, and so do its three numbers (of
    FIGURE_RANGE)."""
    rng = random.Random(f"world-{seed}")
    links: dict[tuple[str, str], str] = {}
    numbers: dict[tuple[str, str], int] = {}
    for kind in TYPES:
        for name in NAMES[kind]:
            for relation, value in zip(LINKS[kind], rng.sample(NAMES[_NEXT[kind]], 3), strict=True):
                links[name, relation.field] = value
            for relation, number in zip(NUMBERS[kind], rng.sample(FIGURE_RANGE, 3), strict=True):
                numbers[name, relation.field] = number
    return GeneratedWorld(links, numbers)
