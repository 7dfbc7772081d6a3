"""From a configuration to a finished run: what ``espalier train`` and ``espalier eval`` do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from actors.conductor import Conductor, checkpoints
from actors.evaluation import evaluate as answer_questions
from actors.learner import LearnerGroup
from actors.placement import Placement
from actors.ray_support import ActorLost, StartFailed
from actors.rollout_pool import RolloutPool, RunActors
from system.cluster.placement import learner_world
from system.config import Config, ConfigError
from system.engine.sglang.command import SglangMissing, interpreter
from system.flow.ledger import Ledger
from system.models.shape import ModelShape, UnsupportedModel
from system.observe.jsonl import read_jsonl
from system.observe.progress import Progress
from system.observe.recorder import Recorder
from system.observe.rundir import RunDir
from system.observe.sinks import JsonlSink
from system.observe.wandb_sink import WandbSink
from system.tasks.base import HasCorpus, HasDemonstrations, HasTokenizer, Task
from system.tasks.demos import demonstration_tree
from system.tasks.registry import make_task
from system.tools.service import ToolStartError
from system.tree.record import Tree

# Exit codes.  STOPPED: asked to stop before the end, a checkpoint was saved.  LOST: a machine or an actor
# failed, not the run itself (EX_TEMPFAIL of sysexits.h): going on from the checkpoint may well succeed.
DONE, FAILED, STOPPED, LOST = 0, 1, 3, 75


def train(config: Config, *, config_name: str, resume: Path | None) -> int:
    """Start a training run, or go on with the one in ``resume``; returns the process's exit code."""
    check_engine(config)
    task = make_task(config)
    check_model(config, task)
    run_dir = RunDir.open(resume) if resume else RunDir.create(config, config_name)
    run_dir.write_config(config)
    print(f"run directory: {run_dir.root}", flush=True)
    try:
        with ray_session(config) as joined:
            return asyncio.run(_train(config, run_dir, task, joined))
    except* ConfigError as errors:
        raise next(_leaves(errors)) from None
    except* (ActorLost, ToolStartError, RayError) as errors:
        for error in _leaves(errors):
            print(f"espalier: {error}", file=sys.stderr)
        print(f"espalier: the run failed; go on with espalier train --resume {run_dir.root}", file=sys.stderr)
        code = failure_code(errors)
    return code


def failure_code(error: BaseException) -> int:
    """LOST if every part that failed may be there again next time, FAILED if one would fail again."""
    lasting = (ToolStartError, StartFailed)
    return FAILED if any(isinstance(leaf, lasting) for leaf in _leaves(error)) else LOST


def evaluate(config: Config, model_dir: Path) -> dict[str, Any]:
    """Greedy answers of the model in ``model_dir`` to the held-out questions."""
    check_engine(config)
    task = make_task(config)
    with ray_session(config) as joined, tempfile.TemporaryDirectory() as scratch:
        return asyncio.run(_evaluate(config, task, model_dir, Path(scratch), joined))


async def _evaluate(
    config: Config, task: Task, model_dir: Path, scratch: Path, joined: bool
) -> dict[str, Any]:
    places = await Placement.claim(config, joined=joined)
    corpus = corpus_file(config, task, scratch)
    pool = await RolloutPool.start(config, str(model_dir), corpus, places, scratch)
    try:
        questions = task.eval()[: config.eval.questions]
        return (await answer_questions(config, pool, questions, lambda: None)).to_dict()
    finally:
        await pool.close()


async def _train(config: Config, run_dir: RunDir, task: Task, joined: bool) -> int:
    recorder = Recorder(run_dir, config, [JsonlSink(run_dir.metrics_path), WandbSink(run_dir, config)])
    try:
        with Progress(
            recorder.status, total_steps=config.run.steps, interval_s=config.observe.progress_s
        ) as progress:
            drawing = asyncio.create_task(progress.run())
            try:
                return await _with_crew(config, run_dir, task, recorder, progress, joined)
            finally:
                drawing.cancel()
                await asyncio.gather(drawing, return_exceptions=True)
    finally:  # a run that stopped or failed says how far it came, too
        summary = recorder.finish()
        if summary["versions"]:
            from system.observe import plots  # slow import, and Ray's processes end meanwhile

            plots.draw(run_dir)
            print(*report(summary, run_dir), sep="\n", flush=True)


async def _with_crew(
    config: Config, run_dir: RunDir, task: Task, recorder: Recorder, progress: Progress, joined: bool
) -> int:
    model = start_weights(config, run_dir)
    places = await Placement.claim(config, joined=joined)
    try:
        async with asyncio.TaskGroup() as tasks:  # whichever fails first ends the other
            watching = tasks.create_task(places.watch(), name="node watch")
            working = tasks.create_task(_work(config, run_dir, task, recorder, progress, places, model))
            working.add_done_callback(lambda _: watching.cancel())
    except* (ActorLost, RayError):
        await places.explain()
        raise
    return working.result()


async def _work(
    config: Config,
    run_dir: RunDir,
    task: Task,
    recorder: Recorder,
    progress: Progress,
    places: Placement,
    model: Path,
) -> int:
    corpus = corpus_file(config, task, run_dir.root)
    actors = await start_crew(config, task, model, corpus, places, run_dir)
    try:
        conductor = make_conductor(config, actors, task, run_dir, recorder, progress)
        places.spare = conductor.spare
        with signals(conductor):
            return await _lead(conductor, task, model)
    finally:
        await actors.close()


async def _lead(conductor: Conductor, task: Task, model: Path) -> int:
    """From the start weights, or the newest checkpoint, to the end of the run."""
    config, run_dir, progress = conductor.config, conductor.run_dir, conductor.progress
    saved = checkpoints(run_dir)
    if saved:
        await conductor.restore(saved[-1])
    else:
        if config.warmstart.steps:
            await conductor.warm_start(demonstrations(config, task, model))
        await conductor.bring_up()
        if not conductor.stopping.is_set():
            await conductor.evaluate("before")
            await conductor.save()
    if conductor.stopping.is_set() or not await conductor.run():
        progress.note(
            f"stopped at step {conductor.version}: go on with espalier train --resume {run_dir.root}"
        )
        return STOPPED
    await conductor.evaluate("after")
    progress.phase("saving")
    await conductor.save_model()
    return DONE


def make_conductor(
    config: Config, actors: RunActors, task: Task, run_dir: RunDir, recorder: Recorder, progress: Progress
) -> Conductor:
    """The conductor of a new run, or of one that goes on from its newest checkpoint."""
    prompts = {prompt.id: prompt for prompt in task.train()}
    ids, seed, attempts = list(prompts), config.run.seed, config.flow.max_attempts
    saved = checkpoints(run_dir)
    version = int(saved[-1].name[1:]) if saved else 0
    if run_dir.ledger_path.exists():
        ledger = Ledger.replay(ids, seed, read_jsonl(run_dir.ledger_path), version, attempts)
    else:
        ledger = Ledger(ids, seed, attempts)
    return Conductor(config, actors, prompts, task.eval(), ledger, recorder, run_dir, progress, version)


def start_weights(config: Config, run_dir: RunDir) -> Path:
    """The directory of the start weights: the configured model, or a tiny new one in the run directory, which
    :func:`start_crew` makes.
    """
    return Path(config.model.path) if config.model.path else run_dir.start


async def start_crew(
    config: Config, task: Task, model: Path, corpus: Path | None, places: Placement, run_dir: RunDir
) -> RunActors:
    """Every actor of a run, at the weights in ``model``; a new model is made while the learner's processes
    load Megatron.
    """
    learner = LearnerGroup(learner_world(config), places)
    if not (model / "config.json").is_file():
        assert isinstance(task, HasTokenizer)
        await asyncio.to_thread(_make_model, model, config, task)
    return await RunActors.start(config, learner, str(model), corpus, places, run_dir.logs.resolve())


def _make_model(path: Path, config: Config, task: HasTokenizer) -> None:
    from transformers.utils.logging import disable_progress_bar

    from system.tasks.tiny_model import create_model  # slow imports

    disable_progress_bar()  # of saving weights, which would break into our own
    partial = path.with_name(path.name + ".partial")  # a run killed meanwhile must not find half a model
    create_model(partial, task.tokenizer(), config.model, config.run.seed)
    partial.rename(path)


def check_model(config: Config, task: Task) -> None:
    """Refuse a model that cannot be trained, or cannot be made.  Raises ConfigError."""
    if config.model.path:
        try:
            ModelShape.from_directory(config.model.path)
        except UnsupportedModel as error:
            raise ConfigError(f"model.path={config.model.path}: {error}") from error
    elif not isinstance(task, HasTokenizer):
        raise ConfigError(f"model.path is empty, and task {task.name!r} brings no tokenizer for a new model")


def check_engine(config: Config) -> None:
    """Refuse an engine that cannot start here, before anything else does.  Raises ConfigError."""
    engine = config.engine
    if engine.name == "sglang" and not engine.urls:
        try:
            interpreter(engine)
        except SglangMissing as error:
            raise ConfigError(f"engine=sglang: {error}") from error


def corpus_file(config: Config, task: Task, directory: Path) -> Path | None:
    """What the search server indexes: the configured file, or the task's own documents written to
    ``directory``; None where no search server is started.
    """
    if "search" not in config.tools.names or config.tools.search_url:
        return None
    if config.tools.corpus:
        return Path(config.tools.corpus)
    if not isinstance(task, HasCorpus):
        raise ConfigError(
            f"tool 'search' has nothing to search: task {task.name!r} brings no corpus; set tools.corpus, or "
            "tools.search_url, or take search out of tools.names"
        )
    path = directory / "corpus.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for document in task.corpus():
            file.write(json.dumps(document, ensure_ascii=False) + "\n")
    return path


def demonstrations(config: Config, task: Task, model: Path) -> list[Tree]:
    """The task's demonstrations as single-leaf trees."""
    if not isinstance(task, HasDemonstrations):
        raise ConfigError(
            f"warmstart.steps={config.warmstart.steps}, but task {task.name!r} has no demonstrations"
        )
    from transformers import AutoTokenizer  # slow import

    tokenizer = AutoTokenizer.from_pretrained(model)
    made = task.demonstrations(config.warmstart.demos, config.run.seed)
    return [demonstration_tree(one, tokenizer) for one in made]


@contextlib.contextmanager
def ray_session(config: Config) -> Generator[bool]:
    """Ray for the length of the block: the cluster we are given, or one of this machine alone.

    Yields whether it is a given one (``cluster.address``, or ``$RAY_ADDRESS`` as a SLURM job sets it).
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    given = config.cluster.address or os.environ.get("RAY_ADDRESS", "")
    ray.init(
        address=given or "local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        namespace=f"espalier-{os.getpid()}",
    )
    try:
        yield bool(given)
    finally:
        ray.shutdown()


@contextlib.contextmanager
def signals(conductor: Conductor) -> Generator[None]:
    """The first SIGINT or SIGTERM saves and stops; the second ends at once."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def handle() -> None:
        if conductor.stopping.is_set():
            task.cancel()
        else:
            conductor.progress.note("stopping: finishing the step and saving (again to stop at once)")
            conductor.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, handle)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def report(summary: dict[str, Any], run_dir: RunDir) -> list[str]:
    """What a run says last."""
    tokens = summary["tokens"]
    lines = [
        f"held-out questions, {which} training: accuracy {scores['accuracy']:.3f}, "
        f"reward {scores['reward']:.3f}, {scores['tool_calls']:.2f} tool calls per question"
        for which, scores in summary["eval"].items()
    ]
    sharing = tokens["flat_trained"] / max(tokens["unique_trained"], 1)
    return [
        *lines,
        f"{summary['trees']} trees, {summary['leaves']} leaves, {summary['forks']} forks, "
        f"{tokens['generated']} tokens generated, {tokens['trained']} trained on, "
        f"{sharing:.2f} flat tokens per packed one, {summary['wall_s']:.0f} s",
        f"see {run_dir.summary_path}, {run_dir.curves}/overview.png, and: espalier tree {run_dir.root}",
    ]


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
