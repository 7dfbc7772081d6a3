"""What an environment is to a rollout: worlds that are opened, acted in, forked and closed.

Most authors write neither of the two classes here but a plain class with methods (:mod:`system.envs.plain`);
these are for servers and sandboxes.  An author writes what a world does and nothing around it: order,
deadlines, retries, journals, rebuilding and counting are :mod:`system.envs.live`'s.

A method may be ``async`` or not.  One that is not runs in a thread, never on the event loop, and one world is
never asked two things at once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from system.errors import EspalierError
from system.text import as_text, named, shown
from system.tools.outcome import ToolSpec, ToolStatus
from system.tree.prompt import Prompt

MOST_REWARD = 1e30  # of one action: what a branch earns is added up, and kept in 32 bits
ROLES = ("tool", "user")  # of a message: the answer to a call, or what somebody says


class ForkKind(StrEnum):
    """How a second world comes to where the first one is.  Where the first two fail, replay does it."""

    NATIVE = "native"  # the world copies itself: :meth:`World.fork`
    SNAPSHOT = "snapshot"  # it is saved, and another one opened from that: :meth:`World.save`
    REPLAY = "replay"  # another one is opened and given the same actions; it must answer the same
    NONE = "none"  # it does not


class Effects(StrEnum):
    """What an action changes."""

    NONE = "none"  # nothing: it may be sent again
    SESSION = "session"  # its own world: another one may be brought to where this one was
    OUTSIDE = "outside"  # what no new world takes back, such as a mail: it is never sent twice


@dataclass(frozen=True, slots=True)
class Ids:
    """Who acts.  Servers and sandboxes put these on what they start, so that it can be found."""

    run: str
    purpose: str  # train | eval
    tree: str  # the tree's ticket
    branch: str  # "0.1.2": root, its fork, that one's fork
    parent: str = ""  # the branch that it forked from; empty: a root
    attempt: int = 0  # worlds of this branch before this one
    step: int = 0  # actions before this one

    def __str__(self) -> str:
        came = f" (from {self.parent})" if self.parent else ""
        branch = f"{self.run}/{self.purpose}/{self.tree}/{self.branch}{came}"
        return f"{branch}, world {self.attempt}, step {self.step}"


@dataclass(frozen=True, slots=True)
class Start:
    """What a world begins with."""

    ids: Ids
    prompt: Prompt
    seed: int  # the same for all worlds of a tree: equal actions must meet equal answers
    deadline_s: float
    saved: Any = None  # what :meth:`World.save` returned, to go on from; None: from the beginning


@dataclass(frozen=True, slots=True)
class Acted:
    """One call of one of the environment's tools."""

    tool: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Action:
    """What a branch does next: it calls tools, or, where it calls none, says ``text`` and waits."""

    calls: tuple[Acted, ...]
    text: str  # what the model wrote in this turn
    ids: Ids
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Message:
    """What the model reads."""

    text: str
    role: str = "tool"  # one of ROLES
    status: str = str(ToolStatus.OK)


@dataclass(frozen=True, slots=True)
class Observation:
    """What came of an action."""

    messages: tuple[Message, ...] = ()  # of calls, one for each, in their order
    reward: float | None = None  # for this action alone
    done: bool = False  # the episode is over: the branch ends here
    truncated: bool = False  # it ends here, too, but for a limit of the environment's

    @classmethod
    def of(cls, text: str, status: ToolStatus = ToolStatus.OK, role: str = "tool") -> Observation:
        """One message and nothing else."""
        return cls((Message(text, role, str(status)),))

    @property
    def over(self) -> bool:
        return self.done or self.truncated


class World(ABC):
    """One live world: what one branch acts in.  Only :meth:`step` has to be written."""

    opening: str = ""  # what the model reads at the beginning; it joins the prompt

    @abstractmethod
    def step(self, action: Action) -> Observation | Any:
        """Raises :class:`.ToolUnavailable` where the action could not be made, or may not have been, and
        :class:`Undone` where it ended the world; what else it raises, the model is told.  May be ``async``.
        """

    def result(self) -> Mapping[str, Any] | Any | None:
        """The final state for the reward, as JSON; ``{"reward": …}`` is what ``reward=environment`` takes."""
        return None

    def fork(self, ids: Ids) -> World | Any:
        """A second world in the same state.  Raises :class:`CannotFork` when it cannot be had now."""
        raise CannotFork(f"{type(self).__name__} has no fork()")

    def save(self) -> Any:
        """Its state, for :attr:`Start.saved`, which is a deep copy of it: it may be the world's own lists and
        dicts.  Raises :class:`CannotFork` when it cannot be had now.
        """
        raise CannotFork(f"{type(self).__name__} has no save()")

    def reseed(self, seed: int) -> Any:
        """What it draws from now on, it draws by ``seed`` alone.  Told to a fork before its first action, so
        that siblings may meet different futures.
        """
        return None

    def close(self, why: str) -> Any:
        """Nobody acts in it any more."""
        return None


class Environment(ABC):
    """Opens worlds.  One instance serves all trees of a rollout worker, another one its evaluations."""

    tools: Mapping[str, ToolSpec] = {}
    forks: ForkKind = ForkKind.NONE
    effects: Effects = Effects.SESSION
    answers_messages: bool = False  # whether a turn without a call is an action, too
    has_result: bool = True  # whether its worlds have a :meth:`World.result`
    # Worlds that are opened, step or tell their result at once: further ones wait, before their deadlines
    # begin.  0: as many as environment.concurrency.
    runs_at_once: int = 0

    @abstractmethod
    def open(self, start: Start) -> World | Any:
        """Raises :class:`.ToolUnavailable` when there is none to be had now.  May be ``async``."""

    def check(self) -> Any:
        """Raise, with a reason and a remedy, if no world could be opened.  May be ``async``."""
        return None

    def normalise(self, text: str) -> str:
        """``text`` without what may differ between two worlds in the same state (a clock, a path)."""
        return text


class CannotFork(EspalierError):
    """This world cannot be copied or saved as it is now; replay may do it."""


class Undone(EspalierError):
    """An action ended the world that it was made in.  The branch reads ``text``, with its ``status``, and
    goes on in a world that is built again without the action.
    """

    def __init__(self, text: str, status: ToolStatus = ToolStatus.ERROR) -> None:
        super().__init__(text, status)
        self.text, self.status = text, status


class WorldFailed(EspalierError):
    """A branch has no world any more.  It ends unscored: this says nothing about what the model did.

    ``reason`` is a word for counters: open_failed, fork_failed, fork_dear, replay_diverged, world_lost,
    bad_observation, bad_normalise.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)  # its own arguments, so that it can be pickled
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class ForkTooLate(EspalierError, RuntimeError):
    """A fork met its parent's world after the parent's next action: a bug of ours, never an author's."""


def checked(given: Any) -> Observation:
    """What ``step`` returned, with texts that can be written, and a reward and an end that say one thing.

    A bare text is the answer to the one call.  Raises :class:`WorldFailed` for what is no observation.
    """
    if isinstance(given, str):
        return Observation.of(as_text(given))
    if not isinstance(given, Observation):
        raise _bad(f"step() returned {shown(given)}, no Observation and no text")
    said: Any = given.messages
    if not isinstance(said, tuple | list):
        raise _bad(f"step() gave {shown(said)} as its messages, no tuple of Message")
    done, truncated = _flag("done", given.done), _flag("truncated", given.truncated)
    return Observation(tuple(map(_message, said)), _reward(given.reward), done, truncated)


def _message(given: Any) -> Message:
    if not isinstance(given, Message):
        raise _bad(f"step() gave {shown(given)} as a Message")
    if given.role not in ROLES:
        raise _bad(f"step() gave a message of {shown(given.role)}: its role is one of {', '.join(ROLES)}")
    try:
        return Message(as_text(given.text), str(given.role), str(ToolStatus(given.status)))
    except Exception as error:  # no such status, or no text of an author's class
        raise _bad(f"step() gave a message that cannot be read: {named(error)}") from error


def _reward(given: Any) -> float | None:
    """A number of Python's or numpy's, or None."""
    if given is None:
        return None
    try:
        value = math.nan if isinstance(given, str | bytes) else float(given)
    except Exception:  # no number, one that is too large, or an author's class
        value = math.nan
    if not abs(value) <= MOST_REWARD:
        raise _bad(
            f"step() gave the reward {shown(given)}, no number from {-MOST_REWARD:g} to {MOST_REWARD:g}"
        )
    return value


def _flag(name: str, given: Any) -> bool:
    """Whether it is over; None, of an attribute that nobody has set, is no."""
    if given is None:
        return False
    if not isinstance(given, int | np.bool_) or given not in (0, 1):
        raise _bad(f"step() gave {name}={shown(given)}: say True or False")
    return bool(given)


def _bad(fault: str) -> WorldFailed:
    return WorldFailed("bad_observation", fault)
