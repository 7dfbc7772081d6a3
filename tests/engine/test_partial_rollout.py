"""Branches in flight survive new weights, the death of an engine and the end of the run that grew them."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from engine_models import TOLERANCE, VOCAB, EngineClient, TinyModel, log_p, make_tokenizer
from test_engine_replicas import server_process

from system.config import RolloutConfig
from system.rollout.branching import Never
from system.rollout.context import RolloutContext
from system.rollout.reward import BranchView, Score
from system.rollout.scorer import Scorer
from system.rollout.scoring import Scoring
from system.rollout.snapshot import freeze, thaw
from system.rollout.syntax.tags import TagSyntax
from system.rollout.tree_rollout import TreeRollout
from system.tools.outcome import CallContext, ToolOutcome, ToolSpec
from system.tree.prompt import Prompt
from system.tree.record import Tree

PROMPT = Prompt("p", ({"role": "user", "content": "the quick brown fox jumps over the lazy dog"},), ("42",))
LEAVES, LENGTH = 6, 200


class NoTools:
    specs: Mapping[str, ToolSpec] = {}

    async def call(self, tool: str, arguments: Mapping[str, Any], context: CallContext) -> ToolOutcome:
        raise AssertionError("there are no tools")


class NoReward:
    def score(self, prompt: Prompt, branch: BranchView) -> Score:
        return Score(0.0, False)


def context(client: EngineClient) -> RolloutContext:
    return RolloutContext(
        engine=client,
        tools=NoTools(),
        syntax=TagSyntax({}),
        policy=Never(4),
        scoring=Scoring([Scorer(NoReward())]),
        tokenizer=make_tokenizer(),
        config=RolloutConfig(leaves=LEAVES, roots=LEAVES, max_response_tokens=LENGTH),
        vocab_size=VOCAB,
    )


async def grown(tree: TreeRollout, tokens: int, task: asyncio.Task[Tree]) -> None:
    """Return once every live branch of ``tree`` has written so many tokens."""
    async with asyncio.timeout(60):
        while any(tree.growth.depth(b.node) - tree.growth.depth(0) < tokens for b in tree.live.values()):
            assert not task.done(), "the test is too slow for its own model"
            await asyncio.sleep(0.001)


def assert_each_token_is_its_versions(tree: Tree, models: Mapping[int, TinyModel]) -> set[int]:
    """Every log-probability is Hugging Face's under the weights that the token is stamped with."""
    seen: set[int] = set()
    for leaf in range(tree.n_leaves):
        (root, node) = tree.path(leaf)
        prompt, own = tree.tokens[: tree.end[root]], slice(int(tree.start[node]), int(tree.end[node]))
        tokens, version = tree.tokens[own], tree.version[own]
        assert (np.diff(version) >= 0).all()
        for one in set(version.tolist()):
            reference = log_p(models[one], prompt, tokens).numpy()[np.arange(tokens.size), tokens]
            np.testing.assert_allclose(
                tree.logprob[own][version == one], reference[version == one], atol=TOLERANCE
            )
            seen.add(one)
    return seen


async def test_a_tree_survives_new_weights_a_killed_engine_and_a_restart(
    tiny: Callable[..., TinyModel],
) -> None:
    models = {0: tiny("qwen3", True, 0), 1: tiny("qwen3", True, 1)}
    async with (
        server_process(models[0], pass_s=0.01) as first,
        server_process(models[0], pass_s=0.01) as second,
    ):
        client = EngineClient([first.url, second.url], deadline_s=120)
        await client.wait_ready(60)
        growing = TreeRollout(context(client), PROMPT, seed=5)
        task = asyncio.create_task(growing.run())
        await grown(growing, 20, task)
        await client.push_weights([models[1].weights()], 1)
        await grown(growing, 60, task)
        running = [info.running for info in await client.infos()]
        busier = int(np.argmax(running))
        victim, other = (first, second)[busier], (second, first)[busier]
        victim.process.send_signal(signal.SIGSTOP)  # what it holds cannot end before it is killed
        left = EngineClient([other.url], deadline_s=120)
        async with asyncio.timeout(60):
            while any(info.running for info in await left.infos()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await left.close()
        held = len(growing.live)
        victim.kill()
        async with asyncio.timeout(60):
            while client.counters.get("resumed", 0) < held:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        await grown(growing, 100, task)
        data = freeze(growing)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert client.counters["resumed"] >= held >= 1
        await client.close()
        resumed = EngineClient([first.url, second.url], deadline_s=120)  # another process would do this
        tree = await thaw(context(resumed), PROMPT, data).run()
        await resumed.close()
    assert tree.n_leaves == LEAVES
    lengths = [int((tree.end - tree.start)[tree.leaf[leaf]]) for leaf in range(LEAVES)]
    ended = [tree.tokens[tree.end[tree.leaf[leaf]] - 1] == 0 for leaf in range(LEAVES)]
    assert all(length == LENGTH or eos for length, eos in zip(lengths, ended, strict=True))
    assert max(lengths) == LENGTH
    assert assert_each_token_is_its_versions(tree, models) == {0, 1}
