"""Running an agent of somebody else's, once: as a program of its own, or as a Python function.

The agent is told its task as JSON and where its session is, and does the rest.  What it says of itself at its
end is its result: a JSON object.
"""

from __future__ import annotations

import asyncio
import difflib
import functools
import inspect
import json
import numbers
import re
import shlex
import shutil
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from system.agents.process import KEPT, Program, inherited, run_program
from system.config import AgentConfig
from system.errors import EspalierError, asked_to_end
from system.foreign import foreign, in_thread
from system.plugins import AGENTS
from system.rollout.scorer import held
from system.text import as_text, described
from system.tree.prompt import Prompt

SHOWN = 2000  # characters of an agent's output that are kept with its episode
FILLED_IN: tuple[str, ...] = ("{prompt}", "{question}")  # in a command
_BRACED = re.compile(r"\{\w+\}")
_MISTYPED = 0.85  # so similar is {quesion}; {print} is another program's own word
MOST_PARTS = 32  # of an agent's own reward
_PART = re.compile(r"[\w.-]{1,64}")


class AgentFailed(EspalierError):
    """An agent that did not come to its end, and the last of what it put out."""

    def __init__(self, text: str, output: str = "") -> None:
        super().__init__(text)
        self.output = output


@dataclass(frozen=True, slots=True)
class SessionAddress:
    """Where an agent finds its model."""

    openai_url: str  # base URL for clients of OpenAI's API
    anthropic_url: str  # base URL for clients of Anthropic's API
    api_key: str
    model: str  # by which name it is trained
    seed: int


@dataclass(frozen=True, slots=True)
class Ran:
    """How a run ended that came to its end."""

    result: Mapping[str, Any] = field(default_factory=dict[str, Any])
    output: str = ""  # the last of it, without the session's key


class Launch(Protocol):
    """One run of the agent.  Raises :class:`AgentFailed`.  When it is cancelled, nothing of it goes on."""

    async def __call__(self, session: SessionAddress, task: Mapping[str, Any]) -> Ran: ...


def make_launch(settings: AgentConfig, directory: Path) -> Launch:
    """As the configuration says; programs get directories of their own below ``directory``.

    Raises :class:`ConfigError` for a function that cannot be had.
    """
    return ProgramAgent(settings, directory) if settings.command else FunctionAgent(settings, directory)


def command_problem(settings: AgentConfig) -> str:
    """What is wrong with the command, with the remedy; "" for nothing."""
    try:
        words = shlex.split(settings.command)
    except ValueError as error:
        return f"agent.command={settings.command!r}: {error}: write it as a shell would take it"
    if settings.command and not words:
        return "agent.command has no words: name the program"
    for word in words[1:]:
        for braced in _BRACED.findall(word):
            if braced not in FILLED_IN and (
                meant := difflib.get_close_matches(braced, FILLED_IN, n=1, cutoff=_MISTYPED)
            ):
                return f"agent.command: {braced} stands for nothing: {meant[0]} is filled in"
    path = {**inherited(()), **settings.env}["PATH"]
    if words and shutil.which(_whole(words[0]), path=path) is None:
        return (
            f"agent.command: there is no program {words[0]!r} that can be run, on PATH or from here: correct "
            "it, or make it executable"
        )
    return ""


def told(prompt: Prompt, columns: list[str]) -> dict[str, Any]:
    """What an agent is told of its task.  Raises :class:`AgentFailed` for a column that there is not."""
    if missing := [name for name in columns if name not in prompt.extra]:
        known = ", ".join(prompt.extra) or "none"
        raise AgentFailed(
            f"agent.columns: question {prompt.id} has no column {missing[0]!r} (known: {known})"
        )
    return {
        "id": prompt.id,
        "kind": prompt.kind,
        "messages": [dict(message) for message in prompt.messages],
        "question": prompt.messages[-1]["content"] if prompt.messages else "",
        "extra": {name: _copied(prompt.extra[name]) for name in columns},
    }


def as_json(task: Mapping[str, Any]) -> str:
    """What an agent is told, for one outside this process.  Raises :class:`AgentFailed` where JSON cannot
    hold it.
    """
    try:
        return json.dumps(task)
    except (TypeError, ValueError, RecursionError) as error:
        raise AgentFailed(
            f"agent.columns: a column of question {task['id']} is nothing that JSON can hold ({error}): "
            "take it out, or let the task make it a text"
        ) from error


def _copied(value: Any) -> Any:
    """``value`` with lists and dictionaries of its own: a function may write into what it is told, which the
    other episodes and the reward read as well.
    """
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in cast("dict[Any, Any]", value).items()}
    if isinstance(value, list):
        return [_copied(one) for one in cast("list[Any]", value)]
    return value


class ProgramAgent:
    """A program in a process group and a directory of its own."""

    def __init__(self, settings: AgentConfig, directory: Path) -> None:
        self._words = [_whole(word) for word in shlex.split(settings.command)]
        self._settings, self._directory = settings, directory

    async def __call__(self, session: SessionAddress, task: Mapping[str, Any]) -> Ran:
        text = as_json({**task, "seed": session.seed})
        program = Program.prepared(self._directory, session.api_key)
        prompt = program.directory / "prompt.json"
        prompt.write_text(text, encoding="utf-8")
        known: Mapping[str, str] = dict(zip(FILLED_IN, (str(prompt), str(task["question"])), strict=True))
        words = [_filled(word, known) for word in self._words]
        environment = {
            "OPENAI_BASE_URL": session.openai_url,
            "OPENAI_API_KEY": session.api_key,
            "ANTHROPIC_BASE_URL": session.anthropic_url,
            "ANTHROPIC_API_KEY": session.api_key,
            "ESPALIER_SESSION": session.api_key,
            "ESPALIER_MODEL": session.model,
            "ESPALIER_PROMPT": str(prompt),
            "ESPALIER_SEED": str(session.seed),
        }
        try:
            ended = await run_program(
                program, words, {**self._settings.env, **environment}, self._settings.env_from
            )
        except (OSError, ValueError) as error:  # no such program, a NUL in a question
            raise AgentFailed(f"agent.command: {described(error)}") from error
        finally:
            await asyncio.to_thread(program.remove)
        if ended.code != 0:
            last = next((line for line in reversed(ended.shown.splitlines()) if line.strip()), "no output")
            raise AgentFailed(
                f"the agent's program ended with code {ended.code}: {last}", ended.shown[-SHOWN:]
            )
        return Ran(_last_object(ended.stdout, ended.cut), ended.shown[-SHOWN:])


class FunctionAgent:
    """A Python function, ``async`` or not, of this process: ``run(session, task, **options)``.

    What it returns is its result: a dictionary, a number (its reward), a text (its answer), or nothing.  One
    that is not ``async`` runs in a thread, which nobody can end: past its deadline it is left behind, and
    finds its session closed.

    Of a class, an object is made here, with ``options``, and called ``(session, task)`` for each episode.
    ``columns``: of the data, those that it needs, whatever ``agent.columns`` says.  ``judges``: no reward but
    its own scores its episodes.  ``async check()``: raises what keeps it from working, before the first.
    """

    def __init__(self, settings: AgentConfig, directory: Path | None = None) -> None:
        self._name = settings.run
        found = AGENTS.find(settings.run)
        if inspect.isclass(found):
            made = AGENTS.make(settings.run, settings.options, settings=settings, directory=directory)
            self._bind, function = functools.partial(functools.partial, made), made.__call__
        else:
            made = function = found
            self._bind = functools.partial(AGENTS.bound, settings.run, settings.options)
        self._is_async = inspect.iscoroutinefunction(function)
        self._check: Callable[[], Awaitable[None]] | None = getattr(made, "check", None)
        self.columns = tuple(getattr(made, "columns", ()))
        self.judges = bool(getattr(made, "judges", False))

    async def check(self) -> None:
        """Raises what the agent's own ``check`` raises."""
        if self._check is not None:
            await foreign(self._check())

    async def __call__(self, session: SessionAddress, task: Mapping[str, Any]) -> Ran:
        bound = self._bind(session, dict(task))
        try:
            if self._is_async:
                value = await foreign(bound())
            else:
                value = await in_thread(bound, "agent")
                value = await foreign(value) if inspect.isawaitable(value) else value
            return Ran(_as_result(value))
        except (AgentFailed, GeneratorExit):
            raise
        except asyncio.CancelledError as error:
            if asked_to_end():
                raise
            raise AgentFailed(f"agent.run={self._name}: it ended by a cancellation of its own") from error
        except BaseException as error:  # a framework's own ends must not be the worker's
            raise AgentFailed(f"agent.run={self._name}: {described(error)}") from error


def reward_of(result: Mapping[str, Any]) -> float | None:
    """The reward that an agent's own result tells, or None.  Raises :class:`AgentFailed` for no number."""
    if (value := result.get("reward")) is None:
        return None
    if (number := held(value)) is None:
        raise AgentFailed(f"the agent's result has reward {value!r:.100}, which is no finite number")
    return number


def correct_of(result: Mapping[str, Any]) -> bool | None:
    """Whether an agent's own result says that it was right, or None.  Raises :class:`AgentFailed` for what is
    neither true nor false.
    """
    if (value := result.get("correct")) is None:
        return None
    if (number := held(value)) not in (0, 1):
        raise AgentFailed(f"the agent's result has correct {value!r:.100}: expected true or false")
    return number == 1


def parts_of(result: Mapping[str, Any]) -> dict[str, float]:
    """What an agent's own reward is made of, by name.  Raises :class:`AgentFailed` for no finite numbers, and
    for names that are none.
    """
    found: Any = result.get("parts", {})
    given = cast("dict[Any, Any]", found) if isinstance(found, dict) else {"parts": None}
    parts = {str(name): held(value) for name, value in list(given.items())[:MOST_PARTS]}
    for name, value in parts.items():
        if value is None or not _PART.fullmatch(name):
            raise AgentFailed(
                f"the agent's result has the part {name!r:.100}: {given.get(name)!r:.100}: expected a finite "
                "number by a name of letters, digits and _.-"
            )
    return {name: value for name, value in parts.items() if value is not None}


def turn_rewards_of(result: Mapping[str, Any], turns: int) -> list[float]:
    """What single turns earned, in their order.  Raises :class:`AgentFailed` for no numbers, and for more
    than there were ``turns``: which of them are meant, nobody can tell.
    """
    values: Any = result.get("turn_rewards", [])
    found = [held(one) for one in cast("list[Any]", values)] if isinstance(values, list) else [None]
    numbers = [one for one in found if one is not None]
    if len(numbers) < len(found):
        raise AgentFailed(f"the agent's result has turn_rewards {values!r:.100}, no list of finite numbers")
    if len(numbers) > turns:
        raise AgentFailed(
            f"the agent's result has turn_rewards of {len(numbers)} turns, but {turns} were handed out to it"
        )
    return numbers


def _as_result(value: Any) -> Mapping[str, Any]:
    """Raises :class:`AgentFailed` for what is no result."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"text": as_text(value)}
    if isinstance(value, numbers.Real) or held(value) is not None:
        return {"reward": value}
    if isinstance(value, Mapping):
        return {str(key): item for key, item in cast("Mapping[Any, Any]", value).items()}
    kind = type(value).__name__
    raise AgentFailed(f"agent.run returned a {kind}: return a dictionary, a number, a text or None")


def _last_object(text: str, cut: bool) -> dict[str, Any]:
    """The JSON object that the last line with any text is; none: an empty one.  ``cut``: the beginning of
    ``text`` is missing.  Raises :class:`AgentFailed` where that is the beginning of the object.
    """
    lines = [line for line in re.split(r"[\r\n]", text) if line.strip()]
    if cut and len(lines) == 1 and lines[0].rstrip().endswith("}"):
        raise AgentFailed(
            f"the last line that the agent's program printed has more than {KEPT} bytes: print a shorter "
            "result"
        )
    try:
        found: Any = json.loads(lines[-1]) if lines else None
    except (ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def _filled(word: str, known: Mapping[str, str]) -> str:
    """``word`` with what it names, in one go: a question may spell out another name."""
    for name, value in known.items():
        if name in word:
            before, _, after = word.partition(name)
            return _filled(before, known) + value + _filled(after, known)
    return word


def _whole(word: str) -> str:
    """A path that is there, from the directory that the run was started in: the program has another."""
    path = Path(word)
    return str(path.resolve()) if path.is_file() or ("/" in word and path.exists()) else word
