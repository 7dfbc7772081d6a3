"""Mixtures of experts in the learner: what Hugging Face computes, in every layout of two ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_models import as_in_files
from learner_ranks import Place, Ranks
from learner_reference import (
    credit_of,
    flat_loss,
    gradients,
    learner_config,
    load_hf,
    make_trees,
    of_new_adapters,
    path_logprobs,
    path_tokens,
    relative_distance,
    train,
)
from test_families import assert_equal, family_case
from test_learner_equality import adamw_case, hf_gradients, idle_rank_case, open_trainer
from test_learner_state import load_case, save_case, save_hf_case

from system.config import ConfigError, LearnConfig, LoraConfig, PartConfig
from system.learn.model import transformer_config
from system.models.adapter import adapter_of
from system.models.known import KNOWN
from system.models.shape import ModelShape
from system.tree.pack import pack_share
from system.tree.record import Tree
from system.tree.stats import TreeStats

EP2: dict[str, Any] = {"dp": 2, "ep": 2}
TP2: dict[str, Any] = {"tp": 2, "sequence_parallel": True}
TP2_EP2 = TP2 | {"ep": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "ep2": EP2,
    "ep2 full": EP2 | {"recompute": "full"},
    "ep2 selective": EP2 | {"recompute": "selective"},
    "ep2 with tp2": TP2_EP2,
    "ep2 with cp2": {"cp": 2, "ep": 2, "recompute": "selective"},
    "dp2": {"dp": 2},
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("tied", [False, True])
def test_experts_equal_hugging_face(
    ranks: Ranks, tiny_model: Callable[..., str], tied: bool, layout: str
) -> None:
    """Tied: with a dense layer, and weights of the chosen experts that do not add up to 1."""
    model = tiny_model("qwen3_moe", tied=tied)
    assert_equal(ranks.run(family_case, world=2, model=model, layout=LAYOUTS[layout]), model)


STEPS: dict[str, tuple[dict[str, Any], PartConfig]] = {
    "tp1": ({}, PartConfig("none")),
    "ep2": (
        EP2,
        PartConfig("seq-tis", {"over": "mean"}),
    ),  # scores, too, unequally many rows
    "ep2, split": (EP2 | {"distributed_optimizer": True}, PartConfig("none")),
    "ep2, offloaded": (EP2 | {"offload": True}, PartConfig("none")),
    "tp2": (TP2, PartConfig("none")),
    "ep2 with tp2": (TP2_EP2, PartConfig("none")),
    "ep2 with tp2, offloaded": (TP2_EP2 | {"offload": True}, PartConfig("none")),
    "pp2": ({"pp": 2}, PartConfig("none")),  # one stage has no experts
}


@pytest.mark.parametrize("name", list(STEPS))
def test_clipped_steps_equal_torch_adamw(ranks: Ranks, tiny_model: Callable[..., str], name: str) -> None:
    layout, correction = STEPS[name]
    offload = layout.get("offload", False)
    layout = {key: value for key, value in layout.items() if key != "offload"}
    case = {"model": tiny_model("qwen3_moe", tied=True), "correction": correction, "offload": offload}
    for result in ranks.run(adamw_case, world=1 if name == "tp1" else 2, **case, **layout):
        assert result["moved"] > 2e-3
        assert result["error"] < 1e-2 * result["moved"] / 3
        assert result["steps"] == 3
        assert result["nll error"] < 1e-5
        assert result["skipped"] == 0


def test_a_rank_without_rows_makes_the_others_passes(ranks: Ranks, tiny_model: Callable[..., str]) -> None:
    """In every layer the ranks exchange tokens: one that computed nothing would keep the other waiting."""
    for stats in ranks.run(idle_rank_case, world=2, model=tiny_model("qwen3_moe"), ep=2):
        assert stats["gradient error"] < 1e-5
        assert stats["silent norm"] == 0
        assert stats["tokens"] > 0


SPLIT = EP2 | {"distributed_optimizer": True}
CHECKPOINTS: dict[str, list[dict[str, Any]]] = {
    "ep2": [EP2, {}, TP2],
    "ep2, split": [SPLIT, TP2_EP2, {"cp": 2, "ep": 2, "distributed_optimizer": True}],
    "tp2": [TP2, EP2 | {"offload": True}, {"pp": 2}],
}


@pytest.mark.parametrize("name", list(CHECKPOINTS))
def test_a_checkpoint_resumes_under_another_layout(
    ranks: Ranks, tiny_model: Callable[..., str], tmp_path: Path, name: str
) -> None:
    """And under its own bit for bit."""
    own, *others = CHECKPOINTS[name]
    case = {"model": tiny_model("qwen3_moe", tied=True), "path": str(tmp_path / "checkpoint")}
    went_on = ranks.run(save_case, world=2, **case, **own)[0]
    same = ranks.run(load_case, world=2, **case, **own)[0]
    assert same["loss"] == went_on["loss"]
    for after in ("weights", "restarted"):
        for tensor, value in went_on[after].items():
            np.testing.assert_array_equal(same[after][tensor], value, err_msg=tensor)
    for layout in others:
        resumed = ranks.run(load_case, world=2 if layout else 1, **case, **layout)[0]
        assert resumed["steps"] == 2
        for after in ("weights", "restarted"):
            assert resumed[after].keys() == went_on[after].keys()
            for tensor, value in went_on[after].items():
                np.testing.assert_allclose(resumed[after][tensor], value, rtol=0, atol=1e-5, err_msg=tensor)


@pytest.mark.parametrize("layout", [EP2, TP2, TP2_EP2], ids=["ep2", "tp2", "ep2 with tp2"])
def test_a_saved_mixture_loads_in_transformers(
    ranks: Ranks, tiny_model: Callable[..., str], tmp_path: Path, layout: dict[str, Any]
) -> None:
    source, out = tiny_model("qwen3_moe"), tmp_path / "model"
    mine = ranks.run(save_hf_case, world=2, model=source, path=str(out), **layout)[0]
    hf, before = load_hf(out), as_in_files(dict(load_hf(source).named_parameters()))
    for name, tensor in as_in_files(dict(hf.named_parameters())).items():
        assert not torch.equal(tensor, before[name]), name  # each has been trained
    for tree, values in zip(make_trees(9), mine, strict=True):
        for leaf in range(tree.n_leaves):
            index = path_tokens(tree, leaf)
            with torch.no_grad():
                expected, _ = path_logprobs(hf, tree.tokens[index])
            np.testing.assert_allclose(values[index][1:], expected.numpy(), rtol=0, atol=1e-4)


BALANCED = 0.3  # weight of the balancing loss


def balanced_case(place: Place, model: str, layout: dict[str, Any]) -> dict[str, Any]:
    """The gradient of a step with a balancing loss, and which trees made each row."""
    settings = {"objective": "ppo", "micro_tokens": 256, "aux_loss": BALANCED} | layout
    trainer, trees = open_trainer(place, learner_config(**settings), model), with_signal()
    try:
        stats = train(trainer, trees)
        plan = trainer.planner.plan([TreeStats.of(tree) for tree in trees])
        shares = [pack_share(plan, rank, dict(enumerate(trees))) for rank in range(trainer.layout.dp)]
        rows = [sorted({*batch.tree.tolist()} - {-1}) for (share,) in shares for batch in share]
        gradient = hf_gradients(trainer, adapters=trainer.learn.lora.on)
        return {"gradient": gradient, "stats": stats, "rows": rows}
    finally:
        trainer.close()


def with_signal() -> list[Tree]:
    """Trees of several leaves: all of their tokens are trained on or lead to such."""
    return [tree for tree in make_trees(1) if tree.n_leaves > 1]


def routed(hf: Any, tree: Tree) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per layer: each token's scores ``[T, E]`` and experts ``[T, k]``, by Hugging Face, path by path."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    routers = [module for name, module in hf.named_modules() if name.endswith("mlp.gate")]
    hooks = [
        router.register_forward_hook(lambda _m, _a, out: seen.append((out[0], out[2]))) for router in routers
    ]
    rows: list[dict[int, tuple[torch.Tensor, torch.Tensor]]] = [{} for _ in routers]
    for leaf in range(tree.n_leaves):
        index = path_tokens(tree, leaf)
        seen.clear()
        hf(torch.from_numpy(tree.tokens[index].astype(np.int64))[None])
        for layer, (scores, experts) in zip(rows, seen, strict=True):
            for token, score, expert in zip(index.tolist(), scores, experts, strict=True):
                layer.setdefault(token, (score, expert))
    for hook in hooks:
        hook.remove()
    return [
        (torch.stack([s for s, _ in one.values()]), torch.stack([e for _, e in one.values()])) for one in rows
    ]


@pytest.mark.parametrize(
    "layout",
    [{}, EP2, TP2, TP2_EP2 | {"recompute": "full"}, {"cp": 2, "ep": 2}, EP2 | {"lora": LoraConfig(rank=4)}],
    ids=str,
)
def test_the_balancing_loss_counts_every_token_once(
    ranks: Ranks, tiny_model: Callable[..., str], layout: dict[str, Any]
) -> None:
    """Its gradient beside the objective's, which reaches adapters through a router that stands still; and the
    load that the statistics tell.
    """
    model = tiny_model("qwen3_moe")
    report = ranks.run(balanced_case, world=2 if layout else 1, model=model, layout=layout)[0]
    hf, trees = load_hf(model), with_signal()
    loss = flat_loss(hf, trees, *credit_of(trees, config := learner_config(objective="ppo")), config.learn)
    tokens, loads = sum(tree.n_tokens for tree in trees), []
    assert sorted(tree for row in report["rows"] for tree in row) == list(range(len(trees)))
    for row in report["rows"]:
        layers = zip(*(routed(hf, trees[tree]) for tree in row), strict=True)
        loads.append([])
        for layer in layers:
            scores, experts = (torch.cat([one[i] for one in layer]) for i in (0, 1))
            counts = experts.flatten().bincount(minlength=8)
            share, mean = counts / counts.sum(), scores.softmax(-1).mean(0)
            loss = loss + BALANCED * len(scores) / tokens * 8 * (share * mean).sum()
            loads[-1].append(counts)
    loss.backward()
    adapter = adapter_of(layout.get("lora", LoraConfig()), ModelShape.from_directory(model))
    expected = of_new_adapters(gradients(hf), adapter) if adapter else gradients(hf)
    assert relative_distance(report["gradient"], expected) < 1e-5
    fullest = [
        float(load.max() / load.double().mean()) for load in (sum(one) for one in zip(*loads, strict=True))
    ]
    assert report["stats"]["expert_load"] == pytest.approx(np.mean(fullest))
    assert report["stats"]["expert_load_max"] == pytest.approx(max(fullest))


@pytest.mark.parametrize(
    ("model", "layout", "says"),
    [
        ("qwen3-30b-a3b", {"tp": 2}, "every rank would compute the same experts for the same tokens"),
        ("qwen3-30b-a3b", {"tp": 1, "ep": 3}, "learn.ep=3 does not divide the model's 128 experts"),
        ("qwen3-30b-a3b", {"tp": 512, "sequence_parallel": True}, "learn.tp=512 does not divide"),
        (
            "qwen3-30b-a3b",
            {"tp": 1, "lora": LoraConfig(rank=4, targets=["q", "gate", "down"])},
            "targets: gate, down: in a mixture of experts these are the experts' own, which stand still",
        ),
        ("qwen3-8b", {"tp": 1, "ep": 2}, "learn.ep=2: the model has no experts"),
        ("qwen3-8b", {"tp": 1, "aux_loss": 0.1}, "learn.aux_loss=0.1: the model has no experts"),
    ],
)
def test_layouts_that_would_be_wrong_are_refused(model: str, layout: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        transformer_config(KNOWN[model], LearnConfig(**layout), torch.float32)


def test_experts_are_whole_under_expert_parallelism_and_split_without() -> None:
    """Without, megatron-core would sum their gradients over the wrong ranks if they were whole."""
    for ep, expert_tp in ((1, 4), (8, 1)):
        learn = LearnConfig(tp=4, dp=2, ep=ep, sequence_parallel=True)
        made = transformer_config(KNOWN["qwen3-30b-a3b"], learn, torch.float32)
        assert (made.expert_model_parallel_size, made.expert_tensor_parallel_size) == (ep, expert_tp)
