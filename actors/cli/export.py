"""``espalier export``: a run's model as a directory of its own, or on a hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from actors.cli.command import argument, command


@command(
    argument("run", type=Path, metavar="RUN", help="run directory"),
    argument("--step", type=int, metavar="N", help="of the checkpoint of this step; else the trained model"),
    argument("--to", type=Path, metavar="DIR", help="write it there, as Hugging Face writes models"),
    argument("--push", metavar="OWNER/NAME", help="upload it (HF_TOKEN; HF_ENDPOINT for another hub)"),
    argument("--adapter", action="store_true", help="of a run by LoRA: the adapters, as PEFT writes them"),
    argument("--public", action="store_true", help="a repository that is made for it is seen by everyone"),
)
def export(args: argparse.Namespace) -> int:
    """Write or upload the model of a run.

    examples:
      espalier export runs/quickstart-s0 --to models/quickstart
      espalier export runs/quickstart-s0 --step 100 --to models/quickstart-100
      espalier export runs/quickstart-s0 --push me/quickstart
      espalier export runs/lora-s0 --adapter --to adapters

    The adapters of a run by LoRA (learn.lora.rank) are merged into its model; --adapter leaves them apart.
    A checkpoint is read file by file, without a GPU and whatever layout wrote it. The directory holds
    weights, configuration, tokenizer, and a model card (README.md) with the run's figures.
    """
    from system.errors import ConfigError
    from system.observe.publish import publish
    from system.observe.rundir import RunDir

    if args.to is None and args.push is None:
        raise ConfigError("say where to: --to DIR, or --push OWNER/NAME")
    if args.public and args.push is None:
        raise ConfigError("--public goes with --push OWNER/NAME")
    run, push = RunDir.open(args.run), args.push or ""
    for line in publish(run, args.step, args.to, push, public=args.public, adapter=args.adapter):
        print(line, flush=True)
    return 0
