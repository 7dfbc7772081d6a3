"""``espalier chaos``."""

from __future__ import annotations

import argparse
from pathlib import Path

from actors.cli.command import RECIPE, argument, command, split


@command(
    RECIPE,
    argument("--faults", type=int, default=10, metavar="N", help="how many (default: 10, about 7 minutes)"),
    argument("--seed", type=int, default=0, help="of the drawing (default: 0)"),
    argument("--only", default="", metavar="WORDS", help='only these, for example "kill engine", or freeze'),
    argument("--out", type=Path, metavar="DIR", help="a new directory (default: runs/chaos-s<seed>)"),
)
def chaos(args: argparse.Namespace) -> int:
    """Make faults in a run and see whether it goes on as if nothing had been.

    examples:
      espalier chaos configs/quickstart.yaml
      espalier chaos configs/quickstart.yaml --faults 100 --seed 1
      espalier chaos configs/quickstart.yaml --faults 3 --only "freeze engine"

    Faults: SIGKILL, and SIGSTOP for longer than a heartbeat, of an engine, a rollout worker, the tool
    servers, a learner rank, the driver and the raylet; SIGKILL during start, checkpoint, evaluation and
    shutdown; a damaged checkpoint or tree file, a torn ledger; a full disk (a small file system in memory,
    where mounting is allowed). A run that ends is resumed, as SLURM would. Writes chaos.json. Exit code 1: a
    prompt was lost or trained twice, the run hung, or something was left behind.
    """
    from system.chaos.run import run
    from system.errors import DONE, FAILED

    path, overrides = split(args.words, "espalier chaos configs/quickstart.yaml")
    assert path is not None
    out = args.out or Path("runs") / f"chaos-s{args.seed}"
    return DONE if run(out, path, args.faults, args.seed, overrides, args.only).sound else FAILED
