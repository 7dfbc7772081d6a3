"""Questions over the generated world: what they say, what they need, and their answers."""

from __future__ import annotations

import random
from dataclasses import dataclass

from system.tasks.quickstart.world import FIGURE_RANGE, LINKS, NAMES, NUMBERS, TYPES, GeneratedWorld, Relation

OPERATORS = {"plus": "+", "minus": "-", "over": "//"}
OPERANDS = range(10, 20)
"""Second operands.  With the world's numbers as first ones (20 to 79) every result lies between 1 and 98:
one token."""

KINDS = {"lookup": 0.15, "chain": 0.35, "calc": 0.15, "search+calc": 0.35}
"""Kinds of question and their shares.  lookup: one search.  chain: two or three searches.  calc: one
calculation. search+calc: one or two searches, then a calculation with the number found."""


@dataclass(frozen=True, slots=True)
class Question:
    """Start at ``start``, follow ``path``, then compute with ``operand``.  Empty parts are not asked for."""

    kind: str
    start: str = ""  # entity ("" for calc)
    path: tuple[Relation, ...] = ()
    first: int = 0  # first operand of a calc question
    operator: str = ""  # a key of OPERATORS, or ""
    operand: int = 0

    @property
    def text(self) -> str:
        """``Q: Alda 's residence 's spires over 12 ?``"""
        subject = (
            " ".join(["", self.start, *(f"'s {r.word}" for r in self.path)])
            if self.start
            else f" {self.first}"
        )
        tail = f" {self.operator} {self.operand}" if self.operator else ""
        return f"Q:{subject}{tail} ?"

    def answer(self, world: GeneratedWorld) -> str:
        """The right answer as text."""
        value = self.start
        for relation in self.path:
            value = world.value(value, relation)
        if not self.operator:
            return value
        return str(compute(self.operator, int(value) if self.path else self.first, self.operand))


def compute(operator: str, a: int, b: int) -> int:
    """``a`` plus, minus or (rounded down) over ``b``."""
    return {"plus": a + b, "minus": a - b, "over": a // b}[operator]


def draw(kind: str, rng: random.Random) -> Question:
    """One random question of a kind."""
    operator = rng.choice(tuple(OPERATORS))
    operand = rng.choice(OPERANDS)
    if kind == "calc":
        return Question(kind, first=rng.choice(FIGURE_RANGE), operator=operator, operand=operand)
    hops = {"lookup": (1,), "chain": (2, 2, 3), "search+calc": (1, 1, 2)}[kind]
    owner = rng.choice(TYPES)
    start = rng.choice(NAMES[owner])
    path: list[Relation] = []
    length = rng.choice(hops)
    for hop in range(length):
        last = hop == length - 1
        numeric = last and (kind == "search+calc" or rng.random() < 0.5)
        relation = rng.choice((NUMBERS if numeric else LINKS)[owner])
        path.append(relation)
        owner = relation.target
    if kind != "search+calc":
        return Question(kind, start, tuple(path))
    return Question(kind, start, tuple(path), operator=operator, operand=operand)
