"""One generation engine: hosts the embedded server on a fixed port for as long as the actor lives."""

from __future__ import annotations

from typing import Any

import ray

from actors.serving import LoopThread
from system import config as configuration


class EngineActor:
    """Restarted by Ray where it was.  A restarted engine knows only the start weights, so it stands paused
    until the conductor has pushed the current ones: no token is sampled from forgotten weights."""

    def __init__(self, config: dict[str, Any], model_path: str, host: str, port: int) -> None:
        from system.engine.embedded import EmbeddedEngine

        settings = configuration.from_dict(config)
        engine = settings.engine
        self._server = EmbeddedEngine(engine, model_path, dtype=settings.model.dtype, seed=settings.run.seed)
        if ray.get_runtime_context().was_current_actor_reconstructed:
            self._server.loop.pause("retract")
        self._http = LoopThread("engine-http")
        self._url = self._http.run(self._server.start(host, port), engine.start_deadline_s)

    def ready(self) -> str:
        """The URL it serves at; answers once it does."""
        return self._url
