"""A supervised run, from its first line to its last: what ``espalier sft`` does."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from actors.candidates import Candidates
from actors.checkpoints import checkpoints
from actors.delivery import deliver, deliver_rest
from actors.ending import signals
from actors.evaluate import right_samples
from actors.heartbeat import Heartbeats, Watched
from actors.learner import LearnerGroup
from actors.placement import Placement
from actors.ray_support import watched
from actors.session import draw_curves, followed, in_session, opened
from actors.supervised import SftState, Supervised
from system.config import Config, to_dict, without_rank
from system.config.lora import going_on
from system.errors import DONE, STOPPED, ConfigError
from system.observe.recorder import Status
from system.observe.rundir import RunDir
from system.observe.terminal import shown
from system.observe.views import sinks
from system.redact import redact
from system.sft.choice import SavedModel, chosen, rule
from system.sft.data import SplitData, read
from system.sft.prepare import learner_config, prepare
from system.tasks.base import Task, make_task
from system.tasks.inputs import make_model


def sft(config: Config, *, config_name: str, resume: Path | None) -> int:
    """Start a supervised run, or go on with the one in ``resume``; returns the process's exit code.

    The configuration has passed :func:`system.doctor.preflight.require`.
    """
    old = RunDir.open(resume) if resume else None
    if old and not old.supervised:
        raise ConfigError(f"{resume} is no supervised run: go on with {old.resume_command}")
    if old and old.end:
        return deliver_rest(
            config, old, f"{resume} has ended, and is left as it is; its model is {old.model}"
        )
    data = read(config.sft, config.run.seed)  # all of it: nothing is made before
    task = make_task(config) if config.sft.samples or not config.model.path else None
    run_dir = old or RunDir.create(config, f"{config_name}-sft", supervised=True)
    with opened(config, run_dir, without_rank(config), new=old is None):
        run = _SftRun(config, run_dir, data, task, rule(config.sft))
        again, last = run_dir.again(config), not config.sft.samples
        code = in_session(config, run_dir.root, run.learn, again, new=old is None, last=last)
        return run.conclude() if code == DONE else code


@dataclass
class _SftRun:
    """What a supervised run is, and what has come of it."""

    config: Config
    run_dir: RunDir
    data: SplitData
    task: Task | None
    how: str  # its model is chosen
    state: SftState = field(default_factory=SftState)

    @property
    def model(self) -> Path:
        """The start model: given, or made for this run."""
        return Path(self.config.model.path) if self.config.model.path else self.run_dir.start

    async def learn(self, joined: bool) -> int:
        """All that happens while the learner is there."""
        config, run_dir = self.config, self.run_dir
        told, began = sinks(run_dir, config), time.monotonic()

        def status() -> Status:
            return Status(step=self.state.step, wall_s=time.monotonic() - began)

        try:
            async with followed(config, run_dir, status) as progress:
                with signals() as ending:
                    places = await Placement.claim(config, joined=joined, only="learner")
                    learner = LearnerGroup(config.learn.ranks, places, config.cluster)
                    parts = (learner, told, progress, self.how)
                    supervised = Supervised(config, run_dir, self.state, *parts)
                    ending.stops(supervised, progress)
                    return await places.watch_during(self._train(supervised, learner, places))
        finally:
            for sink in told:
                sink.close()

    async def _train(self, supervised: Supervised, learner: LearnerGroup, places: Placement) -> int:
        config, run_dir, progress = self.config, self.run_dir, supervised.progress
        if not config.model.path:
            assert self.task is not None
            await asyncio.to_thread(make_model, self.model, config, self.task)
        progress.phase(
            "starting", detail=f"waiting for the learner, encoding {len(self.data.train)} conversations"
        )
        going = going_on(config) if checkpoints(run_dir) else config
        settings = to_dict(learner_config(going))
        beats = Heartbeats(
            lambda: {name: Watched(it, places[name].options, False) for name, it in learner.ranks.items()},
            config.cluster.silent_s,
            config.cluster.start_deadline_s,
            progress.note,
        )

        async def work() -> int:
            async with asyncio.TaskGroup() as starting:
                starting.create_task(learner.start(settings, str(self.model)))
                encoding = starting.create_task(asyncio.to_thread(prepare, config, self.data, self.model))
            prepared = encoding.result()
            progress.note(prepared.told())
            return DONE if await supervised.run(prepared) else STOPPED

        return await watched(work(), beats.watch())

    def conclude(self) -> int:
        """Choose a model, and say which and why."""
        config, run_dir, state = self.config, self.run_dir, self.state
        saved, candidates = Candidates(config, run_dir), [SavedModel(**one) for one in state.candidates]
        if samples := config.sft.samples:
            assert self.task is not None
            for one in candidates:
                print(f"{self.how} of the model of step {one.step} …", flush=True)
                one.rate(right_samples(config, self.task, saved.model(one.step), samples), samples)
                print(f"  {one.solved:.3f} ({one.accuracy:.3f} of all samples right)", flush=True)
        best, why = chosen(candidates, self.how)
        facts = json.loads(run_dir.sft_path.read_text(encoding="utf-8"))
        run_dir.write_summary(
            {
                "steps": state.step,
                "epochs": config.sft.epochs,
                "data": facts,
                "trained_tokens": state.tokens,
                "loss": {"first": state.first_loss, "last": state.last_loss},
                "held_out": state.held_out,
                "candidates": [one.facts() for one in candidates],
                "chosen": {"step": best.step, "by": self.how, "why": why},
                "model": {} if best.lora_kept is None else {"lora_kept": best.lora_kept},
                "wall_s": state.wall_s,
                "seed": config.run.seed,
                "config": redact(to_dict(config)),
            }
        )
        draw_curves(run_dir)
        saved.leave(best.step, stays=False)
        for line in (
            f"{state.step} steps, {state.tokens} tokens learned, loss {state.first_loss:.3f} -> "
            f"{state.last_loss:.3f}, {state.wall_s:.0f} s",
            f"model of step {best.step}: {why}",
            f"go on with: espalier train RECIPE model.path={run_dir.model}",
        ):
            print(shown(line))
        return deliver(config, run_dir)
