"""Every parallel layout computes what one rank computes; checkpoints and weights move between layouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_ranks import Place, Ranks
from learner_reference import learner_config, make_trees, relative_distance, save_tiny_model
from test_learner_equality import hf_gradients, open_trainer
from test_learner_state import STEP, weights_of

Layouts = Sequence[dict[str, Any]]

# Trees cut to 48 tokens make several micro-batches of unequal length; 256 leaves fewer than there are stages.
MANY, FEW = {"micro_tokens": 48}, {"micro_tokens": 256}
SHARED: Layouts = (
    {"tp": 1} | MANY,
    {"tp": 2, "sequence_parallel": True, "recompute": "selective"} | MANY,
    {"pp": 2, "recompute": "full"} | MANY,
    {"dp": 2, "distributed_optimizer": True} | MANY,
    {"tp": 2, "pp": 2} | MANY,
    {"tp": 2, "pp": 2, "sequence_parallel": True, "recompute": "full"} | MANY,
    {"pp": 2, "dp": 2, "distributed_optimizer": True} | MANY,
    {"tp": 2, "dp": 2, "distributed_optimizer": True, "sequence_parallel": True} | MANY,
    {"pp": 4} | FEW,
)


def world_of(layout: dict[str, Any]) -> int:
    return layout.get("tp", 1) * layout.get("pp", 1) * layout.get("dp", 1)


@pytest.fixture(scope="session")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A function (family, tied) -> directory of a tiny model with four layers, so that it has four stages."""
    made: dict[tuple[str, bool], Path] = {}

    def get(family: str, tied: bool) -> str:
        if (family, tied) not in made:
            made[family, tied] = tmp_path_factory.mktemp(f"deep-{family}-{tied}")
            save_tiny_model(made[family, tied], family, tied=tied, num_hidden_layers=4)
        return str(made[family, tied])

    return get


# ---------------------------------------------------------------------- one step in every layout


def step_case(place: Place, model: str, layout: dict[str, Any]) -> dict[str, Any]:
    """The gradient of a batch, then two optimizer steps with every kind of forward pass there is."""
    import torch.distributed as dist

    config = learner_config(kl_coef=0.1, **(STEP | layout))
    trainer = open_trainer(place, config, model)
    try:
        learn = config.learn
        step, learn.lr, learn.grad_clip = (learn.lr, learn.grad_clip), 0.0, 0.0
        first = trainer.train(make_trees(1), version=6)
        # The reduced gradient is spread over the ranks under a distributed optimizer: compare its steps.
        gradient = None if learn.distributed_optimizer else hf_gradients(trainer)
        trainer.reset_optimizer()
        (learn.lr, learn.grad_clip), learn.updates = step, 2
        before = weights_of(trainer)
        stats = trainer.train(make_trees(2), version=6)
        after = weights_of(trainer)
        scores = trainer.logprobs(make_trees(3)[:2])
        fingerprint = torch.stack([p.detach().double().sum() for p in trainer.model.parameters()])
        copies = [torch.empty_like(fingerprint) for _ in range(trainer.layout.dp)]
        dist.all_gather(copies, fingerprint, group=trainer.layout.dp_group)
        return {
            "gradient": gradient,
            "norm": first["grad_norm"],
            "loss": first["loss"],
            "stats": {k: v for k, v in stats.items() if not k.startswith("time_")},
            "update": {n: after[n] - before[n] for n in after},
            "scores": scores,
            "copies agree": all(torch.equal(copy, copies[0]) for copy in copies),
        }
    finally:
        trainer.close()


@pytest.mark.parametrize(("family", "tied"), [("qwen3", False), ("qwen2", True)])
def test_every_layout_takes_the_same_step(
    ranks: Ranks, deep_model: Callable[..., str], family: str, tied: bool
) -> None:
    model = deep_model(family, tied)
    whole: dict[int, dict[str, Any]] = {}
    for layout in SHARED:
        micro = layout["micro_tokens"]
        if micro not in whole:
            (whole[micro],) = ranks.run(step_case, world=1, model=model, layout={"micro_tokens": micro})
        reports = ranks.run(step_case, world=world_of(layout), model=model, layout=layout)
        expected, first = whole[micro], reports[0]
        if first["gradient"]:
            assert relative_distance(first["gradient"], expected["gradient"]) < 1e-5, layout
        assert relative_distance(first["update"], expected["update"]) < 1e-5, layout
        for report in reports:  # the same figures on every rank, whichever computed them
            assert report["loss"] == pytest.approx(expected["loss"], rel=1e-5), layout
            assert report["norm"] == pytest.approx(expected["norm"], rel=1e-5), layout
            assert report["stats"] == pytest.approx(expected["stats"], rel=1e-4, abs=1e-6), layout
            assert report["copies agree"], layout
            for mine, theirs in zip(report["scores"], expected["scores"], strict=True):
                np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5)
