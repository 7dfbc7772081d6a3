"""Every family in every kind of layout computes Hugging Face's log-probabilities and gradients."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_models import NAMES, VARIANTS, documented, register
from learner_ranks import Place, Ranks
from learner_reference import (
    credit_of,
    flat_loss,
    gradients,
    learner_config,
    load_hf,
    make_trees,
    path_logprobs,
    path_tokens,
    relative_distance,
    save_tiny_model,
    train,
)
from test_learner_equality import hf_gradients, open_trainer

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tp": 2, "sequence_parallel": True, "recompute": "selective"},
    "pp2": {"pp": 2, "recompute": "full"},
    "cp2": {"cp": 2},
}
WORK: dict[str, Any] = {"objective": "ppo", "micro_tokens": 64}


def family_case(place: Place, model: str, layout: dict[str, Any], source: str = "") -> dict[str, Any]:
    """Log-probabilities of some trees, and the loss and gradient of a step on others, which changes nothing.

    ``source``: of a family that is registered first.
    """
    if source:
        register(source)
    trainer = open_trainer(place, learner_config(**(WORK | layout)), model)
    try:
        scores = trainer.logprobs(make_trees(0))
        loss = train(trainer, make_trees(1))["loss"]
        return {"scores": scores, "loss": loss, "gradient": hf_gradients(trainer)}
    finally:
        trainer.close()


@cache
def reference(model: str) -> tuple[list[list[np.ndarray]], float, dict[str, np.ndarray]]:
    """The same by Hugging Face, path by path: log-probabilities of each tree's leaves, loss, gradient."""
    hf, config, trees = load_hf(model), learner_config(**WORK), make_trees(1)
    scores: list[list[np.ndarray]] = []
    with torch.no_grad():
        for tree in make_trees(0):
            paths = [tree.tokens[path_tokens(tree, leaf)] for leaf in range(tree.n_leaves)]
            scores.append([path_logprobs(hf, path)[0].numpy() for path in paths])
    loss = flat_loss(hf, trees, *credit_of(trees, config), config.learn)
    loss.backward()
    return scores, float(loss), gradients(hf)


def assert_equal(reports: list[dict[str, Any]], model: str) -> None:
    scores, loss, gradient = reference(model)
    for report in reports:
        assert report["loss"] == pytest.approx(loss, rel=1e-5)
        for tree, mine, paths in zip(make_trees(0), report["scores"], scores, strict=True):
            for leaf, expected in enumerate(paths):
                found = mine[path_tokens(tree, leaf)][1:]
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert relative_distance(reports[0]["gradient"], gradient) < 1e-5


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize(("family", "tied", "rope"), VARIANTS, ids=NAMES)
def test_a_family_equals_hugging_face(
    ranks: Ranks, tiny_model: Callable[..., str], family: str, tied: bool, rope: str, layout: str
) -> None:
    model, world = tiny_model(family, tied=tied, rope=rope), 1 if layout == "tp1" else 2
    assert_equal(ranks.run(family_case, world=world, model=model, layout=LAYOUTS[layout]), model)


def test_a_family_is_added_as_the_documentation_says(ranks: Ranks, tmp_path: Path) -> None:
    """In the learner; the engine's part is in tests/engine/test_embedded.py."""
    save_tiny_model(tmp_path, "seed_oss", tied=False, rope="yarn")
    reports = ranks.run(family_case, world=2, model=str(tmp_path), layout=LAYOUTS["tp2"], source=documented())
    assert_equal(reports, str(tmp_path))


def left_case(place: Place, model: str) -> tuple[int, int]:
    """Threads of gloo before a trainer and after it."""

    def threads() -> int:
        gc.collect()
        return sum("gloo" in path.read_text() for path in Path("/proc/self/task").glob("*/comm"))

    before = threads()
    family_case(place, model, {})
    return before, threads()


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_a_closed_trainer_leaves_no_group_behind(
    family: str, ranks: Ranks, tiny_model: Callable[..., str]
) -> None:
    """Its threads would go on polling: hundreds of trainers took three quarters of these tests' time."""
    for before, after in ranks.run(left_case, world=1, model=tiny_model(family)):
        assert after <= max(before, 3), "three stay from the first group on, whatever comes after"
