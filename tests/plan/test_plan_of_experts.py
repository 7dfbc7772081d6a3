"""The plan of a mixture of experts: what each rank holds, what a token costs, which layouts are tried."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from system.config import LearnConfig, load
from system.models.known import KNOWN
from system.plan import plan
from system.plan import text as plan_text
from system.plan.hardware import GPUS
from system.plan.memory import EngineLayout, adapter_parameters, host_memory, learner_memory
from system.plan.search import layouts, search
from system.plan.speed import EngineRoofline, LearnerRoofline

CONFIGS = Path(__file__).parents[2] / "configs"
MOE, DENSE = KNOWN["qwen3-30b-a3b"], KNOWN["qwen3-32b"]
EXPERTS = 48 * 128 * 3 * 2048 * 768


def parts(**learn: int | bool | str) -> dict[str, float]:
    return learner_memory(MOE, LearnConfig(**{"micro_tokens": 4096, "tp": 1} | learn)).parts  # pyright: ignore[reportArgumentType]


def test_experts_are_divided_over_their_ranks_and_the_rest_over_tensor_parallel_ones() -> None:
    rest = MOE.parameters - EXPERTS
    assert parts()["weights"] == pytest.approx(2 * MOE.parameters)
    assert parts(dp=8, ep=8)["weights"] == pytest.approx(2 * (rest + EXPERTS / 8))
    split = parts(tp=4, sequence_parallel=True)["weights"]
    spread = parts(tp=4, dp=2, ep=8, sequence_parallel=True)["weights"]
    assert split - spread == pytest.approx(2 * EXPERTS / 8)
    everywhere = 48 * MOE.copied(0)  # norms and routers
    assert spread / 2 - EXPERTS / 8 == pytest.approx((rest - everywhere) / 4 + everywhere, rel=1e-4)


def test_the_state_of_experts_is_shared_by_those_who_hold_the_same() -> None:
    rest = MOE.parameters - EXPERTS
    alone = parts(dp=8, ep=8, distributed_optimizer=True)["optimizer"]
    assert alone == pytest.approx(12 * (rest / 8 + EXPERTS / 8))  # nobody else has these experts
    pairs = parts(dp=16, ep=8, distributed_optimizer=True)["optimizer"]
    assert pairs == pytest.approx(12 * (rest / 16 + EXPERTS / 16))
    host = host_memory(MOE, LearnConfig(tp=1, dp=8, ep=8, offload=True)).parts["optimizer"]
    assert host == pytest.approx(alone)


def test_recomputed_experts_keep_nothing() -> None:
    kept = {how: parts(recompute=how)["activations"] for how in ("none", "selective", "full")}
    assert kept["none"] > 2 * kept["selective"] > 2 * kept["full"]
    assert parts(dp=4, ep=4)["activations"] == parts()["activations"]  # as many come as leave


def test_a_token_costs_what_it_is_multiplied_with() -> None:
    learn = LearnConfig(tp=1, dp=8, ep=8)
    moe, dense = (LearnerRoofline(shape, learn, GPUS["h100"]) for shape in (MOE, DENSE))
    assert moe.flops / dense.flops == pytest.approx(MOE.active / DENSE.active)
    near, far = moe.token_s, replace(moe, node=4).token_s
    assert near < far < dense.token_s  # experts on another machine are further
    assert LearnerRoofline(MOE, replace(learn, ep=1), GPUS["h100"]).token_s < near  # nothing travels


def test_an_engine_reads_the_experts_that_any_of_its_tokens_needs() -> None:
    engine = EngineRoofline(MOE, EngineLayout(tp=1), GPUS["h100"])
    one, many = engine.step_s(1, 0), engine.step_s(128, 0)
    gpu = GPUS["h100"]
    read = gpu.hbm * gpu.hbm_share
    assert one == pytest.approx(2 * MOE.active / read + gpu.step_overhead_s + gpu.sequence_overhead_s)
    assert many > 5 * one  # nearly all experts
    assert many < 2 * MOE.parameters / read + gpu.step_overhead_s + 128 * gpu.sequence_overhead_s


def test_the_search_spreads_experts_only_where_it_can() -> None:
    config = load(CONFIGS / "qwen3-30b-a3b-2x8.yaml")
    tried = list(layouts(config, 16))
    assert {layout.ep for layout in tried} == {1, 2, 4, 8}
    for layout in tried:
        assert layout.ep == 1 or layout.ep % layout.tp == 0 == layout.tp * layout.cp * layout.dp % layout.ep
    best, made = search(config, 16).best[0]
    assert f"learn.ep={best.ep}" in best.settings(config)
    assert made.fits
    assert {layout.ep for layout in layouts(load(CONFIGS / "qwen3-14b-2x8.yaml"), 16)} == {1}


def test_adapters_are_the_attentions() -> None:
    """The recipe by LoRA: on what every token goes through, whose state and gradients are small."""
    config = load(CONFIGS / "qwen3-30b-a3b-1x8.yaml", ["learn.lora.rank=8"])
    made, learn = plan(config), config.learn
    q, kv, wide = 32 * 128, 4 * 128, 2048
    numbers = 48 * 8 * (2 * (q + wide) + 2 * (kv + wide))
    assert adapter_parameters(MOE, learn) == numbers
    assert "LoRA of rank 8 on q, k, v, o: 6.68 million numbers are trained" in plan_text(made)
    assert not made.problems
    tp = learn.tp
    on_rank = 48 * 8 * (2 * (q / tp + wide) + 2 * (kv / tp + wide))
    assert made.learner_memory.parts["gradients"] == pytest.approx(4 * on_rank)
    refused = load(CONFIGS / "qwen3-30b-a3b-1x8.yaml", ["learn.lora.rank=8", "learn.lora.targets=[up]"])
    assert any("learn.lora.targets: up: in a mixture" in problem for problem in plan(refused).problems)


def test_a_plan_names_what_experts_do_not_allow() -> None:
    config = load(CONFIGS / "qwen3-30b-a3b-2x8.yaml", ["learn.sequence_parallel=false"])
    assert any("set learn.sequence_parallel=true" in problem for problem in plan(config).problems)
    dense = load(CONFIGS / "qwen3-14b-2x8.yaml", ["learn.ep=8"])
    assert "learn.ep=8: the model has no experts; take it out" in plan(dense).problems
