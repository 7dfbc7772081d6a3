"""``espalier eval``: greedy answers to held-out questions."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from actors.cli.words import split

WHAT = "measure a trained model on held-out questions"
EPILOG = """\
examples:
  espalier eval runs/quickstart-s0
  espalier eval runs/quickstart-s0 eval.questions=500 --out result.json
  espalier eval path/to/hf-model --config configs/quickstart.yaml
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", nargs="+", metavar="RUN|MODEL_DIR | KEY=VALUE", help="what to evaluate, and overrides"
    )
    parser.add_argument(
        "--config", type=Path, help="the recipe; needed for a model directory, which has none"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON")


def run(args: argparse.Namespace) -> int:
    from system.config import load
    from system.config.check import check_parts
    from system.errors import ConfigError
    from system.observe.jsonl import jsonable
    from system.observe.rundir import RunDir, write_atomic

    target, overrides = split(args.words)
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
    check_parts(config)
    from actors.evaluate import evaluate  # slow imports

    result = evaluate(config, model)
    text = json.dumps(jsonable(result), indent=2, ensure_ascii=False, allow_nan=False)
    if args.out:
        write_atomic(args.out, text + "\n")
    print(text)
    return 0
