"""A small generated world: people, places and works, and the documents that describe them.

Every entity has two documents: a *profile* that links it to three entities of the next type, and *figures*
with three numbers.  Types follow each other in a circle (person -> place -> work -> person), so that a chain
of questions never meets the same type twice within three hops, and so that a search which names the type and
the entity ("place Tolm") ranks the profile of exactly that entity first, before the documents that only
mention it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
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
    """The facts: (entity, field) -> another entity's name, or a number, as text."""

    facts: dict[tuple[str, str], str]

    def value(self, entity: str, relation: Relation) -> str:
        """What the documents say under ``relation`` about ``entity``."""
        return self.facts[entity, relation.field]

    def documents(self) -> list[dict[str, str]]:
        """The corpus of the search server: ``{"id", "title", "text"}``, shown to the model as
        ``{title}: {text}``."""
        return [
            self._document(first_word, name, relations)
            for kind in TYPES
            for name in NAMES[kind]
            for first_word, relations in ((kind, LINKS[kind]), (FIGURES, NUMBERS[kind]))
        ]

    def _document(self, first_word: str, entity: str, relations: Sequence[Relation]) -> dict[str, str]:
        """``person Alda: born: Tolmouth home: Karkeep tomb: Zandale``, or
        ``figures Alda: age:47 medals:22 debts:63``."""
        fields = (f"{r.field}:{'' if r.numeric else ' '}{self.value(entity, r)}" for r in relations)
        title = f"{first_word} {entity}"
        return {"id": f"{first_word}/{entity}", "title": title, "text": " ".join(fields)}


def generate(seed: int) -> GeneratedWorld:
    """Facts drawn from ``seed``; an entity's three links differ, and so do its three numbers (of
    FIGURE_RANGE)."""
    rng = random.Random(f"world-{seed}")
    facts: dict[tuple[str, str], str] = {}
    for kind in TYPES:
        for name in NAMES[kind]:
            for relations, values in ((LINKS[kind], NAMES[_NEXT[kind]]), (NUMBERS[kind], FIGURE_RANGE)):
                for relation, value in zip(relations, rng.sample(values, 3), strict=True):
                    facts[name, relation.field] = str(value)
    return GeneratedWorld(facts)
