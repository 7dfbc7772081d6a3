"""A plain class as an environment: its public methods are the tools, its attributes the state::

    class Walk:
        fork = "deepcopy"  # or "replay", "none"

        def reset(self, prompt):  # a text that it returns joins the prompt
            self.place = 0

        def move(self, direction: str) -> str:
            '''Take one step.

            direction: left or right
            '''
            self.place += 1 if direction == "right" else -1
            return f"at {self.place}"

        def reward(self):
            return float(self.place == 3)

May be there, too: ``done``, true once the episode is over; ``reply(text)``, what somebody says to a turn
without a call (None: nothing, and the branch ends); ``reseed(seed)``, called before ``reset`` and for a fork;
``close()``; a static ``normalise(text)`` (:meth:`.Environment.normalise`).  A method may return an
:class:`.Observation` in place of a text.  Nothing of it is ``async``: it runs in threads.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Literal, Union, get_args, get_origin

from system.envs.protocol import Action, Environment, ForkKind, Ids, Observation, Start, World, checked
from system.plugins import PluginError
from system.text import as_text
from system.tools.outcome import ToolSpec

NO_TOOLS = ("reset", "reward", "done", "reply", "reseed", "close", "fork", "normalise")
FORKS = {"deepcopy": ForkKind.NATIVE, "replay": ForkKind.REPLAY, "none": ForkKind.NONE}
_TYPES: dict[Any, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    list: "array",
    dict: "object",
}
_UNBOUND = staticmethod, classmethod  # looked up in their class, these want no object
_PARAMETER = re.compile(r"\s*(\w+)\s*(?:\([^)]*\))?:\s*(.+)")


class PlainEnvironment(Environment):
    """Worlds that are objects of one class."""

    def __init__(self, name: str, kind: type, make: Callable[[], Any]) -> None:
        """``name``: as configured; ``make``: a new object of ``kind``.  Raises :class:`PluginError`."""
        self._make = make
        where = f"environment.name={name!r}"
        public = dict(_methods(kind))
        if slow := [one for one, method in public.items() if inspect.iscoroutinefunction(method)]:
            remedy = "write it without, or a whole environment (system/envs/protocol.py)"
            raise PluginError(f"{where}: {slow[0]} is async: {remedy}")
        self.tools = {
            one: _spec(where, one, method, bound=isinstance(inspect.getattr_static(kind, one), _UNBOUND))
            for one, method in public.items()
            if one not in NO_TOOLS
        }
        self.answers_messages, self.has_result = "reply" in public, "reward" in public
        if not self.tools and not self.answers_messages:
            raise PluginError(f"{where}: {kind.__name__} has no public method for a tool, and no reply()")
        if "done" in public:
            raise PluginError(f"{where}: done is a method: make it an attribute or a property")
        said = getattr(kind, "fork", "none")
        if said not in FORKS:
            raise PluginError(f"{where}: fork={said!r}: choose one of {', '.join(FORKS)}")
        self.forks = FORKS[said]
        self._normalise: Callable[[str], str] = getattr(kind, "normalise", str)
        if not _takes_a_text(self._normalise):
            remedy = "make it a static method of one text: @staticmethod def normalise(text)"
            raise PluginError(f"{where}: normalise cannot be called with a text alone: {remedy}")

    def open(self, start: Start) -> World:
        return PlainWorld(copy.deepcopy(self._make)(), start)  # its options are its own

    def normalise(self, text: str) -> str:
        return self._normalise(text)


class PlainWorld(World):
    """One object of the author's class."""

    def __init__(self, made: Any, start: Start | None) -> None:
        """``start``: None for a copy, which has begun already."""
        self._made = made
        if start is not None:
            self.reseed(start.seed)
            self.opening = as_text(made.reset(start.prompt))

    def step(self, action: Action) -> Observation:
        if not action.calls:
            said = self._made.reply(action.text)
            answer = Observation(done=True) if said is None else _answer(said, role="user")
        else:
            (call,) = action.calls
            answer = _answer(getattr(self._made, call.tool)(**call.arguments))
        return answer if answer.done else dataclasses.replace(answer, done=getattr(self._made, "done", False))

    def result(self) -> dict[str, Any]:
        return {"reward": self._made.reward()}

    def fork(self, ids: Ids) -> World:
        return PlainWorld(copy.deepcopy(self._made), None)

    def reseed(self, seed: int) -> None:
        if hasattr(self._made, "reseed"):
            self._made.reseed(seed)

    def close(self, why: str) -> None:
        if hasattr(self._made, "close"):
            self._made.close()


def _answer(said: Any, role: str = "tool") -> Observation:
    """What a method returned.  Raises :class:`.WorldFailed` for what is no text yet: bytes, or something that
    is still to be awaited or gone through.
    """
    if isinstance(said, bytes | bytearray | Awaitable | Iterator):
        return checked(said)
    return said if isinstance(said, Observation) else Observation.of(as_text(said), role=role)


def _takes_a_text(function: Any) -> bool:
    try:
        inspect.signature(function).bind("")
    except (TypeError, ValueError):  # ValueError: of C, so it is not known
        return function is str
    return True


def _methods(kind: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """What a class has of public functions, in the order in which they are written."""
    seen: set[str] = set()
    for base in kind.__mro__[:-1]:
        for name in vars(base):
            if name not in seen and not name.startswith("_"):
                seen.add(name)
                if inspect.isroutine(found := getattr(kind, name)):
                    yield name, found


def _spec(where: str, name: str, method: Callable[..., Any], bound: bool) -> ToolSpec:
    """A tool of a method's signature and docstring.  ``bound``: no parameter is the object itself.

    Raises :class:`PluginError`.
    """
    try:
        hints = typing.get_type_hints(method)
    except Exception as error:
        raise PluginError(f"{where}: {name}: its types cannot be read: {error}") from error
    told, of = _docstring(method)
    properties: dict[str, Any] = {}
    required: list[str] = []
    for parameter in list(inspect.signature(method).parameters.values())[0 if bound else 1 :]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise PluginError(f"{where}: {name}({parameter}): a tool's parameters have names")
        if parameter.name not in hints:
            raise PluginError(f"{where}: {name}({parameter}): say its type, as in {parameter.name}: str")
        schema = _schema(f"{where}: {name}({parameter})", hints[parameter.name])
        described = {"description": of[parameter.name]} if parameter.name in of else {}
        properties[parameter.name] = schema | described
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters = {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }
    return ToolSpec(name, told or name, parameters, primary=next(iter(properties), ""))


def _docstring(method: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """(What it says of the method, what it says of each parameter: lines ``name: text`` after the first blank
    line.)
    """
    head, _, rest = (inspect.getdoc(method) or "").partition("\n\n")
    names = inspect.signature(method).parameters
    found = (_PARAMETER.fullmatch(line) for line in rest.splitlines())
    return " ".join(head.split()), {one[1]: one[2].strip() for one in found if one and one[1] in names}


def _schema(where: str, kind: Any) -> dict[str, Any]:
    """JSON schema of a parameter's type."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind in _TYPES:
        return {"type": _TYPES[kind]}
    if origin is Literal:
        return {"enum": [*inner]}
    if origin is list and inner:
        return {"type": "array", "items": _schema(where, inner[0])}
    if origin is dict:
        return {"type": "object"}
    if origin in (Union, types.UnionType):
        return {"anyOf": [{"type": "null"} if one is type(None) else _schema(where, one) for one in inner]}
    raise PluginError(
        f"{where}: a tool's parameter is of JSON's types, or a list of one, a Literal or a union"
    )
