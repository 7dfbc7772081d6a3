"""Whole conversations with the embedded engine: turns that the model ends itself, answers by its template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import FAMILIES
from engine_models import TOLERANCE, EngineClient, TinyModel, log_p
from rollout_fakes import Segment
from test_template_answers import Talkers, grown, talking, text

from system.config import EngineConfig
from system.engine.embedded import EmbeddedEngine
from system.rollout.branching import Random
from system.tree.record import Kind, Origin


@pytest.mark.parametrize("several", ["one", "many"])
async def test_what_the_engine_reads_is_the_path_of_the_tree(
    several: str, tiny: Callable[..., TinyModel], tmp_path: Path
) -> None:
    model, tokenizer = tiny("qwen3", False), FAMILIES["qwen3"].tokenizer()
    path = Path(shutil.copytree(model.path, tmp_path / "model"))
    tokenizer.save_pretrained(path)
    (path / "generation_config.json").unlink()  # which names the end of another tokenizer
    settings = json.loads((path / "config.json").read_text())
    settings |= {"eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 2048}
    (path / "config.json").write_text(json.dumps(settings))
    engine = EmbeddedEngine(
        EngineConfig(device="cpu", max_running=16, max_context=2048, cache_slots=32), path, seed=0
    )
    client = EngineClient([await engine.start()], deadline_s=60, stall_s=30)
    try:
        options: dict[str, Any] = {"leaves": 6, "roots": 3, "policy": Random(2, 0.5)}
        world = talking("qwen3", lambda text, rng: Segment(""), Talkers(), calls_per_turn=several, **options)
        world.context = replace(world.context, engine=client, max_context=2000)
        tree = await grown(world)
    finally:
        await client.close()
        await engine.stop()
    codec = world.context.chat.codec
    assert codec is not None
    answers = np.flatnonzero(tree.kind == Kind.TOOL)
    assert answers.size >= 3, "the model has to end turns for this to say anything"
    assert (tree.origin == Origin.FORK).any()
    for leaf in range(tree.n_leaves):
        before = np.empty(0, np.int32)
        for node in tree.path(leaf):
            own = slice(int(tree.start[node]), int(tree.end[node]))
            if tree.kind[node] == Kind.MODEL:
                reference = log_p(model, before, tree.tokens[own]).numpy()
                sampled = reference[np.arange(own.stop - own.start), tree.tokens[own]]
                np.testing.assert_allclose(tree.logprob[own], sampled, atol=TOLERANCE)
            elif tree.kind[node] == Kind.TOOL:
                answer, ended = text(world, tree.tokens[own].tolist()), before[-1] == codec.end
                assert ended or several == "one", "else a stop string has ended the turn"
                assert answer.startswith(f"{'' if ended else '<|im_end|>'}\n<|im_start|>user\n")
                assert node == tree.leaf[leaf] or answer.endswith("<|im_end|>\n<|im_start|>assistant\n")
            before = np.concatenate([before, tree.tokens[own]])
