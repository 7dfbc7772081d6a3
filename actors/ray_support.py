"""Starting actors and waiting for them: every call has a deadline and a name, so a hang says on what."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError

from system.errors import FAILED, LOST, EspalierError

START_DEADLINE_S = 180.0  # for an actor to come up
RETURN_DEADLINE_S = 180.0  # for a killed actor to be restarted
LOOK_S = 0.5
LOGS = "ESPALIER_LOGS"  # the directory that each actor's output goes to, in a file of its own; set by a job


class ActorLost(EspalierError, RuntimeError):
    """An actor died, or did not answer before its deadline."""

    exit_code = LOST


class StartFailed(ActorLost):
    """An actor's ``__init__`` raised: it would again."""

    exit_code = FAILED


def spawn(
    actor: type,
    name: str,
    *arguments: Any,
    restart: bool = True,
    concurrency: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Start ``actor`` in a process of its own; returns its handle at once.

    ``restart``: Ray runs its ``__init__`` again, with the same arguments, whenever its process dies.
    ``concurrency``: calls at once, for an actor with async methods.  ``options``: Ray's, such as its place.
    """
    chosen: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1 if restart else 0, "name": name}
    if concurrency is not None:
        chosen["max_concurrency"] = concurrency
    remote: Any = ray.remote(_logging_to_its_file(actor, name) if LOGS in os.environ else actor)
    return remote.options(**chosen, **(options or {})).remote(*arguments)


def _logging_to_its_file(actor: type, name: str) -> type:
    """``actor``, whose process appends what it prints to ``$ESPALIER_LOGS/<name>.log``."""

    def start(self: Any, *arguments: Any) -> None:
        path = Path(os.environ[LOGS]) / f"{name}.log"
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(file, stream)
        os.close(file)
        actor.__init__(self, *arguments)

    return type(actor.__name__, (actor,), {"__init__": start})  # the name is in the process's title


async def answer(reference: Any, deadline_s: float, what: str) -> Any:
    """The value of an actor call.  Raises what the method raised, or ActorLost naming ``what``."""
    try:
        async with asyncio.timeout(deadline_s):
            return await reference
    except TimeoutError as error:
        raise ActorLost(f"{what}: no answer within {deadline_s:.0f} s") from error
    except RayActorError as error:
        kind = StartFailed if error.actor_init_failed else ActorLost
        raise kind(f"{what}: the actor died: {_last_line(error)}") from error


def _last_line(error: RayActorError) -> str:
    """Of an actor whose ``__init__`` failed, Ray reports a traceback: its last line says what was wrong."""
    return [line.strip() for line in str(error).splitlines() if line.strip()][-1]


async def answers(references: Sequence[Any], deadline_s: float, what: str) -> list[Any]:
    """All values, in order; the first failure ends the wait (the ranks of a collective hang once one is
    gone).
    """
    waits: list[Awaitable[Any]] = [answer(r, deadline_s, f"{what}[{i}]") for i, r in enumerate(references)]
    return list(await asyncio.gather(*waits))


async def returned(actor: Any, what: str, given_up: Callable[[], bool] = bool) -> None:
    """Return once a restarted ``actor`` answers its ``check``, or once it is ``given_up``.

    ActorLost if it does not come back.
    """
    try:
        async with asyncio.timeout(RETURN_DEADLINE_S):
            while True:
                try:
                    await answer(actor.check.remote(), RETURN_DEADLINE_S, what)
                except ActorLost:
                    if given_up():
                        return
                    await asyncio.sleep(LOOK_S)
                else:
                    return
    except TimeoutError as error:
        raise ActorLost(f"{what}: not back within {RETURN_DEADLINE_S:.0f} s") from error
