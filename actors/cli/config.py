"""``espalier config``: what a recipe amounts to, and what the settings mean."""

from __future__ import annotations

import argparse

from actors.cli.words import split, takes_recipe

WHAT = "print the merged configuration, or say what the settings mean"
EPILOG = """\
examples:
  espalier config configs/quickstart.yaml
  espalier config configs/quickstart.yaml flow.staleness=0 > my.yaml
  espalier config --explain                    every setting: type, default, what it may be, what it is
  espalier config --explain flow.staleness     one of them, or a section
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    takes_recipe(parser)
    parser.add_argument(
        "--explain", nargs="?", const="", metavar="KEY|SECTION", help="the settings reference"
    )
    parser.add_argument("--markdown", action="store_true", help="with --explain: as docs/settings.md")


def run(args: argparse.Namespace) -> int:
    if args.explain is not None:
        from system.config.explain import markdown, text

        print(markdown() if args.markdown else text(args.explain), end="")
        return 0
    from system.config import load, to_yaml

    path, overrides = split(args.words)
    print(to_yaml(load(path, overrides)), end="")
    return 0
