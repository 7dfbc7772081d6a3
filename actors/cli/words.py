"""What every command that takes a recipe does with its words: one path, and ``key=value`` overrides."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path


def takes_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", nargs="*", metavar="CONFIG | KEY=VALUE", help="a recipe, and overrides of its keys"
    )


def split(words: Sequence[str], example: str = "") -> tuple[Path | None, list[str]]:
    """A path, if there is one, and the overrides, in any order.

    With an ``example`` the path must be there.  Raises ConfigError for more than one path.
    """
    from system.errors import ConfigError

    paths = [word for word in words if "=" not in word or os.path.exists(word)]
    if len(paths) > 1:
        raise ConfigError(f"one file at a time: {paths[0]} or {paths[1]}? (an override is written key=value)")
    if example and not paths:
        raise ConfigError(f"name a recipe, for example: {example}")
    return (Path(paths[0]) if paths else None), [word for word in words if word not in paths]
