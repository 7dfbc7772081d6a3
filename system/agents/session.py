"""One run of an agent, as its endpoint sees it: turns are asked for until it is done."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import uuid
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from system.agents.forest import Episode, trained_ends
from system.agents.generate import write_turn
from system.agents.mapping import RequestMap, RequestPlace
from system.agents.messages import ChatRequest, FunctionCall, NormalMessage, Refusal, canonical, normalised
from system.agents.model import FROZEN, ServedModel
from system.agents.turn import AgentTurn
from system.agents.wire import Answer
from system.awake import AwakeTimer, awake_s
from system.engine.protocol import EngineError, EngineLost, GenerateRequest, Sampling
from system.plugins import PluginError
from system.rollout.codec import TemplateRefused
from system.rollout.scorer import held
from system.rollout.syntax.base import Syntax
from system.text import described
from system.tree.record import Outcome

log = logging.getLogger(__name__)


class AgentSession:
    """Open until its agent is done.  Requests may come side by side."""

    def __init__(
        self,
        model: ServedModel,
        url: str,
        prompt_id: str,
        seed: int,
        *,
        deadline_s: float,
        turns: int = 0,
        temperature: float | None = None,
        trained: Collection[str] = (),
    ) -> None:
        """``turns``: answers of the trained model at most; 0: any number.  ``temperature``: another than the
        model's.  ``trained``: names under which the model is trained; none: all but :data:`FROZEN`.

        Call inside a running event loop.
        """
        self.key = secrets.token_urlsafe(24)  # whoever knows it may use the session, and nothing else
        self.openai_url, self.anthropic_url = f"{url}/s/{self.key}/v1", f"{url}/s/{self.key}"
        self.prompt_id, self.seed = prompt_id, seed
        self.counters: Counter[str] = Counter()
        self.limit: Outcome | None = None  # the rule of ours that the newest request met
        self.when_closed: Callable[[], None] = lambda: None
        # Told of each turn that is recorded: its piece, its request's id, whether it is trained on.
        self.when_recorded: Callable[[int, str, bool], None] = lambda piece, rid, trains: None
        self._closed, self.done = False, asyncio.Event()  # done: the agent says so
        self.failed = ""  # why, where the agent says that it has
        self.result: dict[str, Any] = {}  # that was reported
        self._model, self._turns, self._trained = model, turns, frozenset(trained)
        self._temperature = model.temperature if temperature is None else temperature
        self._deadline_s, self.route = deadline_s, f"{prompt_id}:{uuid.uuid4().hex[:12]}"
        self._map = RequestMap(model.rendering)
        self._rids: dict[int, str] = {}  # by MODEL piece: the request that wrote it
        self._words: dict[bytes, str] = {}  # on tools, by these
        self._said: dict[str, tuple[NormalMessage, ...]] = {}  # by answer: all messages up to it
        self._asked: defaultdict[bytes, list[AgentTurn]] = defaultdict(list)  # by body
        self._working: dict[AgentTurn, bool] = {}  # and whether it counts as a turn
        self._seeds = np.random.Generator(np.random.PCG64(seed))
        self._expiry, self._heard_s = AwakeTimer(deadline_s, self._expire), awake_s()

    def ask(self, request: ChatRequest, digest: bytes, retry: bool) -> AgentTurn:
        """The answer to ``request``, on its way.

        ``digest``: of the body as it was sent; ``retry``: the client says that it sends it again.  Then it
        gets the answer that it did not get, if there is one.  Raises :class:`Refusal`.
        """
        self._refuse_late()
        if retry and (known := [turn for turn in self._asked[digest] if not turn.failed]):
            self.counters["retries"] += 1
            return next((turn for turn in known if not turn.handed_out), known[-1])
        trains = request.model in self._trained if self._trained else request.model != FROZEN
        if trains and self._turns and self.counters["turns"] + sum(self._working.values()) >= self._turns:
            self.limit = Outcome.TURN_LIMIT
            raise Refusal(429, f"the {self._turns} turns of this session are spent", code="turn_limit")
        request = self._whole(request)
        syntax = self._syntax(request)
        request = self._taught(request, syntax)
        place = self._map.place(request)
        room = self._model.max_context - place.size
        if room < 1:
            self.limit = Outcome.LENGTH
            longest = self._model.max_context
            raise Refusal(
                400,
                f"the prompt is too long: {place.size} tokens; this model's maximum context length is "
                f"{longest} tokens, with the answer",
                code="context_length_exceeded",
                field="messages",
            )
        self.limit = None
        anew = place.turn < 0 and place.told.size > 0  # not even the same request once more
        self.counters["rewrites"] += int(anew and bool(self._map.forest.pieces))
        self.counters["tool_choice"] += int(request.forced)
        turn = AgentTurn(uuid.uuid4().hex, place.size)
        self._asked[digest].append(turn)
        self._working[turn] = trains
        work = partial(self._work, turn, request, place, syntax, trains)
        task = turn.begin(self._answered(turn, work))
        task.add_done_callback(lambda _: self._working.pop(turn, None))  # also if it never ran
        return turn

    def count(self, request: ChatRequest) -> int:
        """Tokens of the prompt that ``request`` would make.  Raises :class:`Refusal`."""
        self._refuse_late()
        request = self._whole(request)
        return self._map.place(self._taught(request, self._syntax(request))).size

    def report(self, result: Mapping[str, Any]) -> None:
        """Add to the episode's result: what the agent, or its surroundings, say of it.

        ``reward``, a finite number, and ``correct`` are what they are in an agent's result.  Raises
        :class:`Refusal`.
        """
        self._refuse_late()
        reward = result.get("reward", 0.0)
        if type(reward) not in (int, float) or held(reward) is None:
            raise Refusal(400, "reward: expected a finite number", field="reward")
        if type(result.get("correct", False)) is not bool:
            raise Refusal(400, "correct: expected true or false", field="correct")
        self.result |= result

    def finish(self, failed: str = "") -> None:
        """The agent says that it is done: it is answered no more.  ``failed``: why it could not do its task.

        Raises :class:`Refusal`.
        """
        self._refuse_late()
        self.failed = failed
        self.done.set()
        self._give_up("the session is done")

    def close(self, outcome: Outcome) -> Episode:
        """End it: no request is answered any more, and those on their way are given up.

        ``outcome``: ENDED where the agent finished, ENVIRONMENT where it failed, or another.  Where a limit
        of ours stopped it, that is the outcome.
        """
        if self._closed:
            raise RuntimeError("the session is closed already")
        self._closed = True
        self.when_closed()
        self._expiry.cancel()
        self._give_up("the session is closed")
        if outcome in (Outcome.ENDED, Outcome.ENVIRONMENT) and self.limit is not None:
            outcome = self.limit
        counters = dict(self.counters)
        counters["given_up"] = sum(turn.failed for turns in self._asked.values() for turn in turns)
        forest = self._map.forest
        return Episode(
            key=self.key,
            seed=self.seed,
            prompt_id=self.prompt_id,
            forest=forest,
            outcome=outcome,
            chosen=trained_ends(forest),
            reward=float(self.result.get("reward", math.nan)),
            correct=int(self.result.get("correct", -1)),
            result=dict(self.result),
            calls=self._map.calls,
            rewrites=counters.pop("rewrites", 0),
            retries=counters.pop("retries", 0),
            counters=counters,
        )

    def heard(self) -> None:
        """The agent has been heard of."""
        self._heard_s = awake_s()

    @property
    def quiet_s(self) -> float:
        """Seconds since its newest request, or since the newest answer was there: its turn since then."""
        return 0.0 if self._working else awake_s() - self._heard_s

    # The end

    def _expire(self) -> None:
        self.limit = Outcome.DEADLINE
        self._give_up(self._late())

    def _late(self) -> str:
        return f"the session's {self._deadline_s:g} s are over"

    def _refuse_late(self) -> None:
        self.heard()
        if self._closed or self.done.is_set():
            raise Refusal(409, f"the session is {'closed' if self._closed else 'done'}", code="session_over")
        if self.limit == Outcome.DEADLINE:
            raise Refusal(409, self._late(), code="session_over")

    def _give_up(self, why: str) -> None:
        for turn in list(self._working):
            turn.fail(Refusal(409, why, code="session_over"))

    # One turn

    def _whole(self, request: ChatRequest) -> ChatRequest:
        """``request`` with the messages that it goes on from."""
        if not request.previous:
            return request
        if (before := self._said.get(request.previous)) is None:
            field = "previous_response_id"
            raise Refusal(404, f"{field}: no answer of this session has this id", field=field)
        # What the system was told before is not told again, as OpenAI has it.
        told = before[int(before[0].role == "system") :]
        new = int(request.messages[0].role == "system")
        messages = [*request.messages[:new], *told, *request.messages[new:]]
        return replace(request, messages=normalised(messages))

    def _syntax(self, request: ChatRequest) -> Syntax | None:
        """How the model writes calls of the tools that it is told of."""
        if not request.tools:
            return None
        try:
            syntax = self._model.syntax(request.specs())
        except PluginError as error:
            raise Refusal(400, f"tools: {error}", field="tools") from error
        syntax.several = not self._model.one_call
        return syntax

    def _taught(self, request: ChatRequest, syntax: Syntax | None) -> ChatRequest:
        """``request`` with words on its tools in the system message, where nothing else tells of them."""
        if syntax is None:
            return request
        first = request.messages[0]
        has_system = first.role == "system"
        key = request.prefixes()[int(has_system)]
        if key not in self._words:
            try:
                self._words[key] = self._model.words(first.text if has_system else "", request.tools, syntax)
            except TemplateRefused as refused:
                raise Refusal(400, f"tools: {refused}", field="tools") from refused
        if not (words := self._words[key]):
            return request
        told = [*request.messages[: int(has_system)], NormalMessage("system", words)]
        return replace(request, messages=normalised([*told, *request.messages[int(has_system) :]]))

    async def _answered(self, turn: AgentTurn, work: Callable[[], Awaitable[Answer]]) -> None:
        """Have the answer written; say why there is none, where there is none."""
        try:
            turn.complete(await work())
        except EngineLost as error:
            self.counters["engine_lost"] += 1
            turn.fail(Refusal(503, f"no engine could be reached: {error}", code="engine_lost"))
        except EngineError as error:
            turn.fail(Refusal(500, f"the engine failed: {error}", code="engine_failed"))
        except Exception as error:  # a fault of ours must not leave a client waiting
            log.exception("an answer to the agent of prompt %s failed", self.prompt_id)
            turn.fail(Refusal(500, f"the answer failed: {described(error)}", code="failed"))
        finally:
            self.heard()
            self._working.pop(turn, None)  # now: the client's next request may be here before the task's end

    async def _work(
        self, turn: AgentTurn, request: ChatRequest, place: RequestPlace, syntax: Syntax | None, trains: bool
    ) -> Answer:
        """Generate the answer, and record it now that it is whole."""
        room = self._model.max_context - place.size
        most = min(room, request.max_tokens or room)
        asked = GenerateRequest(
            rid=f"{self.route}:{turn.key}",
            input_ids=self._map.prompt(place),
            sampling=self._sampling(request, most, syntax, trains),
            route=self.route,
            parent=self._rids.get(place.turn, ""),
        )
        whole, written, stopped = await write_turn(self._model, asked, syntax, request.stops, turn.say)
        calls = tuple(
            FunctionCall(call.tool, canonical(call.arguments), uuid.uuid4().hex[:20])
            for call in written.calls
        )
        piece = self._map.commit(place, whole)
        self._rids[piece] = asked.rid
        self.when_recorded(piece, asked.rid, trains)
        said = NormalMessage("assistant", written.text, calls, written.reasoning)
        self._map.given(request, place, piece, said)
        self._said[turn.key] = (*request.messages, said)
        turn.when_handed = lambda out: setattr(self._map.forest.pieces[piece], "trained", out and trains)
        cut = whole.finish is not None and whole.finish.type == "length"
        if cut and most == room:
            self.limit = Outcome.LENGTH
        self.counters["turns" if trains else "frozen_turns"] += 1
        self.counters["malformed"] += int(written.malformed)
        return Answer(
            id=turn.key,
            reasoning=written.reasoning,
            text=written.text,
            calls=calls,
            finish="length" if cut else "calls" if calls else "stop",
            stopped=stopped,
            prompt_tokens=place.size,
            cached_tokens=whole.cached_tokens,
            tokens=whole.tokens.size,
        )

    def _sampling(self, request: ChatRequest, most: int, syntax: Syntax | None, trains: bool) -> Sampling:
        """Ours, for what is trained on; the client's, where nothing is."""
        model = self._model
        temperature, top_p = self._temperature, model.top_p
        if not trains:
            temperature = temperature if request.temperature is None else request.temperature
            top_p = top_p if request.top_p is None else request.top_p
        eos = model.tokenizer.eos_token_id
        return Sampling(
            max_new_tokens=most,
            temperature=temperature,
            top_p=top_p,
            top_k=model.top_k,
            stop=syntax.stops if syntax and model.one_call else (),
            stop_token_ids=tuple(end for end in model.rendering.ends if end != eos),
            seed=int(self._seeds.integers(2**31)),
        )
