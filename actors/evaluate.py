"""Answers to held-out questions, by the same workers that grow the training trees."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.engine_monitor import EngineOutage
from actors.placement import Placement
from actors.ray_support import ActorLost, answer, ray_session, returned
from actors.rollout_pool import RolloutPool
from system.config import Config, ConfigError, LoraConfig, to_dict
from system.evals.record import Answered, Asked, digest
from system.evals.result import EvalResult
from system.evals.sets import question_sets, to_ask
from system.models.shape import ModelShape
from system.observe.answer_file import AnswerFile
from system.observe.terminal import shown
from system.redact import redact
from system.rollout.failure import RolloutFailed
from system.rollout.score_pool import RewardBroken
from system.rollout.sets import scored_by
from system.tasks.base import Task, make_task, notes
from system.tasks.inputs import corpus_file

FEW = 20  # answers after which the time that is left is guessed
ATTEMPTS = 3  # a worker may die; a question must not be lost for that
_OF_MODEL = ("*.safetensors", "*.json", "*.jinja")  # weights, tokenizer, chat template
# The sections of the configuration that answers depend on; where and how fast they are computed is no part.
_ASKED_BY = ("task", "rollout", "reward", "tools", "environment", "agent", "eval")
CLOSE_MARGIN_S = 30.0  # a worker may take this much longer than a tree's deadlines to answer


def tree_answer_s(config: Config) -> float:
    """Seconds within which a worker has grown a tree and its scores are there, or it hangs."""
    return config.rollout.tree_deadline_s + config.reward.close_deadline_s + CLOSE_MARGIN_S


def evaluate(config: Config, model_dir: Path, answers: Path | None = None) -> EvalResult:
    """Answers of the model in ``model_dir`` to the held-out questions of all sets.

    ``answers``: a file that gets each as it comes; those that it holds already are not asked again.  Raises
    what the last attempt at a question raised when not one has an answer.
    """
    if config.engine.name == "embedded":  # SGLang serves other families, too
        ModelShape.from_directory(model_dir)
    task = make_task(config)
    for note in notes(config, task, training=False):
        print(shown(note), file=sys.stderr)
    asked = questions(config, task)
    file = AnswerFile(answers, about(config, model_dir, asked)) if answers else None
    with contextlib.closing(file) if file else contextlib.nullcontext():
        found, missing = kept(file, asked)
        try:
            new = _answered(config, task, model_dir, missing, file) if missing else []
        except (ActorLost, RolloutFailed):
            if not found:
                raise
            new = [Answered.missing(one) for one in missing]  # each was told
    return result("the engines", asked, found, new)


def questions(config: Config, task: Task) -> list[Asked]:
    """What is asked.  Raises ConfigError where that is nothing."""
    if asked := to_ask(question_sets(config, task)):
        return asked
    raise ConfigError(
        f"there is nothing to ask: task.name={config.task.name} has no held-out questions (of data files, "
        "task.eval_path names them), and eval.sets is empty"
    )


def result(
    who: str,
    asked: Sequence[Asked],
    found: Mapping[tuple[str, str, int], Answered],
    new: Sequence[Answered],
) -> EvalResult:
    """Of all ``asked``, the answers that were ``found`` in a file and the ``new`` ones.  Raises ConfigError
    where ``who`` was asked has answered nothing at all.
    """
    if not found and not any(one.there for one in new):
        raise ConfigError(f"{who} answered none of {len(new)} questions: see above")
    whole = {**found, **{one.key: one for one in new}}
    return EvalResult.of([whole[one.key] for one in asked])


def kept(
    file: AnswerFile | None, asked: Sequence[Asked]
) -> tuple[dict[tuple[str, str, int], Answered], list[Asked]]:
    """The answers that ``file`` holds already, and which of ``asked`` it lacks; told, if it holds some."""
    found = dict(file.known) if file else {}
    missing = [one for one in asked if one.key not in found]
    if found:
        known = f"{len(asked) - len(missing)} of {len(asked)} answers are known"
        print(f"{known}: the others are asked", file=sys.stderr)
    return found, missing


def asked_by(config: Config) -> dict[str, Any]:
    """The settings that answers depend on, whoever gives them."""
    settings = redact(to_dict(config))
    return {name: settings[name] for name in _ASKED_BY}


def about(config: Config, model_dir: Path, asked: Sequence[Asked]) -> dict[str, Any]:
    """What an evaluation's answers depend on: the model's files, the questions, and how they are asked."""
    files = sorted(file for kind in _OF_MODEL for file in model_dir.glob(kind))
    stats = [(file.name, file.stat()) for file in files]
    settings = redact(to_dict(config))
    return {
        "model": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats},
        "questions": digest(asked),
        "engine": {name: settings["engine"][name] for name in ("name", "max_context", "sglang")},
        "dtype": config.model.dtype,
        **asked_by(config),
    }


def right_samples(config: Config, task: Task, model_dir: Path, samples: int) -> list[int]:
    """For each of the task's held-out questions how many of so many answers, sampled at
    ``rollout.temperature``, are right.
    """
    sampling = copy.deepcopy(config)
    sampling.eval.temperature, sampling.eval.samples, sampling.eval.sets = (
        config.rollout.temperature,
        samples,
        [],
    )
    answers = _answered(sampling, task, model_dir, to_ask(question_sets(sampling, task)))
    right = [bool(one.correct) for one in answers]
    return [sum(right[i : i + samples]) for i in range(0, len(right), samples)]


def _answered(
    config: Config, task: Task, model_dir: Path, asked: Sequence[Asked], answers: AnswerFile | None = None
) -> list[Answered]:
    """The answers of the model in ``model_dir``, by engines and workers of their own."""
    with tempfile.TemporaryDirectory() as scratch, ray_session(config, Path(scratch)) as joined:
        return asyncio.run(_ask_pool(config, task, model_dir, asked, Path(scratch), joined, answers))


async def _ask_pool(
    config: Config,
    task: Task,
    model_dir: Path,
    asked: Sequence[Asked],
    scratch: Path,
    joined: bool,
    answers: AnswerFile | None,
) -> list[Answered]:
    config = copy.deepcopy(config)
    config.learn.lora = LoraConfig()  # the model has its adapters in it: its engines wait for none
    config.eval.engines = 0
    places = await Placement.claim(config, joined=joined, only="rollout")
    logs = scratch / "logs"
    logs.mkdir()
    pool = await RolloutPool.start(config, str(model_dir), corpus_file(config, task, scratch), places, logs)
    try:
        outage = EngineOutage(config, pool.engines).wait
        progress = Shown(len(asked), config.observe.progress_s)

        def answered(answer: Answered) -> None:
            if answers is not None:
                answers.add(answer)
            progress.one_more()

        return await ask_each(config, pool, asked, answered, outage, tell)
    finally:
        await pool.close()


def tell(kind: str, text: str) -> None:
    print(f"espalier: {kind}: {text}", file=sys.stderr)


class Shown:
    """How far an evaluation is, on standard error."""

    def __init__(self, total: int, interval_s: float) -> None:
        self._total, self._interval_s, self._count = total, interval_s, 0
        self._began = self._told = time.monotonic()

    def one_more(self) -> None:
        self._count, now = self._count + 1, time.monotonic()
        if now - self._told < self._interval_s and self._count < self._total:
            return
        self._told = now
        left_s = (now - self._began) / self._count * (self._total - self._count)
        left = f", about {left_s:.0f} s left" if self._count >= FEW else ""
        print(f"{self._count}/{self._total} answers{left}", file=sys.stderr, flush=True)


class BrokenSets:
    """Sets that are asked no further, because rewards of their own failed too often."""

    def __init__(self, own: Collection[str], mishap: Callable[[str, str], None]) -> None:
        """``own``: the sets that have such; ``mishap`` is told of each that is broken."""
        self._own, self._mishap, self._broken = own, mishap, set[str]()

    def __contains__(self, of_set: str) -> bool:
        return of_set in self._broken

    def add(self, of_set: str, error: RewardBroken) -> None:
        """Raises ``error`` where it is the run's rewards that failed, which others are scored by, too."""
        if of_set not in self._own:
            raise error
        if of_set not in self._broken:
            self._broken.add(of_set)
            self._mishap("set not scored", f"{of_set} is asked no further: {error}")


async def ask_each(
    config: Config,
    pool: RolloutPool,
    questions: Sequence[Asked],
    answered: Callable[[Answered], None],
    engines_back: Callable[[str], Awaitable[None]],
    mishap: Callable[[str, str], None],
) -> list[Answered]:
    """One branch per question with the engines' current weights, at ``eval.temperature``.

    ``answered`` is called after each.  A question that no attempt answers counts as wrong, and ``mishap`` is
    told why: a kind and a text.  When none is answered, raises what the last attempt at one raised.  A set
    whose own rewards fail too often, or are to stop at a failure, is asked no further, and the others are.
    ``engines_back`` is awaited, with the cause, before another attempt at one whose engine was lost.
    """
    failures: list[RolloutFailed | ActorLost] = []
    own = scored_by(config)
    broken = BrokenSets(own, mishap)
    limit = asyncio.Semaphore(config.trees_at_once * config.rollout.leaves)
    back_s = config.cluster.start_deadline_s
    deadlines = {name: tree_answer_s(of_set) for name, (_, of_set) in own.items()}

    async def ask(asked: Asked) -> Answered:
        question, number = asked.prompt, asked.seed
        failure: RolloutFailed | ActorLost = ActorLost(question.id)
        for attempt in range(1, ATTEMPTS + 1):
            name = [*pool.workers][(number + attempt) % len(pool.workers)]
            worker = pool.workers[name]
            async with limit:
                if asked.set in broken:
                    break
                try:
                    stats = await answer(
                        worker.answer.remote(question, number, config.eval.temperature, asked.set),
                        deadlines.get(asked.set) or tree_answer_s(config),
                        f"{name} answering {question.id}",
                    )
                    for kind, text in stats.mishaps:
                        mishap(kind, text)
                    answered(found := Answered.of(asked, stats))
                    return found
                except RewardBroken as error:
                    broken.add(asked.set, error)
                    break
                except (ActorLost, RolloutFailed) as error:
                    failure = error
                if isinstance(failure, ActorLost):
                    await returned(worker, back_s, name, lambda it=name: it not in pool.workers)
                elif failure.blameless:
                    await engines_back(failure.detail)
        if asked.set not in broken:
            failures.append(failure)
            mishap("question not answered", str(failure))
        answered(found := Answered.missing(asked))
        return found

    async with asyncio.TaskGroup() as tasks:
        all_asked = [tasks.create_task(ask(one)) for one in questions]
    if failures and len(failures) == len(all_asked):
        raise failures[-1]
    return [task.result() for task in all_asked]
