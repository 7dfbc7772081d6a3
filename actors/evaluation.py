"""Greedy answers to held-out questions, by the same workers that grow the training trees."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from actors.ray_support import ActorLost, answer, returned
from actors.rollout_pool import RolloutPool
from system.config import Config
from system.observe.eval import EvalResult
from system.rollout.context import RolloutFailed
from system.tree.prompt import Prompt
from system.tree.record import Tree

ATTEMPTS = 3  # a worker may die; a question must not be lost for that
CLOSE_MARGIN_S = 30.0  # a worker may take this much longer than a tree's deadline to answer


async def evaluate(
    config: Config, pool: RolloutPool, questions: Sequence[Prompt], answered: Callable[[], None]
) -> EvalResult:
    """One branch per question with the engines' current weights, at ``eval.temperature``.

    ``answered`` is called after each.  Raises what the last attempt at a question raised.
    """
    limit = asyncio.Semaphore(config.rollout.concurrency * config.rollout.leaves)
    deadline = config.rollout.tree_deadline_s + CLOSE_MARGIN_S

    async def ask(number: int, question: Prompt) -> Tree:
        for attempt in range(1, ATTEMPTS + 1):
            worker = pool.workers[(number + attempt) % len(pool.workers)]
            async with limit:
                try:
                    tree = await answer(
                        worker.answer.remote(question, number, config.eval.temperature),
                        deadline,
                        f"rollout worker answering {question.id}",
                    )
                except (ActorLost, RolloutFailed) as failure:
                    if attempt == ATTEMPTS:
                        raise
                    if isinstance(failure, ActorLost):
                        await returned(worker, "rollout worker", lambda it=worker: it not in pool.workers)
                else:
                    answered()
                    return tree
        raise AssertionError("unreachable")

    async with asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(ask(i, q)) for i, q in enumerate(questions)]
    return EvalResult.of([task.result() for task in asked])
