"""Greedy answers to held-out questions, by the same workers that grow the training trees."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from actors.inputs import corpus_file
from actors.placement import Placement
from actors.ray_support import ActorLost, answer, ray_session, returned
from actors.rollout_pool import RolloutPool
from system.config import Config
from system.models.shape import ModelShape
from system.observe.eval import EvalResult
from system.rollout.tree_rollout import RolloutFailed
from system.tasks.base import Task, make_task
from system.tree.prompt import Prompt
from system.tree.stats import TreeStats

ATTEMPTS = 3  # a worker may die; a question must not be lost for that
CLOSE_MARGIN_S = 30.0  # a worker may take this much longer than a tree's deadline to answer


def evaluate(config: Config, model_dir: Path) -> dict[str, Any]:
    """Greedy answers of the model in ``model_dir`` to the held-out questions."""
    if config.engine.name == "embedded":  # SGLang serves other families, too
        ModelShape.from_directory(model_dir)
    task = make_task(config)
    with tempfile.TemporaryDirectory() as scratch, ray_session(config, Path(scratch)) as joined:
        return asyncio.run(_evaluate(config, task, model_dir, Path(scratch), joined))


async def _evaluate(
    config: Config, task: Task, model_dir: Path, scratch: Path, joined: bool
) -> dict[str, Any]:
    places = await Placement.claim(config, joined=joined)
    pool = await RolloutPool.start(
        config, str(model_dir), corpus_file(config, task, scratch), places, scratch
    )
    try:
        questions = task.eval()[: config.eval.questions]
        return (await answer_questions(config, pool, questions, lambda: None)).to_dict()
    finally:
        await pool.close()


async def answer_questions(
    config: Config, pool: RolloutPool, questions: Sequence[Prompt], answered: Callable[[], None]
) -> EvalResult:
    """One branch per question with the engines' current weights, at ``eval.temperature``.

    ``answered`` is called after each.  Raises what the last attempt at a question raised.
    """
    limit = asyncio.Semaphore(config.rollout.concurrency * config.rollout.leaves)
    deadline, back_s = config.rollout.tree_deadline_s + CLOSE_MARGIN_S, config.cluster.start_deadline_s

    async def ask(number: int, question: Prompt) -> TreeStats:
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
                except (ActorLost, RolloutFailed) as failure:
                    if attempt == ATTEMPTS:
                        raise
                    if isinstance(failure, ActorLost):
                        await returned(worker, back_s, name, lambda it=name: it not in pool.workers)
                else:
                    answered()
                    return stats
        raise AssertionError("unreachable")

    async with asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(ask(i, q)) for i, q in enumerate(questions)]
    return EvalResult.of([task.result() for task in asked])
