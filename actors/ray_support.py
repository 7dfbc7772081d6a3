"""Starting actors and waiting for them: every call has a deadline and a name, so a hang says on what."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import ray
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader  # pyright: ignore[reportAttributeAccessIssue]
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from actors import keys
from actors.local_ray import SETTINGS, directory, lean
from system.config import Config
from system.errors import EXPECTED, FAILED, LOST, EspalierError

T = TypeVar("T")

LOOK_S = 0.5
STALL_S = 1.0  # for an answer that came while this process stood still, to be read
HEARTBEAT = "heartbeat"  # the concurrency group of an actor's heartbeat: a thread of its own
OF_PEERS = (ConnectionError, TimeoutError)  # OSErrors that tell of another process, not of a file
LOGS = "ESPALIER_LOGS"  # the directory that each actor's output goes to, in a file of its own


class ActorLost(EspalierError, RuntimeError):
    """An actor died, or did not answer before its deadline."""

    exit_code = LOST


class StartFailed(ActorLost):
    """An actor's ``__init__`` raised: it would again."""

    exit_code = FAILED


class NodeLost(ActorLost):
    """A node of the cluster is gone."""


@contextlib.contextmanager
def ray_session(config: Config, root: Path) -> Generator[bool]:
    """Ray for the length of the block: the cluster we are given, or one of this machine alone, which listens
    on loopback and asks for a token that is this run's own.

    Yields whether it is a given one (``cluster.address``, or ``$RAY_ADDRESS`` as a SLURM job sets it).
    ``root``: holds the keys of the run (:mod:`.keys`) and, in ``logs``, the actors' output, unless a job has
    set ``$ESPALIER_LOGS``.  Ray itself puts the current directory on the path of every process, so that a
    user's modules are found there.
    """
    given = config.cluster.address or os.environ.get("RAY_ADDRESS", "")
    defaults = {
        LOGS: str((root / "logs").resolve()),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # of a tree that failed: its statistics' failure is handled
        "PYTHONUNBUFFERED": "1",  # an actor's last words must be in its file
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(keys.made(config, root))
        if not given:
            token = keys.private_file(root / keys.RAY, secrets.token_hex(32))
            defaults["RAY_AUTH_TOKEN_PATH"] = str(stack.enter_context(token).resolve())
            defaults |= SETTINGS | _on_loopback() | stack.enter_context(directory())
        stack.enter_context(_environment(defaults))
        stack.callback(ray.shutdown)
        try:
            with contextlib.nullcontext() if given else lean(agents=config.cluster.ray_agents):
                ray.init(
                    address=given or "local",
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    namespace=f"espalier-{os.getpid()}",
                )
        except Exception as error:  # Ray's own kinds, of which there are many
            if given:
                told = f"Ray does not answer at {given}: correct cluster.address: {error}"
            else:
                told = f"Ray does not start here: {error}"
                if not config.cluster.ray_agents:
                    told += "; cluster.ray_agents=true starts it with its own agents"
            raise StartFailed(told) from error
        yield bool(given)


@contextlib.contextmanager
def _environment(defaults: Mapping[str, str]) -> Generator[None]:
    """Add what is not set yet, for the length of the block; Ray's own additions go with it."""
    before = set(os.environ)
    os.environ |= {name: value for name, value in defaults.items() if name not in before}
    try:
        yield
    finally:
        for name in {*defaults, "RAY_AUTH_MODE"} - before:  # Ray sets the mode, having found the token
            os.environ.pop(name, None)


def _on_loopback() -> dict[str, str]:
    """Let Ray, here and (by the variables returned) in its processes, take loopback for its address, as it
    does by itself on systems where it knows no clusters; it would listen on every interface.

    A token that this process has used for an earlier session is forgotten.
    """
    ray_constants.ENABLE_RAY_CLUSTER = False
    AuthenticationTokenLoader.instance().reset_cache()
    return {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}


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
    directory = os.environ.get(LOGS)
    made = _as_process(actor, Path(directory) / f"{name}.log" if directory else None)
    remote: Any = cast(Any, ray.remote)(concurrency_groups={HEARTBEAT: 1})(made)
    return remote.options(**chosen, **(options or {})).remote(*arguments)


def _as_process(actor: type, log: Path | None) -> type:
    """``actor`` with a heartbeat; its process holds the run's keys and appends what it prints to ``log``."""
    held = keys.held()

    def start(self: Any, *arguments: Any) -> None:
        keys.hold(held)
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            for stream in (1, 2):
                os.dup2(file, stream)
            os.close(file)
        actor.__init__(self, *arguments)

    def beat(self: Any) -> int:
        """The process's number, once whatever must be alive in it has answered."""
        if alive := getattr(self, "alive", None):
            alive()
        return os.getpid()

    added: dict[str, Any] = {"__init__": start}
    if not hasattr(actor, "beat"):
        added["beat"] = ray.method(concurrency_group=HEARTBEAT)(beat)
    return type(actor.__name__, (actor,), added)  # the name is in the process's title


def fetch(reference: Any, deadline_s: float) -> Any:
    """The object behind a reference; None if it cannot be had: its machine is gone."""
    try:
        return ray.get(reference, timeout=deadline_s)
    except RayError:
        return None


async def answer(reference: Any, deadline_s: float, what: str) -> Any:
    """The value of an actor call.  Raises what the method raised, or ActorLost naming ``what``.

    An answer that has come counts, however late this process, which may have stood still, reads it.
    An error that is told in a line (:data:`EXPECTED`: a full disk, say) is what it would be if it had been
    raised here; one that nobody expected there comes as Ray's RayTaskError, with the traceback.
    """
    waiting = asyncio.ensure_future(_value(reference))
    try:
        await asyncio.wait([waiting], timeout=deadline_s)
        if not waiting.done():
            await asyncio.wait([waiting], timeout=STALL_S)
        if not waiting.done():
            raise ActorLost(f"{what}: no answer within {deadline_s:.0f} s")
        return waiting.result()
    except RayActorError as error:
        kind = StartFailed if error.actor_init_failed else ActorLost
        raise kind(f"{what}: the actor died: {_last_line(error)}") from error
    except RayTaskError as error:
        if isinstance(error.cause, EXPECTED) and not isinstance(error.cause, OF_PEERS):
            raise error.cause from None
        raise
    finally:
        waiting.cancel()


async def _value(reference: Any) -> Any:
    return await reference


def _last_line(error: RayActorError) -> str:
    """Of an actor whose ``__init__`` failed, Ray reports a traceback: its last line says what was wrong.

    Of one that has just gone Ray knows nothing but that the connection has.
    """
    if isinstance(error, ActorUnavailableError):
        return "its process is gone"
    return [line.strip() for line in str(error).splitlines() if line.strip()][-1]


async def watched(work: Coroutine[Any, Any, T], watch: Coroutine[Any, Any, None]) -> T:
    """The value of ``work``, during which ``watch`` runs: whichever fails first ends the other."""
    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(watch)
        working = tasks.create_task(work)
        working.add_done_callback(lambda _: watching.cancel())
    return working.result()


async def answers(references: Sequence[Any], deadline_s: float, what: str) -> list[Any]:
    """All values, in order; the first failure ends the wait (the ranks of a collective hang once one is
    gone).
    """
    waits = (answer(call, deadline_s, f"{what}[{i}]") for i, call in enumerate(references))
    return await asyncio.gather(*waits)


async def answers_of_living(calls: Mapping[str, Any], deadline_s: float, what: str) -> dict[str, Any]:
    """The values by actor, without those of actors that are gone or being restarted."""
    waits = (answer(call, deadline_s, f"{what} of {name}") for name, call in calls.items())
    values = dict(zip(calls, await asyncio.gather(*waits, return_exceptions=True), strict=True))
    for value in values.values():
        if isinstance(value, BaseException) and not isinstance(value, ActorLost):
            raise value
    return {name: value for name, value in values.items() if not isinstance(value, ActorLost)}


async def returned(actor: Any, deadline_s: float, what: str, given_up: Callable[[], bool] = bool) -> None:
    """Return once a restarted ``actor`` answers its ``check``, or once it is ``given_up``.

    ActorLost if it does not come back.
    """
    try:
        async with asyncio.timeout(deadline_s):
            while True:
                try:
                    await answer(actor.check.remote(), deadline_s, what)
                except ActorLost:
                    if given_up():
                        return
                    await asyncio.sleep(LOOK_S)
                else:
                    return
    except TimeoutError as error:
        raise ActorLost(f"{what}: not back within {deadline_s:.0f} s (cluster.start_deadline_s)") from error
