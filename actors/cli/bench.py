"""``espalier bench``: measure a part of the system, or the whole, here or on a simulated machine.

A benchmark is a module of ``system.bench`` with ``run(out_dir, quick)``; one that takes arguments gets them
as ``words``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

WHAT = "measure a part of the system on this machine"
EPILOG = """\
examples:
  espalier bench engine            our engine against transformers' batching, tokens per second
  espalier bench learner --quick   packed trees against flattened paths, at several sharing ratios
  espalier bench schedules         barrier-free growth against the released rounds, on a virtual clock
  espalier bench host              what one rollout worker carries: 2,000 branches against a stub engine
  espalier bench throughput        whole runs: sync and async, linear and trees, by the spread of tool latency
  espalier bench twin RUN OTHER    the digital twin, calibrated on RUN, predicts OTHER
  espalier bench twin runs/bench-engine/engine.json runs/bench-learner/learner.json RUN
                                   the twin at the speeds that these benchmarks measured predicts RUN
  espalier bench scale 7B          the twin from 8 to 4096 GPUs: best split, and where throughput bends
  espalier bench scale 14B 32 64   the same for these numbers of GPUs only
  espalier bench dataflow          a batch on its way to the learner: bytes, memory, packing time

Each writes <name>.json, PNG plots and <name>.html, one page that opens offline.
"""
BENCHMARKS = ("engine", "learner", "schedules", "host", "throughput", "twin", "scale", "dataflow")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=BENCHMARKS)
    parser.add_argument(
        "words", nargs="*", metavar="ARGUMENT", help="what some benchmarks need; see examples"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where the report goes (default: runs/bench-…)"
    )
    parser.add_argument("--quick", action="store_true", help="a smaller measurement, for a first look")


def run(args: argparse.Namespace) -> int:
    import inspect

    from system import plugins
    from system.errors import ConfigError

    measure = plugins.load(f"system.bench.{args.what}:run")
    takes = "words" in inspect.signature(measure).parameters
    if args.words and not takes:
        raise ConfigError(f"bench {args.what} takes no arguments, found: {' '.join(args.words)}")
    out = args.out or Path("runs") / f"bench-{args.what}"
    out.mkdir(parents=True, exist_ok=True)
    measure(out, quick=args.quick, **({"words": args.words} if takes else {}))
    return 0
