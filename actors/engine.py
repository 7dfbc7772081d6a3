"""One generation engine on a fixed port, for as long as the actor lives: our own, or a real SGLang server."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import ray

from actors import keys
from actors.ray_support import StartFailed
from actors.serving import LoopThread
from system import config as configuration
from system.config import Config
from system.config.lora import adapters_travel
from system.engine.control import EngineControl, Http
from system.engine.pool import EnginePool
from system.engine.protocol import EngineError, GenerateRequest, Sampling
from system.engine.routes import RouteFormat
from system.engine.sglang.command import IN_SERVER, interpreter, server_command
from system.engine.sglang.server import ServerFailed, SglangServer
from system.models.shape import ModelShape

CHECK_DEADLINE_S = 30.0


class EngineActor:
    """Restarted by Ray where it was.  A restarted engine knows only the start weights, so it stands paused
    until the conductor has pushed the current ones: no token is sampled from forgotten weights.

    ``number``: which replica it is.  ``log``: where an SGLang server writes what it says.
    """

    def __init__(
        self, config: dict[str, Any], model_path: str, host: str, port: int, number: int, log: str
    ) -> None:
        self._sglang: SglangServer | None = None
        self._closing = threading.Event()
        settings = configuration.from_dict(config)
        with warnings.catch_warnings():  # Ray calls what it has deprecated itself: not a line for our logs
            warnings.simplefilter("ignore")
            restarted = bool(ray.get_runtime_context().was_current_actor_reconstructed)
        if settings.engine.name == "sglang":
            self._url = self._start_sglang(settings, model_path, host, port, number, Path(log), restarted)
        else:
            self._url = self._start_embedded(settings, model_path, host, port, restarted)

    def ready(self) -> str:
        """The URL it serves at; answers once it does."""
        return self._url

    def alive(self) -> None:
        """Return if the embedded server's loop turns; an SGLang server is watched by a thread of its own."""
        if self._sglang is None:
            self._http.look()

    def close(self) -> None:
        """Stop an SGLang server with all its processes; the embedded one ends with this process."""
        self._closing.set()
        if self._sglang is not None:
            self._sglang.stop()

    def _start_embedded(
        self, settings: Config, model_path: str, host: str, port: int, restarted: bool
    ) -> str:
        from system.engine.embedded import EmbeddedEngine

        engine = settings.engine
        self._server = EmbeddedEngine(engine, model_path, dtype=settings.model.dtype, seed=settings.run.seed)
        self._server.loop.paused = restarted
        self._http = LoopThread("engine-http")
        start = self._server.start(host, port, key=keys.held().engines)
        url = self._http.run(start, engine.start_deadline_s)
        threading.Thread(target=self._watch_embedded, name="engine-watch", daemon=True).start()
        return url

    def _watch_embedded(self) -> None:
        """A decoding thread that dies takes this process along; Ray then starts both again."""
        if failure := self._server.loop.wait():
            _give_up(failure)

    def _start_sglang(
        self, settings: Config, model_path: str, host: str, port: int, number: int, log: Path, restarted: bool
    ) -> str:
        import torch

        engine = settings.engine
        command = server_command(
            engine,
            python=interpreter(engine),
            model=model_path,
            dtype=settings.model.dtype,
            host=host,
            port=port,
            seed=settings.run.seed,
            replica=number,
            cpu=engine.device == "cpu" or (engine.device == "auto" and not torch.cuda.is_available()),
            cores=sorted(os.sched_getaffinity(0)),
            paused=restarted,
            key=keys.held().engines,
            routes=settings.rollout.replay_routes and RouteFormat.of_directory(model_path) is not None,
            lora=settings.learn.lora if adapters_travel(settings) else None,
            experts=ModelShape.from_directory(model_path).experts is not None,
        )
        server = self._sglang = SglangServer(command, f"http://{host}:{port}", log)
        try:
            url = server.wait_ready(engine.start_deadline_s)
        except ServerFailed as failure:
            server.kill()
            if not restarted:
                raise
            _give_up(failure)  # an actor whose __init__ raises is never started again
        if not restarted:  # that one generates nothing yet
            asyncio.run(_check(url, engine.start_deadline_s))
            asyncio.run(_check_locked(url))
        watched = (server, settings.cluster.silent_s)
        threading.Thread(target=self._watch, args=watched, name="sglang-watch", daemon=True).start()
        return url

    def _watch(self, server: SglangServer, silent_s: float) -> None:
        """A server that ends takes its actor along; Ray then starts both again."""
        failure = server.wait(silent_s)
        if not self._closing.is_set():
            _give_up(failure)


def _give_up(failure: Exception | str) -> NoReturn:
    """End this process; Ray starts the actor again, and the engine monitor has a deadline for that."""
    print(failure, file=sys.stderr, flush=True)
    os._exit(1)


def named(urls: Sequence[str]) -> dict[str, str]:
    """The servers at ``urls``, which somebody else started, by name.  Without the slash at their end: a path
    is put behind each, and SGLang knows none that begins with two.
    """
    return {f"engine-{number}": url.rstrip("/") for number, url in enumerate(urls)}


async def attached(urls: Sequence[str], deadline_s: float, entropies: bool, routes: bool = False) -> None:
    """Return once the servers at ``urls``, which somebody else started, serve as this system needs them.

    ``entropies``: whether they must give them; ``routes``: whether they must record which experts tokens go
    through.  Raises StartFailed for a server that does not do.
    """
    try:
        async with asyncio.TaskGroup() as checks:
            for url in urls:
                checks.create_task(_check(url, deadline_s, entropies, routes))
    except* EngineError as errors:
        raise StartFailed(f"engine.urls: {'; '.join(map(str, errors.exceptions))}") from errors


async def _check_locked(url: str) -> None:
    """Raise EngineError for a server of ours that obeys who shows no key: it runs without our plug-in."""
    async with Http() as http:
        try:
            await http.call(f"{url}/model_info", limit_s=CHECK_DEADLINE_S)
        except EngineError:
            return
    raise EngineError(f"{url}: answers without its key: it has not loaded {IN_SERVER / 'plugin'}")


async def _check(url: str, deadline_s: float, entropies: bool = True, routes: bool = False) -> None:
    """Raise EngineError for a server that does not answer, or gives no entropies or ``routes``."""
    asked = GenerateRequest("check", np.zeros(1, np.int32), Sampling(max_new_tokens=1, ignore_eos=True))
    async with keys.http([url]) as http:
        await EngineControl(url, http).wait_ready(deadline_s)
        if routes:
            info = await http.call(f"{url}/server_info", limit_s=CHECK_DEADLINE_S)
            if info.get("enable_return_routed_experts") is not True:
                raise EngineError(
                    f"{url}: rollout.replay_routes needs a record of the experts that tokens go through, and "
                    "this server keeps none: start it with --enable-return-routed-experts, or set "
                    "rollout.replay_routes=false"
                )
    pool = EnginePool([url], deadline_s=deadline_s, key=keys.held().engines)
    try:
        chunks = [chunk async for chunk in pool.generate(asked)]
    finally:
        await pool.close()
    if entropies and any(np.isnan(chunk.entropy).any() for chunk in chunks):
        raise EngineError(
            f"{url}: no entropies in its answers: Espalier's plug-in is not loaded; start the server with "
            f"{IN_SERVER / 'plugin'} on its PYTHONPATH, or set engine.entropy_top_k=20 to make do with "
            "estimates"
        )
