"""What a command is, and what every command that takes a recipe does with its words."""

from __future__ import annotations

import argparse
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from system.config import Config

Argument = tuple[tuple[str, ...], dict[str, Any]]


@dataclass(frozen=True)
class CliCommand:
    """A function whose docstring is the help: its first line what it does, the rest what follows the options.

    A list among the ``arguments`` holds options of which one may be given.
    """

    name: str
    run: Callable[[argparse.Namespace], int]
    arguments: tuple[Argument | list[Argument], ...]

    def parser(self, adder: Any) -> argparse.ArgumentParser:
        """Its parser, added to ``adder``: what ``add_subparsers`` returns."""
        # python -OO leaves out docstrings: commands work without their help.
        description, _, epilog = (inspect.getdoc(self.run) or "").partition("\n\n")
        parser = adder.add_parser(
            self.name,
            help=description[:1].lower() + description[1:-1],
            description=description,
            epilog=epilog + "\n",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.set_defaults(run_command=self.run)
        for one in self.arguments:
            group = parser.add_mutually_exclusive_group() if isinstance(one, list) else parser
            for names, options in one if isinstance(one, list) else [one]:
                group.add_argument(*names, **options)
        return parser


def command(
    *arguments: Argument | list[Argument], name: str = ""
) -> Callable[[Callable[[argparse.Namespace], int]], CliCommand]:
    """Make a function a command, by default of its own name."""
    return lambda run: CliCommand(name or run.__name__, run, arguments)


def argument(*names: str, **options: Any) -> Argument:
    """As of ``ArgumentParser.add_argument``."""
    return names, options


RECIPE = argument(
    "words", nargs="*", metavar="CONFIG | KEY=VALUE", help="a recipe, and overrides of its keys"
)


def split(words: Sequence[str], example: str = "") -> tuple[Path | None, list[str]]:
    """A path, if there is one, and the overrides, in any order.

    With an ``example`` the path must be there.  Raises ConfigError for more than one path.
    """
    from system.errors import ConfigError

    paths = [word for word in words if "=" not in word or os.path.exists(word)]
    if len(paths) > 1:
        raise ConfigError(
            f"one file at a time: {paths[0]} or {paths[1]}? (an override is written key=value, "
            "one with spaces in quotes: 'task.columns={question: q}')"
        )
    if example and not paths:
        raise ConfigError(f"name a recipe, for example: {example}")
    return (Path(paths[0]) if paths else None), [word for word in words if word not in paths]


def configured(words: Sequence[str], resume: Path | None, example: str) -> tuple[Config, str]:
    """A run's configuration and name: those of a recipe, or of the run in the directory ``resume``.

    Raises ConfigError where there is neither (it then shows the ``example``), or both.
    """
    from system.config import ConfigError, load
    from system.observe.rundir import RunDir

    path, overrides = split(words, "" if resume else example)
    if resume is None:
        assert path is not None
        return load(path, overrides), path.stem
    if path is not None:
        raise ConfigError(f"--resume takes its configuration from {resume}/config.yaml; leave {path} out")
    run = RunDir.open(resume)
    run.check_config()
    return run.config(tuple(overrides)), run.name
