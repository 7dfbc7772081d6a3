"""``espalier watch``."""

from __future__ import annotations

import argparse
from pathlib import Path

from actors.cli.command import argument, command


@command(
    argument("runs", nargs="*", type=Path, metavar="RUN", help="run directories"),
    argument("--demo", action="store_true", help="a small recorded run that comes with Espalier"),
    argument("--port", type=int, default=0, metavar="N", help="default: a free one"),
    argument("--host", default="127.0.0.1", help="where to listen (default: 127.0.0.1, this machine alone)"),
    argument("--open", action="store_true", help="open it in this machine's browser"),
)
def watch(args: argparse.Namespace) -> int:
    """Show a run in the browser, while it goes on and afterwards.

    examples:
      espalier watch runs/quickstart-s0                     its curves, trees, waiting times
      espalier watch runs/quickstart-s0 runs/quickstart-s1  the same, and both compared
      espalier watch --demo                                 a recorded run, to look around
      espalier watch RUN --port 8420                        on a cluster; then, on your own machine:
          ssh -L 8420:127.0.0.1:8420 USER@MACHINE           and open the address that was printed

    Everything is read from the run's directory, where nothing is written; the run itself is not asked, and
    may have crashed. The page loads nothing from elsewhere. Its address carries a key, new at every start:
    who has the address can read the run.

    How to read a tree: a lane is a branch, from left to right over its tokens. A ring is a fork: the rise of
    the entropy after a tool's result (ΔH), the chance it gave, P(fork), and the draw. Click a ring, then
    "compare two of them", to read two siblings side by side. `1` to `5` change the page, `j`, `k` and Enter
    go through the list, arrows through a tree.
    """
    from system.watch import serving

    return serving.run(args)
