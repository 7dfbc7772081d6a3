"""``espalier study``."""

from __future__ import annotations

import argparse
from pathlib import Path

from actors.cli.command import argument, command
from system.errors import ConfigError
from system.study.questions import QUESTIONS


@command(
    argument("question", choices=[*QUESTIONS]),
    argument("recipes", nargs="*", type=Path, metavar="CONFIG", help="tasks, as recipes"),
    argument("--arms", default="", metavar="A,B", help="only these (default: all)"),
    argument("--seeds", type=int, default=5, metavar="N", help="runs of each arm and task (default: 5)"),
    argument("--steps", type=int, default=100, metavar="N", help="training steps of a run (default: 100)"),
    argument("--every", type=int, default=10, metavar="N", help="steps between evaluations (default: 10)"),
    argument("--jobs", type=int, default=2, metavar="N", help="runs at a time, a core each (default: 2)"),
    argument("--out", type=Path, metavar="DIR", help="where it all goes (default: runs/study-QUESTION)"),
)
def study(args: argparse.Namespace) -> int:
    """Ask a question with many small runs, and answer it with intervals.

    examples:
      espalier study branching configs/quickstart.yaml --seeds 1 --steps 20   a first look, some minutes
      espalier study branching configs/study/*.yaml --steps 60 --every 5
      espalier study branching configs/quickstart.yaml --arms calibrated,random,surest
      espalier study sampling configs/quickstart.yaml

    `branching`: does it pay to fork where the model is unsure? Arms: calibrated, depth (calibrated among
    results as deep), arpo, release, aepo, at2po, random, surest (the contrary) and none (independent
    rollouts), at equal tokens and at equal tool calls.
    `sampling`: does it pay to leave out trees without signal? Arms: all, dynamic.
    `measures`: what says best that the model is unsure? Arms: delta (calibrated), entropy, first, surprise,
    varentropy, siblings, treerl (inside turns) and random.
    `data`: do a curriculum, or demonstrations, pay on few questions? Arms: epochs, curriculum, guided (of the
    hopeless ones some trees) and expert (some branches begin with its turns).
    (system/study/questions.py says what each arm sets.) Every run is synchronous (flow.staleness=0), on one
    rank and the embedded engine. With 5 seeds p is at least 0.0625 for one task; all together can say more.
    The same command goes on after a stop: runs that are there are not made again. (It warns if the code has
    changed meanwhile.) Writes QUESTION.json, PNG figures and QUESTION.html.
    """
    from system.study.study import study

    known = QUESTIONS[args.question].arms
    arms = args.arms.split(",") if args.arms else [*known]
    if unknown := [arm for arm in arms if arm not in known]:
        raise ConfigError(f"--arms={unknown[0]}: choose among {', '.join(known)}")
    for name in ("seeds", "steps", "every", "jobs"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name}={getattr(args, name)} must be 1 or more")
    if not args.recipes:
        raise ConfigError("name a recipe, for example: espalier study branching configs/quickstart.yaml")
    if len({recipe.stem for recipe in args.recipes}) < len(args.recipes):
        raise ConfigError("two recipes of one file name: a study calls its tasks by it")
    out = args.out or Path("runs") / f"study-{args.question}"
    study(args.question, out, args.recipes, arms, args.seeds, args.steps, args.every, args.jobs)
    return 0
