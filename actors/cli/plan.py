"""``espalier plan``: memory per GPU and the likely bottleneck, before a job is submitted."""

from __future__ import annotations

import argparse

from actors.cli.words import split, takes_recipe

WHAT = "say how a configuration would use N GPUs, and what would limit it"
EPILOG = """\
examples:
  espalier plan configs/quickstart.yaml --gpus 8 model.path=Qwen2.5-7B model.dtype=bfloat16 learn.tp=4
  espalier plan my.yaml --gpus 64 --gpu h200 --response 6000 --calls 4 --tool-s 2.5

Nothing is started or downloaded: a model is known by its directory (config.json) or its name. Speeds are
a roofline with the assumptions of system/plan/hardware.py; the memory model is that of Korthikanti et al.
(2022). Exit code 1: it would not fit. `espalier bench scale` simulates the run itself.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    takes_recipe(parser)
    parser.add_argument("--gpus", type=int, metavar="N", help="default: what the configuration names")
    parser.add_argument("--gpu", default="h100", help="h100 (default), h200 or a100")
    parser.add_argument("--prompt", type=float, metavar="TOKENS", help="mean tokens of a prompt")
    parser.add_argument("--response", type=float, metavar="TOKENS", help="mean tokens of a response")
    parser.add_argument("--calls", type=float, help="mean tool calls of a branch")
    parser.add_argument("--tool-s", type=float, metavar="SECONDS", help="mean seconds of a tool call")


def run(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from system.config import load
    from system.plan import AgentWorkload, plan, text

    config = load(*split(args.words, "espalier plan configs/quickstart.yaml --gpus 8"))
    given = {
        "prompt_tokens": args.prompt,
        "response_tokens": args.response,
        "calls": args.calls,
        "tool_s": args.tool_s,
    }
    workload = replace(AgentWorkload.guess(config), **{k: v for k, v in given.items() if v is not None})
    made = plan(config, args.gpus, gpu=args.gpu, workload=workload)
    print(text(made))
    return 0 if made.fits else 1
