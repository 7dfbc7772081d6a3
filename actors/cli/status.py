"""``espalier status``: how a submitted run or sweep is doing."""

from __future__ import annotations

import argparse
from pathlib import Path

WHAT = "show a submitted run: its jobs, steps and attempts; or a sweep's table"
EPILOG = """\
examples:
  espalier status runs/qwen3-14b-s0
  espalier status runs/quickstart-sweep      prints the table; writes summary.json, summary.md, summary.png
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN | SWEEP", type=Path)


def run(args: argparse.Namespace) -> int:
    from system.cluster import status, sweep

    print(sweep.summarise(args.run) if sweep.is_sweep(args.run) else status.status(args.run))
    return 0
