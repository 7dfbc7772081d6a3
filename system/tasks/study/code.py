"""Calculations whose programs fail, and what to make of it.

    Q: largest 23 47 over 14 less 14 else 50 ?

asks for max(23, 47) // (14 - 14), or for 50 where that cannot be calculated.  The model writes the program
and chooses a function and two operators for the words; Python has no function ``avg``.  What the sandbox
answers is what it says of that program, tracebacks included.  Then the model chooses again: it answers what
was printed, or what the question says for an error, or writes another program.  A number may be that of a
wrong program, and a ZeroDivisionError the question's or of a wrong operator: the result does not say which.
"""

from __future__ import annotations

import io
import random
from contextlib import redirect_stdout
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from system.config import Config
from system.rollout.syntax.tags import TagSyntax
from system.tasks import tiny_tokenizer
from system.tasks.base import Demonstration
from system.tasks.generated import GeneratedTask
from system.tasks.skill import Skill
from system.tools.sandbox import program
from system.tree.prompt import Prompt

FUNCTIONS = {"total": "sum", "largest": "max", "smallest": "min"}  # word -> what it is in Python
WRITTEN = ("sum", "avg", "max", "min")  # what a program may be written with
OPERATORS = {"plus": "+", "less": "-", "over": "//"}
READ, ELSE, AGAIN = "read", "else", "again"  # what to do after a result
LISTED, INNER, OTHERWISE = range(20, 60), range(10, 20), range(60, 100)
IMPOSSIBLE = 0.5  # share of the questions with "over" that divide by zero


@dataclass(frozen=True, slots=True)
class Calculation:
    """``word`` of ``listed``, ``operator`` what ``within`` makes of ``inner``; ``otherwise`` if it fails."""

    word: str
    listed: tuple[int, int]
    operator: str
    within: str
    inner: tuple[int, int]
    otherwise: int

    @property
    def kind(self) -> str:
        return self.operator

    @property
    def text(self) -> str:
        (a, b), (c, d) = self.listed, self.inner
        return f"Q: {self.word} {a} {b} {self.operator} {c} {self.within} {d} else {self.otherwise} ?"

    def program(self, function: str, operator: str, within: str) -> str:
        """``print(max([23,47])//(14-14))``"""
        (a, b), (c, d) = self.listed, self.inner
        return f"print({function}([{a},{b}]){operator}({c}{within}{d}))"

    @property
    def right(self) -> str:
        """The program that calculates it."""
        return self.program(FUNCTIONS[self.word], OPERATORS[self.operator], OPERATORS[self.within])


class CodeTask(GeneratedTask[Calculation]):
    name = "code"

    def __init__(self, config: Config, right: float = 0.42, slip: float = 0.48) -> None:
        """``right``, ``slip``: the expert's chances, the same wherever it chooses."""
        super().__init__(config, Skill(right, slip))
        self.call_limit = config.rollout.call_limit

    def draw(self, rng: random.Random) -> Calculation:
        word, operator = rng.choice([*FUNCTIONS]), rng.choice([*OPERATORS])
        listed = (rng.choice(LISTED), rng.choice(LISTED))
        within = rng.choice([*OPERATORS])
        inner = (rng.choice(INNER), rng.choice(INNER))
        if operator == "over" and rng.random() < IMPOSSIBLE:
            within = rng.choice(("less", "over"))
            low, high = sorted(rng.sample(INNER, 2))
            inner = (low, low) if within == "less" else (low, high)
        return Calculation(word, listed, operator, within, inner, rng.choice(OTHERWISE))

    def answer(self, question: Calculation) -> str:
        said, failed = run(question.right)
        return str(question.otherwise) if failed else said

    def demonstrate(
        self, question: Calculation, prompt: Prompt, skill: Skill, rng: random.Random
    ) -> Demonstration:
        render = TagSyntax({}).render_result
        segments: list[tuple[str, str]] = []
        said, taken, result = " <think> write", AGAIN, ""
        while taken == AGAIN:
            code = question.program(
                skill.choose(FUNCTIONS[question.word], WRITTEN, rng),
                skill.choose(OPERATORS[question.operator], [*OPERATORS.values()], rng),
                skill.choose(OPERATORS[question.within], [*OPERATORS.values()], rng),
            )
            result, failed = run(code)
            segments.append(("model", f"{said} </think> <python> {code} </python>"))
            segments.append(("tool", render(result)))
            options = [*([] if failed else [READ]), ELSE]
            right = READ if not failed else AGAIN if "NameError" in result else ELSE
            if len(segments) < 2 * self.call_limit:
                taken = skill.choose(right, [*options, AGAIN], rng)
            else:  # no call is left
                taken = options[0]
            said = f" <think> {taken}"
        boxed = result if taken == READ else str(question.otherwise)
        segments.append(("model", f"{said} </think> <answer> \\boxed{{{boxed} }} </answer>"))
        return Demonstration(prompt, tuple(segments))

    def tokenizer(self) -> PreTrainedTokenizerFast:
        pieces = [*tiny_tokenizer.syntax("python"), "Q:", " ?", " \\boxed{", " }", " write"]
        pieces += [f" {what}" for what in (READ, ELSE, AGAIN)]
        for word in (*FUNCTIONS, *OPERATORS, ELSE):
            pieces += [f" {word}", f" {word} "]  # at the end of a text, or before a number
        pieces += [" ", "print(", " print(", *(f"{name}([" for name in WRITTEN), ",", "])", "(", "))"]
        pieces += [*OPERATORS.values(), *tiny_tokenizer.numbers(), *_traceback_pieces()]
        return tiny_tokenizer.build(pieces)


def run(code: str) -> tuple[str, bool]:
    """What the sandbox would answer to one of our own programs, and whether that is an error."""
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            program.execute(code, {})
    except Exception as error:
        return (printed.getvalue() + program.told(error)).rstrip("\n"), True
    return printed.getvalue().rstrip("\n"), False


def _traceback_pieces() -> list[str]:
    """Of the errors that the programs make: the lines around the program, and the marks under it."""
    first, _, marks, _ = run("print(avg([20,20])+(10+10))")[0].rsplit("\n", 3)
    _, impossible = run("print(sum([20,20])//(10-10))")[0].rsplit("\n", 1)
    before = "\n" + marks[: -len(marks.lstrip())]
    return [
        first,
        "\n    print(",
        f"{before}^^^",
        *(f"{before}{'~' * length}" for length in range(1, 20)),
        "^^",
        *("~" * length for length in range(1, 20)),
        f"\n{impossible}",
        *(f"\nNameError: name '{name}' is not defined" for name in WRITTEN),
    ]
