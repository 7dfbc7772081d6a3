"""What goes wrong in one tree stays there: a branch without a score, or a failure with a name."""

from __future__ import annotations

import asyncio
import json
import pickle
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_fakes import PROMPT, Segment, World, make_world, ok

from actors.rollout import RolloutWorker
from system.config import ConfigError, ToolsConfig
from system.engine.protocol import Chunk, EngineError, EngineLost, GenerateRequest
from system.engine.stream import EventSplitter, StreamReader
from system.rollout.branching import EntropyUnknown, Random
from system.rollout.failure import RolloutFailed
from system.rollout.guard import one_tree
from system.rollout.tree_rollout import TreeRollout
from system.tools.outcome import CallContext, ToolOutcome, ToolSpec, ToolStatus
from system.tools.service import Patience, ToolService
from system.tools.tool import ToolUnavailable
from system.tree.prompt import Prompt
from system.tree.record import Kind, Mishap, Outcome, Tree, validate
from system.tree.stats import TreeStats
from system.twin.clock import run

CALL, ANSWER = "<search> a query </search>", "<answer> \\boxed{ me } </answer>"
VOCAB = 100


def one_call(text: str, rng: np.random.Generator) -> Segment:
    return Segment(ANSWER if "<result>" in text else CALL)


def grown(world: World, prompt: Prompt = PROMPT) -> Tree:
    """As a worker does it."""
    with one_tree(prompt.id):
        tree = run(TreeRollout(world.context, prompt, seed=1).run())
        TreeStats.of(tree)
        return tree


# A worker's errors --------------------------------------------------------------------------------


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


@pytest.mark.parametrize(
    ("error", "reason", "detail"),
    [
        (TypeError("a \ud83d\x1b[2J b"), "TypeError", "TypeError: a \ufffd [2J b (test_misfortune.py:"),
        (Mute(), "Mute", "Mute (test_misfortune.py:"),
        (RecursionError(), "RecursionError", "RecursionError (test_misfortune.py:"),
    ],
    ids=["hostile", "mute", "recursion"],  # a lone surrogate in a test's name ends pytest-xdist
)
def test_an_error_that_nobody_expected_is_a_failure_with_a_name(
    error: Exception, reason: str, detail: str
) -> None:
    with pytest.raises(RolloutFailed) as failed, one_tree("p"):
        raise error
    sent = pickle.loads(pickle.dumps(failed.value))
    assert (sent.prompt_id, sent.reason, sent.blameless) == ("p", reason, False)
    assert sent.detail.startswith(detail)


@pytest.mark.parametrize(
    "error",
    [EntropyUnknown("no entropies"), ConfigError("reward"), RolloutFailed("p", "deadline", "")],
)
def test_what_is_the_same_for_every_tree_is_not_one_trees_failure(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, one_tree("p"):
        raise error
    assert raised.value is error


class BadPolicy(Random):
    def decide(self, *_: Any) -> Any:
        raise IndexError("a bug in the policy")


def test_a_policy_with_a_bug_fails_its_tree_and_no_branch_is_left() -> None:
    world = make_world(one_call, policy=BadPolicy(4, 1.0), leaves=4, roots=2)
    with pytest.raises(RolloutFailed, match=r"IndexError: a bug in the policy \(test_misfortune.py"):
        grown(world)
    assert world.engine.running == 0


def test_a_worker_leaves_out_a_snapshot_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(one_call, leaves=2, roots=2)
    worker = RolloutWorker.__new__(RolloutWorker)

    async def grow_both() -> tuple[list[int], dict[int, bytes]]:
        good, bad = (TreeRollout(world.context, PROMPT, seed=1, ticket=n) for n in (0, 1))
        bad.mishaps = [Mishap("tool", object())]  # type: ignore[arg-type]  # JSON cannot hold it
        worker._growing = {0: good, 1: bad}
        found = await worker.snapshots()
        assert bad.mishaps[-1].kind == "snapshot"
        return found

    tickets, frozen = run(grow_both())
    assert tickets == [0]
    assert frozen.keys() == {0}


class Bounded:
    """An engine that refuses what its context cannot hold, as real ones do."""

    def __init__(self, engine: Any, context: int) -> None:
        self.engine, self.context = engine, context

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        if request.input_ids.size + request.sampling.max_new_tokens > self.context:
            raise EngineError("too many tokens")
        async with aclosing(self.engine.generate(request)) as chunks:
            async for chunk in chunks:
                yield chunk


def bounded(context: int, **config: Any) -> World:
    world = make_world(one_call, leaves=4, roots=2, **config)
    engine = Bounded(world.engine, context)
    return replace(world, context=replace(world.context, engine=engine, max_context=context))


def longest(tree: Tree) -> int:
    sizes = tree.end - tree.start
    return max(int(sizes[tree.path(leaf)].sum()) for leaf in range(tree.n_leaves))


@pytest.mark.parametrize("taken", range(1, 14))
def test_a_branch_ends_where_the_engines_context_does(taken: int) -> None:
    """Wherever that is: in what the model writes, in a tool's answer, or between the two."""
    whole = grown(bounded(1000))
    asked = bounded(1000).context.encode_prompt(PROMPT).size
    assert longest(whole) > asked + 13
    tree = grown(bounded(asked + taken))
    validate(tree)
    assert longest(tree) == asked + taken
    assert set(tree.outcome.tolist()) == {Outcome.LENGTH}


@pytest.mark.parametrize("missing", [0, 1])
def test_a_question_that_leaves_no_room_is_a_failure_with_a_name(missing: int) -> None:
    asked = bounded(1000).context.encode_prompt(PROMPT).size
    says = (
        rf"prompt_too_long: {asked} tokens, and engine\.max_context leaves room for {asked - missing}: raise"
    )
    with pytest.raises(RolloutFailed, match=says):
        grown(bounded(asked - missing))


# What an engine answers ---------------------------------------------------------------------------

Change = Callable[[int, int, dict[str, Any]], Any]
"""(number of the request, number of its message, message) -> what is sent instead."""


class Wire:
    """A scripted engine whose answers travel as SGLang sends them, and may be changed on their way."""

    def __init__(self, world: World, change: Change) -> None:
        self.engine, self.change, self.requests = world.engine, change, 0

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        number, self.requests = self.requests, self.requests + 1
        reader, splitter, total, messages = StreamReader(vocab=VOCAB), EventSplitter(), 0, 0
        async with aclosing(self.engine.generate(request)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                total += len(chunk.tokens)
                message = self.change(number, messages, sent(chunk, total))
                messages += 1
                for read in splitter.feed(b"data: " + json.dumps(message).encode() + b"\n\n"):
                    yield reader.read(read)[0]


def sent(chunk: Chunk, total: int) -> dict[str, Any]:
    ids, logprob = chunk.tokens.tolist(), chunk.logprob.tolist()
    return {
        "text": "",
        "output_ids": ids,
        "meta_info": {
            "completion_tokens": total,
            "output_token_logprobs": [
                [value, token, None] for value, token in zip(logprob, ids, strict=True)
            ],
            "entropy": chunk.entropy.tolist(),
            "weight_version": "7",
            "weight_versions": [{"version": "7", "start": 0, "end": total}],
            "cached_tokens": 0,
            "finish_reason": None
            if chunk.finish is None
            else {"type": chunk.finish.type, "matched": chunk.finish.matched},
        },
    }


def wired(change: Change, **config: Any) -> World:
    world = make_world(one_call, policy=Random(4, 0.0), vocab_size=VOCAB, **config)
    return replace(world, context=replace(world.context, engine=Wire(world, change)))


def put(*path: Any, value: Any) -> Callable[[dict[str, Any]], Any]:
    """Sets what stands at ``path`` in a message."""

    def change(message: dict[str, Any]) -> dict[str, Any]:
        at: Any = message
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        return message

    return change


def token(value: Any) -> Callable[[dict[str, Any]], Any]:
    """One token, in both places that name it."""

    def change(message: dict[str, Any]) -> dict[str, Any]:
        message["output_ids"][0] = message["meta_info"]["output_token_logprobs"][0][1] = value
        return message

    return change


META = "meta_info"
LOGPROB = (META, "output_token_logprobs", 0, 0)


@pytest.mark.parametrize(
    ("field", "spoil"),
    [
        ("output_token_logprobs", put(*LOGPROB, value=None)),
        ("output_token_logprobs", put(*LOGPROB, value=0.5)),
        ("output_token_logprobs", put(*LOGPROB, value=-1e300)),
        ("not JSON", put(*LOGPROB, value=float("nan"))),
        ("values for", put(META, "output_token_logprobs", value=[])),
        ("output_ids", token(-1)),
        ("output_ids", token(999_999)),
        ("output_ids", token(2**40)),
        ("different tokens", put("output_ids", 0, value=5)),
        ("entropy", put(META, "entropy", 0, value=-5)),
        ("entropy", put(META, "entropy", 0, value=99)),
        ("entropy", put(META, "entropy", 0, value=None)),
        ("values for", put(META, "entropy", value=[1.0] * 50)),
        ("weight_version", put(META, "weight_version", value="-1")),
        ("weight_version", put(META, "weight_version", value=10**12)),
        ("weight_version", put(META, "weight_versions", 0, "version", value="one")),
        ("weight_version", put(META, "weight_versions", 0, "end", value=1)),  # 7, then 6
        ("cached_tokens", put(META, "cached_tokens", value=-3)),
        ("ends at token", put(META, "completion_tokens", value=10**9)),
        ("meta_info", put(META, value=None)),
        ("finish reason", put(META, "finish_reason", value={"type": "tired"})),
    ],
)
def test_a_reply_that_cannot_be_ends_its_branch_and_names_the_field(
    field: str, spoil: Callable[[dict[str, Any]], Any]
) -> None:
    def change(request: int, number: int, message: dict[str, Any]) -> Any:
        if request:
            return message
        if field == "weight_version":
            message[META]["weight_version"] = "6"
        return spoil(message)

    tree = grown(wired(change, leaves=4, roots=4))
    assert Counter(Outcome(o) for o in tree.outcome) == {Outcome.STOPPED: 3, Outcome.ENGINE_ERROR: 1}
    ((kind, text),) = TreeStats.of(tree).mishaps
    assert kind == "engine"
    assert field in text


def test_a_lost_engine_is_not_the_prompts_fault() -> None:
    class Gone:
        async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
            raise (EngineLost if request.route.endswith("0") else EngineError)("connection refused")
            yield

    world = make_world(one_call, leaves=2, roots=2)
    context = replace(world.context, engine=Gone())
    for ticket, reason, blameless in ((0, "engine lost", True), (1, "engine_error", False)):
        with pytest.raises(RolloutFailed, match="connection refused") as failed:
            run(TreeRollout(context, PROMPT, seed=1, ticket=ticket).run())
        assert (failed.value.reason, failed.value.blameless) == (reason, blameless)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-5, 2**70)
    | st.floats()
    | st.sampled_from(["", "7", "-1", "stop", "default", "\x00"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)
PLACES = st.sampled_from(
    [
        *(("text",), ("output_ids",), ("output_ids", 0), (META,), ("error",), LOGPROB, (*LOGPROB[:-1], 1)),
        *(
            (META, name)
            for name in ("completion_tokens", "output_token_logprobs", "entropy", "finish_reason")
        ),
        *((META, name) for name in ("weight_version", "weight_versions", "cached_tokens")),
        *((META, "weight_versions", 0, name) for name in ("version", "start", "end")),
        *((META, "entropy", 0), (META, "output_token_logprobs", 0)),
        *((META, "output_token_sampling_logprobs"), (META, "finish_reason")),
    ]
)


@settings(max_examples=60, deadline=None)
@given(place=PLACES, value=VALUES, request=st.integers(0, 5), at=st.integers(0, 2))
def test_sixty_engine_streams(place: tuple[Any, ...], value: Any, request: int, at: int) -> None:
    """Each ends as a tree that holds: the branch that was told nonsense is unscored, and its cause kept."""

    def change(number: int, message_number: int, message: dict[str, Any]) -> Any:
        return put(*place, value=value)(message) if (number, message_number) == (request, at) else message

    tree = grown(wired(change, leaves=4, roots=4))
    validate(tree)
    errors = int((tree.outcome == Outcome.ENGINE_ERROR).sum())
    assert [kind for kind, _ in TreeStats.of(tree).mishaps] == ["engine"] * errors
    json.dumps(tree.meta, allow_nan=False)


# What a tool answers ------------------------------------------------------------------------------


class Saying:
    """A tool that returns, or raises, what it is given."""

    spec = ToolSpec("search", "", {"type": "object"}, "query")

    def __init__(self, reply: Any) -> None:
        self.reply = reply

    async def run(self, arguments: Mapping[str, Any], context: CallContext) -> ToolOutcome:
        if isinstance(self.reply, BaseException):
            raise self.reply
        return self.reply

    async def check(self) -> None: ...


def tree_with_tool(reply: Any) -> tuple[World, Tree]:
    world = make_world(one_call, policy=Random(4, 0.0), leaves=2, roots=2)
    service = ToolService([Saying(reply)], ToolsConfig(retries=0), patience=Patience(backoff_s=0.01))
    world = replace(world, context=replace(world.context, tools=service))
    return world, grown(world)


@pytest.mark.parametrize(
    ("reply", "status", "text"),
    [
        (ToolOutcome(ToolStatus.OK, "fox \ud83d"), "ok", "fox \ufffd"),
        (ToolOutcome(ToolStatus.OK, None), "ok", "<result>\n\n</result>"),  # type: ignore[arg-type]
        (ToolOutcome(ToolStatus.OK, 42), "ok", "42"),  # type: ignore[arg-type]
        (ToolOutcome(ToolStatus.OK, b"caf\xc3\xa9"), "ok", "café"),  # type: ignore[arg-type]
        (ToolOutcome("ok", "plain"), "ok", "plain"),  # type: ignore[arg-type]
        (ToolOutcome("fine", "plain"), "error", "ValueError"),  # type: ignore[arg-type]
        ("only a text", "error", "it returned a str, not a ToolOutcome"),
        (None, "error", "it returned a NoneType"),
        (KeyError("\udcff"), "error", "KeyError"),
        (Mute(), "error", "failed: Mute"),
        (SystemExit(3), "error", "SystemExit: 3"),
        (KeyboardInterrupt(), "error", "KeyboardInterrupt"),
        (asyncio.CancelledError("mine"), "error", "CancelledError: mine"),
    ],
)
def test_what_a_tool_says_is_text(reply: Any, status: str, text: str) -> None:
    world, tree = tree_with_tool(reply)
    assert {call.status for call in tree.calls} == {status}
    (node, *_) = np.flatnonzero(tree.kind == Kind.TOOL)
    read = world.text(tree.tokens[tree.start[node] : tree.end[node]])
    assert text in read
    assert TreeStats.of(tree).mishaps == ()


TEXTS = st.text(st.characters() | st.characters(categories=["Cs"]), max_size=20)
REPLIES = st.one_of(
    st.builds(
        ToolOutcome,
        st.sampled_from([*ToolStatus, "ok", "fine", None, 3]),
        TEXTS | SCALARS | st.binary(max_size=9) | st.lists(TEXTS, max_size=2),
    ),
    SCALARS | TEXTS,
    st.builds(lambda kind, text: kind(text), st.sampled_from([KeyError, OSError, ToolUnavailable]), TEXTS),
    st.sampled_from(
        [Mute(), SystemExit(), KeyboardInterrupt(), RecursionError(), UnicodeError(), asyncio.QueueFull()]
    ),
)


@settings(max_examples=60, deadline=None)
@given(reply=REPLIES)
def test_sixty_tool_replies(reply: Any) -> None:
    """Each is a result that the model reads, with a status that is counted."""
    world, tree = tree_with_tool(reply)
    validate(tree)
    assert set(tree.outcome) == {Outcome.STOPPED}
    assert {call.status for call in tree.calls} <= {status.value for status in ToolStatus}
    world.text(tree.tokens).encode()
    assert TreeStats.of(tree).mishaps == ()


def test_a_service_that_breaks_its_promise_is_told() -> None:
    def broken(tool: str, arguments: Mapping[str, Any]) -> tuple[float, ToolOutcome]:
        raise Mute

    tree = grown(make_world(one_call, broken, policy=Random(4, 0.0), leaves=2, roots=2))
    assert {call.status for call in tree.calls} == {"unavailable"}
    assert [kind for kind, _ in TreeStats.of(tree).mishaps] == ["tool", "tool"]


# Questions and records ----------------------------------------------------------------------------


def test_a_question_with_half_a_character_is_asked() -> None:
    prompt = Prompt("p\ud83d", ({"role": "user", "content": "fox \ud83d"},), ("me \ude00",), kind="\udcff")
    assert (prompt.id, prompt.messages[0]["content"], prompt.answers, prompt.kind) == (
        *("p\ufffd", "fox \ufffd", ("me \ufffd",), "\ufffd"),
    )
    world = make_world(one_call, lambda tool, arguments: ok(), leaves=2, roots=2)
    assert grown(world, prompt).prompt_id == "p\ufffd"


def test_numbers_of_numpy_become_numbers_of_json() -> None:
    world = make_world(one_call, leaves=2, roots=2)
    rollout = TreeRollout(world.context, PROMPT, seed=1)
    rollout.growth.meta["mine"] = {"a": np.float32(1.5), 3: (np.int64(2), np.arange(2))}
    meta = run(rollout.run()).meta
    assert json.loads(json.dumps(meta["mine"])) == {"a": 1.5, "3": [2, [0, 1]]}
    rollout.growth.meta["b"] = {"deep": [object()]}
    with pytest.raises(ValueError, match=r"meta\.b\.deep\[0\]: object is not JSON"):
        rollout.growth.close(0.0)
