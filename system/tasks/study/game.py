"""A game with a hidden state: a number between two others, by a few guesses that are told higher or lower.

    Q: game 271828 between 12 27 ?

The secret stands nowhere in the prompt: the tool ``guess`` looks it up by the game's number, which is the end
of the prompt's id (:attr:`.CallContext.prompt_id`).  Three guesses and the answer suffice for 15 numbers if
each halves what is left; whoever guesses them from the lowest on has luck in 4 of 15 games.  How many numbers
are left, and so how unsure anybody must be, is the game's doing.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from system.config import Config
from system.rollout.syntax.tags import TagSyntax
from system.tasks import tiny_tokenizer
from system.tasks.base import Demonstration
from system.tasks.generated import GeneratedTask
from system.tasks.skill import Skill
from system.tools.outcome import CallContext, ToolOutcome, ToolSpec, ToolStatus
from system.tools.tool import CallRefused
from system.tree.prompt import Prompt

GUESSES = 3
LOWEST, CANDIDATES = range(10, 15), range(12, 2 ** (GUESSES + 1))
HIGHER, LOWER, RIGHT = "higher", "lower", "right"
_GAMES = range(100_000, 1_000_000)


@dataclass(frozen=True, slots=True)
class Game:
    """All of it follows from its number."""

    number: int

    @property
    def bounds(self) -> tuple[int, int]:
        """The secret lies between them, and is neither."""
        rng = random.Random(f"bounds of game {self.number}")
        low = rng.choice(LOWEST)
        return low, low + rng.choice(CANDIDATES) + 1

    @property
    def secret(self) -> int:
        low, high = self.bounds
        return random.Random(f"secret of game {self.number}").randrange(low + 1, high)

    @property
    def kind(self) -> str:
        low, high = self.bounds
        return f"{high - low - 1} numbers"

    @property
    def text(self) -> str:
        low, high = self.bounds
        return f"Q: game {self.number} between {low} {high} ?"

    def told(self, guess: int) -> str:
        return RIGHT if guess == self.secret else HIGHER if self.secret > guess else LOWER


class GuessTool:
    """Compares a guess with the secret of the game that the prompt is of."""

    spec = ToolSpec(
        name="guess",
        description="Guess the secret number and be told whether it is higher, lower or right.",
        parameters={
            "type": "object",
            "properties": {"number": {"type": "string", "description": "the guess"}},
            "required": ["number"],
        },
        primary="number",
        idempotent=True,  # not pure: the same guess is told another thing in another game
    )

    async def run(self, arguments: Mapping[str, Any], context: CallContext) -> ToolOutcome:
        _, _, game = context.prompt_id.rpartition("/")
        try:
            guess = int(arguments["number"])
        except ValueError as error:
            raise CallRefused("a guess is a number") from error
        return ToolOutcome(ToolStatus.OK, Game(int(game)).told(guess))

    async def check(self) -> None:
        """Nothing has to be there for it."""


class GameTask(GeneratedTask[Game]):
    name = "game"

    def __init__(self, config: Config, right: float = 0.42, slip: float = 0.48) -> None:
        """``right``, ``slip``: the chances of the expert to guess the middle, and the lowest number left."""
        super().__init__(config, Skill(right, slip))

    def draw(self, rng: random.Random) -> Game:
        return Game(rng.choice(_GAMES))

    def answer(self, question: Game) -> str:
        return str(question.secret)

    def key(self, question: Game, index: int) -> str:
        return str(question.number)  # by which the tool finds the secret

    def demonstrate(self, question: Game, prompt: Prompt, skill: Skill, rng: random.Random) -> Demonstration:
        render = TagSyntax({}).render_result
        segments: list[tuple[str, str]] = []
        (low, high), told = question.bounds, ""
        while True:
            said = f" <think>{low} {high} </think>"
            middle = (low + high) // 2
            others = [number for number in range(low + 1, high) if number != middle]
            guess = skill.choose(middle, [*others, middle], rng)  # after the middle comes the lowest
            if len(segments) == 2 * GUESSES:
                break
            segments.append(("model", f"{said} <guess>{guess} </guess>"))
            told = question.told(guess)
            segments.append(("tool", render(told)))
            if told == RIGHT:
                said = f" <think> {RIGHT} </think>"
                break
            low, high = (guess, high) if told == HIGHER else (low, guess)
        segments.append(("model", f"{said} <answer> \\boxed{{{guess} }} </answer>"))
        return Demonstration(prompt, tuple(segments))

    def tokenizer(self) -> PreTrainedTokenizerFast:
        pieces = [*tiny_tokenizer.syntax("guess"), "Q: game ", " between ", " ?", " ", " \\boxed{", " }"]
        pieces += [HIGHER, LOWER, RIGHT, f" {RIGHT}"]
        return tiny_tokenizer.build([*pieces, *tiny_tokenizer.numbers()])
