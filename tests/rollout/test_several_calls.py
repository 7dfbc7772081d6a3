"""Turns of several calls: what they ask for, who does it when, and what the model reads of it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_fakes import PROMPT, SPECS, Segment, ok
from rollout_fakes import World as Made
from test_template_answers import Talker, Talkers, grown, paths, talking, text, told

from system.config import Config, ConfigError, load
from system.envs.protocol import Action, Environment, ForkKind, Ids, Observation, Start, World
from system.plugins import SYNTAXES
from system.rollout.branching import Never, Random
from system.rollout.chat import make_chat, make_syntax
from system.rollout.planting import planted
from system.rollout.snapshot import freeze, thaw
from system.rollout.syntax.base import MalformedCall, ParsedCall
from system.rollout.tree_rollout import TreeRollout
from system.tools.outcome import ToolStatus
from system.tree.record import Kind, Origin, Outcome, Tree
from system.twin.clock import run

HERMES, CODER, TAGS = (SYNTAXES.make(name, {}, SPECS) for name in ("hermes", "qwen3-coder", "tags"))


def call(name: str, **arguments: str) -> str:
    inner = ", ".join(f'"{key}": "{value}"' for key, value in arguments.items())
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{{inner}}}}}\n</tool_call>'


def search(what: str) -> ParsedCall:
    return ParsedCall("search", {"query": what})


# Syntax


def test_all_calls_of_a_turn_are_read_in_order() -> None:
    said = f"I look.\n{call('search', query='x')}\nAnd:\n{call('python', code='y')}\nDone."
    assert HERMES.calls(said) == [search("x"), ParsedCall("python", {"code": "y"})]
    assert TAGS.calls("a <search> x </search> b <python> y </python> c <search> z") == [
        search("x"),
        ParsedCall("python", {"code": "y"}),
    ]
    one = "<tool_call>\n<function=search>\n<parameter=query>\nx\n</parameter>\n</function>\n</tool_call>"
    assert CODER.calls(one + one) == [search("x")] * 2
    assert HERMES.calls("no call") == []


def test_a_broken_call_spoils_no_other() -> None:
    broken, good = HERMES.calls(f"<tool_call>{{</tool_call>{call('search', query='x')}")
    assert isinstance(broken, MalformedCall)
    assert "not valid JSON" in broken.reason
    assert good == search("x")


def test_what_is_thought_makes_no_call() -> None:
    said = f"<think>\nPerhaps {call('search', query='no')}?\n</think>\n\n{call('search', query='x')}"
    assert HERMES.calls(said) == [search("x")]


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "b c", "é", "<", "tool_call"]), max_size=5))
def test_as_many_calls_as_are_written(queries: list[str]) -> None:
    said = " and ".join(call("search", query=query) for query in queries)
    assert HERMES.calls(said) == [search(query) for query in queries]


def test_what_is_refused_says_what_to_write() -> None:
    syntax = make_syntax(configured("rollout.syntax=hermes"), SPECS, None)
    (refused,) = syntax.calls('<tool_call>[{"name": "a"}, {"name": "b"}]</tool_call>')
    assert isinstance(refused, MalformedCall)
    assert "write each call in <tool_call>" in refused.reason


# Settings


def configured(*words: str) -> Config:
    return load("configs/quickstart.yaml", ["rollout.calls_per_turn=many", *words])


def test_several_calls_need_answers_by_the_template() -> None:
    config = configured("rollout.syntax=hermes", "rollout.answers=syntax")
    world = told("qwen2.5", lambda text, rng: Segment("x"))
    with pytest.raises(ConfigError, match=r"rollout\.calls_per_turn=many: .* set rollout\.answers=template"):
        make_chat(config, world.tokenizer, "", make_syntax(config, SPECS, None))
    config.rollout.answers = "template"
    assert make_chat(config, world.tokenizer, "", make_syntax(config, SPECS, None)).codec is not None
    config.rollout.calls_per_turn, config.rollout.answers = "one", "syntax"
    assert make_chat(config, world.tokenizer, "", make_syntax(config, SPECS, None)).codec is None


def test_a_history_that_is_written_anew_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"rollout\.history=template is not there yet: .* set rollout\.history=keep"
    ):
        load("configs/quickstart.yaml", ["rollout.history=template"])


# Whole trees


def at_once(*calls: str) -> Any:
    """A model that makes ``calls`` in its first turn."""
    return lambda text, rng: Segment(
        "So." if "tool_response" in text.split("<|im_start|>user", 1)[1] else "\n".join(calls)
    )


def several(script: Any, answer: Any = lambda *_: ok(), name: str = "qwen2.5", **config: Any) -> Made:
    return told(name, script, answer, **{"calls_per_turn": "many", "leaves": 2, "roots": 2, **config})


def test_calls_of_a_turn_are_made_side_by_side_and_answered_in_order() -> None:
    slow = {"x": 3.0, "y": 1.0}
    turn = f"{call('search', query='x')}\n{call('search', query='y')}"
    world = several(at_once(turn), lambda tool, given: ok(f"about {given['query']}", slow[given["query"]]))
    tree = run(TreeRollout(world.context, PROMPT, seed=1).run())
    assert {request.sampling.stop for request in world.engine.requests} == {()}
    assert tree.meta["seconds"]["tool"] == pytest.approx(2 * 3.0)
    assert [(c.arguments["query"], c.latency_s) for c in tree.calls] == [("x", 3.0), ("y", 1.0)] * 2
    assert len({c.node for c in tree.calls}) == 2
    codec = world.context.chat.codec
    assert codec is not None
    answers = [{"role": "tool", "content": f"about {what}"} for what in "xy"]
    said = [*PROMPT.messages, {"role": "assistant", "content": turn}, *answers]
    wanted = codec.rendered(said, codec.tools) + "So.<|im_end|>"
    assert [text(world, path) for path in paths(tree)] == [wanted] * 2
    assert tree.meta["parts"] == [{"calls": 2.0}] * 2


def test_calls_beyond_the_limit_are_refused_and_answered() -> None:
    world = several(at_once(*(call("search", query=what) for what in "abc")), call_limit=2)
    tree = run(TreeRollout(world.context, PROMPT, seed=1).run())
    assert [c.status for c in tree.calls] == [ToolStatus.OK, ToolStatus.OK, ToolStatus.REJECTED] * 2
    assert len(world.tools.calls) == 4
    assert text(world, paths(tree)[0]).count("the limit of 2 tool calls is reached") == 1
    assert set(tree.outcome.tolist()) == {Outcome.STOPPED}


def test_a_branch_that_goes_on_calling_ends_at_the_limit() -> None:
    world = several(lambda text, rng: Segment(call("search", query="x") * 2), call_limit=3)
    tree = run(TreeRollout(world.context, PROMPT, seed=1).run())
    assert set(tree.outcome.tolist()) == {Outcome.CALL_LIMIT}
    assert [c.status for c in tree.calls if c.node == tree.calls[-1].node] == ["ok", "rejected"]


def test_a_broken_call_among_others_is_answered_in_its_place() -> None:
    world = several(at_once("<tool_call>{</tool_call>", call("nothing"), call("search", query="x")))
    tree = run(TreeRollout(world.context, PROMPT, seed=1).run())
    assert [(c.tool, c.status) for c in tree.calls] == [
        ("", "rejected"),
        ("", "rejected"),
        ("search", "ok"),
    ] * 2
    answers = text(world, paths(tree)[0]).split("<tool_response>\n")[1:]
    assert [
        words in answer for words, answer in zip(("JSON", "unknown tool", "found it"), answers, strict=True)
    ]


def test_a_tool_that_raises_spoils_no_other() -> None:
    def answer(tool: str, given: Any) -> Any:
        if given["query"] == "bad":
            raise RuntimeError("broken")
        return ok()

    world = several(at_once(call("search", query="bad"), call("search", query="good")), answer)
    tree = run(TreeRollout(world.context, PROMPT, seed=1).run())
    assert [c.status for c in tree.calls] == ["unavailable", "ok"] * 2


# In worlds


class Slow(Talker):
    """Its n-th look takes the longer, the earlier it comes; what overlaps is found."""

    async def step(self, action: Action) -> Observation:
        assert not getattr(self, "busy", False)
        self.busy = True
        await asyncio.sleep(2.0 / (1 + len(self.seen)))
        self.busy = False
        self.seen = (*self.seen, action.calls[0].arguments["what"])
        over = self.seen[-1] == "end"
        return replace(Observation.of(f"seen {' '.join(self.seen)}"), done=over, reward=1.0)

    async def fork(self, ids: Ids) -> World:
        return Slow(0, self.seen)


class Slows(Talkers):
    answers_messages = False

    async def open(self, start: Start) -> World:
        return Slow(0)


def looking(script: Any, environment: Environment | None = None, **config: Any) -> Made:
    options = {"calls_per_turn": "many", "leaves": 2, "roots": 2, "policy": Never(4), **config}
    return talking("qwen2.5", script, environment or Slows(), **options)


def test_calls_into_one_world_keep_their_order_beside_the_others() -> None:
    turn = [call("look", what="a"), call("search", query="x"), call("look", what="b")]
    world = looking(at_once(*turn), answer=lambda *_: ok("found it", 2.5))
    tree = run(grown(world))
    answers = text(world, paths(tree)[0]).split("<tool_response>\n")[1:]
    assert [answer.split("\n")[0] for answer in answers] == ["seen a", "found it", "seen a b"]
    assert [c.tool for c in tree.calls] == ["look", "search", "look"] * 2
    assert tree.meta["seconds"]["tool"] == pytest.approx(2 * 3.0)  # 2 s and 1 s, beside 2.5 s
    (first,) = {float(value) for value in tree.step_reward if value}
    assert first == 2.0


def test_after_the_end_of_an_episode_no_call_is_made() -> None:
    world = looking(at_once(call("look", what="end"), call("look", what="more")))
    tree = run(grown(world))
    assert set(tree.outcome.tolist()) == {Outcome.ENDED}
    assert [c.status for c in tree.calls] == ["ok", "rejected"] * 2
    assert "the episode is over" in text(world, paths(tree)[0])


def branching(text: str, rng: np.random.Generator) -> Segment:
    turns = text.count("tool_response>")
    names = [f"{chr(97 + int(rng.integers(26)))}{turns}" for _ in range(2)]
    if turns > 10:
        return Segment("So.")
    return Segment("\n".join(call("look", what=one) for one in names), entropy=2.0)


def seen_by(world: Made, tree: Tree, leaf: int) -> tuple[list[str], list[str]]:
    """What a leaf's path asks to look at, and what its last answer says has been seen."""
    said = text(world, paths(tree)[leaf])
    asked = [part.split('"')[0] for part in said.split('"what": "')[1:]]
    return asked, said.split("seen ")[-1].split("\n")[0].split()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [ForkKind.NATIVE, ForkKind.REPLAY])
def test_worlds_fork_between_turns_of_several_calls(kind: ForkKind, seed: int) -> None:
    environment = Slows()
    environment.forks = kind
    world = looking(branching, environment, leaves=8, roots=2, policy=Random(4, 0.8), call_limit=8)
    tree = run(grown(world, seed))
    assert world.context.environments is not None
    assert world.context.environments.train.counts[f"forks_{kind}"]
    assert (tree.origin == Origin.FORK).any()
    for leaf in range(tree.n_leaves):
        asked, seen = seen_by(world, tree, leaf)
        assert asked[: len(seen)] == seen
        assert len(seen) == len(asked) == 6


@pytest.mark.parametrize("pause", [1.6, 2.7, 3.2, 4.1])
def test_a_turn_that_was_under_way_is_not_done_twice(pause: float) -> None:
    """Frozen between two calls of a turn, or behind both: the first of them is not made again."""
    world = looking(branching, leaves=2, roots=2, call_limit=4)

    async def main() -> Tree:
        assert world.context.environments is not None
        growing = await planted(world.context, PROMPT, seed=1, ticket=3)
        task = asyncio.ensure_future(growing.run())
        await asyncio.wait([task], timeout=pause)
        data = freeze(growing)
        task.cancel()
        await asyncio.wait([task])
        try:
            return await thaw(world.context, PROMPT, data, 3).run()
        finally:
            await world.context.environments.settle()

    tree = run(main())
    for leaf in range(tree.n_leaves):
        asked, seen = seen_by(world, tree, leaf)
        assert asked[:4] == seen
    assert (tree.kind == Kind.TOOL).sum() == 4
    assert len(tree.calls) == 8
