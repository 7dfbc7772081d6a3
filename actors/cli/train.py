"""``espalier train`` and ``espalier eval``: what starts processes that compute."""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.cli.command import RECIPE, argument, command, configured, split

if TYPE_CHECKING:  # the command line is there at once
    from system.config import Config
    from system.evals.result import EvalResult

# What has to be right for a model and engines of our own.
_OF_MODEL = ("layout", "model", "chat", "run directory", "engine", "gpus", "memory", "hub", "views")


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
    argument("words", nargs="*", metavar="RUN|MODEL_DIR | KEY=VALUE", help="what to evaluate, and overrides"),
    argument("--config", type=Path, help="the recipe; needed for a model directory, which has none"),
    argument("--sets", metavar="NAME,…", help="only these of eval.sets; held-out: the task's own questions"),
    argument("--out", type=Path, metavar="FILE", help="write the result as JSON, or FILE.md: as a table"),
    argument(
        "--answers",
        type=Path,
        metavar="FILE",
        help="keep every answer as it comes, in JSON lines; the same command goes on with what is there",
    ),
    argument(
        "--endpoint",
        metavar="URL",
        help="ask a server of OpenAI's chat completions instead (URL/chat/completions), with the recipe of "
        "--config or of a run",
    ),
    argument("--model", metavar="NAME", default="", help="of --endpoint: the model, as the server knows it"),
    argument("--key-env", metavar="VAR", default="", help="the environment variable that holds its key"),
    argument("--concurrency", type=int, default=16, metavar="N", help="conversations at a time (16)"),
    argument("--timeout", type=float, default=300.0, metavar="S", help="seconds of one request (300)"),
    argument("--retries", type=int, default=5, metavar="N", help="of a request that failed (5), backing off"),
    argument(
        "--parameter",
        action="append",
        default=[],
        metavar="KEY=JSON",
        help="of its requests: top_p=0.9, say; null leaves one out (max_tokens=null)",
    ),
    name="eval",
)
def evaluate(args: argparse.Namespace) -> int:
    """Measure a trained model, or one behind a server, on held-out questions.

    examples:
      espalier eval runs/quickstart-s0
      espalier eval runs/quickstart-s0 task.eval_size=500 --out result.json
      espalier eval runs/quickstart-s0 eval.samples=8 eval.temperature=1 --answers answers.jsonl
      espalier eval path/to/hf-model --config configs/quickstart.yaml
      espalier eval path/to/hf-model --config configs/benchmarks/arpo.yaml --sets aime24,hotpotqa
      espalier eval --endpoint https://api.example.com/v1 --model NAME --key-env API_KEY --config my.yaml
    """
    from system.evals.table import markdown
    from system.observe.jsonl import jsonable
    from system.observe.rundir import write_atomic
    from system.observe.terminal import visible

    result = _of_endpoint(args) if args.endpoint else _of_model(args)
    text = json.dumps(jsonable(result.to_dict()), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    print(visible(text.rstrip(), breaks=True))
    if args.out:  # last: what cannot be written has been shown
        write_atomic(args.out, markdown(result) if args.out.suffix == ".md" else text)
    return 0


def _of_model(args: argparse.Namespace) -> EvalResult:
    """The evaluation of a model that is here."""
    from actors.forking import GROWING, fork_server
    from system.config import load
    from system.doctor.preflight import require
    from system.errors import ConfigError
    from system.observe.rundir import RunDir

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
    config = _to_ask(args, config)
    if not (model / "config.json").is_file():
        raise ConfigError(f"{model} holds no model in Hugging Face format (no config.json)")
    checked = copy.deepcopy(config)
    checked.model.path = str(model)
    with fork_server(config, GROWING):
        # SGLang serves models that are not trained here.
        require(checked, without=("model", "run directory"), training=False)
        from actors.evaluate import evaluate  # slow imports

        return evaluate(config, model, args.answers)


def _of_endpoint(args: argparse.Namespace) -> EvalResult:
    """The evaluation of a model behind a server."""
    from system.config import load
    from system.doctor.preflight import require
    from system.errors import ConfigError
    from system.observe.rundir import RunDir

    target, overrides = split(args.words)
    if (target is None) == (args.config is None):
        raise ConfigError("--endpoint asks the questions of a recipe: name it by --config, or name a run")
    config = RunDir.open(target).config(tuple(overrides)) if target else load(args.config, overrides)
    config = _to_ask(args, config)
    parameters: dict[str, Any] = {}
    for given in args.parameter:
        name, _, value = given.partition("=")
        try:
            parameters[name] = json.loads(value)
        except ValueError:
            raise ConfigError(f"--parameter {given}: KEY=JSON; a text in quotes: '{name}=\"…\"'") from None
    require(config, without=_OF_MODEL, training=False)
    from actors.ask_endpoint import Endpoint, ask_endpoint  # slow imports

    limits = (args.concurrency, args.timeout, args.retries)
    endpoint = Endpoint(args.endpoint, args.model, args.key_env, *limits, parameters)
    return ask_endpoint(config, endpoint, args.answers)


def _to_ask(args: argparse.Namespace, config: Config) -> Config:
    """The part of ``config`` that is to be evaluated.  Raises ConfigError for a set that there is not."""
    from system.evals.sets import only, without_idle_reward, without_training_data
    from system.observe.terminal import shown

    if args.sets is not None:
        config = only(config, [name.strip() for name in args.sets.split(",")])
    config, missing = without_training_data(config)
    if missing:
        print(shown(missing), file=sys.stderr)
    return without_idle_reward(config)


def unsafe_on_resume(overrides: Sequence[str]) -> list[str]:
    """Keys among the overrides that change what is being trained: all that are not safe on resume."""
    from system.config import settings

    def safe(key: str) -> bool:
        """By the setting that it is, or the dictionary or part that it is within."""
        one = settings().get(key)
        return one.safe_on_resume if one else "." in key and safe(key.rpartition(".")[0])

    return [key for text in overrides if not safe(key := text.split("=", 1)[0].strip())]
