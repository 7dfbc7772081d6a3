"""One tool server: hosts the search or the python service on a fixed port for as long as the actor lives."""

from __future__ import annotations

from typing import Any

from actors import keys
from actors.serving import LoopThread
from system import config as configuration
from system.serving import serve
from system.tools.servers import application

START_DEADLINE_S = 120.0  # for a server in this process to listen


class ToolActor:
    """Restarted by Ray on the same port; calls that meet the gap are retried by the tool service."""

    def __init__(self, name: str, config: dict[str, Any], corpus: str, host: str, port: int) -> None:
        app = application(name, configuration.from_dict(config).tools, corpus)
        self._loop = LoopThread(f"tool-{name}")
        self._server = self._loop.run(serve(app, host, port, key=keys.held().tools[name]), START_DEADLINE_S)

    def ready(self) -> str:
        """The URL it serves at; answers once it does."""
        return self._server.url

    def alive(self) -> None:
        """Return if the server's loop turns."""
        self._loop.look()

    def close(self) -> None:
        """Stop serving and whatever the server has started."""
        self._loop.run(self._server.close(), START_DEADLINE_S)
