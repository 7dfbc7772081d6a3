"""Conversations of any shape, continued, retold and mixed: what is recorded is what was asked and sampled."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from agent_models import ADD, CLOSE, DONE, END, LOOK, OPEN, SAY, THINK, THOUGHT, WONDER, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from system.agents.forest import Forest
from system.agents.mapping import RequestMap
from system.agents.messages import ChatRequest, FunctionCall, NormalMessage, normalised
from system.engine.protocol import Chunk
from system.rollout.codec import ChatCodec
from system.tree.record import Kind


@functools.cache
def codec() -> ChatCodec:
    return ChatCodec(make_tokenizer())


CALLS = (FunctionCall("add", '{"a":1,"b":2}', "i1"), FunctionCall("look", '{"word":"ü"}', "i2"))
# What the model says, and how it is handed out.
TURNS: list[tuple[str, NormalMessage]] = [
    (DONE + END, NormalMessage("assistant", DONE)),
    (
        "An" + "swer",
        NormalMessage("assistant", "Answer"),
    ),  # cut, and in other tokens than its text would make
    (f"{THINK}{WONDER}{THOUGHT}{DONE}{END}", NormalMessage("assistant", DONE, (), "What may it be?")),
    (f"{SAY}{OPEN}{ADD}{CLOSE}{OPEN}{LOOK}{CLOSE}{END}", NormalMessage("assistant", SAY.strip(), CALLS)),
]


def turn_of(line: str, rng: np.random.Generator) -> Chunk:
    """``line`` in tokens, some of them spelled in bytes: as a model may sample it, and no tokenizer would."""
    tokenizer = codec().tokenizer
    ids: list[int] = []
    for token in tokenizer.encode(line):
        text = tokenizer.decode([token])
        spelled = tokenizer.encode(text[:1]) + tokenizer.encode(text[1:])
        words = text != END and rng.random() < 0.5
        ids += spelled if words and tokenizer.decode(spelled) == text else [token]
    tokens = np.asarray(ids, np.int32)
    scores = rng.normal(size=tokens.size).astype(np.float32)
    return Chunk(tokens, scores, -scores, np.full(tokens.size, int(rng.integers(9)), np.int32))


def habit(message: NormalMessage, which: int) -> NormalMessage:
    """``message`` as a client sends it back."""
    if message.role != "assistant" or which == 0:
        return message
    if which == 1:  # without its thoughts
        return NormalMessage(message.role, message.text, message.calls)
    if which == 2:  # retold
        return NormalMessage("assistant", f"{message.text} I called {len(message.calls)}.")
    return NormalMessage(message.role, f"{message.text}\n", message.calls, message.reasoning)


@settings(max_examples=60)
@given(st.data())
def test_what_is_recorded_is_what_was_asked_and_sampled(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    requests = RequestMap(codec())
    histories: list[tuple[NormalMessage, ...]] = [(NormalMessage("user", "?"),)]
    ends: dict[tuple[NormalMessage, ...], int] = {}  # where a history's newest answer stands, as given
    asked: list[tuple[list[int], Chunk]] = []
    for _ in range(data.draw(st.integers(1, 8))):
        history = data.draw(st.sampled_from(histories))
        which = data.draw(st.integers(0, 3))
        told = tuple(habit(message, which) for message in history)
        request = ChatRequest(normalised(told))
        before = snapshot(requests.forest)
        place = requests.place(request)
        prompt = requests.prompt(place)
        assert place.size == prompt.size
        if which != 2 and history in ends:  # told as it was given, or near enough: its own tokens stand
            exact = requests.forest.tokens(ends[history]).tolist()
            assert prompt[: len(exact)].tolist() == exact
            assert place.turn == ends[history]
        line, said = data.draw(st.sampled_from(TURNS))
        turn = turn_of(line, rng)
        piece = requests.commit(place, turn)
        requests.given(request, place, piece, said)
        asked.append((prompt.tolist(), turn))
        assert snapshot(requests.forest)[: len(before)] == before  # nothing was changed
        behind: list[NormalMessage] = [
            NormalMessage("tool", f"{i} {END}", call_id=call.id) for i, call in enumerate(said.calls)
        ]
        longer = (*told, said, *(behind or [NormalMessage("user", "Go on.")]))
        histories.append(longer)
        # Of two answers that read alike, the newer one is meant.
        for known in [old for old in ends if alike(old, longer)]:
            del ends[known]
        ends[longer] = piece
    check(requests.forest, asked)


def alike(one: tuple[NormalMessage, ...], other: tuple[NormalMessage, ...]) -> bool:
    return [message.key for message in one] == [message.key for message in other]


def snapshot(forest: Forest) -> list[Any]:
    return [(one.parent, one.kind, one.tokens.tolist(), one.logprob.tolist()) for one in forest.pieces]


def check(forest: Forest, asked: list[tuple[list[int], Chunk]]) -> None:
    """Each turn is there once, behind what was asked; everything else was told."""
    turns = [i for i, piece in enumerate(forest.pieces) if piece.kind == Kind.MODEL]
    assert len(turns) == len(asked)
    for i, (prompt, turn) in zip(turns, asked, strict=True):
        piece = forest.pieces[i]
        assert forest.tokens(piece.parent).tolist() == prompt
        for name in ("tokens", "logprob", "entropy", "version"):
            assert getattr(piece, name).tolist() == getattr(turn, name).tolist()
    assert all(forest.pieces[end].kind == Kind.MODEL for end in forest.ends())
