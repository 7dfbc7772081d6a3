"""A supervised step against Hugging Face: loss and gradient of the same masked tokens, in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from learner_ranks import Place, Ranks
from learner_reference import VOCAB, learner_config, load_hf
from test_learner_equality import hf_gradients, open_trainer

from system.sft.example import Example
from system.tree.pack import pack_share
from system.tree.record import Kind
from system.tree.stats import TreeStats


def examples(seed: int, count: int) -> list[Example]:
    """Conversations of random tokens: one turn, and several with what others say between them."""
    rng = np.random.default_rng(seed)

    def node(kind: Kind) -> tuple[Kind, np.ndarray]:
        return kind, rng.integers(0, VOCAB, int(rng.integers(1, 12))).astype(np.int32)

    kinds = [(Kind.PROMPT, Kind.MODEL, *(i % 4) * (Kind.TOOL, Kind.MODEL)) for i in range(count)]
    return [Example.of(str(i), [node(kind) for kind in these]) for i, these in enumerate(kinds)]


def hf_loss(model: Any, batch: list[Example]) -> torch.Tensor:
    """Mean negative log-likelihood of the MODEL tokens of all examples, each by itself."""
    total, count = torch.zeros(()), 0
    for one in batch:
        ids = torch.from_numpy(one.tokens.astype(np.int64))
        mask = torch.from_numpy(np.repeat(one.kind == Kind.MODEL, one.end - one.start))
        labels = torch.where(mask, ids, -100)  # Hugging Face's own mask
        mean = model(ids[None], labels=labels[None]).loss
        total = total + mean * int(mask[1:].sum())
        count += int(mask[1:].sum())
    return total / count


def supervised_case(place: Place, model: str, layout: dict[str, int]) -> dict[str, float]:
    trainer = open_trainer(place, learner_config(micro_tokens=64, **layout), model)
    try:
        hf, batch = load_hf(model), examples(3, 7)
        trees = [one.tree() for one in batch]
        plan = trainer.planner.supervised([TreeStats.of(tree) for tree in trees])
        (micro_batches,) = pack_share(plan, trainer.layout.dp_rank, dict(enumerate(trees)))
        looked = trainer.supervised_loss(micro_batches)
        stats = trainer.supervise(micro_batches, 0.0)
        mine = hf_gradients(trainer)
        loss = hf_loss(hf, batch)
        loss.backward()
        worst = {"loss": abs(stats["loss"] - float(loss)), "looked": abs(looked - float(loss))}
        if place.rank == 0:
            named = {name: p.grad.numpy() for name, p in hf.named_parameters() if p.grad is not None}
            assert mine.keys() == named.keys()
            worst["gradient"] = max(float(np.abs(mine[name] - named[name]).max()) for name in named)
            worst["size"] = max(float(np.abs(grad).max()) for grad in named.values())
            worst["rows"] = float(len(micro_batches))
        return worst
    finally:
        trainer.close()


@pytest.mark.parametrize("layout", [{"tp": 1}, {"tp": 2}, {"pp": 2}, {"dp": 2}, {"cp": 2}], ids=str)
def test_loss_and_gradient_are_hugging_face_s(
    ranks: Ranks, tiny_model: Callable[..., str], layout: dict[str, int]
) -> None:
    world = int(np.prod([*layout.values()]))
    found = ranks.run(supervised_case, world=world, model=tiny_model("qwen3"), layout=layout)
    for worst in found:
        assert worst["loss"] < 2e-6
        assert worst["looked"] < 2e-6
    assert found[0]["gradient"] < 3e-6
    assert found[0]["size"] > 0.01
    if layout == {"tp": 1}:
        assert found[0]["rows"] > 1, "several rows, so that their weights matter"
