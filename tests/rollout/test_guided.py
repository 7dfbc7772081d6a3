"""A guided tree: what the engine is given, what the record says, and what the learner gets of it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from chat_tokenizers import chatml
from rollout_fakes import PROMPT, SPECS, Segment, World, make_world
from test_tree_rollout import ANSWER, CALL

from system.config import GuideConfig, load
from system.learn.batch import BatchPlanner
from system.learn.rows import Row
from system.plugins import SYNTAXES
from system.rollout.branching import Random
from system.rollout.chat import Chat, PromptError
from system.rollout.failure import RolloutFailed
from system.rollout.snapshot import freeze, thaw
from system.rollout.tree_rollout import TreeRollout
from system.tree.pack import pack_share
from system.tree.prompt import Prompt
from system.tree.record import Tree
from system.tree.stats import TreeStats
from system.twin.clock import run

ACTIONS = ("<think> first </think> <search> Alda </search>", "<search> Karkeep </search>")
SHOWN = replace(
    PROMPT,
    demonstration=(
        *(("model", ACTIONS[0]), ("tool", "<result> Karkeep </result>")),
        *(("model", ACTIONS[1]), ("tool", "<result> 12 </result>")),
        ("model", "<answer> 12 </answer>"),
    ),
)
TEXT = " Begin with: {actions}"


def one_call(text: str, rng: np.random.Generator) -> Segment:
    """A call, and then a right answer if the prompt told of Alda."""
    said = ANSWER if "Alda" in text else "<answer> no idea </answer>"
    return Segment(said if "<result>" in text else CALL)


def world(**config: Any) -> World:
    made = make_world(one_call, policy=Random(4, 1.0), leaves=4, roots=2, **config)
    made.context = replace(made.context, guide=GuideConfig(others=1.0, text=TEXT))
    return made


def grow(made: World, prompt: Prompt = SHOWN, **options: Any) -> Tree:
    return run(TreeRollout(made.context, prompt, **({"seed": 1} | options)).run())


def test_the_engine_goes_on_from_the_guide_and_the_learner_sees_the_plain_prompt() -> None:
    """Token by token, from the first request to the row that is trained on."""
    made = world()
    tree = grow(made, guide=1)
    told = f"who? Begin with: {ACTIONS[0]}"
    for request in made.engine.requests:
        assert made.text(request.input_ids).startswith(told)
    assert len(made.engine.requests) >= 4
    assert made.text(tree.sampled_prompt) == told
    assert (tree.guide, tree.guided) == (1, True)
    assert made.text(tree.tokens[: tree.start[1]]) == "who?"
    tree.reward[:] = np.arange(tree.n_leaves)
    stats, config = TreeStats.of(tree), load(None, ["learn.credit=grpo", "learn.tp=1"])
    assert (stats.guide, stats.length[0]) == (1, 2)
    plan = BatchPlanner(config, flat=False).plan([stats])
    ((packed,),) = pack_share(plan, 0, {0: tree})
    text = made.text(packed.tokens)
    assert text.startswith("who?")
    assert "Alda" not in text
    assert "boxed" in text, "what the guide led to is learned"
    row = Row(packed, torch.device("cpu"), trained=True)
    assert len(row.scored) == stats.trainable
    zero = torch.zeros(len(row.scored))
    seen = row.loss_tokens(zero, zero, 7, None)
    assert seen.guided is not None
    assert (seen.guided == 1).all()
    assert (seen.behaviour == -0.5).all(), "as it was sampled, under the guide: μ(y | prompt with it)"


def test_so_many_actions_as_the_ticket_says_and_never_the_answer() -> None:
    said: list[str] = []
    for guide in (1, 2, 5):
        made = world()
        said.append(made.text(grow(made, guide=guide).sampled_prompt))
    assert said[0] == f"who? Begin with: {ACTIONS[0]}"
    assert said[1] == said[2] == f"who? Begin with: {ACTIONS[0]}\n{ACTIONS[1]}"


def test_without_a_guide_it_is_the_tree_it_was() -> None:
    """A prompt's demonstration by itself changes nothing."""
    one, two = grow(world()), grow(world(), PROMPT)
    assert not one.guided
    assert (one.tokens.tolist(), one.guide) == (two.tokens.tolist(), 0)


def test_the_room_for_a_response_is_not_taken_by_the_guide() -> None:
    for guide in (0, 2):
        tree = grow(world(max_response_tokens=12), guide=guide)
        length = tree.end - tree.start
        assert max(length[tree.path(leaf)[1:]].sum() for leaf in range(tree.n_leaves)) == 12


def test_a_guide_for_which_the_engine_has_no_room_is_told() -> None:
    made = world()
    made.context = replace(made.context, max_context=8)
    assert not made.context.encode_prompt(SHOWN).size > 8
    with pytest.raises(RolloutFailed, match=r"engine\.max_context"):
        grow(made, guide=2)


def test_a_guided_tree_goes_on_from_its_snapshot() -> None:
    made = world()

    async def interrupted() -> Tree:
        growing = TreeRollout(made.context, SHOWN, seed=1, guide=2)
        task = asyncio.ensure_future(growing.run())
        await asyncio.sleep(0.8)
        data = freeze(growing)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        before = len(made.engine.requests)
        tree = await thaw(made.context, SHOWN, data).run()
        assert len(made.engine.requests) > before
        return tree

    tree = run(interrupted())
    assert all(made.text(one.input_ids).startswith("who? Begin with:") for one in made.engine.requests)
    assert (tree.guide, made.text(tree.tokens[: tree.start[1]])) == (2, "who?")
    assert made.text(tree.sampled_prompt) == f"who? Begin with: {ACTIONS[0]}\n{ACTIONS[1]}"


@pytest.mark.parametrize("how", ["words", "auto", "none"])
def test_a_guide_changes_nothing_else_of_what_is_told(how: str) -> None:
    """Its actions are calls, which would look like data that tell of the tools themselves."""
    chat = Chat(chatml(), SYNTAXES.make("tags", {}, SPECS), how=how, answer_format="Box it.")
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    plain, guided = (
        chat.tokenizer.decode(chat.encode(asked, guide))
        for guide in ("", "<search> a </search> <python> 1 </python>")
    )
    assert guided == plain.replace("Who?", "Who?<search> a </search> <python> 1 </python>")
    gone_on = [*asked, {"role": "assistant", "content": "Well"}]
    assert "Who?!<|im_end|>" in chat.tokenizer.decode(chat.encode(gone_on, "!"))


def test_a_guide_needs_a_message_of_the_user() -> None:
    with pytest.raises(PromptError, match="there is none"):
        Chat(chatml()).encode([{"role": "system", "content": "Be brief."}], "!")
