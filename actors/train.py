"""A training run, from its first line to its last: what ``espalier train`` does."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from actors.best_model import ModelChoice
from actors.checkpoints import Restored, checkpoints, restore_newest
from actors.conductor import Conductor
from actors.delivery import deliver, deliver_rest, delivered
from actors.ending import Signals, signals
from actors.heartbeat import Heartbeats
from actors.placement import Placement
from actors.ray_support import watched
from actors.rollout_pool import RunActors
from actors.session import draw_curves, followed, in_session, opened
from system.config import Config, ConfigError, truncated, without_effect
from system.config.lora import going_on
from system.errors import DONE, FAILED, STOPPED
from system.evals.record import Asked
from system.evals.sets import question_sets, to_ask
from system.observe.card import base_name
from system.observe.memory import follow
from system.observe.progress import Progress
from system.observe.recorder import Recorder
from system.observe.rundir import RunDir
from system.observe.terminal import shown
from system.observe.totals import report
from system.observe.views import sinks
from system.sft.demonstrations import demonstrations
from system.tasks.base import Task, make_task, notes


def train(config: Config, *, config_name: str, resume: Path | None) -> int:
    """Start a training run, or go on with the one in ``resume``; returns the process's exit code.

    The configuration has passed :func:`system.doctor.preflight.require`.
    """
    old = RunDir.open(resume) if resume else None
    if old and old.supervised:
        raise ConfigError(f"{resume} is a supervised run: go on with {old.resume_command}")
    if old and _nothing_to_train(config, old):
        told = f"{resume} ended at step {old.end['versions']}, and is left as it is; to go on, set run.steps"
        return deliver_rest(config, old, f"{told} above that")
    if why := truncated(config):
        raise ConfigError(why)
    task = make_task(config)  # which reads all its data, as do the further sets: nothing is made before
    asked = to_ask(question_sets(config, task))
    run_dir = old or RunDir.create(config, config_name)
    with opened(config, run_dir, [*notes(config, task), *without_effect(config)], new=old is None):
        work = partial(_run_and_deliver, config, run_dir, task, asked)
        return in_session(config, run_dir.root, work, run_dir.again(config), new=old is None)


def _nothing_to_train(config: Config, run_dir: RunDir) -> bool:
    """Whether the run came to its end, by its steps or (``run.stop_at_accuracy``) with its model not yet
    delivered.
    """
    if not (end := run_dir.end):
        return False
    same = end["config"]["run"]["steps"] == config.run.steps
    return end["versions"] >= config.run.steps or (same and not delivered(run_dir))


async def _run_and_deliver(
    config: Config, run_dir: RunDir, task: Task, asked: Sequence[Asked], joined: bool
) -> int:
    code = await _run(config, run_dir, task, asked, joined)
    return deliver(config, run_dir) if code == DONE else code  # nothing else goes on meanwhile


async def _run(config: Config, run_dir: RunDir, task: Task, asked: Sequence[Asked], joined: bool) -> int:
    """Everything that happens while Ray is there, shown, recorded, and reported at the end."""
    recorder, code = Recorder(run_dir, config, sinks(run_dir, config)), FAILED
    # In a cluster most processes are on other machines, or not below this one.
    beside = () if joined else (follow(recorder.memory_used),)
    try:
        async with followed(config, run_dir, recorder.status, config.run.steps, beside) as progress:
            recorder.tell = progress.note
            with signals() as ending:
                places = await Placement.claim(config, joined=joined)
                run = _Run(config, run_dir, task, asked, recorder, progress, ending)
                code = await places.watch_during(_train(run, places))
    finally:  # a run that stopped or failed says how far it came, too
        summary = recorder.finish(ended=code == DONE)
        if summary["versions"]:
            draw_curves(run_dir)
            print(*map(shown, report(summary, run_dir)), sep="\n", flush=True)
    return code


@dataclass(frozen=True, slots=True)
class _Run:
    """What a run is, and who hears of it."""

    config: Config
    run_dir: RunDir
    task: Task
    asked: Sequence[Asked]  # at each evaluation
    recorder: Recorder
    progress: Progress
    ending: Signals

    @property
    def model(self) -> Path:
        """The start model: given, or made for this run."""
        return Path(self.config.model.path) if self.config.model.path else self.run_dir.start


async def _train(run: _Run, places: Placement) -> int:
    """The actors of a run, from their start to their end."""
    progress = run.progress
    config = going_on(run.config) if checkpoints(run.run_dir) else run.config
    actors = await RunActors.start(
        config, run.task, run.model, places, run.run_dir, lambda awaited: progress.advance(0, awaited)
    )

    def silent(text: str) -> None:
        progress.note(text)
        run.recorder.actor_silent(text)

    beats = Heartbeats(actors.watched, config.cluster.silent_s, config.cluster.start_deadline_s, silent)
    try:
        return await watched(_conduct(run, actors), beats.watch())
    finally:
        actors.learner.end()  # the largest process: its memory would still be held while the curves are drawn
        await actors.pool.close()


async def _conduct(run: _Run, actors: RunActors) -> int:
    """Start weights or a checkpoint, training, model."""
    config, run_dir, progress = run.config, run.run_dir, run.progress
    found = await restore_newest(actors.learner, run_dir, progress.note)
    version = found.version if found else 0
    choice = ModelChoice(config, run_dir, actors.learner)
    parts = (config, actors, run.task, run_dir, run.recorder, progress)
    conductor = Conductor(*parts, asked=run.asked, version=version, choice=choice)
    actors.places.spare = conductor.spare
    run.ending.stops(conductor.loop, progress)
    run_dir.write_config(config)  # only now: a resume that is refused changes nothing
    if end := run_dir.end:  # of fewer steps: until the new one the run has none
        run_dir.write_summary({**end, "ended": False})
    try:
        return await _to_its_end(run, actors, conductor, found, choice)
    finally:  # of a run that fails, too, which must not wait for an evaluation beside it
        await conductor.evaluations.cut()


async def _to_its_end(
    run: _Run, actors: RunActors, conductor: Conductor, found: Restored | None, choice: ModelChoice
) -> int:
    """``found``: the checkpoint that the learner holds; ``choice``: which model the run leaves."""
    config, run_dir, progress = run.config, run.run_dir, run.progress
    if found:
        await conductor.restore(found)
    else:
        if config.warmstart.steps:
            # Thousands of them take seconds: beside the event loop, which hears signals and heartbeats.
            await conductor.warm_start(await asyncio.to_thread(demonstrations, config, run.task, run.model))
        await conductor.bring_up()
        if not conductor.loop.stopping.is_set():
            await conductor.evaluations.before()
            await conductor.save()
    if conductor.loop.stopping.is_set() or not await conductor.run():
        await conductor.saved()
        saved = "" if checkpoints(run_dir) else ", with nothing to save yet"
        how = f"go on with {run_dir.resume_command}"
        progress.note(f"stopped at step {conductor.version}{saved}: {how}")
        return STOPPED
    await conductor.evaluations.after()
    await conductor.read_counters()  # of what it did, too
    progress.phase("saving")
    if choice.on:
        progress.note(choice.leave(conductor.evaluations.records, run.recorder))
        return DONE
    if config.learn.lora.on:
        await actors.learner.save_adapters(str(run_dir.adapter), base_name(config))
    kept = await actors.learner.save_hf(str(run_dir.model))
    if kept is not None:
        run.recorder.model_merged(kept)
    return DONE
