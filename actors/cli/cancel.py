"""``espalier cancel``: stop a submitted run or sweep."""

from __future__ import annotations

import argparse
from pathlib import Path

WHAT = "stop a submitted run or sweep; running jobs save a checkpoint first"
EPILOG = """\
examples:
  espalier cancel runs/qwen3-14b-s0          save and stop; espalier submit --resume goes on
  espalier cancel runs/qwen3-14b-s0 --now    without a checkpoint
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN | SWEEP", type=Path)
    parser.add_argument("--now", action="store_true", help="do not wait for a checkpoint")


def run(args: argparse.Namespace) -> int:
    from system.cluster.status import cancel

    print(cancel(args.run, now=args.now))
    return 0
