"""``espalier export``: a run's model as a directory of its own, or on a hub.

``espalier dequantise``: a float8 model with plain weights.
"""

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
    argument(
        "--dtype", choices=("bfloat16", "float32"), help="of the weights (default: model.dtype of the run)"
    ),
    argument("--public", action="store_true", help="a repository that is made for it is seen by everyone"),
)
def export(args: argparse.Namespace) -> int:
    """Write or upload the model of a run.

    examples:
      espalier export runs/quickstart-s0 --to models/quickstart
      espalier export runs/quickstart-s0 --step 100 --to models/quickstart-100
      espalier export runs/quickstart-s0 --push me/quickstart
      espalier export runs/lora-s0 --adapter --to adapters
      espalier export runs/lora-s0 --dtype float32 --to models/lora

    The adapters of a run by LoRA (learn.lora.rank) are merged into its model, in which bfloat16 rounds small
    changes away: --dtype float32 merges them anew, without that loss; --adapter leaves them apart.
    A checkpoint is read file by file, without a GPU and whatever layout wrote it. The directory holds
    weights, configuration, tokenizer, and a model card (README.md) with the run's figures.
    A hub of your own (HF_ENDPOINT) that knows no Xet, Hugging Face's storage, wants HF_HUB_DISABLE_XET=1.
    """
    from system.errors import ConfigError
    from system.observe.publish import publish
    from system.observe.rundir import RunDir

    if args.to is None and args.push is None:
        raise ConfigError("say where to: --to DIR, or --push OWNER/NAME")
    if args.public and args.push is None:
        raise ConfigError("--public goes with --push OWNER/NAME")
    run, push = RunDir.open(args.run), args.push or ""
    for line in publish(
        run,
        args.step,
        args.to,
        push,
        public=args.public,
        adapter=args.adapter,
        dtype=args.dtype or "",
    ):
        print(line, flush=True)
    return 0


@command(
    argument(
        "model", type=Path, metavar="MODEL", help="directory of a float8 model, as Hugging Face writes it"
    ),
    argument("to", type=Path, metavar="DIR", help="a new directory for it"),
    argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(default: %(default)s)"),
)
def dequantise(args: argparse.Namespace) -> int:
    """Write a float8 model with plain weights, which SGLang can be started from.

    examples:
      espalier dequantise models/Qwen3-14B-FP8 models/Qwen3-14B-plain

    Learner and embedded engine read float8 models as they are (docs/precision.md).
    """
    from system.errors import ConfigError
    from system.models.files import DTYPES, dequantise
    from system.models.float8 import Float8

    if args.to.exists():
        raise ConfigError(f"{args.to}: it is there already: name a new directory, or remove it")
    if not (args.model / "config.json").is_file():
        raise ConfigError(f"{args.model}: no model in Hugging Face format (config.json is missing)")
    if Float8.of_directory(args.model) is None:
        raise ConfigError(f"{args.model} is not quantised (config.json): use it as it is")
    dequantise(args.model, args.to, DTYPES[args.dtype])
    print(args.to)
    return 0
