"""Greedy answers to held-out questions, by the same workers that grow the training trees."""

from __future__ import annotations

import asyncio
import copy
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from actors.engine_monitor import EngineOutage
from actors.placement import Placement
from actors.ray_support import ActorLost, answer, ray_session, returned
from actors.rollout_pool import RolloutPool
from system.config import Config, LoraConfig
from system.models.shape import ModelShape
from system.observe.eval import EvalResult
from system.observe.terminal import shown
from system.rollout.failure import RolloutFailed
from system.tasks.base import Task, first, make_task, notes
from system.tasks.inputs import corpus_file
from system.tree.prompt import Prompt
from system.tree.stats import TreeStats

ATTEMPTS = 3  # a worker may die; a question must not be lost for that
CLOSE_MARGIN_S = 30.0  # a worker may take this much longer than a tree's deadlines to answer


def tree_answer_s(config: Config) -> float:
    """Seconds within which a worker has grown a tree and its scores are there, or it hangs."""
    return config.rollout.tree_deadline_s + config.reward.close_deadline_s + CLOSE_MARGIN_S


def evaluate(config: Config, model_dir: Path) -> dict[str, Any]:
    """Greedy answers of the model in ``model_dir`` to the held-out questions."""
    if config.engine.name == "embedded":  # SGLang serves other families, too
        ModelShape.from_directory(model_dir)
    task = make_task(config)
    for note in notes(config, task):
        print(shown(note), file=sys.stderr)
    questions = first(task.eval(), config.eval.questions)
    return EvalResult.of(*_parted(_answered(config, task, model_dir, questions))).to_dict()


def right_samples(config: Config, task: Task, model_dir: Path, samples: int) -> list[int]:
    """For each held-out question how many of so many answers, sampled at ``rollout.temperature``, are
    right.
    """
    asked = first(task.eval(), config.eval.questions)
    sampling = copy.deepcopy(config)
    sampling.eval.temperature = config.rollout.temperature
    answers = _answered(sampling, task, model_dir, [one for one in asked for _ in range(samples)])
    right = [isinstance(one, TreeStats) and bool(one.correct.all() and one.correct.size) for one in answers]
    return [sum(right[i : i + samples]) for i in range(0, len(right), samples)]


def _answered(
    config: Config, task: Task, model_dir: Path, questions: Sequence[Prompt]
) -> list[TreeStats | Prompt]:
    """The answers of the model in ``model_dir``, by engines and workers of their own."""
    with tempfile.TemporaryDirectory() as scratch, ray_session(config, Path(scratch)) as joined:
        return asyncio.run(_ask_pool(config, task, model_dir, questions, Path(scratch), joined))


async def _ask_pool(
    config: Config,
    task: Task,
    model_dir: Path,
    questions: Sequence[Prompt],
    scratch: Path,
    joined: bool,
) -> list[TreeStats | Prompt]:
    config = copy.deepcopy(config)
    config.learn.lora = LoraConfig()  # the model has its adapters in it: its engines wait for none
    places = await Placement.claim(config, joined=joined, only="rollout")
    logs = scratch / "logs"
    logs.mkdir()
    pool = await RolloutPool.start(config, str(model_dir), corpus_file(config, task, scratch), places, logs)
    try:
        outage = EngineOutage(config, pool.engines).wait
        return await ask_each(config, pool, questions, lambda: None, outage, _tell)
    finally:
        await pool.close()


def _tell(kind: str, text: str) -> None:
    print(f"espalier: {kind}: {text}", file=sys.stderr)


async def answer_questions(
    config: Config,
    pool: RolloutPool,
    questions: Sequence[Prompt],
    answered: Callable[[], None],
    engines_back: Callable[[str], Awaitable[None]],
    mishap: Callable[[str, str], None],
) -> EvalResult:
    """What :func:`ask_each` finds, in figures."""
    results = await ask_each(config, pool, questions, answered, engines_back, mishap)
    return EvalResult.of(*_parted(results))


def _parted(results: Sequence[TreeStats | Prompt]) -> tuple[list[TreeStats], list[str]]:
    """The answers, and the kinds of the questions without."""
    stats = [one for one in results if isinstance(one, TreeStats)]
    return stats, [one.kind for one in results if isinstance(one, Prompt)]


async def ask_each(
    config: Config,
    pool: RolloutPool,
    questions: Sequence[Prompt],
    answered: Callable[[], None],
    engines_back: Callable[[str], Awaitable[None]],
    mishap: Callable[[str, str], None],
) -> list[TreeStats | Prompt]:
    """One branch per question with the engines' current weights, at ``eval.temperature``; the question itself
    where it was not answered.

    ``answered`` is called after each.  A question that no attempt answers counts as wrong, and ``mishap`` is
    told why: a kind and a text.  When none is answered, raises what the last attempt at one raised.
    ``engines_back`` is awaited, with the cause, before another attempt at one whose engine was lost.
    """
    failures: list[RolloutFailed | ActorLost] = []
    limit = asyncio.Semaphore(config.trees_at_once * config.rollout.leaves)
    deadline, back_s = tree_answer_s(config), config.cluster.start_deadline_s

    async def ask(number: int, question: Prompt) -> TreeStats | Prompt:
        failure: RolloutFailed | ActorLost = ActorLost(question.id)
        for attempt in range(1, ATTEMPTS + 1):
            name = [*pool.workers][(number + attempt) % len(pool.workers)]
            worker = pool.workers[name]
            async with limit:
                try:
                    stats = await answer(
                        worker.answer.remote(question, number, config.eval.temperature),
                        deadline,
                        f"{name} answering {question.id}",
                    )
                    for kind, text in stats.mishaps:
                        mishap(kind, text)
                    answered()
                    return stats
                except (ActorLost, RolloutFailed) as error:
                    failure = error
                if isinstance(failure, ActorLost):
                    await returned(worker, back_s, name, lambda it=name: it not in pool.workers)
                elif failure.blameless:
                    await engines_back(failure.detail)
        failures.append(failure)
        mishap("question not answered", str(failure))
        answered()
        return question

    async with asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(ask(i, q)) for i, q in enumerate(questions)]
    results = [task.result() for task in asked]
    if failures and not any(isinstance(one, TreeStats) for one in results):
        raise failures[-1]
    return results
