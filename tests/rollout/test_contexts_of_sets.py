"""Sets of an evaluation with rewards of their own: another scoring, another form that the model is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chat_tokenizers import chatml

from system.config import load
from system.http import Keys
from system.rollout.context import build_context
from system.rollout.reward import BranchView, Score
from system.rollout.sets import contexts
from system.tree.prompt import Prompt
from system.tree.record import Kind, Outcome

PROMPT = Prompt("p", ({"role": "user", "content": "Which capital?"},), ("Paris",))
VIEW = BranchView(((Kind.MODEL, "<answer>Paris, France</answer>"),), Outcome.STOPPED)


async def test_only_what_a_set_scores_otherwise_is_another(tmp_path: Path) -> None:
    model = tmp_path / "model"
    chatml().save_pretrained(model)
    (model / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": 1000}))
    sets = "eval.sets=[{name: a, path: x, reward: f1}, {name: b, path: x}]"
    config = load(None, [f"model.path={model}", "tools.names=[]", "task.tools_in_prompt=words", sets])
    context, tools, engine = build_context(config, str(model), ["http://127.0.0.1:9"], {}, Keys())
    found = contexts(config, context, str(model), Keys())
    try:
        assert [*found] == ["a"]
        of_set = found["a"]
        assert (of_set.engine, of_set.tools) == (context.engine, context.tools)
        (score,) = await of_set.scoring.scorers[0].score(PROMPT, [VIEW])
        assert isinstance(score, Score)
        assert score.value == pytest.approx(2 / 3)
        told = [one.told(PROMPT).messages[0]["content"] for one in (context, of_set)]
        assert ["\\boxed" in text for text in told] == [True, False]
        assert ["as short as it can be said" in text for text in told] == [False, True]
        assert "reward/eval/a/close_wait_s" in of_set.scoring.counters
        assert (of_set.scoring.key, context.scoring.key) == ("eval.sets[a].reward", "reward")
        assert "reward/close_wait_s" in context.scoring.counters
    finally:
        for one in (context, *found.values()):
            await one.scoring.close()
        await tools.close()
        await engine.close()
