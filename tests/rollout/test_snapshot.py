"""A tree frozen at any moment and thawed elsewhere becomes the tree it would have become."""

from __future__ import annotations

import asyncio
import zlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_fakes import PROMPT, PieceTokenizer, ScriptedTools, Segment, World, make_world, ok

from system.config import Config
from system.engine.protocol import Chunk, Finish, GenerateRequest
from system.rollout.branching import Aepo, Arpo, ArpoCalibrated, Never, Policy, Random
from system.rollout.expanding import MostUncertainTurns, UnlikelyTokens
from system.rollout.snapshot import SnapshotError, can_freeze, fingerprint, freeze, thaw
from system.rollout.tree_rollout import TreeRollout
from system.tree.record import Tree
from system.twin.clock import run

WORDS = ["<eos>", "a", "b", "c", "d", " ", "<search>", "</search>", "<answer>", "</answer>"]


@dataclass
class PositionEngine:
    """Draws each token by (seed, position) alone, as our engine does: an interruption changes nothing.

    ``version`` stamps what it writes; ``written`` counts tokens, to see that none is written twice.
    """

    tokenizer: PieceTokenizer
    call: float  # chance that a token begins a call
    end: float  # chance that a token ends the branch
    version: int = 0
    written: int = 0
    requests: list[GenerateRequest] = field(default_factory=list)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        self.requests.append(request)
        size, seed = len(request.input_ids), request.sampling.seed
        before, count = int(request.input_ids[-1]), 0
        await asyncio.sleep(0.3 + 0.2 * self._draw(seed, size, "latency"))
        while True:
            tokens: list[int] = []
            finish = None
            for _ in range(3):
                before = self._next(before, seed, size)
                tokens.append(before)
                size, count = size + 1, count + 1
                if before == 0:
                    finish = Finish("stop", 0)
                elif self.tokenizer.pieces[before] in request.sampling.stop:
                    finish = Finish("stop", self.tokenizer.pieces[before])
                elif count == request.sampling.max_new_tokens:
                    finish = Finish("length")
                if finish:
                    break
            self.written += len(tokens)
            places = range(size - len(tokens), size)
            yield Chunk(
                np.array(tokens, np.int32),
                np.array([-1 - self._draw(seed, i, "p") for i in places], np.float32),
                np.array([4 * self._draw(seed, i, "h") for i in places], np.float32),
                np.full(len(tokens), self.version, np.int32),
                finish,
            )
            if finish:
                return
            await asyncio.sleep(0.03)

    def _next(self, before: int, seed: int | None, position: int) -> int:
        if self.tokenizer.pieces[before] == "<search>":
            return self.tokenizer.ids["a"]
        if (
            position
            and self.tokenizer.pieces[before] == "a"
            and self._draw(seed, position - 2, "t") < self.call
        ):
            return self.tokenizer.ids["</search>"]
        draw = self._draw(seed, position, "t")
        if draw < self.call:
            return self.tokenizer.ids["<search>"]
        if draw > 1 - self.end:
            return 0
        return self.tokenizer.ids["abcd"[int(draw * 997) % 4]]

    @staticmethod
    def _draw(seed: int | None, position: int, what: str) -> float:
        return zlib.crc32(f"{seed}/{position}/{what}".encode()) / 2**32


def world(policy: Policy, call: float = 0.06, end: float = 0.02, **config: Any) -> World:
    made = make_world(
        lambda text, rng: Segment(""),
        lambda tool, arguments: ok("r r r", 0.7),
        policy=policy,
        max_response_tokens=120,
        **config,
    )
    for piece in WORDS:
        made.tokenizer.encode(piece)
    engine = PositionEngine(made.tokenizer, call, end)
    made.engine = engine  # type: ignore[assignment]
    made.context = replace(made.context, engine=engine)
    return made


def leaves_of(tree: Tree) -> Counter[Any]:
    """Every leaf as its path's tokens, log-probabilities and entropies, whatever the order."""
    found: Counter[Any] = Counter()
    for leaf in range(tree.n_leaves):
        spans = [slice(int(tree.start[n]), int(tree.end[n])) for n in tree.path(leaf)]
        columns = [np.concatenate([a[s] for s in spans]) for a in (tree.tokens, tree.logprob, tree.entropy)]
        found[
            tuple(column.tobytes() for column in columns),
            int(tree.outcome[leaf]),
            int(tree.origin[leaf]),
            float(tree.reward[leaf]),
        ] += 1
    return found


async def interrupted(made: World, seed: int, pauses: list[float]) -> tuple[Tree, int]:
    """Grow, freeze and drop at each pause, thaw and go on; also says how often that happened."""
    growing, cuts = TreeRollout(made.context, PROMPT, seed=seed, ticket=1), 0
    for pause in pauses:
        task = asyncio.ensure_future(growing.run())
        done, _ = await asyncio.wait([task], timeout=pause)
        if done:
            return task.result(), cuts
        data, cuts = freeze(growing), cuts + 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        growing = thaw(made.context, PROMPT, data, ticket=1 + cuts)
    return await growing.run(), cuts


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    pauses=st.lists(st.floats(0.0, 6.0), min_size=1, max_size=5),
    policy=st.sampled_from(
        [
            Arpo(4, 0.5, 0.9),
            Aepo(4, 0.6, 0.9, 0.2),
            ArpoCalibrated(4, 0.25, 0.0, by="siblings"),
            Random(3, 0.4),
            MostUncertainTurns(3),
            UnlikelyTokens(3),
            Never(4),
        ]
    ),
)
def test_frozen_and_thawed_is_the_same_tree(seed: int, pauses: list[float], policy: Policy) -> None:
    """n is so large that forks never fill it: which branch forks first cannot matter."""
    sizes = {"leaves": 40, "roots": 4, "call_limit": 3}
    whole, cut = world(policy, **sizes), world(policy, **sizes)
    expected = run(TreeRollout(whole.context, PROMPT, seed=seed).run())
    found, _ = run(interrupted(cut, seed, pauses))
    assert leaves_of(found) == leaves_of(expected)
    assert found.n_tokens == expected.n_tokens
    # Calls are made again where they were cut off, tokens never.
    assert cut.engine.written == whole.engine.written  # type: ignore[attr-defined]
    assert Counter(d.forks for d in found.forks) == Counter(d.forks for d in expected.forks)
    assert Counter(call.status for call in found.calls) == Counter(call.status for call in expected.calls)


def test_new_tokens_carry_the_new_version_and_old_ones_theirs() -> None:
    made = world(Never(4), leaves=4, roots=4, call=0.0, end=0.0)

    async def main() -> Tree:
        growing = TreeRollout(made.context, PROMPT, seed=3)
        task = asyncio.ensure_future(growing.run())
        await asyncio.sleep(0.9)
        data = freeze(growing)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        made.engine.version = 5  # type: ignore[attr-defined]
        return await thaw(made.context, PROMPT, data).run()

    tree = run(main())
    for leaf in range(4):
        versions = tree.version[tree.start[tree.path(leaf)[-1]] : tree.end[tree.path(leaf)[-1]]]
        assert versions.size == 120
        assert set(versions) == {0, 5}
        assert (np.diff(versions) >= 0).all()


def test_a_call_under_way_is_said_to_be_made_again() -> None:
    """The tool service then decides whether that does harm."""
    made = world(Never(4), leaves=1, roots=1)
    tools = ScriptedTools(lambda tool, arguments: ok("r r r", 0.7))
    made.context = replace(made.context, tools=tools)

    async def main() -> None:
        growing = TreeRollout(made.context, PROMPT, seed=3)
        task = asyncio.ensure_future(growing.run())
        for _ in range(1000):
            if tools.running:
                break
            await asyncio.sleep(0.05)
        data = freeze(growing)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await thaw(made.context, PROMPT, data).run()

    run(main())
    assert [context.again for context in tools.contexts[:2]] == [False, True]
    assert not any(context.again for context in tools.contexts[2:])


def test_deadlines_go_on_where_they_were() -> None:
    """A branch of 10 s of life that was frozen at 6 s has 4 s left, however long nobody grew it."""
    made = world(Never(4), leaves=2, roots=2, branch_deadline_s=10.0, tree_deadline_s=100.0)
    made.context = replace(
        made.context, engine=HangingEngine(), tools=ScriptedTools(lambda tool, arguments: ok())
    )

    async def main() -> float:
        growing = TreeRollout(made.context, PROMPT, seed=0)
        task = asyncio.ensure_future(growing.run())
        await asyncio.sleep(6.0)
        data = freeze(growing)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(1000.0)
        began = asyncio.get_running_loop().time()
        await asyncio.gather(thaw(made.context, PROMPT, data).run(), return_exceptions=True)
        return asyncio.get_running_loop().time() - began

    assert run(main()) == pytest.approx(4.0)


class HangingEngine:
    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        await asyncio.Event().wait()
        yield Chunk(*[np.zeros(0)] * 4)


def test_what_is_no_snapshot_is_refused() -> None:
    made = world(Never(4), leaves=2, roots=2)

    async def main() -> bytes:
        growing = TreeRollout(made.context, PROMPT, seed=0)
        task = asyncio.ensure_future(growing.run())
        await asyncio.sleep(0.5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return freeze(growing)

    data = run(main())
    for bad in (b"", b"nonsense" * 4, data[:-3], data.replace(b"ended", b"endid")):
        with pytest.raises(SnapshotError):
            thaw(made.context, PROMPT, bad)
    with pytest.raises(SnapshotError, match="not of 'another'"):
        thaw(made.context, replace(PROMPT, id="another"), data)


def test_lockstep_trees_are_not_frozen() -> None:
    made = world(Never(4), leaves=2, roots=2, schedule="lockstep")
    assert not can_freeze(TreeRollout(made.context, PROMPT, seed=0))


def test_the_fingerprint_knows_what_matters() -> None:
    config, other = Config(), Config()
    other.rollout.workers, other.rollout.tree_deadline_s, other.learn.lr = 7, 1.0, 0.5
    assert fingerprint(config) == fingerprint(other)
    other.rollout.leaves = 16
    assert fingerprint(config) != fingerprint(other)
    other = Config()
    other.branching.alpha = 0.1
    assert fingerprint(config) != fingerprint(other)
