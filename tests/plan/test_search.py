"""`espalier plan --search`: the fastest layout of all that can be placed and fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.cli.main import main
from system.cluster.placement import paper_nodes, place
from system.config import Config, ConfigError, load
from system.plan import plan
from system.plan.search import FULL, layouts, objection, search

CONFIGS = Path(__file__).parents[2] / "configs"


def recipe(name: str = "qwen3-14b-2x8", *overrides: str) -> Config:
    return load(CONFIGS / f"{name}.yaml", overrides)


def test_the_first_is_as_fast_as_any_that_fits() -> None:
    config = recipe()
    found = search(config, 16)
    every = [*layouts(config, 16)]
    assert found.tried == len(every) == len(set(every))
    assert found.fitting + sum(found.refused.values()) == found.tried
    steps = [
        made.forecast.step_s
        for layout in every
        if not objection(made := plan(layout.of(config), 16, engines=layout.engines))
    ]
    assert len(steps) == found.fitting > 0
    best = found.best[0][1].forecast.step_s
    assert best <= 1.05 * min(steps)
    assert best <= plan(config).forecast.step_s  # and not slower than the recipe itself
    assert all(made.learner_memory.total <= FULL * made.gpu.memory for _, made in found.best)


@pytest.mark.parametrize(("nodes", "each"), [(1, 4), (1, 8), (3, 8)])
def test_whatever_is_proposed_can_be_placed_as_its_settings_say(nodes: int, each: int) -> None:
    cluster = ["model.path=Qwen2.5-7B", f"cluster.gpus_per_node={each}", "cluster.learner_nodes=0"]
    config = recipe("qwen3-14b-2x8", *cluster)
    every = [layout for layout in layouts(config, nodes * each) if layout.recompute == "none"]
    for layout in every:
        made = layout.of(config)
        assert sum(seat.gpus for seat in place(made, paper_nodes(made))) <= nodes * each
    assert {layout.learner_nodes == 0 for layout in every} == ({True, False} if nodes > 1 else {True})
    for layout in every[:: len(every) // 4]:
        assert recipe("qwen3-14b-2x8", *cluster, *layout.settings(config)) == layout.of(config)


def test_where_paths_are_long_their_tokens_are_shared_where_that_serves() -> None:
    long = ["engine.max_context=131072", "learn.micro_tokens=131072", "rollout.max_response_tokens=129024"]
    config = recipe("qwen3-32b-8x8", *long, "flow.batch_leaves=16", "learn.updates=1")
    assert {layout.cp for layout in layouts(config, 64)} == {1, 2, 4, 8}
    assert {layout.cp for layout in layouts(recipe("qwen3-32b-8x8"), 64)} == {1}
    few = recipe("qwen3-32b-8x8", *long, "learn.micro_tokens=256")
    assert {layout.cp for layout in layouts(few, 64)} == {1, 2}  # a block of 128 tokens for each rank
    flash = recipe("qwen3-32b-8x8", *long, "learn.attention=flash")  # which takes whole rows only
    assert {layout.cp for layout in layouts(flash, 64)} == {1}
    best, made = search(config, 64).best[0]  # a single tree: there is nothing for data-parallel ranks
    assert best.cp > 1 == best.dp
    assert made.config.learn.cp == best.cp
    assert f"learn.cp={best.cp}" in best.settings(config)


def test_memory_and_sizes_refuse_by_name() -> None:
    reasons = " ".join(search(recipe(), 16).refused)
    assert "needs more than 95% of its GPU's 74.5 GiB" in reasons
    reasons = " ".join(search(recipe("qwen3-14b-2x8", "model.path=Qwen2.5-7B"), 16).refused)
    assert "learn.tp=8 does not divide the model's heads, kv_heads or ffn" in reasons
    assert "engine.tp=8 does not divide the model's heads or ffn" in reasons
    assert "learn.pp=8 does not divide the model's 28 layers" in reasons
    few = search(recipe("qwen3-14b-2x8", "model.path=Qwen2.5-7B", "flow.batch_leaves=64"), 16)
    assert any("learn.dp is more than there are trees in an update" in why for why in few.refused)
    assert search(recipe("qwen3-32b-4x8"), 4).best == []
    with pytest.raises(ConfigError, match="1 GPU: a learner and an engine take one each"):
        search(recipe(), 1)


def test_of_layouts_alike_the_simpler_and_of_these_the_one_with_more_memory_left_comes_first() -> None:
    best = search(recipe(), 16).best
    step = best[0][1].forecast.step_s
    alike = [
        (layout.parts, made.learner_memory.total) for layout, made in best if made.forecast.step_s <= step
    ]
    assert len(alike) > 1
    assert alike == sorted(alike)


def test_the_command_prints_the_best_and_why_others_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(CONFIGS / "qwen3-14b-2x8.yaml"), "--search"]) == 0
    out = capsys.readouterr().out
    head, _, rest = out.partition("\n\n")
    assert "layouts fit on 16 GPUs" in head
    assert 2 <= sum(" · dp " in line for line in head.splitlines()) <= 5
    assert "the first: learn.tp=" in head
    assert "refused:" in head
    assert "bottleneck" in rest  # the plan of the first
    assert main(["plan", str(CONFIGS / "qwen3-32b-4x8.yaml"), "--search", "--gpus", "4"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("0 of ")
    assert "give more of them or larger ones" in out
    assert "the first" not in out
