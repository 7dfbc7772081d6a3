"""``espalier study``."""

from __future__ import annotations

import argparse
from pathlib import Path

from actors.cli.command import argument, command
from system.errors import ConfigError

STUDIES = ("branching",)


@command(
    argument("what", choices=STUDIES),
    argument("recipes", nargs="*", type=Path, metavar="CONFIG", help="tasks, as recipes"),
    argument("--arms", default="", metavar="A,B", help="only these ways to fork (default: all)"),
    argument("--seeds", type=int, default=5, metavar="N", help="runs of each arm and task (default: 5)"),
    argument("--steps", type=int, default=100, metavar="N", help="training steps of a run (default: 100)"),
    argument("--every", type=int, default=10, metavar="N", help="steps between evaluations (default: 10)"),
    argument("--jobs", type=int, default=2, metavar="N", help="runs at a time, a core each (default: 2)"),
    argument("--out", type=Path, metavar="DIR", help="where it all goes (default: runs/study-branching)"),
)
def study(args: argparse.Namespace) -> int:
    """Ask a question with many small runs, and answer it with intervals.

    examples:
      espalier study branching configs/quickstart.yaml --seeds 1 --steps 20   a first look, some minutes
      espalier study branching configs/study/*.yaml --out runs/study-branching
      espalier study branching configs/study/hops.yaml --arms calibrated,random,surest

    `branching`: does it pay to fork where the model is unsure? Arms: calibrated, arpo, release, aepo, at2po,
    random, surest (the contrary) and none (independent rollouts), at equal tokens and at equal tool calls
    (system/study/branching.py says what each sets). Every run is synchronous (flow.staleness=0), on one rank
    and the embedded engine. With 5 seeds p is at least 0.0625 for one task; all tasks together can say more.
    The same command goes on after a stop: runs that are there are not made again. Writes branching.json, PNG
    figures and branching.html.
    """
    from system.study.branching import ARMS, study

    arms = args.arms.split(",") if args.arms else [*ARMS]
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise ConfigError(f"--arms={unknown[0]}: choose among {', '.join(ARMS)}")
    for name in ("seeds", "steps", "every", "jobs"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name}={getattr(args, name)} must be 1 or more")
    if not args.recipes:
        raise ConfigError("name a recipe, for example: espalier study branching configs/quickstart.yaml")
    if len({recipe.stem for recipe in args.recipes}) < len(args.recipes):
        raise ConfigError("two recipes of one file name: a study calls its tasks by it")
    out = args.out or Path("runs") / f"study-{args.what}"
    study(out, args.recipes, arms, args.seeds, args.steps, args.every, args.jobs)
    return 0
