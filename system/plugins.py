"""The parts that a configuration picks by name, ours or a user's own: one registry for each kind.

A name is one of the tables at the end, or ``package.module:Name`` for one's own, with the current directory
on the path.  Adding a built-in part means one file and one line here.  Nothing is imported before it is asked
for, so that a name can be checked, and listed, without the library behind it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib
import inspect
import operator
import os
import re
import sys
import typing
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from system.errors import ConfigError, EspalierError


class PluginError(ConfigError):
    """A part that cannot be had: unknown, not importable, or given options it does not take."""


@contextlib.contextmanager
def blaming(what: str) -> Generator[None]:
    """Any error of the user's own code in the block becomes a :class:`PluginError` that names ``what``."""
    try:
        yield
    except EspalierError:
        raise
    except Exception as error:
        raise PluginError(f"{what}: {type(error).__name__}: {error}") from error


KINDS: dict[Any, str] = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}


def nearest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """``; did you mean …?`` with the nearest of the ``known`` words, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.65)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def is_path(name: str) -> bool:
    """Whether ``name`` is written as a path rather than as the name of a part of ours."""
    return ":" in name


def load(path: str) -> Callable[..., Any]:
    """The class or function at ``package.module:Name``.  Raises :class:`PluginError`."""
    module, _, attribute = path.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    try:
        found = operator.attrgetter(attribute)(importlib.import_module(module))
    except Exception as error:  # importing runs the user's own code
        where = f" (looked in {here} and on PYTHONPATH)" if isinstance(error, ModuleNotFoundError) else ""
        if isinstance(error, AttributeError) and module in sys.modules:
            found = vars(sys.modules[module]).items()
            where = nearest(attribute, [key for key, it in found if getattr(it, "__module__", "") == module])
        raise PluginError(f"{type(error).__name__}: {error}{where}") from error
    if not callable(found):
        raise PluginError(f"{attribute} is not callable")
    return found


@dataclasses.dataclass(frozen=True)
class Registry:
    """One kind of part.

    ``key``: the setting that picks it; ``table``: built-in name -> ``module:Name``; ``given``: what a part is
    called with, by position, as words for an error; ``offered``: keywords that it gets if it has parameters
    of these names; ``options_key``: the setting that holds the options, if not beside ``key``; ``base``: the
    class (``module:Name``) that a part is derived from, if there is one; ``methods``: it must have one;
    ``first_made``: a class among them is called with its options alone, and what that makes is called with
    what is given.
    """

    key: str
    table: Mapping[str, str]
    given: tuple[str, ...] = ()
    offered: tuple[str, ...] = ()
    options_key: str = ""
    base: str = ""
    methods: tuple[str, ...] = ()
    first_made: bool = False

    def at(self, key: str) -> Registry:
        """The same for a part that stands at ``key`` (``reward.parts[1]``), with its options beside it."""
        return dataclasses.replace(self, key=f"{key}.name")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.table)

    def find(self, name: str) -> Callable[..., Any]:
        """The class or function called ``name``.  Raises :class:`PluginError` naming the key and a remedy."""
        self.check_name(name)
        try:
            return load(self.table.get(name, name))
        except PluginError as error:
            raise PluginError(f"{self.key}={name!r}: {error}") from error

    def make(self, name: str, options: Mapping[str, Any], *given: Any, **offered: Any) -> Any:
        """The part called ``name``, called with ``given`` and with ``options`` as typed keywords.

        What is ``offered``, and not None, goes to a parameter of that name, if there is one and no option
        sets it: settings that several parts of a kind share.  Raises :class:`PluginError` for options that do
        not fit, and for a part that fails to be made.
        """
        factory = self.bound(name, options, *given, **offered)
        with blaming(f"{self.key}={name!r}"):  # the user's own code, or options that do not agree
            made = factory()
        self._check_kind(name, type(made))
        return made

    def bound(self, name: str, options: Mapping[str, Any], *given: Any, **offered: Any) -> Callable[[], Any]:
        """What makes the part, as :meth:`make` would, each time it is called."""
        factory = self.find(name)
        return functools.partial(
            factory, *given, **self._keywords(name, factory, options, len(given), offered)
        )

    def check_name(self, name: str) -> None:
        """Raises :class:`PluginError` for a word that is no part of ours.  Imports nothing."""
        if name not in self.table and not is_path(name):
            raise PluginError(
                f"{self.key}={name!r}: choose one of {', '.join(self.table)}, or your own as "
                f"package.module:Name{nearest(name, self.table)}"
            )

    def check(self, name: str, options: Mapping[str, Any]) -> None:
        """Import the part and check its options, without making it.  Raises :class:`PluginError`.

        A part of ours without options is not imported: there is nothing to check.
        """
        if options or name not in self.table:
            offered, factory = dict.fromkeys(self.offered, True), self.find(name)
            first = self.first_made and inspect.isclass(factory)
            self._keywords(name, factory, options, 0 if first else len(self.given), offered)
            if inspect.isclass(factory):
                self._check_kind(name, factory)

    def _check_kind(self, name: str, made: type) -> None:
        """Raises :class:`PluginError` for a part of another kind."""
        if self.base and name not in self.table and not issubclass(made, typing.cast(type, load(self.base))):
            base = self.base.replace(":", ".")
            raise PluginError(f"{self.key}={name!r}: {made.__name__} is not derived from {base}")
        if self.methods and not any(callable(getattr(made, method, None)) for method in self.methods):
            needed = " or ".join(f"{method}()" for method in self.methods)
            raise PluginError(f"{self.key}={name!r}: {made.__name__} has no method {needed}")

    def _keywords(
        self,
        name: str,
        factory: Callable[..., Any],
        options: Mapping[str, Any],
        given: int,
        offered: Mapping[str, Any],
    ) -> dict[str, Any]:
        """``options`` converted to what the parameters after the first ``given`` ones are annotated with."""
        section = self.key.removesuffix(".name").removesuffix(".run")
        where = f"{self.options_key}.{name}" if self.options_key else f"{section}.options"
        try:
            parameters = list(inspect.signature(factory).parameters.values())
        except ValueError:  # some classes written in C do not tell: they get no options
            parameters = [inspect.Parameter("given", inspect.Parameter.VAR_POSITIONAL)]
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if len(positional) < given and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            what = ", ".join(self.given) or f"{given} arguments"
            raise PluginError(f"{self.key}={name!r}: it is called with ({what}), which it does not take")
        taken = {p.name for p in positional[:given]}
        rest = [p for p in parameters if p.name not in taken]
        named = {p.name: p for p in rest if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in rest):
            known = f"it takes {', '.join(named)}" if named else "it takes none"
            drop = f"'{where}=!replace {{}}' drops what a base file sets"
            if unknown := [str(option) for option in options if option not in named]:
                raise PluginError(
                    "\n".join(
                        f"{where}.{one}: {name} has no such option{_meant(one, named)}; {known}; {drop}"
                        for one in unknown
                    )
                )
        values = {k: v for k, v in offered.items() if v is not None and k in named and k not in options}
        missing = [p for p in named if named[p].default is inspect.Parameter.empty and p not in options]
        if missing := [p for p in missing if p not in values]:
            raise PluginError(f"{where}: {name} needs {', '.join(missing)}")
        hints = _hints(factory)
        return values | {key: typed(f"{where}.{key}", hints.get(key, Any), options[key]) for key in options}


def _meant(option: str, known: Iterable[str]) -> str:
    word, colon, value = option.partition(":")
    return f"; write {word}: {value} with a space" if colon else nearest(option, known)


def _hints(factory: Callable[..., Any]) -> dict[str, Any]:
    """The types of its parameters; none where that cannot be told: it then checks its options itself."""
    try:
        return typing.get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    except Exception:  # names that only a type checker imports; a callable object
        return {}


def typed(where: str, kind: Any, value: Any) -> Any:
    """``value`` as a ``kind``, with OmegaConf's conversions ("3" is an int, a mapping a dataclass).

    Raises :class:`PluginError` naming ``where`` it stands.
    """
    try:
        schema = OmegaConf.structured(dataclasses.make_dataclass("Options", [("value", kind)]))
    except (OmegaConfBaseException, ValueError):  # a type that OmegaConf does not know: the part's to check
        return value
    try:
        made: Any = OmegaConf.to_object(OmegaConf.merge(schema, {"value": escape(value)}))
    except OmegaConfBaseException as error:
        fault = f" must be {KINDS[kind]}" if kind in KINDS else f": {str(error).splitlines()[0]}"
        raise PluginError(f"{where}={value!r}{fault}") from error
    return made.value


def escape(value: Any) -> Any:
    """``value`` so that OmegaConf reads ``${`` as text: what is resolved has no interpolations left."""
    if isinstance(value, dict):
        return {key: escape(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [escape(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


# --- the tables --------------------------------------------------------------------------------------------

TASKS = Registry(
    "task.name",
    {
        "quickstart": "system.tasks.quickstart.task:QuickstartTask",
        "jsonl": "system.tasks.jsonl:JsonlTask",
        "reasoning-gym": "system.tasks.reasoning:ReasoningTask",
        "hops": "system.tasks.study.hops:HopsTask",
        "code": "system.tasks.study.code:CodeTask",
        "game": "system.tasks.study.game:GameTask",
        "gymnasium": "system.tasks.gym:GymTask",
        "verifiers": "system.tasks.verifiers:VerifiersTask",
    },
    given=("config",),
)
REWARDS = Registry(
    "reward.name",
    {
        "arpo": "system.rollout.rewards.arpo:ArpoReward",
        "arpo-release": "system.rollout.rewards.arpo_release:ArpoReleaseReward",
        "f1": "system.rollout.rewards.f1:F1Reward",
        "judge": "system.rollout.rewards.judge:Judge",
        "task": "system.tasks.base:task_reward",
        "environment": "system.rollout.rewards.environment:EnvironmentReward",
    },
    offered=("config", "deadline_s", "secret", "store"),
    methods=("score", "score_group"),
)
SYNTAXES = Registry(
    "rollout.syntax",
    {
        "tags": "system.rollout.syntax.tags:TagSyntax",
        "hermes": "system.rollout.syntax.hermes:HermesSyntax",
        "qwen3-coder": "system.rollout.syntax.qwen_coder:QwenCoderSyntax",
    },
    given=("specs",),
)
TOOLS = Registry(
    "tools.names",
    {
        "search": "system.tools.http_tools:SearchTool",
        "python": "system.tools.http_tools:PythonTool",
        "browse": "system.tools.browse.tool:BrowseTool",
        "guess": "system.tasks.study.game:GuessTool",
    },
    offered=("url", "top_k", "http", "tools_config", "run_directory"),
    options_key="tools.options",
)
ENVIRONMENTS = Registry(
    "environment.name",
    {
        "tools": "system.envs.make:no_worlds",
        "python": "system.envs.python:PythonEnvironment",
        "bash": "system.envs.shell:ShellEnvironment",
        "gymnasium": "system.envs.gym:GymEnvironment",
        "mcp": "system.envs.mcp:McpEnvironment",
    },
)
AGENTS = Registry(
    "agent.run",
    {"verifiers": "system.agents.verifiers.agent:VerifiersAgent"},
    given=("session", "task"),
    offered=("settings", "directory"),
    first_made=True,
)
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
        "g2rpo": "system.learn.credit.group:GaussianGrpo",
        "ema-grpo": "system.learn.credit.ema:EmaGrpo",
        "ucpo": "system.learn.credit.tree:Ucpo",
        "tree-grpo": "system.learn.credit.tree:TreeGrpo",
        "treepo": "system.learn.credit.tree:TreePo",
        "at2po": "system.learn.credit.node:At2po",
        "treerl": "system.learn.credit.node:TreeRl",
        "vineppo": "system.learn.credit.node:VinePpo",
        "gigpo": "system.learn.credit.step:GiGpo",
        "a2tgpo": "system.learn.credit.gain:A2tgpo",
        "igpo": "system.learn.credit.gain:Igpo",
        "none": "system.learn.credit.none:NoCredit",  # the teacher alone
    },
    base="system.learn.credit.base:Credit",
)
OBJECTIVES = Registry(
    "learn.objective",
    {
        "decoupled": "system.learn.objective:Decoupled",
        "ppo": "system.learn.objective:Ppo",
        "grpo-flat": "system.learn.objective:FlatPpo",
        "cispo": "system.learn.gates:Cispo",
        "sapo": "system.learn.gates:Sapo",
        "dppo-tv": "system.learn.gates:Dppo",
        "dppo-kl": "system.learn.gates:DppoKl",
        "topr": "system.learn.gates:Topr",
        "aepo": "system.learn.gates:AepoClip",
        "at2po": "system.learn.gates:TurnClip",
        "a2tgpo": "system.learn.gates:GainTurnClip",
        "gspo": "system.learn.gates:Gspo",
        "m2po": "system.learn.gates:M2po",
        "a3po": "system.learn.objective:LogLinear",
    },
    offered=("clip_low", "clip_high", "dual_clip", "tis_cap"),
    base="system.learn.objective:Objective",
)
CORRECTIONS = Registry(
    "learn.correction",
    {
        "none": "system.learn.correction:NoCorrection",
        "seq-tis": "system.learn.correction:SequenceTis",
        "seq-mis": "system.learn.correction:SequenceMis",
        "seq-reject": "system.learn.correction:SequenceRejection",
        "geo-reject": "system.learn.correction:GeometricRejection",
    },
    base="system.learn.correction:Correction",
)
AGGREGATES = Registry(
    "learn.aggregate",
    {
        "token-mean": "system.learn.aggregate:TokenMean",
        "seq-mean": "system.learn.aggregate:SequenceMean",
        "constant": "system.learn.aggregate:ConstantLength",
    },
    offered=("length_cap",),
    base="system.learn.aggregate:Aggregate",
)
POLICIES = Registry(
    "branching.name",
    {
        "arpo": "system.rollout.branching:Arpo",
        "arpo-paper": "system.rollout.branching:ArpoPaper",
        "arpo-release": "system.rollout.branching:ArpoRelease",
        "arpo-calibrated": "system.rollout.branching:ArpoCalibrated",
        "aepo": "system.rollout.branching:Aepo",
        "at2po": "system.rollout.expanding:MostUncertainTurns",
        "treerl": "system.rollout.expanding:UnlikelyTokens",
        "random-turns": "system.rollout.expanding:RandomTurns",
        "random": "system.rollout.branching:Random",
        "none": "system.rollout.branching:Never",
    },
    offered=("probe_tokens", "alpha", "beta", "tau"),
    base="system.rollout.branching:Policy",
)
