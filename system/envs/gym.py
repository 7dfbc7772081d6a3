"""``environment=gymnasium``: environments of gymnasium that can be told in words, as they are.

The model calls one tool, ``act``, and reads what the environment shows (``render_mode="ansi"`` where it has
that, else its observation).  What a step earned is that turn's reward.
"""

from __future__ import annotations

import copy
import re
from typing import Any, Literal

import numpy as np

try:
    import gymnasium
    from gymnasium import spaces
    from gymnasium.envs.registration import load_env_creator
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("gymnasium is missing: pip install 'espalier[gymnasium]'") from error

from system.envs.protocol import (
    Action,
    CannotFork,
    Environment,
    ForkKind,
    Ids,
    Message,
    Observation,
    Start,
    World,
    WorldFailed,
)
from system.plugins import PluginError
from system.text import as_text
from system.tools.outcome import ToolSpec
from system.tools.tool import CallRefused

_STYLE = re.compile(r"\x1b\[[0-9;]*m")
_SHOWN = "\x1b[7m", "\x1b[41m", "\x1b[42m", "\x1b[43m"  # styles by which a picture says where one stands


class GymEnvironment(Environment):
    """Opens environments of one id.  A question's ``extra["seed"]`` says which beginning; its tree's seed
    does where there is none.
    """

    forks = ForkKind.NATIVE
    has_result = False

    def __init__(
        self,
        id: str = "",
        actions: list[str] | None = None,
        make: dict[str, Any] | None = None,
        show: Literal["", "picture", "observation"] = "",
        stochastic: bool = False,
    ) -> None:
        """``id``: as :func:`gymnasium.make` takes it (``module:Id-v0`` imports the module first);
        ``actions``: what the model calls the actions 0, 1, …; ``make``: further arguments of
        ``gymnasium.make``; ``show``: the environment's picture in letters, or its observation (empty: the
        picture if there is one); ``stochastic``: siblings draw a future of their own (their past stays the
        same).  Raises PluginError.
        """
        self._id, self._make, self.stochastic = id, dict(make or {}), stochastic
        where = "environment.options"
        if not id:
            raise PluginError(f"{where}.id: name an environment of gymnasium, such as FrozenLake-v1")
        try:
            modes = _modes(id)
        except gymnasium.error.Error as error:
            raise PluginError(f"{where}.id={id!r}: {error}") from error
        self.pictured = show == "picture" or (not show and "ansi" in modes)
        if self.pictured:
            if "ansi" not in modes:
                raise PluginError(f"{where}.show=picture: {id} has none in letters: show=observation")
            self._make["render_mode"] = "ansi"
        try:
            space = self.made().action_space
        except Exception as error:  # whatever an author's environment has against being made
            raise PluginError(f"{where}: {id!r} cannot be made: {type(error).__name__}: {error}") from error
        self.names: list[str] | None = None
        if isinstance(space, spaces.Discrete):
            self.first = int(space.start)
            self.names = actions or [str(self.first + i) for i in range(int(space.n))]
            if len(self.names) != space.n or len(set(self.names)) != len(self.names):
                raise PluginError(f"{where}.actions: {space.n} different names are needed, not {self.names}")
        elif not isinstance(space, spaces.Text):
            raise PluginError(f"{where}.id={id!r}: actions of {space} cannot be told in words")
        choices = {"enum": self.names} if self.names else {}
        self.tools = {
            "act": ToolSpec(
                "act",
                "Do an action, and see what comes of it.",
                {
                    "type": "object",
                    "properties": {"action": {"type": "string", "description": "what to do", **choices}},
                    "required": ["action"],
                },
                primary="action",
            )
        }

    def made(self) -> gymnasium.Env[Any, Any]:
        """A new one."""
        return gymnasium.make(self._id, **self._make)

    def open(self, start: Start) -> World:
        seed = str(start.prompt.extra.get("seed", start.seed))  # a number as text, in a table
        if not (seed.isascii() and seed.isdecimal()):
            fault = f"extra.seed: {seed:.200} is no whole number from 0 on"
            raise WorldFailed("open_failed", f"question {start.prompt.id!r}: {fault}")
        return GymWorld(self, self.made(), int(seed))


class GymWorld(World):
    """One environment, which has begun."""

    def __init__(self, environment: GymEnvironment, made: gymnasium.Env[Any, Any], seed: int | None) -> None:
        """``seed``: to begin with; None: it has begun already."""
        self._environment, self._made = environment, made
        if seed is not None:
            seen, _ = made.reset(seed=seed)
            self.opening = self._shown(seen)

    def step(self, action: Action) -> Observation:
        (call,) = action.calls
        word, names = str(call.arguments["action"]).strip(), self._environment.names
        if names is None:
            if not self._made.action_space.contains(word):
                raise CallRefused(f"{word!r:.200} is not in {self._made.action_space}")
            chosen: Any = word
        elif word in names:
            chosen = self._environment.first + names.index(word)
        else:
            raise CallRefused(f"{word!r:.200} is none of {', '.join(names)}")
        seen, reward, over, cut, _ = self._made.step(chosen)
        return Observation((Message(self._shown(seen)),), float(reward), over, cut)

    def fork(self, ids: Ids) -> World:
        try:
            return GymWorld(self._environment, copy.deepcopy(self._made), None)
        except Exception as error:  # whatever it holds that has no copy
            raise CannotFork(f"{type(error).__name__}: {error}") from error

    def reseed(self, seed: int) -> None:
        if self._environment.stochastic:
            self._made.unwrapped.np_random = np.random.default_rng(seed)

    def close(self, why: str) -> None:
        self._made.close()

    def _shown(self, seen: Any) -> str:
        if not self._environment.pictured:
            return as_text(seen if isinstance(seen, str) else repr(_plain(seen)))
        picture = as_text(self._made.render())
        for style in _SHOWN:  # what stands out, in letters
            picture = re.sub(re.escape(style) + r"(.*?)\x1b\[0m", r"[\1]", picture)
        return _STYLE.sub("", picture).strip("\n")


def _modes(id: str) -> list[str]:
    """Ways in which an environment of this id draws itself."""
    entry: Any = gymnasium.spec(id).entry_point
    kind: Any = load_env_creator(entry) if isinstance(entry, str) else entry
    return list(getattr(kind, "metadata", {}).get("render_modes", ()))


def _plain(value: Any) -> Any:
    """``value`` without numpy's types, which say more than they tell."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value
