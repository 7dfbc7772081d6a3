"""Starting actors and waiting for them: every call has a deadline and a name, so a hang says on what."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError

START_DEADLINE_S = 180.0  # for an actor to come up
RETURN_DEADLINE_S = 180.0  # for a killed actor to be restarted
LOOK_S = 0.5


class ActorLost(RuntimeError):
    """An actor died, or did not answer before its deadline."""


def spawn(
    actor: type, name: str, *arguments: Any, restart: bool = True, concurrency: int | None = None
) -> Any:
    """Start ``actor`` in a process of its own; returns its handle at once.

    ``restart``: Ray runs its ``__init__`` again, with the same arguments, whenever its process dies.
    ``concurrency``: calls at once, for an actor with async methods.
    """
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1 if restart else 0, "name": name}
    if concurrency is not None:
        options["max_concurrency"] = concurrency
    remote: Any = ray.remote(actor)
    return remote.options(**options).remote(*arguments)


async def answer(reference: Any, deadline_s: float, what: str) -> Any:
    """The value of an actor call.  Raises what the method raised, or ActorLost naming ``what``."""
    try:
        async with asyncio.timeout(deadline_s):
            return await reference
    except TimeoutError as error:
        raise ActorLost(f"{what}: no answer within {deadline_s:.0f} s") from error
    except RayActorError as error:
        raise ActorLost(f"{what}: the actor died: {_last_line(error)}") from error


def _last_line(error: RayActorError) -> str:
    """Of an actor whose ``__init__`` failed, Ray reports a traceback: its last line says what was wrong."""
    return [line.strip() for line in str(error).splitlines() if line.strip()][-1]


async def answers(references: Sequence[Any], deadline_s: float, what: str) -> list[Any]:
    """All values, in order; the first failure ends the wait (the ranks of a collective hang once one is
    gone).
    """
    waits: list[Awaitable[Any]] = [answer(r, deadline_s, f"{what}[{i}]") for i, r in enumerate(references)]
    return list(await asyncio.gather(*waits))


async def returned(actor: Any, what: str) -> None:
    """Return once a restarted ``actor`` answers its ``check``.  ActorLost if it does not come back."""
    try:
        async with asyncio.timeout(RETURN_DEADLINE_S):
            while True:
                try:
                    await answer(actor.check.remote(), RETURN_DEADLINE_S, what)
                except ActorLost:
                    await asyncio.sleep(LOOK_S)
                else:
                    return
    except TimeoutError as error:
        raise ActorLost(f"{what}: not back within {RETURN_DEADLINE_S:.0f} s") from error
