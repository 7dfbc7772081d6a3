"""``espalier prompt``: what the model is told."""

from __future__ import annotations

import argparse
from pathlib import Path

from actors.cli.command import argument, command, split


@command(
    argument(
        "words", nargs="*", metavar="CONFIG | N | KEY=VALUE", help="a recipe, how many questions, overrides"
    ),
    argument("--held-out", action="store_true", help="of the held-out questions"),
)
def prompt(args: argparse.Namespace) -> int:
    """Print the first N questions (1) exactly as the model gets them, before anything is started.

    examples:
      espalier prompt configs/quickstart.yaml
      espalier prompt my.yaml 3 rollout.syntax=hermes 'task.template={enable_thinking: false}'
      espalier prompt my.yaml 5 --held-out

    For each: the text, special tokens and what the chat template adds included, its tokens, the gold answers,
    the columns that reach the reward, and who tells of the tools (task.tools_in_prompt). Before them: which
    rows of the data are used, the tokens that end the model's turn, and the strings that end a tool call.
    """
    from system.config import load
    from system.errors import ConfigError
    from system.observe.prompts import describe

    numbers = [word for word in args.words if word.isdecimal() and not Path(word).exists()]
    if len(numbers) > 1:
        raise ConfigError(f"one number of questions at a time: {numbers[0]} or {numbers[1]}?")
    words = [word for word in args.words if word not in numbers]
    config = load(*split(words, "espalier prompt configs/quickstart.yaml"))
    for line in describe(config, int(numbers[0]) if numbers else 1, args.held_out):
        print(line)
    return 0
