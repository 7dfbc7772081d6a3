"""A training run, from its first line to its last: what ``espalier train`` does."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from ray.exceptions import RayError

from actors.conductor import Conductor, checkpoints
from actors.ending import EXIT_DEADLINE_S, exit_within, stops_on_signals
from actors.inputs import check_engine, check_model, demonstrations
from actors.placement import Placement
from actors.ray_support import StartFailed, ray_session
from actors.rollout_pool import RunActors
from system.config import Config, ConfigError
from system.errors import DONE, FAILED, LOST, STOPPED, EspalierError, exit_code, leaves
from system.observe.jsonl import JsonlWriter
from system.observe.progress import Progress
from system.observe.recorder import Recorder
from system.observe.rundir import RunDir
from system.observe.terminal import shown
from system.observe.totals import report
from system.observe.wandb_sink import WandbSink
from system.tasks.base import Task, make_task


def train(config: Config, *, config_name: str, resume: Path | None) -> int:
    """Start a training run, or go on with the one in ``resume``; returns the process's exit code."""
    check_engine(config)
    task = make_task(config)
    check_model(config, task)
    run_dir = RunDir.open(resume) if resume else RunDir.create(config, config_name)
    run_dir.write_config(config)
    print(f"run directory: {run_dir.root}", flush=True)
    code = FAILED
    try:
        with ray_session(config, run_dir.root) as joined:
            try:
                code = asyncio.run(_run(config, run_dir, task, joined))
            except* ConfigError as errors:
                raise next(leaves(errors)) from None
            except* (EspalierError, RayError) as errors:
                code = _failed(errors, run_dir)
            finally:
                exit_within(EXIT_DEADLINE_S, code)
    except StartFailed as error:
        code = _failed(error, run_dir)
    return code


def _failed(errors: BaseException, run_dir: RunDir) -> int:
    """Say why the run failed and how to go on; returns the exit code."""
    for error in leaves(errors):
        print(f"espalier: {shown(str(error))}", file=sys.stderr)
    code = exit_code(errors, lost=(RayError,))
    when = "" if code == LOST else "once that is mended, "
    again = f"espalier train --resume {run_dir.root}"
    print(f"espalier: the run failed; {when}go on with {again}", file=sys.stderr)
    return code


async def _run(config: Config, run_dir: RunDir, task: Task, joined: bool) -> int:
    """Everything that happens while Ray is there, shown, recorded, and reported at the end."""
    recorder = Recorder(run_dir, config, [JsonlWriter(run_dir.metrics_path), WandbSink(run_dir, config)])
    try:
        with Progress(
            recorder.status, total_steps=config.run.steps, interval_s=config.observe.progress_s
        ) as progress:
            drawing = asyncio.create_task(progress.run())
            try:
                places = await Placement.claim(config, joined=joined)
                return await places.watch_during(_train(config, run_dir, task, recorder, progress, places))
            finally:
                drawing.cancel()
                await asyncio.gather(drawing, return_exceptions=True)
    finally:  # a run that stopped or failed says how far it came, too
        summary = recorder.finish()
        if summary["versions"]:
            from system.observe import plots  # slow import, and Ray's processes end meanwhile

            plots.draw(run_dir)
            print(*map(shown, report(summary, run_dir)), sep="\n", flush=True)


async def _train(
    config: Config, run_dir: RunDir, task: Task, recorder: Recorder, progress: Progress, places: Placement
) -> int:
    """Actors, start weights or the newest checkpoint, training, model."""
    model = Path(config.model.path) if config.model.path else run_dir.start  # where one is made
    actors = await RunActors.start(config, task, model, places, run_dir)
    try:
        conductor = Conductor(config, actors, task, run_dir, recorder, progress)
        places.spare = conductor.spare
        with stops_on_signals(conductor.loop, progress):
            if saved := checkpoints(run_dir):
                await conductor.restore(saved[-1])
            else:
                if config.warmstart.steps:
                    await conductor.warm_start(demonstrations(config, task, model))
                await conductor.bring_up()
                if not conductor.loop.stopping.is_set():
                    await conductor.evaluate("before")
                    await conductor.save()
            if conductor.loop.stopping.is_set() or not await conductor.run():
                saved = "" if checkpoints(run_dir) else ", with nothing to save yet"
                how = f"go on with espalier train --resume {run_dir.root}"
                progress.note(f"stopped at step {conductor.version}{saved}: {how}")
                return STOPPED
            await conductor.evaluate("after")
            progress.phase("saving")
            await actors.learner.save_hf(str(run_dir.model))
            return DONE
    finally:
        await actors.pool.close()
