"""From requests to places in a session's forest.

A request is mapped by meaning first: where its messages begin as a conversation of this session did, up to
an answer that was given, that answer's own tokens stand for it, and what comes behind it is appended.  Where
the agent has rewritten what was said, its request is rendered as a whole, and goes on from the deepest piece
whose tokens it repeats.  Nothing that was sampled is ever made tokens again, or taken away.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from system.agents.forest import AgentCall, Forest
from system.agents.messages import ChatRequest, FunctionCall, NormalMessage, Refusal
from system.agents.model import Rendering
from system.engine.protocol import Chunk
from system.rollout.codec import TemplateRefused
from system.tree.record import Int32, Kind


class RequestPlace(NamedTuple):
    """Where a request goes on."""

    piece: int  # -1: nowhere
    told: Int32  # tokens behind it
    size: int  # tokens from the start of the chain to the end of ``told``
    turn: int  # the newest answer on the way, as it was given; -1: none, the request was rendered as a whole
    fresh: tuple[NormalMessage, ...]  # the messages that are told behind that answer


@dataclass(frozen=True, slots=True)
class _Given:
    """An answer that was given."""

    piece: int
    before: int  # the answer before it in its conversation; -1: none
    reasoning: str


class RequestMap:
    """A session's forest, and which messages stand for which of its pieces."""

    def __init__(self, rendering: Rendering) -> None:
        self.forest = Forest()
        self.calls: list[AgentCall] = []
        self._rendering = rendering
        self._given: defaultdict[bytes, list[_Given]] = defaultdict(list)  # by the messages up to it
        self._made: dict[str, FunctionCall] = {}  # by id

    def place(self, request: ChatRequest) -> RequestPlace:
        """Where ``request`` goes on.  Raises :class:`.Refusal` for messages that cannot be rendered."""
        number, turn = self._newest(request)
        fresh = request.messages[number:]
        rendered = [message.rendered() for message in fresh]
        if turn >= 0 and not any(message.role == "assistant" for message in fresh):
            path = self.forest.tokens(turn)
            ended = int(path[-1]) in self._rendering.ends
            try:
                told = self._rendering.increment(rendered, ended=ended, tools=request.tools)
            except TemplateRefused:  # no exact form behind a turn: it has one as part of the whole
                pass
            else:
                return RequestPlace(turn, told, path.size + told.size, turn, fresh)
        try:
            whole = self._rendering.prompt(
                [message.rendered() for message in request.messages], request.tools
            )
        except TemplateRefused as refused:
            raise Refusal(400, f"messages: {refused}", field="messages") from refused
        piece, size = self._deepest(whole)
        return RequestPlace(piece, whole[size:], whole.size, -1, ())

    def prompt(self, place: RequestPlace) -> Int32:
        """All tokens [P] of a request at ``place``."""
        before = self.forest.tokens(place.piece) if place.piece >= 0 else np.empty(0, np.int32)
        return np.concatenate([before, place.told])

    def commit(self, place: RequestPlace, turn: Chunk) -> int:
        """Add the model's ``turn`` and what it answers; the turn's piece, which is not trained on so far."""
        above = self._told(place)
        return self.forest.add_turn(
            above, turn.tokens, turn.logprob, turn.entropy, turn.version, trained=False
        )

    def given(self, request: ChatRequest, place: RequestPlace, piece: int, message: NormalMessage) -> None:
        """From now on ``message`` behind those of ``request`` stands for ``piece``."""
        known = ChatRequest((*request.messages, message), request.tools)
        self._given[known.prefixes()[-1]].append(_Given(piece, place.turn, message.reasoning))
        self._made |= {call.id: call for call in message.calls}

    def _newest(self, request: ChatRequest) -> tuple[int, int]:
        """How many messages, up to the newest answer of ours that they lead to; and that answer's piece.

        Of several answers that read alike, one that what comes behind was said to is meant, then the newest.
        """
        prefixes = request.prefixes()
        number = 0
        meant = {-1}
        for i, message in enumerate(request.messages, 1):
            if message.role != "assistant":
                continue
            same = {
                one.piece
                for one in self._given.get(prefixes[i], ())
                if message.reasoning.strip() in ("", one.reasoning.strip()) and one.before in (meant | {-1})
            }
            if same:
                number, meant = i, same
        return number, max(meant)

    def _deepest(self, tokens: Int32) -> tuple[int, int]:
        """The deepest piece on the way of ``tokens`` [P], and how many of them stand up to its end."""
        best: tuple[int, int] = (-1, 0)
        waiting: list[tuple[int, int]] = [best]
        while waiting:
            piece, begin = waiting.pop()
            for child in self.forest.children(piece):
                own = self.forest.pieces[child].tokens
                end = begin + own.size
                if end <= tokens.size and np.array_equal(own, tokens[begin:end]):
                    waiting.append((child, end))
                    best = max(best, (child, end), key=lambda found: found[1])
        return best

    def _told(self, place: RequestPlace) -> int:
        """The piece that the answer to a request at ``place`` hangs below."""
        if not place.told.size:
            return place.piece
        for child in self.forest.children(place.piece):
            one = self.forest.pieces[child]
            if one.kind == Kind.TOOL and np.array_equal(one.tokens, place.told):
                return child  # another request, at the same time or before, said the same
        piece = self.forest.add_context(place.piece, place.told)
        for message in place.fresh:
            call = self._made.get(message.call_id.rpartition("_")[2])
            if message.role == "tool" and call is not None:
                self.calls.append(AgentCall(piece, call.name, _object(call.arguments), message.text))
        return piece


def _object(arguments: str) -> dict[str, Any]:
    return json.loads(arguments)
