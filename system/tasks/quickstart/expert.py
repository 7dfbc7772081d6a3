"""The imperfect expert whose demonstrations warm the model up.

It always writes well-formed calls and restates what is asked for.  But where a document offers three fields,
or a calculation three operators, it does not always ``check`` which one was asked for: more often it
``skims`` and takes the first one, and now and then it guesses.  It says so, and acts accordingly.  A model
that imitates it knows the format and can do either, samples the right choice now and then, yet prefers a
wrong one: what reinforcement learning can then visibly mend.  (Small models improve under RL only from such a
start.)

Saying so matters.  With the way named first, imitation teaches each way as a rule without noise, for all
labels alike, and to prefer the right one is a matter of some tens of steps; without it a tiny model learns a
blurred table, label by label, in which every correction disturbs the others.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from system.tasks.base import Demonstration, Prompt
from system.tasks.quickstart.questions import OPERATORS, Question, compute
from system.tasks.quickstart.world import FIGURES, NAMES, TYPES, World

T = TypeVar("T")

_OWNER = {name: kind for kind in TYPES for name in NAMES[kind]}


WAYS = ("check", "skim", "guess")


@dataclass(frozen=True, slots=True)
class Skill:
    """Chances of each way of choosing; it guesses with what remains."""

    check: float = 0.35
    skim: float = 0.55

    def __post_init__(self) -> None:
        if min(self.check, self.skim) < 0 or self.check + self.skim > 1:
            raise ValueError(f"check={self.check}, skim={self.skim}: chances must sum to at most 1")

    def choose(self, asked: T, options: Sequence[T], rng: random.Random) -> tuple[str, T]:
        """How it chooses, and what: the option asked for, the first one, or any.

        What is not among the options cannot be checked: a wrong turn was taken before, and it skims.
        """
        draw = rng.random()
        if draw < self.check and asked in options:
            return "check", asked
        if draw < self.check + self.skim:
            return "skim", options[0]
        return "guess", rng.choice(options)


def demonstrate(
    question: Question,
    prompt: Prompt,
    world: World,
    search: Callable[[str], str],
    render_result: Callable[[str], str],
    skill: Skill,
    rng: random.Random,
) -> Demonstration:
    """Answer a question as the expert would, with the texts the real tools would return.

    ``search`` maps a query to the text of the search tool; ``render_result`` wraps a tool's text as the
    rollout does.
    """
    segments: list[tuple[str, str]] = []
    said = " <think>"
    value = question.start
    if value:
        said += f" {value}"
    for asked in question.path:
        first_word = FIGURES if asked.numeric else _OWNER[value]
        query = f"{first_word} {value}"
        segments.append(("model", f"{said} </think> <search> {query} </search>"))
        segments.append(("tool", render_result(search(query))))
        options = world.relations(value, asked.numeric)
        way, taken = skill.choose(asked, options, rng)
        value = world.value(value, taken)
        said = f" <think> {asked.field} ? {way} {taken.field} {value}"
    if question.operator:
        way, operator = skill.choose(question.operator, tuple(OPERATORS), rng)
        first = int(value) if question.path else question.first
        code = f"print( {first} {OPERATORS[operator]} {question.operand} )"
        segments.append(("model", f"{said} {question.operator} ? {way} </think> <python> {code} </python>"))
        value = str(compute(operator, first, question.operand))
        segments.append(("tool", render_result(value)))
        said = " <think> done"
        boxed = value  # as python prints it: without a space
    else:
        boxed = f" {value}"
    segments.append(("model", f"{said} </think> <answer> \\boxed{{{boxed} }} </answer>"))
    return Demonstration(prompt, tuple(segments))
