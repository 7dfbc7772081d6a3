"""Sessions: what the branches of one tree act in.

A session is its journal.  The live world is a copy of that which may be thrown away at any time and built
again: by opening another one and doing the same actions, which must be answered as before.

Whatever is asked of a session waits in one line.  A fork takes its place there in the moment in which it is
decided, behind all that its parent has done and before what it does next; so the copy is of the right moment
however long things take.  The child does not wait for its world before it first acts.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Coroutine, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np

from system.envs.arguments import typed
from system.envs.journal import Entry, Journal, difference, seconds
from system.envs.line import Line, Spot
from system.envs.protocol import (
    Acted,
    Action,
    CannotFork,
    Effects,
    ForkKind,
    ForkTooLate,
    Ids,
    Observation,
    Start,
    Undone,
    WorldFailed,
    checked,
)
from system.envs.service import EnvironmentService, Held, Raised, apart, plain
from system.foreign import TooLate
from system.tools.outcome import ToolSpec, ToolStatus
from system.tools.tool import CallRefused, ToolUnavailable
from system.tree.prompt import Prompt

BACKOFF_S = 0.5  # before the first further attempt, doubling
_FAILURES = (TooLate, Raised, ToolUnavailable, CallRefused, CannotFork, Undone)


class TreeSessions:
    """The sessions of one tree.  ``close`` it."""

    def __init__(
        self, service: EnvironmentService, prompt: Prompt, tree: str, seed: int, opening: str | None = None
    ) -> None:
        """``tree``: its ticket; ``seed``: its own.  ``opening``: what its worlds begin with, where known."""
        self.service, self.prompt, self.tree, self.opening = service, prompt, tree, opening
        self._seed = seed
        self.seed = int(np.random.default_rng([seed, 5]).integers(2**31))  # of every world at its beginning
        self._first: Held | None = None
        self._sessions: list[BranchSession] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def turn_limit(self) -> int:
        """Messages of a branch that are answered."""
        return self.service.limits.turn_limit if self.service.environment.answers_messages else 0

    async def begin(self) -> str:
        """Open the first world, for whichever root comes first; returns what its model reads then.

        Raises :class:`WorldFailed`.
        """
        self._first = await BranchSession(self, "0").world()
        self.opening = self._first.opening
        return self.opening

    def root(self, key: Sequence[int]) -> BranchSession:
        """The session of a branch that begins at the prompt."""
        session, self._first = BranchSession(self, _label(key), held=self._first), None
        self._sessions.append(session)
        return session

    def forked(self, parent: BranchSession, key: Sequence[int], at: int) -> BranchSession:
        """See :meth:`BranchSession.fork`."""
        draws = np.random.SeedSequence([self._seed, 5], spawn_key=tuple(key))
        seed = int(np.random.default_rng(draws).integers(2**31))
        session = BranchSession(self, _label(key), parent.branch, parent.journal[:at], seed)
        self._sessions.append(session)
        return session

    def restored(self, values: Mapping[str, Any], entries: Sequence[Entry]) -> BranchSession:
        """A session of :meth:`BranchSession.state`; its world is built when it is needed."""
        journal = tuple(entries[i] for i in values["journal"])
        session = BranchSession(self, values["branch"], values["parent"], journal, values["seed"])
        session.attempt, session.final = values["attempt"], values["final"]
        self._sessions.append(session)
        return session

    def spawn(self, work: Coroutine[Any, Any, None], *spots: Spot) -> None:
        """Run ``work``, which raises nothing, beside all else; it leaves its ``spots`` however it ends."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        for spot in spots:
            task.add_done_callback(lambda _, spot=spot: spot.leave())

    async def close(self) -> None:
        """Retire every world that is left; what still comes to be is given up."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for session in self._sessions:
            session.discard("the tree is closed")
        if self._first is not None:
            self.service.retire(self._first, "no branch acted in it")
            self._first = None


class BranchSession:
    """What one branch acts in."""

    def __init__(
        self,
        tree: TreeSessions,
        branch: str,
        parent: str = "",
        journal: Journal = (),
        seed: int | None = None,
        held: Held | None = None,
    ) -> None:
        """``branch``, ``parent``: as in :class:`.Ids`; ``seed``: that the world is told before the branch's
        own first action; ``held``: a world that is where ``journal`` ends.
        """
        self.branch, self.parent, self.journal = branch, parent, journal
        self.attempt = 0 if held is None else 1  # worlds that were opened for it
        self.final: dict[str, Any] | None = None  # what the world came to, once it was asked
        self._tree, self._service = tree, tree.service
        self._seed, self._held = seed, held
        self._line = Line()
        self._fault: WorldFailed | ForkTooLate | None = None

    @property
    def tools(self) -> Mapping[str, ToolSpec]:
        return self._service.environment.tools

    async def act(self, calls: Sequence[Acted], text: str) -> Observation:
        """Do one action: ``calls``, or the turn's ``text`` as a message where there are none.

        An action that failed without having an effect, as far as this branch is concerned, is answered so and
        stands in no journal.  Raises :class:`WorldFailed` where there is no world to act in.
        """
        try:
            made = tuple(Acted(call.tool, typed(self.tools[call.tool], call.arguments)) for call in calls)
        except CallRefused as refusal:
            return Observation.of(f"The call was refused: {refusal}.", ToolStatus.REJECTED)
        async with self._line.spot():
            return await self._act(made, text)

    def fork(self, key: Sequence[int], at: int) -> BranchSession:
        """The session of a branch that goes on from after the first ``at`` of these actions; it begins to
        come to be at once.  Whatever fails is told when it is first used.
        """
        child = self._tree.forked(self, key, at)
        most_s, kind = self._service.limits.replay_s, self._service.environment.forks
        replayed = kind == ForkKind.REPLAY or at < len(self.journal)
        if replayed and (cost := seconds(child.journal)) > most_s:
            why = f"its actions took {cost:.1f} s, more than environment.replay_s={most_s:g}"
            child._failure("fork_dear", why)
            return child
        mine, its = child._line.spot(), None if replayed else self._line.spot()
        self._tree.spawn(child._come(self, at, mine, its), *(spot for spot in (mine, its) if spot))
        return child

    async def result(self) -> dict[str, Any] | None:
        """What the world has come to, for the reward; None for an environment that does not tell.

        Raises :class:`WorldFailed`.
        """
        if self.final is not None or not self._service.environment.has_result:
            return self.final
        async with self._line.spot():
            for again in (self._service.rebuilds, False):  # a world that has gone is built anew, once
                held, limit = await self.world(), self._service.limits.result_s
                try:
                    told = await self._ask(held, limit, "result", held.world.result)
                    self.final = None if told is None else dict(plain(told))
                    break
                except (*_FAILURES, TypeError, ValueError) as error:
                    if not (again and isinstance(error, ToolUnavailable) and error.retryable):
                        raise self._failure("no_result", str(error)) from error
                    self.discard("its result was not to be had")
        return self.final

    def end(self, why: str) -> None:
        """Retire the world once all that was asked before is done."""
        spot = self._line.spot()

        async def ended() -> None:
            async with spot:
                self.discard(why)

        self._tree.spawn(ended(), spot)

    def discard(self, why: str) -> None:
        """Do without this world; the next action has another one built."""
        if self._held is not None:
            self._service.retire(self._held, why)
            self._held = None

    def state(self, places: Sequence[int]) -> dict[str, Any]:
        """As JSON; ``places``: of the journal's entries (:class:`.Book`)."""
        return {
            "branch": self.branch,
            "parent": self.parent,
            "journal": list(places),
            "seed": self._seed,
            "attempt": self.attempt,
            "final": self.final,
        }

    async def world(self) -> Held:
        """The world where the journal ends.  Raises :class:`WorldFailed`."""
        if self._fault is not None:
            raise self._fault
        if self._held is None:
            self._held = await self._built()
        return self._held

    # An action

    async def _act(self, calls: tuple[Acted, ...], text: str) -> Observation:
        tries, rebuilt = 0, False
        service, limits = self._service, self._service.limits
        name = f"The tool {calls[0].tool!r}" if calls else "The environment"
        repeatable = self._repeatable(calls)
        while True:
            held = await self.world()
            try:
                answer = await self._step(held, calls, text, len(self.journal), self._seed)
            except CallRefused as refusal:  # it has changed nothing
                return Observation.of(f"{name} refused the call: {refusal}", ToolStatus.REJECTED)
            except Undone as undone:
                return self._without(f"{undone.text}\n", undone.status)
            except TooLate:
                service.counts["timeouts"] += 1
                late = f"{name} did not answer within {limits.step_s:g} s. "
                return self._without(late, ToolStatus.TIMEOUT)
            except ToolUnavailable as error:
                safe = repeatable or not error.delivered
                if error.retryable and safe and tries < limits.retries:
                    tries += 1
                elif not safe and service.rebuilds:
                    self.discard("an action may have been made")
                    if rebuilt or not error.retryable:
                        return _unavailable(name, "The state is as before the call.")
                    rebuilt = True
                else:
                    sent = "" if safe else "The call may have taken effect; it was not sent again."
                    return _unavailable(name, sent)
                service.counts["retries"] += 1
                await asyncio.sleep(BACKOFF_S * 2 ** max(tries - 1, 0))
                continue
            service.counts["steps"] += 1
            taken = min(held.caller.took_s, limits.step_s)  # waiting for a place is not what it takes
            self.journal = (*self.journal, Entry(calls, text, answer, taken, self._seed))
            self._seed = None
            return answer

    def _without(self, what: str, status: ToolStatus) -> Observation:
        """The answer to an action that left the world in no known state: the next one is built without it."""
        self.discard("an action left it in no known state")
        if not self._service.rebuilds:
            raise self._failure("world_lost", what)
        return Observation.of(f"{what}The state is as before the call.", status)

    def _repeatable(self, calls: Sequence[Acted]) -> bool:
        environment = self._service.environment
        if environment.effects == Effects.NONE:
            return True
        return bool(calls) and all(self.tools[call.tool].repeatable for call in calls)

    async def _step(
        self, held: Held, calls: tuple[Acted, ...], text: str, step: int, seed: int | None
    ) -> Observation:
        """One action in a world.  An error of the author's is an answer: the next world has it as well."""
        limit = self._service.limits.step_s
        action = Action(copy.deepcopy(calls), text, self._ids(step), limit)  # the author's to keep
        if seed is not None:
            await self._told_seed(held, seed)
        try:
            return checked(await self._ask(held, limit, "step", held.world.step, action))
        except (Raised, CannotFork) as error:
            what = f"The tool {calls[0].tool!r}" if calls else "The environment"
            role = "tool" if calls else "user"
            return Observation.of(f"{what} failed: {error}", ToolStatus.ERROR, role)
        except WorldFailed as error:
            raise self._known(error) from error

    async def _told_seed(self, held: Held, seed: int) -> None:
        try:
            await self._ask(held, self._service.limits.step_s, "reseed", held.world.reseed, seed)
        except Raised as error:
            raise self._failure("world_lost", f"reseed: {error}") from error

    async def _ask(self, held: Held, deadline_s: float, what: str, function: Any, *arguments: Any) -> Any:
        """As :meth:`EnvironmentService.ask`; a world that may still be at work is not used again."""
        with self._given_up(held, what):
            return await self._service.ask(held.caller, deadline_s, what, function, *arguments)

    @contextmanager
    def _given_up(self, held: Held, what: str) -> Generator[None]:
        """Discard the world if the block, which asks it something, does not wait for the answer."""
        try:
            yield
        except (asyncio.CancelledError, TooLate):
            if held is self._held:
                self.discard(f"{what} was given up")
            raise

    # Where a world comes from

    async def _built(self) -> Held:
        service, retries = self._service, self._service.limits.retries
        if self.attempt and not service.rebuilds:
            raise self._failure("world_lost", "the environment has no way to build it again")
        if self.attempt:
            service.counts["rebuilt"] += 1
        for attempt in range(retries + 1):
            try:
                return await self._opened(None)
            except (TooLate, ToolUnavailable) as why:
                if attempt == retries:
                    raise self._failure("world_lost" if self.journal else "open_failed", str(why)) from why
                service.counts["retries"] += 1
                await asyncio.sleep(BACKOFF_S * 2**attempt)
            except (Raised, CallRefused, CannotFork, Undone) as error:
                raise self._failure("open_failed", str(error)) from error
            except WorldFailed as error:
                raise self._known(error) from error
        raise AssertionError("unreachable: the last attempt raises")

    async def _opened(self, saved: Any) -> Held:
        """A world from ``saved``, or a new one in which the journal was done again."""
        tree, limits = self._tree, self._service.limits
        prompt = copy.deepcopy(tree.prompt)  # this world's to change
        start = Start(self._ids(len(self.journal)), prompt, tree.seed, limits.open_s, saved)
        self.attempt += 1
        held = await self._service.opened(start)
        try:
            if saved is None:
                await self._replay(held)
        except BaseException:
            self._service.retire(held, "it did not come to where it should")
            raise
        return held

    async def _replay(self, held: Held) -> None:
        normalise = self._service.normalised
        before, now = self._tree.opening, held.opening
        if before is not None and normalise(before) != normalise(now):
            self._diverged(0, f"the opening was {before!r:.300}, now {now!r:.300}")
        for step, entry in enumerate(self.journal):
            try:
                answer = await self._step(held, entry.calls, entry.text, step, entry.seed)
            except Undone as undone:
                self._diverged(step + 1, f"this time it was not done: {undone.text:.300}")
            if found := difference(entry.answer, answer, normalise):
                self._diverged(step + 1, found)

    def _diverged(self, step: int, found: str) -> NoReturn:
        raise self._failure("replay_diverged", f"step {step}: {found}")

    async def _come(self, parent: BranchSession, at: int, mine: Spot, its: Spot | None) -> None:
        """Bring the world of a fork to be.  What fails stands in the session's fault."""
        try:
            async with mine:
                if its is not None:
                    async with its:
                        if len(parent.journal) != at:
                            raise ForkTooLate(f"{self._ids(at)}: its parent is at step {len(parent.journal)}")
                        given = await self._copied(parent)
                    if isinstance(given, Held):
                        self._held = given
                    elif given is not None:  # the second is held until then: files may go with it
                        self._held = await self._from_saved(given[0])
                    if self._held is not None:
                        self._service.counts[f"forks_{self._service.environment.forks}"] += 1
                        return
                await self.world()
                self._service.counts["forks_replay"] += 1
        except WorldFailed as error:
            self._known(error)
        except ForkTooLate as error:
            self._fault = error
        except _FAILURES as error:
            self._fault = self._failure("fork_failed", str(error))

    async def _copied(self, parent: BranchSession) -> Held | tuple[Any, Any] | None:
        """A copy of the parent's world, or one of what it saved, and that itself; None: neither, counted."""
        held, kind, limit = parent._held, self._service.environment.forks, self._service.limits.fork_s
        if held is None:
            return None
        try:
            if kind == ForkKind.SNAPSHOT:
                saved = await parent._ask(held, limit, "save", held.world.save)
                return await parent._ask(held, limit, "the copy of what save() gave", apart, saved), saved
            ids = self._ids(len(self.journal))
            with parent._given_up(held, "its copy"):
                made = await self._service.world(held.caller, limit, "fork", held.world.fork, ids)
        except _FAILURES as error:
            self._service.counts["forks_refused"] += 1
            if not self._service.rebuilds:
                raise self._failure("fork_failed", str(error)) from error
            return None
        except WorldFailed as error:
            raise self._known(error) from error
        self.attempt += 1
        return made

    async def _from_saved(self, saved: Any) -> Held | None:
        """None: it cannot be opened, and is replayed."""
        try:
            return await self._opened(saved)
        except (*_FAILURES, WorldFailed):
            self._service.counts["forks_refused"] += 1
            if not self._service.rebuilds:
                raise
            return None

    def _ids(self, step: int) -> Ids:
        tree, service = self._tree, self._service
        return Ids(service.run, service.purpose, tree.tree, self.branch, self.parent, self.attempt, step)

    def _failure(self, reason: str, detail: str) -> WorldFailed:
        """The end of this session, counted."""
        self._service.counts[reason] += 1
        self._fault = WorldFailed(reason, f"{self._ids(len(self.journal))}: {detail}")
        return self._fault

    def _known(self, error: WorldFailed) -> WorldFailed:
        """``error`` as the end of this session, counted once."""
        return error if error is self._fault else self._failure(error.reason, error.detail)


def _label(key: Sequence[int]) -> str:
    return ".".join(map(str, key))


def _unavailable(name: str, more: str) -> Observation:
    return Observation.of(f"{name} is not available at the moment. {more}".rstrip(), ToolStatus.UNAVAILABLE)
