"""The parts that a configuration picks by name, ours or a user's own: one registry for each kind.

A name is one of the tables below, or ``package.module:Name`` for one's own, with the current directory on the
path.  Adding a built-in part means one file and one line here.  Nothing is imported before it is asked for,
so that a name can be checked, and listed, without the library behind it.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import os
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


class PluginError(ValueError):
    """A part that cannot be had: unknown, not importable, or given options it does not take."""


def nearest(word: str, known: Sequence[str], prefix: str = "") -> str:
    """``; did you mean …?`` with the nearest of the ``known`` words, or nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def is_path(name: str) -> bool:
    """Whether ``name`` is written as a path rather than as the name of a part of ours."""
    return ":" in name


def load(path: str) -> Callable[..., Any]:
    """The class or function at ``package.module:Name``.  Raises :class:`PluginError`."""
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    module, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # importing runs the user's own code
        raise PluginError(f"{type(error).__name__}: {error}") from error
    if not callable(found):
        raise PluginError(f"{attribute} is not callable")
    return found


@dataclasses.dataclass(frozen=True)
class Registry:
    """One kind of part.  ``key``: the setting that picks it; ``table``: built-in name -> ``module:Name``."""

    key: str
    table: Mapping[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.table)

    def find(self, name: str) -> Callable[..., Any]:
        """The class or function called ``name``.  Raises :class:`PluginError` naming the key and a remedy."""
        if name not in self.table and not is_path(name):
            raise PluginError(
                f"{self.key}={name!r}: choose one of {', '.join(self.table)}, or your own as "
                f"package.module:Name{nearest(name, self.names)}"
            )
        try:
            return load(self.table.get(name, name))
        except PluginError as error:
            raise PluginError(f"{self.key}={name!r}: {error}") from error

    def make(self, name: str, options: Mapping[str, Any], *given: Any, **offered: Any) -> Any:
        """The part called ``name``, called with ``given`` and with ``options`` as typed keywords.

        What is ``offered`` goes to a parameter of that name, if there is one and no option sets it: settings
        that several parts of a kind share.  Raises :class:`PluginError` for options that do not fit, and what
        the part itself raises.
        """
        factory = self.find(name)
        return factory(*given, **self._keywords(name, factory, options, len(given), offered))

    def check(self, name: str, options: Mapping[str, Any], given: int = 0, **offered: Any) -> None:
        """Import the part and check its options, without making it.  Raises :class:`PluginError`."""
        self._keywords(name, self.find(name), options, given, offered)

    def _keywords(
        self,
        name: str,
        factory: Callable[..., Any],
        options: Mapping[str, Any],
        given: int,
        offered: Mapping[str, Any],
    ) -> dict[str, Any]:
        """``options`` converted to what the parameters after the first ``given`` ones are annotated with."""
        parameters = list(inspect.signature(factory).parameters.values())[given:]
        named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        where = self.key.removesuffix(".name")
        for option in options:
            if option not in named:
                known = f"it takes {', '.join(named)}" if named else "it takes none"
                close = nearest(option, list(named))
                raise PluginError(f"{where}.options.{option}: {name} has no such option{close}; {known}")
        values = {key: value for key, value in offered.items() if key in named and key not in options}
        missing = [
            p.name
            for p in named.values()
            if p.default is p.empty and p.name not in options and p.name not in values
        ]
        if missing:
            raise PluginError(f"{where}.options: {name} needs {', '.join(missing)}")
        return values | _typed(where, factory, named, options)


def _typed(
    where: str,
    factory: Callable[..., Any],
    named: Mapping[str, inspect.Parameter],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """``options`` by the annotations of ``factory``, with OmegaConf's conversions ("3" is an int, say)."""
    hints = typing.get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    values: dict[str, Any] = {}
    for option, value in options.items():
        field = (option, hints.get(named[option].name, Any))
        try:
            made = OmegaConf.structured(dataclasses.make_dataclass("Options", [field]))
        except OmegaConfBaseException:  # a type that OmegaConf does not know is the part's own to check
            made = OmegaConf.structured(dataclasses.make_dataclass("Options", [(option, Any)]))
        try:
            values[option] = OmegaConf.to_container(OmegaConf.merge(made, {option: value}))[option]  # type: ignore[index, call-overload]
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise PluginError(f"{where}.options.{option}={value!r}: {reason}") from error
    return values


CREDITS = Registry(
    "learn.credit",
    {
        "grpo": "system.learn.credit.group:Grpo",
        "arpo-soft": "system.learn.credit.group:Grpo",  # one estimator, two names
        "arpo-hard": "system.learn.credit.group:ArpoHard",
        "rloo": "system.learn.credit.group:Rloo",
        "dr-grpo": "system.learn.credit.group:DrGrpo",
        "reinforce++": "system.learn.credit.reinforce:ReinforcePlusPlus",
        "reinforce++-baseline": "system.learn.credit.reinforce:ReinforcePlusPlusBaseline",
    },
)
OBJECTIVES = Registry(
    "learn.objective",
    {
        "decoupled": "system.learn.objective:Decoupled",
        "ppo": "system.learn.objective:Ppo",
        "grpo-flat": "system.learn.objective:FlatPpo",
    },
)
AGGREGATES = Registry(
    "learn.aggregate",
    {
        "token-mean": "system.learn.aggregate:TokenMean",
        "seq-mean": "system.learn.aggregate:SequenceMean",
        "constant": "system.learn.aggregate:ConstantLength",
    },
)
POLICIES = Registry(
    "branching.name",
    {
        "arpo": "system.rollout.branching:Arpo",
        "arpo-paper": "system.rollout.branching:ArpoPaper",
        "arpo-release": "system.rollout.branching:arpo_release",
        "random": "system.rollout.branching:Random",
        "none": "system.rollout.branching:Never",
    },
)
