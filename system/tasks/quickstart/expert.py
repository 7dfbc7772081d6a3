"""The imperfect expert whose demonstrations warm the model up.

It always writes well-formed calls, restates what is asked for, and names what it read.  But where a document
offers three fields, or a calculation three operators, its eye tends to slip to the *next* one in the list.  A
model that imitates it therefore knows the format and often samples the right choice, yet prefers a wrong one:
what reinforcement learning can then visibly mend.  (Small models improve under RL only from such a start.)

That the slip depends on what was asked for matters: to imitate even the habit, the model has to learn to look
at the question, which a habit of always taking the same field would not teach it.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from system.rollout.syntax.tags import TagSyntax
from system.tasks.base import Demonstration
from system.tasks.quickstart.questions import OPERATORS, Question, compute
from system.tasks.quickstart.world import FIGURES, LINKS, NAMES, NUMBERS, TYPES, GeneratedWorld
from system.tasks.skill import Skill
from system.tree.prompt import Prompt

_OWNER = {name: kind for kind in TYPES for name in NAMES[kind]}


def demonstrate(
    question: Question,
    prompt: Prompt,
    world: GeneratedWorld,
    search: Callable[[str], str],
    skill: Skill,
    rng: random.Random,
) -> Demonstration:
    """Answer a question as the expert would, with the texts the real tools would return.

    ``search`` maps a query to the text of the search tool.
    """
    render_result = TagSyntax({}).render_result
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
        options = (NUMBERS if asked.numeric else LINKS)[asked.owner]
        taken = skill.choose(asked, options, rng)
        value = world.value(value, taken)
        said = f" <think> {asked.word} {taken.field}:{value if taken.numeric else ' ' + value}"
    if question.operator:
        operator = skill.choose(question.operator, tuple(OPERATORS), rng)
        first = int(value) if question.path else question.first
        code = f"print({first}{OPERATORS[operator]}{question.operand})"
        segments.append(("model", f"{said} {question.operator} </think> <python> {code} </python>"))
        value = str(compute(operator, first, question.operand))
        segments.append(("tool", render_result(value)))
        said = " <think> done"
    boxed = value if value.lstrip("-").isdigit() else f" {value}"
    segments.append(("model", f"{said} </think> <answer> \\boxed{{{boxed} }} </answer>"))
    return Demonstration(prompt, tuple(segments))
