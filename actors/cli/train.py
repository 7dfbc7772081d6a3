"""``espalier train`` and ``espalier eval``: what starts processes that compute."""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from actors.cli.command import RECIPE, argument, command, configured, split


@command(
    RECIPE,
    argument("--resume", metavar="RUN", type=Path, help="go on with the run in this directory"),
)
def train(args: argparse.Namespace) -> int:
    """Train an agent.

    examples:
      espalier train configs/quickstart.yaml
      espalier train configs/quickstart.yaml run.seed=1 branching=none flow.staleness=0
      espalier train configs/quickstart.yaml 'task.options=!replace {}'      an inherited dictionary, emptied
      espalier train --resume runs/quickstart-s0
      espalier train --resume runs/quickstart-s0 run.steps=200

    A run writes into runs/<name>: metrics, trees, curves, checkpoints, the model and summary.json.
    Ctrl-C (SIGTERM, a closed terminal) saves a checkpoint and stops; a second Ctrl-C stops at once.
    What can be told in a second to be wrong is told before anything starts, in a line each (exit code 2).
    `espalier config --explain` says what each key means, `espalier config RECIPE` prints the values.
    """
    from actors.forking import GROWING, TRAINING, fork_server  # slow imports
    from system.doctor.preflight import require

    config, name = configured(args.words, args.resume, "espalier train configs/quickstart.yaml")
    for key in unsafe_on_resume(args.words) if args.resume else ():
        print(
            f"WARNING: {key} changes in the middle of a run: results before and after do not compare, "
            "and the checkpoint may not fit",
            file=sys.stderr,
        )
    with fork_server(config, [*TRAINING, *GROWING]):  # it imports meanwhile
        require(config, resume=args.resume)
        from actors.train import train  # Ray is imported when nothing stands against the run

        return train(config, config_name=name, resume=args.resume)


@command(
    argument("words", nargs="+", metavar="RUN|MODEL_DIR | KEY=VALUE", help="what to evaluate, and overrides"),
    argument("--config", type=Path, help="the recipe; needed for a model directory, which has none"),
    argument("--out", type=Path, metavar="FILE", help="write the result as JSON, or FILE.md: as a table"),
    argument(
        "--answers",
        type=Path,
        metavar="FILE",
        help="keep every answer as it comes, in JSON lines; the same command goes on with what is there",
    ),
    name="eval",
)
def evaluate(args: argparse.Namespace) -> int:
    """Measure a trained model on held-out questions.

    examples:
      espalier eval runs/quickstart-s0
      espalier eval runs/quickstart-s0 eval.questions=500 --out result.json
      espalier eval runs/quickstart-s0 eval.samples=8 eval.temperature=1 --answers answers.jsonl
      espalier eval path/to/hf-model --config configs/quickstart.yaml
    """
    from system.config import load
    from system.doctor.preflight import require
    from system.errors import ConfigError
    from system.observe.jsonl import jsonable
    from system.observe.rundir import RunDir, write_atomic
    from system.observe.terminal import visible

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
            "espalier eval MODEL_DIR --config configs/quickstart.yaml"
        )
    else:
        config, model = load(args.config, overrides), target
    if not (model / "config.json").is_file():
        raise ConfigError(f"{model} holds no model in Hugging Face format (no config.json)")
    checked = copy.deepcopy(config)
    checked.model.path = str(model)
    require(checked, without=("model", "run directory"))  # SGLang serves models that are not trained here
    from actors.evaluate import evaluate  # slow imports
    from system.evals.table import markdown

    result = evaluate(config, model, args.answers)
    text = json.dumps(jsonable(result.to_dict()), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    print(visible(text.rstrip(), breaks=True))
    if args.out:  # last: what cannot be written has been shown
        write_atomic(args.out, markdown(result) if args.out.suffix == ".md" else text)
    return 0


def unsafe_on_resume(overrides: Sequence[str]) -> list[str]:
    """Keys among the overrides that change what is being trained: all that are not safe on resume."""
    from system.config import settings

    def safe(key: str) -> bool:
        """By the setting that it is, or the dictionary or part that it is within."""
        one = settings().get(key)
        return one.safe_on_resume if one else "." in key and safe(key.rpartition(".")[0])

    return [key for text in overrides if not safe(key := text.split("=", 1)[0].strip())]
