"""``espalier submit``, ``status``, ``cancel`` and ``logs``: runs on SLURM."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from actors.cli.command import RECIPE, argument, command, configured, split

if TYPE_CHECKING:
    from system.config import Config


@command(
    RECIPE,
    argument("--nodes", type=int, metavar="N", help="short for cluster.nodes=N"),
    argument("--time", metavar="LIMIT", help="short for slurm.time=LIMIT, of one attempt"),
    argument("--resume", metavar="RUN", type=Path, help="submit the run in this directory again"),
    argument("--sft", action="store_true", help="a supervised run (espalier sft); with --resume it is known"),
    argument(
        "--sweep", metavar="KEY=A,B,…", action="append", default=[], help="one run per value; may be repeated"
    ),
    argument("--at-once", type=int, default=0, metavar="K", help="points of a sweep that run at once"),
    argument("--dry-run", action="store_true", help="show the plan and the script, submit nothing"),
)
def submit(args: argparse.Namespace) -> int:
    """Submit a run, or a sweep of runs, to SLURM.

    examples:
      espalier submit configs/qwen3-14b-2x8.yaml --dry-run       the plan and the script; nothing is submitted
      espalier submit configs/qwen3-14b-2x8.yaml --nodes 4 --time 12:00:00 slurm.partition=gpu
      espalier submit configs/sft/arpo-8b.yaml --sft sft.path=conversations.jsonl
      espalier submit configs/quickstart.yaml --sweep flow.staleness=0,1,2,4 --sweep run.seed=0,1
      espalier submit configs/qwen3-14b-2x8.yaml --sweep cluster.nodes=2,4,8 --at-once 1
      espalier submit --resume runs/qwen3-14b-2x8-s0

    What can be told in a second to be wrong is told first, all at once (exit code 2; a dry run goes on).
    Whether the nodes have ports, GPUs and scratch space, and reach the servers, the job finds out.
    The job checkpoints and requeues itself before its time limit, and after the loss of a node; see
    `espalier status RUN`. Every setting is a key of the sections `cluster` and `slurm`.
    """
    from system.cluster.submit import submit_run, submit_sweep
    from system.config import ConfigError, without_effect, without_rank
    from system.doctor import preflight, supervised
    from system.observe.rundir import RunDir
    from system.observe.terminal import shown

    example = "espalier submit configs/quickstart.yaml --dry-run"

    sft = RunDir.open(args.resume).supervised if args.resume else args.sft
    if args.sft and not sft:
        raise ConfigError(f"{args.resume} is no supervised run: leave --sft out")
    require = supervised.require if sft else preflight.require

    told = set[str]()  # of an earlier point of a sweep

    def tell(line: str, file: TextIO) -> None:
        if line not in told:
            told.add(line)
            print(line, file=file)

    def check(config: Config) -> None:
        """A dry run, which may be for another machine, only warns."""
        try:
            require(config, login=True, resume=args.resume)
            for line in without_rank(config) if sft else without_effect(config):
                tell(shown(line), sys.stdout)
            tell(f"checked here; in the job, when it starts: {preflight.LATER}", sys.stdout)
        except ConfigError as error:
            if not args.dry_run:
                raise
            for line in str(error).splitlines():
                tell(f"WARNING: {line}", sys.stderr)

    words = [*args.words]
    words += [f"cluster.nodes={args.nodes}"] if args.nodes is not None else []
    words += [f"slurm.time='{args.time}'"] if args.time is not None else []
    if not args.sweep:
        config, name = configured(words, args.resume, example)
        check(config)
        return submit_run(config, name, resume=args.resume, dry_run=args.dry_run, supervised=sft)
    if args.resume:
        raise ConfigError("--resume takes its configuration from the run directory: no --sweep")
    if sft:
        raise ConfigError("--sweep compares runs of espalier train: submit supervised runs one by one")
    path, overrides = split(words, example)
    assert path is not None
    return submit_sweep(path, overrides, args.sweep, at_once=args.at_once, dry_run=args.dry_run, check=check)


@command(
    argument("run", metavar="RUN | SWEEP", type=Path),
)
def status(args: argparse.Namespace) -> int:
    """Show a submitted run: its jobs, steps and attempts; or a sweep's table.

    examples:
      espalier status runs/qwen3-14b-2x8-s0
      espalier status runs/quickstart-sweep     prints the table; writes summary.json, summary.md, summary.png
    """
    from system.cluster.status import status
    from system.cluster.sweep import is_sweep, summarise
    from system.observe.terminal import shown

    print(shown(summarise(args.run) if is_sweep(args.run) else status(args.run)))
    return 0


@command(
    argument("run", metavar="RUN | SWEEP", type=Path),
    argument("--now", action="store_true", help="do not wait for a checkpoint"),
)
def cancel(args: argparse.Namespace) -> int:
    """Stop a submitted run or sweep; running jobs save a checkpoint first.

    examples:
      espalier cancel runs/qwen3-14b-2x8-s0          save and stop; espalier submit --resume goes on
      espalier cancel runs/qwen3-14b-2x8-s0 --now    without a checkpoint
    """
    from system.cluster.status import cancel

    print(cancel(args.run, now=args.now))
    return 0


@command(
    argument("run", metavar="RUN", type=Path),
    argument("component", nargs="?", default="", help="driver, node-0, learner-3, engine, …"),
    argument("--attempt", type=int, metavar="N", help="of a submitted run; default: the newest"),
    argument("--lines", type=int, default=40, metavar="N", help="the last N lines; 0: all"),
    argument("--follow", action="store_true", help="go on printing what is appended"),
)
def logs(args: argparse.Namespace) -> int:
    """Print the logs of a run, by component.

    examples:
      espalier logs runs/quickstart-s0                        which logs there are
      espalier logs runs/quickstart-s0 learner                the newest lines of every learner rank
      espalier logs runs/qwen3-14b-2x8-s0 driver --follow
      espalier logs runs/qwen3-14b-2x8-s0 engine --attempt 0  every engine's, of the first attempt
    """
    from system.cluster.status import logs

    return logs(args.run, args.component, attempt=args.attempt, lines=args.lines, follow=args.follow)
