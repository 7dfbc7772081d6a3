"""``espalier``: the command line.

Only the standard library is imported here; each command imports what it needs when it runs, so ``--help``
answers at once and a command never waits for a library of another.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

USAGE_ERROR = 2
INTERRUPTED = 130

# Commands that are modules of `actors.cli`: WHAT, EPILOG, arguments(parser) and run(args).  They import
# only the standard library at their top.
MODULES: tuple[str, ...] = ("tree", "bench", "plan", "submit", "status", "cancel", "logs", "doctor")

# Keys a resumed run may change without becoming a different experiment.
SAFE_ON_RESUME = (
    "run.steps",
    "run.stop_at_accuracy",
    "rollout.workers",
    "rollout.concurrency",
    "engine.replicas",
    "engine.threads",
    "engine.cache_slots",
    "engine.max_running",
    "learn.threads",
    "tools.concurrency",
    "tools.rate_per_s",
    "checkpoint.",
    "eval.",
    "observe.",
    "cluster.",
    "slurm.",
)

_TRAIN_HELP = """\
examples:
  espalier train configs/quickstart.yaml
  espalier train configs/quickstart.yaml run.seed=1 branching=none flow.staleness=0
  espalier train --resume runs/quickstart-s0
  espalier train --resume runs/quickstart-s0 run.steps=200

A run writes into runs/<name>: metrics, trees, curves, checkpoints, the model and summary.json.
Ctrl-C saves a checkpoint and stops; a second Ctrl-C stops at once.
`espalier config configs/quickstart.yaml` prints every key with its value.
"""
_EVAL_HELP = """\
examples:
  espalier eval runs/quickstart-s0
  espalier eval runs/quickstart-s0 eval.questions=500 --out result.json
  espalier eval path/to/hf-model --config configs/quickstart.yaml
"""
_CONFIG_HELP = """\
examples:
  espalier config configs/quickstart.yaml
  espalier config configs/quickstart.yaml flow.staleness=0 > my.yaml
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 2 wrong usage or configuration, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser, commands = build_parser()
    if not argv:
        parser.print_help()
        return USAGE_ERROR
    try:
        if argv[0] in commands:  # intermixed: overrides may stand before and after options
            args = commands[argv[0]].parse_intermixed_args(argv[1:])
        else:
            args = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has said what is wrong, or printed the help
        return stop.code if isinstance(stop.code, int) else USAGE_ERROR
    from system.config import ConfigError

    try:
        return args.run_command(args)
    except ConfigError as error:
        print(f"espalier: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("espalier: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `espalier tree RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The whole parser, and the parser of each command."""
    parser = argparse.ArgumentParser(
        prog="espalier",
        description="Asynchronous reinforcement learning of tool-using agents on trajectory trees (ARPO).",
        epilog="start here: espalier train configs/quickstart.yaml",
    )
    parser.add_argument("--version", action=_Version, help="print the version")
    adder = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    commands: dict[str, argparse.ArgumentParser] = {}

    def command(
        name: str, what: str, epilog: str, run: Callable[[argparse.Namespace], int]
    ) -> argparse.ArgumentParser:
        made = adder.add_parser(
            name,
            help=what,
            description=what[0].upper() + what[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(run_command=run)
        commands[name] = made
        return made

    train = command("train", "train an agent", _TRAIN_HELP, _train)
    train.add_argument(
        "words", nargs="*", metavar="CONFIG | KEY=VALUE", help="a recipe, and overrides of its keys"
    )
    train.add_argument("--resume", metavar="RUN", type=Path, help="go on with the run in this directory")

    evaluate = command("eval", "measure a trained model on held-out questions", _EVAL_HELP, _eval)
    evaluate.add_argument(
        "words", nargs="+", metavar="RUN|MODEL_DIR | KEY=VALUE", help="what to evaluate, and overrides"
    )
    evaluate.add_argument(
        "--config", type=Path, help="the recipe; needed for a model directory, which has none"
    )
    evaluate.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON")

    for name in MODULES:
        module = importlib.import_module(f"actors.cli.{name}")
        module.arguments(command(name, module.WHAT, module.EPILOG, module.run))

    config = command("config", "print the merged configuration", _CONFIG_HELP, _config)
    config.add_argument(
        "words", nargs="*", metavar="CONFIG | KEY=VALUE", help="a recipe, and overrides of its keys"
    )
    return parser, commands


class _Version(argparse.Action):
    """Looks the version up only when asked."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        from importlib.metadata import version

        print(f"espalier {version('espalier')}")
        parser.exit()


def _train(args: argparse.Namespace) -> int:
    from system.config import ConfigError, load
    from system.observe.rundir import RunDir

    path, overrides = _split(args.words)
    if args.resume is not None:
        if path is not None:
            raise ConfigError(
                f"--resume takes its configuration from {args.resume}/config.yaml; leave {path} out"
            )
        run_dir = RunDir.open(args.resume)
        for key in unsafe_on_resume(overrides):
            print(
                f"WARNING: {key} changes in the middle of a run: results before and after do not compare, "
                "and the checkpoint may not fit",
                file=sys.stderr,
            )
        config, name = run_dir.config(tuple(overrides)), run_dir.name
        return _entry("train")(config, config_name=name, resume=run_dir.root)
    if path is None:
        raise ConfigError("name a recipe, for example: espalier train configs/quickstart.yaml")
    config = load(path, overrides)
    return _entry("train")(config, config_name=path.stem, resume=None)


def _eval(args: argparse.Namespace) -> int:
    from system.config import ConfigError, load
    from system.observe.jsonl import jsonable
    from system.observe.rundir import RunDir, write_atomic

    target, overrides = _split(args.words)
    if target is None:
        raise ConfigError("name what to evaluate: a run directory, or a model in Hugging Face format")
    if (target / "config.yaml").is_file():
        run_dir = RunDir.open(target)
        config = load(args.config, overrides) if args.config else run_dir.config(tuple(overrides))
        model = run_dir.model
    elif args.config is None:
        raise ConfigError(
            f"{target} is no run directory (no config.yaml); for a model directory give a recipe: "
            f"espalier eval {target} --config configs/quickstart.yaml"
        )
    else:
        config, model = load(args.config, overrides), target
    if not (model / "config.json").is_file():
        raise ConfigError(f"{model} holds no model in Hugging Face format (no config.json)")
    result = _entry("evaluate")(config, model)
    text = json.dumps(jsonable(result), indent=2, ensure_ascii=False, allow_nan=False)
    if args.out:
        write_atomic(args.out, text + "\n")
    print(text)
    return 0


def _config(args: argparse.Namespace) -> int:
    from system.config import load, to_yaml

    path, overrides = _split(args.words)
    print(to_yaml(load(path, overrides)), end="")
    return 0


def unsafe_on_resume(overrides: Sequence[str]) -> list[str]:
    """Keys among the overrides that change what is being trained (all but ``SAFE_ON_RESUME``)."""
    keys = [text.split("=", 1)[0].strip() for text in overrides]
    return [
        key
        for key in keys
        if not any(key.startswith(safe) if safe.endswith(".") else key == safe for safe in SAFE_ON_RESUME)
    ]


def _split(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """A path, if there is one, and the ``key=value`` overrides, in any order."""
    from system.config import ConfigError

    paths = [word for word in words if "=" not in word or Path(word).exists()]
    if len(paths) > 1:
        raise ConfigError(f"one file at a time: {paths[0]} or {paths[1]}? (an override is written key=value)")
    return (Path(paths[0]) if paths else None), [word for word in words if word not in paths]


def _entry(name: str) -> Any:
    """``train`` or ``evaluate``: slow imports, so only when they are called."""
    return getattr(importlib.import_module(f"actors.{name}"), name)


if __name__ == "__main__":
    sys.exit(main())
