"""Does an environment answer alike when the same is done again?  Replay, and so a resume, rests on that."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from system.config import Config
from system.envs.live import TreeSessions
from system.envs.protocol import Acted, WorldFailed
from system.envs.service import Environments, EnvironmentService
from system.errors import EspalierError
from system.rollout.chat import planned_syntax
from system.rollout.syntax.base import ParsedCall, Syntax
from system.tasks.base import HasDemonstrations, make_task
from system.text import one_line
from system.tree.prompt import Prompt

TRIED = 4  # demonstrations, each done twice

Deed = tuple[Prompt, Sequence[Acted]]  # what a demonstration does in a world


@dataclass(frozen=True, slots=True)
class Replays:
    """Of worlds in which the same was done twice."""

    tried: int = 0
    same: int = 0
    fault: str = ""  # of the first that was not the same
    untried: str = ""  # why none was


def replays(config: Config) -> Replays | None:
    """Do the first demonstrations' actions twice; None where there is no environment that is replayed."""
    try:
        environments = Environments.of(config)
        if environments is None or not environments.train.rebuilds:
            return None
        deeds = list(_deeds(config, planned_syntax(config), environments.train))
        if not deeds:
            return Replays(untried="the task has no demonstration that calls a tool of the environment")
        return asyncio.run(_twice(environments.train, deeds))
    except EspalierError as error:  # told by preflight
        return Replays(untried=one_line(error))


def _deeds(config: Config, syntax: Syntax, service: EnvironmentService) -> Iterator[Deed]:
    small = copy.deepcopy(config)
    small.task.train_size = small.task.eval_size = TRIED
    task = make_task(small)
    shown: list[tuple[Prompt, Sequence[tuple[str, str]]]] = [
        (prompt, prompt.demonstration) for prompt in task.train()[:TRIED] if prompt.demonstration
    ]
    if not shown and isinstance(task, HasDemonstrations):
        shown = [(one.prompt, one.segments) for one in task.demonstrations(TRIED, config.run.seed)]
    for prompt, segments in shown:
        read = (syntax.parse(text) for author, text in segments if author == "model")
        calls = (call for call in read if isinstance(call, ParsedCall))
        if acted := [Acted(c.tool, c.arguments) for c in calls if c.tool in service.environment.tools]:
            yield prompt, acted


async def _twice(service: EnvironmentService, deeds: Sequence[Deed]) -> Replays:
    same, fault = 0, ""
    for number, (prompt, calls) in enumerate(deeds):
        sessions = TreeSessions(service, prompt, f"doctor-{number}", number)
        try:
            await sessions.begin()
            session = sessions.root((0,))
            for call in calls:
                if (await session.act([call], "")).over:
                    break
            session.discard("to be built again")
            await session.world()
            same += 1
        except WorldFailed as error:
            fault = fault or one_line(error)
        finally:
            await sessions.close()
    await service.settle()
    return Replays(len(deeds), same, fault)
