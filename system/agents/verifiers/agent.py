"""``agent.run=verifiers``: an episode is one of an environment of verifiers', played and scored by it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from system.agents.launch import AgentFailed, SessionAddress
from system.agents.verifiers.command import interpreter, specification, surroundings, told_wrong
from system.agents.verifiers.server import EpisodeFailed, EpisodeServer, ServerRefused
from system.config import AgentConfig
from system.redact import redact

COLUMN = "verifiers"  # of a question: {"split", "data"}, the task as verifiers writes tasks down


class VerifiersAgent:
    """Runs the episodes of one rollout worker."""

    columns = (COLUMN,)
    judges = True

    def __init__(
        self,
        environment: Any = "",
        held_out: dict[str, Any] | None = None,
        python: str = "",
        right: float = 1.0,
        start_s: float = 120.0,
        *,
        settings: AgentConfig,
        directory: Path,
    ) -> None:
        """``environment``: verifiers' own ``env`` block, or the id of a taskset; ``held_out``: settings of
        that taskset for the held-out questions, if they are others; ``python``: the interpreter that has
        verifiers; ``right``: the reward from which on an episode counts as right; ``start_s``: seconds for
        the environment to load.  Raises :class:`ConfigError`.
        """
        self._python, self._right = interpreter(python), right
        spec = specification(environment, held_out, settings.turns)
        around = surroundings(self._python, settings)
        self._server = EpisodeServer(self._python, spec, around, directory, start_s)

    async def __call__(self, session: SessionAddress, task: Mapping[str, Any]) -> dict[str, Any]:
        """Raises :class:`AgentFailed`."""
        given: dict[str, Any] = task["extra"][COLUMN]
        request = {
            "split": given["split"],
            "task": given["data"],
            "base_url": session.openai_url,
            "model": session.model,
        }
        try:
            answer = await self._server.run(request)
        except ServerRefused as refused:
            raise AgentFailed(str(told_wrong(self._python, refused.message))) from refused
        except EpisodeFailed as error:
            raise AgentFailed(f"verifiers: {error}", self._server.output) from error
        if "error" in answer:
            told = redact(str(answer["error"]).replace(session.api_key, "…"))
            raise AgentFailed(f"verifiers: {told}")
        return {**answer, "correct": answer["reward"] >= self._right}

    async def check(self) -> None:
        """Start the server, which loads the environment: on this machine, perhaps, it cannot.

        Raises :class:`ConfigError` for what is to be mended, :class:`EpisodeFailed` for what else happened.
        """
        try:
            await self._server.ready()
        except ServerRefused as refused:
            raise told_wrong(self._python, refused.message) from refused

    async def close(self) -> None:
        """End the server; it ends with this process, too."""
        await self._server.close()
