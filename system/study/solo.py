"""A training run in one process, without Ray: engine, tools, rollouts and learner around one event loop.

The training loop, the rollouts, the engine behind its HTTP protocol, the tools in their confinement and the
learner are those of a run on actors.  There are no checkpoints and no restarts: whatever is lost ends the
run.  A study makes many small runs, two at a time on two cores, and a run on actors takes longer to start
than one of these takes to end.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from pathlib import Path

from system.cluster.placement import served_tools
from system.config import Config, at_step
from system.engine import weights
from system.engine.control import Http
from system.engine.embedded import EmbeddedEngine
from system.engine.protocol import EngineError
from system.evals.record import Answered, Asked
from system.evals.result import EvalResult
from system.flow.curriculum import PoolWeights
from system.flow.guidance import Guides
from system.flow.ledger import Ledger, Ticket
from system.flow.loop import RunEvents, TrainingLoop, TreeLost
from system.flow.replay import TreeInFlight
from system.http import Keys
from system.learn import cpu
from system.rollout import process
from system.rollout.context import RolloutContext, build_context
from system.rollout.failure import RolloutFailed
from system.rollout.guard import one_tree
from system.rollout.planting import planted
from system.sft.demonstrations import demonstrations, warm_start
from system.tasks.base import HasTokenizer, Task
from system.tasks.inputs import corpus_file, make_model
from system.tools.servers import served
from system.tree.pack import pack_share
from system.tree.prompt import Prompt
from system.tree.record import Tree
from system.tree.stats import TreeStats

with cpu.quick_import():  # a study makes many runs, and each imports it
    from system.learn.trainer import Trainer


class Solo:
    """A run whose parts are all here (``system.flow.loop.Parts``); see :func:`opened`."""

    def __init__(
        self,
        config: Config,
        prompts: Sequence[Prompt],
        trainer: Trainer,
        context: RolloutContext,
        send: Callable[[int], Awaitable[None]],
    ) -> None:
        self.config, self.prompts = config, {prompt.id: prompt for prompt in prompts}
        self._trainer, self._context, self._send = trainer, context, send
        # Hears of every tree that was grown to train.
        self.closed: Callable[[Tree, TreeStats], object] = lambda tree, stats: None

    async def run(self, steps: int, events: RunEvents, between: Callable[[int], Awaitable[None]]) -> None:
        """``steps`` training steps.  ``between`` is awaited before the first and after each, with the version
        that the engine holds.
        """
        config = self.config
        attempts, pools = config.flow.max_attempts, PoolWeights.of(config)
        guides = Guides.of(config, self.prompts.values())
        ledger = Ledger.replay(
            [*self.prompts], config.run.seed, (), 0, attempts, weights=pools, guides=guides
        )
        loop = TrainingLoop(config, ledger, self, events)
        await between(0)
        async with asyncio.TaskGroup() as tasks:
            growing = tasks.create_task(loop.admit(), name="admission")
            try:
                while loop.version < steps and await loop.step():
                    await between(loop.version)
            finally:
                loop.stop()
                growing.cancel()

    async def answers(self, questions: Sequence[Prompt]) -> EvalResult:
        """Greedy answers with the engine's current weights."""

        async def answer(number: int, question: Prompt) -> Answered:
            with one_tree(question.id):
                tree = await (await planted(self._context, question, seed=number, greedy=True)).run()
            return Answered.of(Asked("", question, 0, number), TreeStats.of(tree))

        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(answer(*one)) for one in enumerate(questions)]
        return EvalResult.of([one.result() for one in asked])

    # What the loop asks for

    async def grow(self, ticket: Ticket, seed: int) -> TreeInFlight:
        prompt = self.prompts[ticket.prompt_id]
        temperature = at_step(self.config, ticket.start_version).rollout.temperature
        try:
            with one_tree(prompt.id):
                growing = await planted(
                    *(self._context, prompt),
                    seed=seed,
                    ticket=ticket.number,
                    temperature=temperature,
                    guide=ticket.guide,
                )
                tree = await growing.run()
        except RolloutFailed as failure:
            raise TreeLost(failure.reason, str(failure), blameless=failure.blameless) from failure
        stats = TreeStats.of(tree)
        self.closed(tree, stats)
        return TreeInFlight(ticket, tree, stats)

    async def train(self, version: int, trees: Sequence[TreeInFlight]) -> Mapping[str, float]:
        plan = self._trainer.planner.plan([tree.stats for tree in trees])
        share = pack_share(plan, 0, {index: tree.reference for index, tree in enumerate(trees)})
        return await asyncio.to_thread(self._trainer.train, plan, share, version=version)

    async def publish(self, version: int) -> None:
        await self._send(version)


@contextlib.asynccontextmanager
async def opened(config: Config, task: Task, model: Path, scratch: Path) -> AsyncGenerator[Solo]:
    """Everything that a run needs, at the weights in ``model``, until the context ends.

    ``scratch``: a directory for what the run leaves behind.  Raises what the first failing part raised.
    """
    process.prepare()
    names, corpus = served_tools(config), corpus_file(config, task, scratch)
    keys = Keys(secrets.token_hex(16), {name: secrets.token_hex(16) for name in names})
    async with contextlib.AsyncExitStack() as stack:
        engine = EmbeddedEngine(config.engine, str(model), dtype=config.model.dtype, seed=config.run.seed)
        url = await engine.start(key=keys.engines)
        stack.push_async_callback(engine.stop)
        urls = await stack.enter_async_context(served(names, config.tools, str(corpus or ""), keys.tools))
        context, tools, pool = build_context(config, str(model), [url], urls, keys)
        stack.push_async_callback(pool.close)
        stack.push_async_callback(tools.close)
        stack.push_async_callback(context.scoring.close)
        await tools.check()
        if context.environments is not None:
            stack.push_async_callback(context.environments.settle)
            await context.environments.check()
        trainer = stack.enter_context(_learner(config, model, scratch))
        http = await stack.enter_async_context(Http([url], keys.engines))
        transport = weights.make(config.engine, [url], model, config.model.dtype)

        async def send(version: int) -> None:
            report = await transport.push(http, [url], trainer.export(), version, "recompute")
            if report.failures:
                raise EngineError(f"weights {version} were not taken: {report.failures[url]}")

        yield Solo(config, task.train(), trainer, context, send)


def start_model(config: Config, task: Task, scratch: Path) -> Path:
    """The directory of a new model, warmed up on the task's demonstrations; one that is there is kept."""
    fresh, warm = scratch / "fresh", scratch / "warm"
    if warm.is_dir():
        return warm
    assert isinstance(task, HasTokenizer)
    make_model(fresh, config, task.tokenizer())
    with _learner(config, fresh, scratch) as trainer:
        for trees, lr in warm_start(config, demonstrations(config, task, fresh)):
            plan = trainer.planner.supervised([TreeStats.of(tree) for tree in trees])
            (micro_batches,) = pack_share(plan, 0, dict(enumerate(trees)))
            trainer.supervise(micro_batches, lr)
        trainer.save_hf(warm)
    return warm


@contextlib.contextmanager
def _learner(config: Config, model: Path, scratch: Path) -> Generator[Trainer]:
    meet = scratch / f"gather-{secrets.token_hex(4)}"
    trainer = Trainer(config, str(model), rank=0, world=1, init_method=f"file://{meet.resolve()}")
    try:
        yield trainer
    finally:
        trainer.close()
