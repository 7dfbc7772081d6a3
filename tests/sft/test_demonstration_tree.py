"""Demonstrations as trees: the same tokens that the rollout makes with the real tools."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from system.config import Config, ConfigError, RolloutConfig
from system.engine.protocol import Chunk, Finish, GenerateRequest
from system.learn.schedule import warm_start_lr
from system.rollout.branching import Never
from system.rollout.chat import Chat
from system.rollout.context import RolloutContext
from system.rollout.rewards.arpo import ArpoReward
from system.rollout.scorer import Scorer
from system.rollout.scoring import Scoring
from system.rollout.syntax.tags import TagSyntax
from system.rollout.tree_rollout import TreeRollout
from system.serving import serve
from system.sft.demonstrations import demonstration_tree, demonstrations, warm_start
from system.tasks.base import Demonstration
from system.tasks.quickstart import vocabulary
from system.tasks.quickstart.task import QuickstartTask
from system.tools import python_server, search_server
from system.tools.sandbox.sandbox import Sandbox, SandboxUnavailable
from system.tools.search_index import Document, SearchIndex
from system.tools.service import build_tools
from system.tree.prompt import Prompt
from system.tree.record import Kind, Outcome


class Replay:
    """An engine that says what a demonstration's model said, segment by segment."""

    def __init__(self, demo: Demonstration, tokenizer) -> None:
        self.said = [tokenizer.encode(text) for author, text in demo.segments if author == "model"]
        self.said[-1].append(tokenizer.eos_token_id)
        self.eos = tokenizer.eos_token_id

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        ids = self.said.pop(0)
        stopped_by = self.eos if ids[-1] == self.eos else request.sampling.stop[0]
        if stopped_by != self.eos:
            text = vocabulary.build().convert_ids_to_tokens(int(ids[-1]))
            stopped_by = next(stop for stop in request.sampling.stop if text.endswith(stop))
        yield Chunk(
            np.array(ids, np.int32),
            np.zeros(len(ids), np.float32),
            np.zeros(len(ids), np.float32),
            np.zeros(len(ids), np.int32),
            Finish("stop", stopped_by),
        )


async def test_demonstrations_are_token_for_token_what_the_grower_makes():
    """Real search server, real sandbox, real syntax: every demonstration replayed comes out as its tree."""
    config = Config()
    config.task.train_size, config.task.eval_size, config.tools.search_top_k = 10, 50, 2
    task = QuickstartTask(config)
    tokenizer = task.tokenizer()
    search = await serve(search_server.create_app(SearchIndex.build(Document(**d) for d in task.corpus())))
    try:
        python = await serve(python_server.create_app(Sandbox()))
    except SandboxUnavailable as error:
        await search.close()
        pytest.skip(str(error))
    tools = build_tools(config.tools, {"search": search.url, "python": python.url})
    right = 0
    try:
        demos = task.demonstrations(24, 0)
        assert {d.prompt.kind for d in demos} == {"lookup", "chain", "calc", "search+calc"}
        for demo in demos:
            context = RolloutContext(
                engine=Replay(demo, tokenizer),
                tools=tools,
                syntax=TagSyntax(tools.specs),
                policy=Never(probe_tokens=8),
                scoring=Scoring([Scorer(ArpoReward())]),
                tokenizer=tokenizer,
                config=RolloutConfig(leaves=1, roots=1),
                vocab_size=len(tokenizer),
            )
            grown = await TreeRollout(context, demo.prompt, seed=0, greedy=True).run()
            tree = demonstration_tree(demo, Chat(tokenizer))
            for name in ("tokens", "start", "parent", "kind", "leaf", "outcome"):
                np.testing.assert_array_equal(getattr(tree, name), getattr(grown, name), err_msg=name)
            boxed = demo.segments[-1][1].split("\\boxed{")[1].split("}")[0].strip()
            is_right = boxed == demo.prompt.answers[0]
            right += is_right
            both_tools = demo.prompt.kind == "search+calc"
            assert bool(grown.correct[0]) == is_right
            assert grown.reward[0] == pytest.approx((1.1 if both_tools else 1.0) if is_right else 0.0)
    finally:
        await tools.close()
        await search.close()
        await python.close()
    assert 0 < right < 24


def test_tree_of_a_demonstration():
    tokenizer = vocabulary.build()
    prompt = Prompt("p", ({"role": "user", "content": "Q: 47 plus 12 ?"},), ("59",), "calc")
    demo = Demonstration(
        prompt,
        (
            ("model", " <think> plus </think> <python> print(47+12) </python>"),
            ("tool", " <result>\n59\n</result>"),
            ("model", " <think> done </think> <answer> \\boxed{59 } </answer>"),
        ),
    )
    tree = demonstration_tree(demo, Chat(tokenizer))
    assert tree.kind.tolist() == [Kind.PROMPT, Kind.MODEL, Kind.TOOL, Kind.MODEL]
    assert tree.tokens[-1] == tokenizer.eos_token_id
    assert (tree.tokens == tokenizer.eos_token_id).sum() == 1
    assert (tree.n_leaves, tree.path(0), tree.reward.tolist()) == (1, [0, 1, 2, 3], [1.0])
    assert tree.outcome.tolist() == [Outcome.STOPPED]
    assert tokenizer.decode(tree.tokens[:-1].tolist()) == "Q: 47 plus 12 ?" + "".join(
        text for _, text in demo.segments
    )
    model = np.repeat(tree.kind == Kind.MODEL, tree.end - tree.start)
    assert (tree.version[model] == 0).all()
    assert (tree.version[~model] == -1).all()
    assert all(math.isnan(h) for h in tree.entropy)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ((), "must end with a segment of the model"),
        ((("model", " <think>"), ("tool", "59")), "must end with a segment of the model"),
        ((("user", "x"), ("model", "y")), "unknown author 'user'"),
        ((("tool", ""), ("model", " </think>")), "segment 0 is empty"),
    ],
)
def test_malformed_demonstrations_are_errors(segments, message):
    prompt = Prompt("p", ({"role": "user", "content": "Q: 47 plus 12 ?"},), ("59",))
    with pytest.raises(ValueError, match=message):
        demonstration_tree(Demonstration(prompt, segments), Chat(vocabulary.build()))


def test_a_malformed_demonstration_fails_before_the_first_batch(tmp_path: Path):
    vocabulary.build().save_pretrained(tmp_path)
    prompt = Prompt("p", ({"role": "user", "content": "Q: 47 plus 12 ?"},), ("59",))
    good, bad = Demonstration(prompt, (("model", " <think>"),)), Demonstration(prompt, ())

    class Shows(QuickstartTask):
        def demonstrations(self, n: int, seed: int) -> list[Demonstration]:
            return [good] * n if seed else [good] * n + [bad]

    config = Config()
    config.task.train_size, config.task.eval_size, config.warmstart.demos = 10, 10, 3
    with pytest.raises(ConfigError, match=r"^task.name=.*must end with .*; correct .* warmstart.steps=0$"):
        demonstrations(config, Shows(config), tmp_path)
    config.run.seed = 1
    made = demonstrations(config, Shows(config), tmp_path)
    assert [tree.n_leaves for tree in made] == [1] * 3


@pytest.mark.parametrize(
    ("family", "path", "share"),
    [
        ("qwen3", "", 1.0),
        ("qwen3_moe", "", 1.0),
        ("llama", "", 0.5),
        ("mistral", "", 0.5),
        ("llama", "given", 1.0),  # what a given model is, model.family does not say
    ],
)
def test_a_new_model_without_norms_of_queries_and_keys_is_warmed_up_at_half_the_rate(
    family: str, path: str, share: float
):
    config = Config()
    config.model.family, config.model.path = family, path
    config.warmstart.steps, config.warmstart.batch = 40, 1
    prompt = Prompt("p", ({"role": "user", "content": "Q: 47 plus 12 ?"},), ("59",))
    tree = demonstration_tree(Demonstration(prompt, (("model", "59"),)), Chat(vocabulary.build()))
    rates = [lr for _, lr in warm_start(config, [tree] * 4)]
    assert rates == [warm_start_lr(step, 40, share * config.warmstart.lr) for step in range(40)]
