"""``espalier tree``, ``bench``, ``plan``, ``doctor`` and ``config``: what looks, measures and explains."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from dataclasses import asdict
from pathlib import Path

from actors.cli.command import RECIPE, argument, command, split

BENCHMARKS = (
    *("engine", "learner", "schedules", "host", "throughput", "twin", "scale", "dataflow", "weights"),
    *("eager", "gpu", "memory", "judge", "sessions", "trl"),
)


@command(
    argument("run", metavar="RUN", type=Path, help="a run directory"),
    [
        argument("--list", action="store_true", help="a table of all trees that the run keeps"),
        argument("--best", action="store_true", help="the tree of the highest mean reward"),
        argument("--worst", action="store_true", help="the tree of the lowest mean reward"),
        argument("--prompt", metavar="ID", help="the newest tree of this prompt"),
        argument(
            "--number",
            type=int,
            default=-1,
            metavar="N",
            help="the tree that --list and `espalier watch` show under N; -1 is the newest",
        ),
    ],
    argument("--entropy", action="store_true", help="show the entropy of every token"),
    argument("--full", action="store_true", help="whole texts with their line breaks"),
    argument("--html", type=Path, metavar="FILE", help="as a page of its own, to open offline or to mail"),
)
def tree(args: argparse.Namespace) -> int:
    """Print a trajectory tree of a run.

    examples:
      espalier tree runs/quickstart-s0                    the newest tree
      espalier tree runs/quickstart-s0 --list             a table of all trees kept
      espalier tree runs/quickstart-s0 --number 1284      one of them
      espalier tree runs/quickstart-s0 --best --entropy   the best rewarded, with its entropies
      espalier tree runs/quickstart-s0 --worst --full | less
      espalier tree runs/quickstart-s0 --best --html tree.html   drawn, in one file to mail
      espalier tree runs/quickstart-s0 --list --html trees.html  the table, in one file

    How to read it: a tree goes one level deeper where it forks. `fork?` is a decision of the branching
    policy after a tool result: the rise in entropy (ΔH), the fork probability P and the draw. A leaf shows
    its reward, its advantage A over its siblings, why it ended, and whether it began as root, fork or top-up.
    """
    from system.observe import show

    if args.html:
        from system.watch import mail

        return mail.run(args)
    return show.run(args)


@command(
    argument("what", choices=BENCHMARKS),
    argument("words", nargs="*", metavar="ARGUMENT", help="what some benchmarks need; see examples"),
    argument("--out", type=Path, metavar="DIR", help="where the report goes (default: runs/bench-…)"),
    argument("--quick", action="store_true", help="a smaller measurement, for a first look"),
    argument("--rounds", type=int, metavar="N", help="of trl, throughput: how often each way runs"),
    argument(
        "--latency",
        metavar="S,S",
        help="of trl: seconds that a search takes longer: 0,0.1; of throughput: σ of its latency: "
        "0,1,1+stragglers",
    ),
    argument("--steps", type=int, metavar="N", help="of trl, throughput: training steps of a run"),
)
def bench(args: argparse.Namespace) -> int:
    """Measure a part of the system on this machine.

    examples:
      espalier bench engine            our engine against transformers' batching, tokens per second
      espalier bench learner --quick   packed trees against flattened paths, at several sharing ratios
      espalier bench schedules         barrier-free growth against the released rounds, on a virtual clock
      espalier bench eager 8           eager growth against linear rollouts, on so many seeds
      espalier bench host              what one rollout worker carries: 2,000 branches against a stub engine
      espalier bench judge             whole runs with and without a slow judge: what the engine waits
      espalier bench judge 8           the same for this bound of staleness only
      espalier bench sessions          python sessions: a fork, a cell, memory, with 1, 100 and 2,000 alive
      espalier bench throughput        whole runs: sync and async, linear and trees, by spread of tool latency
      espalier bench throughput 'linear async η=1' 'eager async η=1'
                                       these ways only, compared with the first
      espalier bench throughput --rounds 8 --latency 1+stragglers 'linear async η=1' 'eager async η=1'
                                       so many rounds, each with slow queries of its own; one latency only
      espalier bench twin RUN OTHER    the digital twin, calibrated on RUN, predicts OTHER
      espalier bench twin runs/bench-engine/engine.json runs/bench-learner/learner.json RUN
                                       the twin at the speeds that these benchmarks measured predicts RUN
      espalier bench scale 7B          the twin from 8 to 4096 GPUs: best split, and where throughput bends
      espalier bench scale 14B 32 64   the same for these numbers of GPUs only; sizes: 7B, 14B, 32B
      espalier bench gpu               kernels, a learner's step and weights, at a 14B model's shapes
      espalier bench gpu attention loss
                                       these probes only; without a GPU, or with --quick, at toy size
      espalier bench memory 14B        peak bytes of a training step on fake tensors, and the plan's beside it
      espalier bench dataflow          a batch on its way to the learner: bytes, memory, packing time
      espalier bench trl               whole runs beside TRL's GRPOTrainer on the same work, in about an hour;
                                       needs `make bench-trl` and a quiet machine (--quick: 6 minutes)
      espalier bench trl --rounds 3 --latency 0 trl linear-sync arpo
                                       these ways only: trl, trl-1-thread, trl-in-process, trl-continuous,
                                       linear-sync, linear-async, arpo, arpo-tp2
      espalier bench weights           new weights for 1 to 8 fake SGLang servers over slow links: how long
                                       they stand still, what the learner sends; one group, and one per server

    Each writes <name>.json, most of them PNG plots, and <name>.html, one page that opens offline.
    """
    from system import plugins
    from system.errors import ConfigError

    measure = plugins.load(f"system.bench.{args.what}:run")
    takes = inspect.signature(measure).parameters
    if args.words and "words" not in takes:
        raise ConfigError(f"bench {args.what} takes no arguments, found: {' '.join(args.words)}")
    given = {name: getattr(args, name) for name in ("rounds", "latency", "steps")}
    given = {name: value for name, value in given.items() if value is not None}
    if other := [name for name in given if name not in takes]:
        raise ConfigError(f"bench {args.what} takes no --{other[0]}")
    out = args.out or Path("runs") / f"bench-{args.what}"
    out.mkdir(parents=True, exist_ok=True)
    measure(out, quick=args.quick, **given, **({"words": args.words} if "words" in takes else {}))
    return 0


@command(
    RECIPE,
    argument("--gpus", type=int, metavar="N", help="default: what the configuration names"),
    argument("--gpu", default="", help="h100, h200 or a100; default: cluster.gpu"),
    argument("--search", action="store_true", help="find the fastest layout that fits them"),
    argument("--sft", action="store_true", help="of espalier sft: the learner alone, on all of its GPUs"),
    argument("--prompt", type=float, metavar="TOKENS", help="mean tokens of a prompt"),
    argument("--response", type=float, metavar="TOKENS", help="mean tokens of a response"),
    argument("--calls", type=float, help="mean tool calls of a branch"),
    argument("--tool-s", type=float, metavar="SECONDS", help="mean seconds of a tool call"),
)
def plan(args: argparse.Namespace) -> int:
    """Say how a configuration would use N GPUs, and what would limit it.

    examples:
      espalier plan configs/quickstart.yaml --gpus 8 model.path=Qwen2.5-7B model.dtype=bfloat16 learn.tp=4
      espalier plan configs/qwen3-14b-8x8.yaml --gpu h200 --response 6000 --calls 4 --tool-s 2.5
      espalier plan my.yaml --gpus 64 --search     learn.tp, pp, cp, dp and recompute, engine.tp and replicas
      espalier plan configs/sft/arpo-8b.yaml --sft

    Nothing is started or downloaded: a model is known by its directory (config.json) or its name. Speeds are
    a roofline with the assumptions of system/plan/hardware.py; the memory model is that of Korthikanti et al.
    (2022). Exit code 1: it would not fit. `espalier bench scale` simulates the run itself.
    """
    from system.cluster.placement import PlacementError, paper_nodes, place
    from system.config import load
    from system.errors import ConfigError
    from system.plan import AgentWorkload, named_gpus, plan, search, supervised_plan, table, text

    config = load(*split(args.words, "espalier plan configs/quickstart.yaml --gpus 8"))
    if args.sft:
        place(config, paper_nodes(config), "learner")
        lines, fits = supervised_plan(config, gpu=args.gpu or config.cluster.gpu)
        print(lines)
        return 0 if fits else 1
    if args.gpus is not None and args.gpus < 1:
        raise ConfigError(f"--gpus {args.gpus}: give 1 or more, or leave it out")
    workload = AgentWorkload.guess(config).told(
        config, prompt_tokens=args.prompt, response_tokens=args.response, calls=args.calls, tool_s=args.tool_s
    )
    gpu, gpus = args.gpu or config.cluster.gpu, args.gpus or named_gpus(config)
    if args.search:
        found = search(config, gpus, gpu=gpu, workload=workload)
        print(table(config, gpus, found) + "\n")
        if not found.best:
            return 1
        made = found.best[0][1]
    else:
        made = plan(config, gpus, gpu=gpu, workload=workload)
    print(text(made))
    if not args.search and args.gpus is None and config.cluster.gpus_per_node:
        try:
            place(config, paper_nodes(config))
        except PlacementError as error:
            print(f"PROBLEM: {error}")
            return 1
    return 0 if made.fits else 1


@command(
    RECIPE,
    argument("--json", action="store_true", help="print the findings as JSON"),
)
def doctor(args: argparse.Namespace) -> int:
    """Check this machine, or the allocation it runs in, against a recipe.

    examples:
      espalier doctor                                      against the defaults
      espalier doctor configs/quickstart.yaml engine=sglang
      srun --ntasks-per-node=1 espalier doctor recipe.yaml --json     on every node of an allocation

    In the shell of `salloc --nodes=2`, or in a batch script, it also asks all nodes, by one srun, for their
    clocks, GPUs and drivers, and whether they read what is written where the run goes.
    Exit code 1: a problem stops the recipe from running here.  Warnings do not.
    """
    from system.config import load
    from system.doctor.checks import examine, stops
    from system.doctor.facts import gather
    from system.observe.terminal import shown
    from system.redact import redact

    config = load(*split(args.words))
    findings = examine(gather(config), config)
    if args.json:
        print(json.dumps([redact(asdict(finding)) for finding in findings], indent=2))
        return int(stops(findings))
    width = max(len(finding.topic) for finding in findings)
    for finding in findings:
        print(f"{finding.level:8} {finding.topic:{width}}  {shown(finding.found)}")
        if finding.remedy:
            print(f"{'':8} {'':{width}}  → {shown(finding.remedy)}")
    problems = sum(finding.level == "problem" for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    print(f"\n{problems} problem{'s' * (problems != 1)}, {warnings} warning{'s' * (warnings != 1)}")
    return int(stops(findings))


@command(
    RECIPE,
    argument("--explain", nargs="?", const="", metavar="KEY|SECTION", help="the settings reference"),
    argument("--markdown", action="store_true", help="with --explain: as docs/settings.md"),
)
def config(args: argparse.Namespace) -> int:
    """Print the merged configuration, or say what the settings mean.

    examples:
      espalier config configs/quickstart.yaml
      espalier config configs/quickstart.yaml flow.staleness=0 > my.yaml
      espalier config --explain                    every setting: type, default, what it may be, what it is
      espalier config --explain flow.staleness     one of them, or a section
      espalier config --explain algorithm          what `algorithm=dapo` and others stand for
    """
    if args.explain is not None:
        from system.config.explain import markdown, text

        print(markdown() if args.markdown else text(args.explain), end="")
        return 0
    from system.config import from_dict, load, to_dict, to_yaml
    from system.redact import HIDDEN, redact

    values = to_dict(load(*split(args.words)))
    if (printed := redact(values)) != values:
        print(
            f"WARNING: secrets are printed as {HIDDEN}; take them from the environment: "
            "'slurm.env={WANDB_API_KEY: ${oc.env:WANDB_API_KEY}}'",
            file=sys.stderr,
        )
    print(to_yaml(from_dict(printed)), end="")
    return 0


@command(
    argument("key", nargs="?", default="", metavar="KEY", help="one key, or the beginning of several"),
    argument("--markdown", action="store_true", help="all of it, as docs/metrics.md"),
)
def metrics(args: argparse.Namespace) -> int:
    """Say what the keys of metrics.jsonl mean.

    examples:
      espalier metrics                             every key: unit, what it is, what it should look like
      espalier metrics train                       those that begin so
      espalier metrics tools/search/ok/p95_s       one, as a run wrote it

    The same keys are in W&B, TensorBoard and trackio; the names in Prometheus stand beside them.
    """
    from system.observe.catalogue import markdown, text

    print(markdown() if args.markdown else text(args.key), end="")
    return 0
