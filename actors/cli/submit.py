"""``espalier submit``: hand a run or a sweep to SLURM."""

from __future__ import annotations

import argparse
from pathlib import Path

from actors.cli.words import split, takes_recipe

WHAT = "submit a run, or a sweep of runs, to SLURM"
EPILOG = """\
examples:
  espalier submit configs/qwen3-14b.yaml --dry-run            the plan and the script; nothing is submitted
  espalier submit configs/qwen3-14b.yaml --nodes 4 --time 12:00:00 slurm.partition=gpu slurm.account=me
  espalier submit configs/quickstart.yaml --sweep flow.staleness=0,1,2,4 --sweep run.seed=0,1
  espalier submit configs/qwen3-14b.yaml --sweep cluster.nodes=2,4,8 --at-once 1
  espalier submit --resume runs/qwen3-14b-s0

The job checkpoints and requeues itself before its time limit, and after the loss of a node; see
`espalier status RUN`. Every setting is a key of the sections `cluster` and `slurm`.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    takes_recipe(parser)
    parser.add_argument("--nodes", type=int, metavar="N", help="short for cluster.nodes=N")
    parser.add_argument("--time", metavar="LIMIT", help="short for slurm.time=LIMIT, of one attempt")
    parser.add_argument("--resume", metavar="RUN", type=Path, help="submit the run in this directory again")
    parser.add_argument(
        "--sweep", metavar="KEY=A,B,…", action="append", default=[], help="one run per value; may be repeated"
    )
    parser.add_argument(
        "--at-once", type=int, default=0, metavar="K", help="points of a sweep that run at once"
    )
    parser.add_argument("--dry-run", action="store_true", help="show the plan and the script, submit nothing")


def run(args: argparse.Namespace) -> int:
    from system.cluster.submit import submit_run, submit_sweep
    from system.config import ConfigError, load
    from system.observe.rundir import RunDir

    new = args.resume is None
    path, overrides = split(args.words, "espalier submit configs/quickstart.yaml --dry-run" if new else "")
    overrides += [f"cluster.nodes={args.nodes}"] if args.nodes is not None else []
    overrides += [f"slurm.time='{args.time}'"] if args.time is not None else []
    if args.resume is not None:
        if path or args.sweep:
            raise ConfigError(
                "--resume takes its configuration from the run directory: no recipe, no --sweep"
            )
        config = RunDir.open(args.resume).config(tuple(overrides))
        return submit_run(config, args.resume.name, resume=args.resume, dry_run=args.dry_run)
    assert path is not None
    if args.sweep:
        return submit_sweep(path, overrides, args.sweep, at_once=args.at_once, dry_run=args.dry_run)
    return submit_run(load(path, overrides), path.stem, resume=None, dry_run=args.dry_run)
