"""Where an MCP server is, and what of it is offered: one entry of ``tools.mcp``."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from system.errors import ConfigError
from system.plugins import nearest

_KNOWN = (
    *("command", "args", "env", "env_from", "cwd"),
    *("url", "headers_from"),
    *("prefix", "names", "include", "pure", "idempotent", "start_s"),
)


@dataclass(frozen=True, slots=True)
class McpPlace:
    """A server that is started (``command``) or reached (``url``); ``where`` names its setting."""

    where: str
    command: tuple[str, ...]
    url: str
    cwd: str
    env_from: tuple[str, ...]  # variables that it gets besides PATH, HOME and the like
    headers_from: tuple[tuple[str, str], ...]  # header -> the variable whose value it is shown
    env: tuple[tuple[str, str], ...] = field(repr=False)
    prefix: str
    names: tuple[tuple[str, str], ...]  # the server's name of a tool -> ours
    include: tuple[str, ...]  # tools, by the server's names; empty: all
    pure: tuple[str, ...]
    idempotent: tuple[str, ...]
    start_s: float

    @property
    def name(self) -> str:
        return self.url or shlex.join(self.command)

    def environment(self) -> dict[str, str]:
        """Raises ConfigError for a variable of ``env_from`` that is not set."""
        return dict(self.env) | {name: self._variable("env_from", name) for name in self.env_from}

    def headers(self) -> dict[str, str]:
        return {header: self._variable("headers_from", name) for header, name in self.headers_from}

    def _variable(self, key: str, name: str) -> str:
        if (value := os.environ.get(name)) is None:
            raise ConfigError(f"{self.where}.{key}: the environment variable {name} is not set")
        return value


def place(where: str, given: Mapping[str, Any]) -> McpPlace:
    """An entry of ``tools.mcp``, the setting ``where``, in form.  Raises ConfigError naming the field."""
    for key in given:
        if key not in _KNOWN:
            known = ", ".join(_KNOWN)
            raise ConfigError(f"{where}.{key}: no such key{nearest(str(key), _KNOWN)}; known: {known}")
    read = _Fields(where, given)
    command, url = read.words("command", split=True) + read.words("args"), read.text("url")
    if bool(command) == bool(url):
        raise ConfigError(
            f"{where}: name the command that starts the server, or the url where it is: one of both"
        )
    if url and not url.startswith(("http://", "https://")):
        raise ConfigError(f"{where}.url={url!r}: it begins with http:// or https://")
    start_s = given.get("start_s", 30.0)
    if isinstance(start_s, bool) or not isinstance(start_s, int | float) or not 0 < start_s < 3600:
        raise ConfigError(f"{where}.start_s={start_s!r}: seconds, above 0")
    return McpPlace(
        where=where,
        command=command,
        url=url,
        cwd=read.text("cwd"),
        env_from=read.words("env_from"),
        headers_from=read.pairs("headers_from"),
        env=read.pairs("env"),
        prefix=read.text("prefix"),
        names=read.pairs("names"),
        include=read.words("include"),
        pure=read.words("pure"),
        idempotent=read.words("idempotent"),
        start_s=float(start_s),
    )


@dataclass(frozen=True, slots=True)
class _Fields:
    where: str
    given: Mapping[str, Any]

    def text(self, key: str) -> str:
        value = self.given.get(key, "")
        if not isinstance(value, str):
            raise ConfigError(f"{self.where}.{key}={value!r}: a text")
        return value

    def words(self, key: str, split: bool = False) -> tuple[str, ...]:
        """A list of texts; with ``split``, a text as a shell would split it, too."""
        value = self.given.get(key, [])
        if split and isinstance(value, str):
            return tuple(shlex.split(value))
        if not isinstance(value, list | tuple) or any(not isinstance(word, str) for word in value):
            raise ConfigError(f"{self.where}.{key}={value!r}: a list of texts")
        return tuple(value)

    def pairs(self, key: str) -> tuple[tuple[str, str], ...]:
        value = self.given.get(key, {})
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self.where}.{key}={value!r}: names and texts, {{NAME: text}}")
        return tuple((str(name), str(text)) for name, text in value.items())
