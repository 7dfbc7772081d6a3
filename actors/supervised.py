"""The steps of a supervised run: trained, measured, saved, and gone on with after whatever ended it."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from actors.candidates import Candidates
from actors.checkpoints import newest, prune, version_of
from actors.learner import LearnerGroup
from system.config import Config
from system.errors import CheckpointError, ConfigError, EspalierError
from system.observe.progress import Progress, compact
from system.observe.rundir import RunDir, write_atomic
from system.observe.sinks import RESUMED, Sink
from system.sft.course import Course
from system.sft.example import Example
from system.sft.prepare import Prepared

MEASURED = ("loss", "grad_norm", "weight_norm", "lr", "skipped_steps")  # by the learner, recorded as they are
RECENT = 20  # steps that the rate on the progress line is of
MOST_SKIPPED = 10  # steps in a row without finite gradients; there is no loss scale that finds its size so


class NeverFinite(EspalierError):
    """A supervised run that learns nothing any more: its gradients are not finite."""


@dataclass
class SftState:
    """What a checkpoint holds besides weights, as JSON."""

    step: int = 0
    digest: str = ""  # of the data
    tokens: int = 0  # learned so far
    wall_s: float = 0.0
    first_loss: float = float("nan")
    last_loss: float = float("nan")
    skipped: int = 0  # steps up to this one, in a row, whose gradients were not finite
    held_out: list[dict[str, Any]] = field(default_factory=list)  # step, loss in nats per token
    candidates: list[dict[str, Any]] = field(default_factory=list)  # step, loss, lora_kept


class Supervised:
    """Trains to the end of the course: a new run, or one that goes on from its newest checkpoint."""

    def __init__(
        self,
        config: Config,
        run_dir: RunDir,
        state: SftState,
        learner: LearnerGroup,
        sinks: Sequence[Sink],
        progress: Progress,
        how: str,
    ) -> None:
        """``state`` is filled in as the run goes on.  ``how`` its model is chosen: but for "last" there are
        several.
        """
        self.config, self.run_dir, self.state, self.progress = config, run_dir, state, progress
        self.stopping = asyncio.Event()
        self._learner, self._sinks, self._several = learner, sinks, how != "last"
        self._began = time.monotonic()
        self._ticks: deque[tuple[float, int]] = deque(maxlen=RECENT)  # (when, tokens learned by then)

    @property
    def wall_s(self) -> float:
        """Seconds of running, over all sessions."""
        return time.monotonic() - self._began

    def stop(self) -> None:
        """Let :meth:`run` return after the step under way."""
        self.stopping.set()

    async def run(self, prepared: Prepared) -> bool:
        """Train on what was prepared.  False when it was asked to stop first; a checkpoint is saved then."""
        config, state = self.config, self.state
        state.digest = prepared.digest
        course = Course(config.sft, len(prepared.train), config.run.seed)
        await self._restore(course.steps)
        self.run_dir.write_config(config)  # only now: a resume that is refused changes nothing
        write_atomic(self.run_dir.sft_path, json.dumps(prepared.facts(), indent=2) + "\n")
        for warning in self._learner.warnings:
            self.progress.note(warning)
        self.progress.phase("supervised", total=course.steps - state.step)
        for rows in course.batches()[state.step :]:
            if self.stopping.is_set():
                break
            await self._step(course, [prepared.train[i] for i in rows])
            await self._after(course, prepared.held_out)
        else:
            await self.save()
        await self.saved()
        if state.step == course.steps:
            return True
        how = f"go on with {self.run_dir.resume_command}"
        self.progress.note(f"stopped at step {state.step} of {course.steps}: {how}")
        return False

    async def _step(self, course: Course, batch: Sequence[Example]) -> None:
        state, began = self.state, time.monotonic()
        lr = course.lr(state.step)
        stats = await self._learner.supervise([one.tree() for one in batch], lr)
        state.step += 1
        state.tokens += (learned := sum(one.learned for one in batch))
        state.wall_s, seconds = self.wall_s, time.monotonic() - began
        state.last_loss = stats["loss"]
        if state.step == 1:
            state.first_loss = stats["loss"]
        epoch = course.epoch(state.step)
        self._ticks.append((time.monotonic(), state.tokens))
        self.progress.advance(
            1, f"loss {stats['loss']:.3f}  {compact(self._rate())} tok/s  epoch {epoch:.2f}"
        )
        self._write(
            {f"sft/{name}": stats[name] for name in MEASURED}
            | {"sft/epoch": epoch, "sft/tokens": learned, "sft/tokens_per_s": learned / seconds}
            | {"sft/computed_per_s": stats["tokens_computed"] / seconds}
        )
        self._count_skipped(stats, most=min(MOST_SKIPPED, course.steps))

    def _count_skipped(self, stats: dict[str, float], most: int) -> None:
        """Raises :class:`NeverFinite` for the last of ``most`` steps in a row that changed nothing."""
        state = self.state
        state.skipped = state.skipped + 1 if stats["skipped_steps"] else 0
        found = f"gradient norm {stats['grad_norm']:g}, loss {stats['loss']:g}"
        if state.skipped >= most:
            raise NeverFinite(
                f"step {state.step}: the gradients of the last {state.skipped} steps were not finite "
                f"({found}), and nothing is learned: if the first loss was not finite, the weights of "
                "model.path are at fault; else lower sft.lr, or set model.dtype=float32"
            )
        if state.skipped == 1:
            self.progress.note(f"step {state.step} changed nothing: its gradients are not finite ({found})")

    async def _after(self, course: Course, held_out: Sequence[Example]) -> None:
        """What comes after a step: a look at the held-out loss, a model to choose from, a checkpoint."""
        config, state = self.config, self.state
        candidate = state.step == course.steps or (
            self._several and course.due(state.step, config.sft.candidate_every)
        )
        loss: float | None = None
        if held_out and (candidate or course.due(state.step, config.sft.eval_every)):
            loss = await self._held_out_loss(held_out)
            state.held_out.append({"step": state.step, "loss": loss})
            self._write({"sft/held_out_loss": loss})
            self.progress.note(f"held-out loss after step {state.step}: {loss:.4f}")
        if candidate:
            kept = await Candidates(config, self.run_dir).save(state.step, self._learner)
            state.candidates.append({"step": state.step, "loss": loss, "lora_kept": kept})
            state.wall_s = self.wall_s
        await self.saved(wait=False)
        every = config.checkpoint.every
        if self.stopping.is_set() or (every and state.step % every == 0):
            await self.save()

    async def _held_out_loss(self, held_out: Sequence[Example]) -> float:
        """Nats per token over all held-out examples."""
        total, size = 0.0, self.config.sft.batch
        for first in range(0, len(held_out), size):
            some = held_out[first : first + size]
            loss = await self._learner.supervised_loss([one.tree() for one in some])
            total += loss * sum(one.learned for one in some)
        return total / sum(one.learned for one in held_out)

    async def save(self) -> None:
        """Begin a checkpoint of this step; it is there once :meth:`saved` says so."""
        await self.saved()
        path = self.run_dir.checkpoints / f"v{self.state.step:06d}"
        if not path.exists():
            await self._learner.save(str(path), {"sft": asdict(self.state)})

    async def saved(self, *, wait: bool = True) -> None:
        """Older checkpoints beyond ``checkpoint.keep`` go if the last one is there; ``wait`` until it is."""
        if await self._learner.saved(wait=wait):
            prune(self.run_dir, self.config.checkpoint.keep)

    async def _restore(self, steps: int) -> None:
        """Go on from the newest checkpoint that can be read; others are set aside.

        Raises ConfigError where it was trained on other data or another course, CheckpointError where none of
        several is of use.
        """
        mend = "put the settings back as they were, or start anew"
        take = partial(self._taken, steps=steps)
        if (found := await newest(self.run_dir, take, self.progress.note, mend)) is None:
            return
        path, state = found
        vars(self.state).update(vars(state))
        self._began -= state.wall_s
        for sink in self._sinks:
            sink.write({RESUMED: state.step, "time": time.time()})
        self.progress.note(f"resumed at step {state.step} from {path}")

    async def _taken(self, path: Path, steps: int) -> SftState:
        """What the checkpoint at ``path``, which the learner loads, holds besides weights."""
        found = await self._learner.load(str(path))
        try:
            state = SftState(**found["sft"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: it holds no supervised run: {error}") from error
        if state.step != version_of(path):
            raise CheckpointError(f"{path}: it holds step {state.step}, whatever its name says")
        if state.digest != self.state.digest or state.step > steps:
            raise ConfigError(
                f"{path} was trained on other conversations, in other tokens, or on more steps than "
                "there are: put sft.path, the model's tokenizer and the settings back as they were, or "
                "start anew"
            )
        return state

    def _rate(self) -> float:
        """Learned tokens per second of the last steps."""
        (first, before), (last, now) = self._ticks[0], self._ticks[-1]
        return (now - before) / (last - first) if last > first else 0.0

    def _write(self, values: dict[str, Any]) -> None:
        record = {"step": self.state.step, "time": time.time(), **values, "time/wall_s": self.state.wall_s}
        for sink in self._sinks:
            sink.write(record)
