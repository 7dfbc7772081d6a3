"""``espalier train``: a new run, or one that goes on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from actors.cli.words import split, takes_recipe

WHAT = "train an agent"
EPILOG = """\
examples:
  espalier train configs/quickstart.yaml
  espalier train configs/quickstart.yaml run.seed=1 branching=none flow.staleness=0
  espalier train configs/quickstart.yaml 'task.options=!replace {}'      an inherited dictionary, emptied
  espalier train --resume runs/quickstart-s0
  espalier train --resume runs/quickstart-s0 run.steps=200

A run writes into runs/<name>: metrics, trees, curves, checkpoints, the model and summary.json.
Ctrl-C saves a checkpoint and stops; a second Ctrl-C stops at once.
`espalier config --explain` says what each key means, `espalier config RECIPE` prints the values.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    takes_recipe(parser)
    parser.add_argument("--resume", metavar="RUN", type=Path, help="go on with the run in this directory")


def run(args: argparse.Namespace) -> int:
    from system.config import load
    from system.config.check import check_parts
    from system.errors import ConfigError
    from system.observe.rundir import RunDir

    new = args.resume is None
    path, overrides = split(args.words, "espalier train configs/quickstart.yaml" if new else "")
    if path is not None and not new:
        raise ConfigError(
            f"--resume takes its configuration from {args.resume}/config.yaml; leave {path} out"
        )
    if path is not None:
        config, name, resume = load(path, overrides), path.stem, None
    else:
        run_dir = RunDir.open(args.resume)
        for key in unsafe_on_resume(overrides):
            print(
                f"WARNING: {key} changes in the middle of a run: results before and after do not compare, "
                "and the checkpoint may not fit",
                file=sys.stderr,
            )
        config, name, resume = run_dir.config(tuple(overrides)), run_dir.name, run_dir.root
    check_parts(config)
    from actors.train import train  # slow imports

    return train(config, config_name=name, resume=resume)


def unsafe_on_resume(overrides: Sequence[str]) -> list[str]:
    """Keys among the overrides that change what is being trained: all that are not safe on resume."""
    from system.config import settings

    safe = {key for key, one in settings().items() if one.safe_on_resume}
    keys = [text.split("=", 1)[0].strip() for text in overrides]
    return [key for key in keys if ".".join(key.split(".")[:2]) not in safe]
