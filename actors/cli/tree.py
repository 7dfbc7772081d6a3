"""``espalier tree``: look at the trees a run kept."""

from __future__ import annotations

import argparse
from pathlib import Path

WHAT = "print a trajectory tree of a run"
EPILOG = """\
examples:
  espalier tree runs/quickstart-s0                    the newest tree
  espalier tree runs/quickstart-s0 --list             a table of all trees kept
  espalier tree runs/quickstart-s0 --index 17         one of them
  espalier tree runs/quickstart-s0 --best --entropy   the best rewarded, with its entropies
  espalier tree runs/quickstart-s0 --worst --full | less

How to read it: a tree goes one level deeper where it forks. `fork?` is a decision of the branching
policy after a tool result: the rise in entropy (ΔH), the fork probability P and the draw. A leaf shows
its reward, its advantage A over its siblings, why it ended, and whether it began as root, fork or top-up.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="a run directory")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--list", action="store_true", help="a table of all trees")
    which.add_argument(
        "--index", type=int, default=-1, metavar="I", help="tree number I of the table; -1 is the newest"
    )
    which.add_argument("--best", action="store_true", help="the tree of the highest mean reward")
    which.add_argument("--worst", action="store_true", help="the tree of the lowest mean reward")
    which.add_argument("--prompt", metavar="ID", help="the newest tree of this prompt")
    parser.add_argument("--entropy", action="store_true", help="show the entropy of every token")
    parser.add_argument("--full", action="store_true", help="whole texts with their line breaks")


def run(args: argparse.Namespace) -> int:
    from system.observe import show

    return show.run(args)
