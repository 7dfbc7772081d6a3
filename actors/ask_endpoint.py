"""An evaluation of a model behind somebody's server: ``espalier eval --endpoint``.

Everything happens in this process, the servers of the task's tools included: no engine runs, and no Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from actors import keys
from actors.evaluate import BrokenSets, Shown, asked_by, kept, questions, result, tell
from system.cluster.placement import served_tools
from system.config import Config, ConfigError
from system.envs.make import make_environment
from system.evals.endpoint import Questions
from system.evals.record import Answered, Asked, digest
from system.evals.result import EvalResult
from system.observe.answer_file import AnswerFile
from system.observe.terminal import shown
from system.rollout import process
from system.rollout.completions import ChatCompletions
from system.rollout.score_pool import RewardBroken
from system.rollout.scoring import Scoring
from system.rollout.sets import scorings
from system.tasks.base import Task, make_task, notes
from system.tasks.inputs import corpus_file
from system.tools.servers import served
from system.tools.service import build_tools


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server of OpenAI's chat completions, and how it is asked."""

    url: str  # up to and without /chat/completions
    model: str
    key_env: str = ""  # the environment variable with the key that it wants to be shown
    concurrency: int = 16  # conversations at a time
    try_s: float = 300.0  # of one attempt
    retries: int = 5  # after a failure that may pass
    parameters: dict[str, Any] = field(default_factory=dict[str, Any])  # of the request; null leaves one out

    def server(self, patience_s: float) -> ChatCompletions:
        """``patience_s``: the longest Retry-After that is waited for.  Raises ConfigError for a variable that
        is not set.
        """
        key = os.environ.get(self.key_env, "") if self.key_env else ""
        if self.key_env and not key:
            raise ConfigError(f"--key-env {self.key_env}: no such environment variable is set")
        limits: dict[str, Any] = {"retries": self.retries, "try_s": self.try_s, "patience_s": patience_s}
        return ChatCompletions(self.url, self.model, self.parameters, key=key, **limits)

    def problem(self, config: Config) -> str:
        """Why the task of ``config`` cannot be put to it; empty: it can."""
        if not self.url.startswith(("http://", "https://")):
            return f"--endpoint {self.url}: it begins with http:// or https://"
        if not self.model:
            return "--endpoint needs --model: the name by which the server knows the model"
        if self.concurrency < 1 or self.try_s <= 0 or self.retries < 0:
            return "--concurrency is 1 or more, --timeout above 0, --retries 0 or more"
        if config.agent.on:
            return "--endpoint asks the questions itself: agent.command and agent.run have no part in it"
        if make_environment(config.environment) is not None:
            return f"--endpoint knows tools alone, and environment.name={config.environment.name} keeps state"
        return ""


def ask_endpoint(config: Config, endpoint: Endpoint, answers: Path | None = None) -> EvalResult:
    """Answers of the model at ``endpoint`` to the held-out questions of all sets.

    ``answers``: as of :func:`actors.evaluate.evaluate`.  Raises ConfigError for an endpoint that answers no
    question at all, too.
    """
    if why := endpoint.problem(config):
        raise ConfigError(why)
    task = make_task(config)
    for note in notes(config, task, training=False):
        print(shown(note), file=sys.stderr)
    asked = questions(config, task)
    about = {**asdict(endpoint), "questions": digest(asked), **asked_by(config)}
    for name in ("concurrency", "try_s", "retries", "key_env"):  # of which no answer depends
        del about[name]
    file = AnswerFile(answers, about) if answers else None
    with contextlib.closing(file) if file else contextlib.nullcontext():
        found, missing = kept(file, asked)
        new = asyncio.run(_ask(config, task, endpoint, missing, file)) if missing else []
    return result(endpoint.url, asked, found, new)


async def _ask(
    config: Config, task: Task, endpoint: Endpoint, asked: Sequence[Asked], file: AnswerFile | None
) -> list[Answered]:
    told = Counter[str]()

    def mishap(kind: str, text: str) -> None:
        told[kind] += 1
        if told[kind] == 1:
            tell(kind, f"{text} (more of this kind are counted)")

    process.prepare()
    server, limit = endpoint.server(config.rollout.tree_deadline_s), asyncio.Semaphore(endpoint.concurrency)
    progress = Shown(len(asked), config.observe.progress_s)
    async with AsyncExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(keys.made(config, scratch))
        stack.push_async_callback(server.close)
        corpus = str(corpus_file(config, task, scratch) or "")
        serving = served(served_tools(config), config.tools, corpus, keys.held().tools)
        urls = await stack.enter_async_context(serving)
        tools = build_tools(config.tools, urls, keys.held().tools, scratch)
        stack.push_async_callback(tools.close)
        await tools.check()
        scoring = Scoring.of(config, keys.held().rewards.get, scratch)
        own = scorings(config, keys.held().rewards.get, scratch)
        for each in (scoring, *own.values()):
            stack.push_async_callback(each.close)
        conversations = Questions(config, server, tools, scoring, mishap, own)
        broken = BrokenSets(own, mishap)

        async def one(each: Asked) -> Answered:
            async with limit:
                answer = Answered.missing(each)
                try:
                    if each.set not in broken:
                        answer = await conversations.ask(each)
                except RewardBroken as error:
                    broken.add(each.set, error)
            if file is not None:
                file.add(answer)
            progress.one_more()
            return answer

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(each)) for each in asked]
    for kind, count in sorted(told.items()):
        if count > 1:
            tell(kind, f"{count} times")
    return [task.result() for task in tasks]
