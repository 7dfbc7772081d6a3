"""The keys of a run: what its servers, and Ray, want to be shown.

The driver makes them at its start and leaves a copy in the run directory, readable by its user only, for as
long as it runs: ``key`` for the engines and tool servers (``Authorization: Bearer $(cat RUN/key)``),
``ray-token`` for Ray where it is this machine's alone.  Actors get them from the driver through Ray, whose
connections ask for its token: no key stands on a command line or in an environment that a tool could read.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Generator, Iterable
from pathlib import Path

from system.config import Config, ConfigError, all_rewards
from system.engine.control import Http
from system.http import Keys

SERVERS, RAY = "key", "ray-token"  # files of the run directory

_held = Keys()


def held() -> Keys:
    """The keys of this process's run."""
    return _held


def http(urls: Iterable[str]) -> Http:
    """Connections to the engines at ``urls`` that show the run's key."""
    return Http(urls, _held.engines)


def hold(keys: Keys) -> None:
    """Make ``keys`` those of this process: what an actor does first."""
    global _held
    _held = keys


@contextlib.contextmanager
def made(config: Config, root: Path) -> Generator[None]:
    """Hold new keys for the length of the block, with a copy in ``root``.

    Raises ConfigError where ``engine.api_key_env``, ``teacher.api_key_env``, ``tools.search_key_env``,
    ``agent.token_env`` or the ``api_key_env`` of a reward names no variable.
    """
    engine, tools = config.engine, config.tools
    own = secrets.token_hex(32)
    keys = Keys(
        engines=_named("engine.api_key_env", engine.api_key_env) if engine.urls else own,
        tools={
            "python": own,
            "search": _named("tools.search_key_env", tools.search_key_env) if tools.search_url else own,
        },
        rewards=_of_rewards(config),
        teacher=_named("teacher.api_key_env", config.teacher.api_key_env),
        sessions=_named("agent.token_env", config.agent.token_env),
    )
    with private_file(root / SERVERS, own):
        hold(keys)
        try:
            yield
        finally:
            hold(Keys())


@contextlib.contextmanager
def private_file(path: Path, text: str) -> Generator[Path]:
    """A file that only this user can read, for the length of the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # of a session that was killed
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _of_rewards(config: Config) -> dict[str, str]:
    """What judges' servers want to be shown, by the environment variables that hold it."""
    named = {
        str(variable): f"{one.key}.options.api_key_env"
        for one in all_rewards(config)
        if (variable := one.options.get("api_key_env"))
    }
    return {variable: _named(setting, variable) for variable, setting in named.items()}


def _named(setting: str, variable: str) -> str:
    """The key in an environment variable; none where none is named."""
    if not variable:
        return ""
    if not (key := os.environ.get(variable, "").strip()):
        raise ConfigError(f"{setting}={variable}: this environment variable is not set, or empty: export it")
    return key
