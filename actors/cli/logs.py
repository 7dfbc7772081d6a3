"""``espalier logs``: the logs of a run, by component."""

from __future__ import annotations

import argparse
from pathlib import Path

WHAT = "print the logs of a run, by component"
EPILOG = """\
examples:
  espalier logs runs/quickstart-s0                    which logs there are
  espalier logs runs/quickstart-s0 learner            the newest lines of every learner rank
  espalier logs runs/qwen3-14b-s0 driver --follow
  espalier logs runs/qwen3-14b-s0 engine --attempt 0  every engine's, of the first attempt
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path)
    parser.add_argument("component", nargs="?", default="", help="driver, node-0, learner-3, engine, …")
    parser.add_argument("--attempt", type=int, metavar="N", help="of a submitted run; default: the newest")
    parser.add_argument("--lines", type=int, default=40, metavar="N", help="the last N lines; 0: all")
    parser.add_argument("--follow", action="store_true", help="go on printing what is appended")


def run(args: argparse.Namespace) -> int:
    from system.cluster.status import logs

    return logs(args.run, args.component, attempt=args.attempt, lines=args.lines, follow=args.follow)
