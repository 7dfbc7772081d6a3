"""bfloat16 with float32 master weights against float32, within the bounds that docs/precision.md states; and
float8 checkpoints in the learner.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from float8_models import save_float8
from learner_ranks import Place, Ranks
from learner_reference import learner_config, make_trees, relative_distance, save_tiny_model, supervise, train
from safetensors.torch import load_file
from test_learner_equality import hf_gradients, open_trainer

from system.config import PartConfig
from system.models.files import dequantise
from system.models.float8 import Float8

LOG_P_MEAN, LOG_P_MOST = 0.015, 0.1  # of a log-probability; measured: 0.0083, 0.033
GRADIENT = 0.04  # relative distance of the whole gradient; measured: 0.021
MOVEMENT = 0.12  # relative distance of what the steps change; measured: 0.061, of small ones 0.041
SMALL_STEPS, SMALL_LR = 12, 1e-6


def masters(trainer: Any) -> dict[str, np.ndarray]:
    """The float32 weights that the optimizer steps, flattened, by their names in the learner."""
    return {
        name: one.values.float().reshape(-1).numpy().copy()
        for name, parameter in trainer.model.named_parameters()
        for one in trainer.optimizer.slices(parameter, mine=True)
        if one.kind == "parameter"
    }


def precision_case(place: Place, model: str, dtype: str, offload: bool) -> dict[str, Any]:
    """Log-probabilities, a gradient, three steps of a usual size; then many small ones from there."""
    config = learner_config(objective="ppo", offload=offload)
    config.model.dtype = dtype
    trainer = open_trainer(place, config, model)
    try:
        found: dict[str, Any] = {"scores": trainer.logprobs(make_trees(0))}
        train(trainer, make_trees(1))  # at learning rate 0
        found["gradient"] = hf_gradients(trainer)
        found["sums"] = {str(one.main_grad.dtype) for one in trainer.model.parameters()}
        trainer.reset_optimizer()
        places = [masters(trainer)]
        for lr, steps in ((1e-3, 3), (SMALL_LR, SMALL_STEPS)):
            for _ in range(steps):
                supervise(trainer, make_trees(2), lr)
            places.append(masters(trainer))
        found["masters"] = places
        found["served"] = {n: p.detach().reshape(-1) for n, p in trainer.model.named_parameters()}
        found["kinds"] = {str(p.dtype) for p in trainer.model.parameters()}
        found["served"] = {n: p.float().numpy() for n, p in found["served"].items()}
        return found
    finally:
        trainer.close()


def moved(case: dict[str, Any], leg: int) -> dict[str, np.ndarray]:
    before, after = case["masters"][leg : leg + 2]
    return {name: after[name].astype(np.float64) - before[name] for name in after}


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of bfloat16 numbers, so that both learners begin with the same ones."""
    path = tmp_path_factory.mktemp("rounded")
    save_tiny_model(path, "qwen3", tied=False, dtype=torch.bfloat16)
    return str(path)


@pytest.mark.parametrize("offload", [False, True])
def test_bfloat16_is_float32_within_the_stated_bounds(ranks: Ranks, rounded: str, offload: bool) -> None:
    full, half = (
        ranks.run(precision_case, world=1, model=rounded, dtype=dtype, offload=offload)[0]
        for dtype in ("float32", "bfloat16")
    )
    assert half["kinds"] == {"torch.bfloat16"}
    assert half["sums"] == {"torch.float32"}, "gradients add up in float32"
    errors = np.abs(np.concatenate([a - b for a, b in zip(half["scores"], full["scores"], strict=True)]))
    errors = errors[np.isfinite(errors)]
    assert 0 < errors.mean() < LOG_P_MEAN
    assert errors.max() < LOG_P_MOST
    assert relative_distance(half["gradient"], full["gradient"]) < GRADIENT
    for leg in (0, 1):
        assert relative_distance(moved(half, leg), moved(full, leg)) < MOVEMENT
    for name, held in half["served"].items():
        np.testing.assert_array_equal(held, rounded_to_bfloat16(half["masters"][2][name]))
    # What is served hardly moves with one small step; without master weights that would be all.
    lost = without_masters(half["masters"][1], moved(half, 1))
    assert relative_distance(lost, moved(full, 1)) > 5 * MOVEMENT


def rounded_to_bfloat16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).bfloat16().float().numpy()


def without_masters(start: dict[str, np.ndarray], change: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What becomes of ``change``, in equal steps, where each step's sum is rounded to bfloat16."""
    kept: dict[str, np.ndarray] = {}
    for name, values in start.items():
        before = now = rounded_to_bfloat16(values)
        for _ in range(SMALL_STEPS):
            now = rounded_to_bfloat16(now + (change[name] / SMALL_STEPS).astype(np.float32))
        kept[name] = now.astype(np.float64) - before
    return kept


def float8_case(place: Place, model: str, out: str) -> list[np.ndarray]:
    config = learner_config(tp=2, sequence_parallel=True)
    config.model.dtype = "bfloat16"
    trainer = open_trainer(place, config, model)
    try:
        trainer.save_hf(out)
        return trainer.logprobs(make_trees(0))
    finally:
        trainer.close()


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_a_float8_model_is_the_model_that_it_stands_for(
    ranks: Ranks, tiny_model: Callable[..., str], family: str, tmp_path: Path
) -> None:
    """Blocks end within the shards of both ranks; what is written is no float8 any more."""
    numbers = save_float8(tiny_model(family), tmp_path / "float8", "block", (40, 56))
    dequantise(tmp_path / "float8", tmp_path / "plain", torch.bfloat16)
    scores = [
        ranks.run(float8_case, world=2, model=str(tmp_path / of), out=str(tmp_path / f"{of}-out"))[0]
        for of in ("float8", "plain")
    ]
    for mine, plain in zip(*scores, strict=True):
        np.testing.assert_array_equal(mine, plain)
    assert Float8.of_directory(tmp_path / "float8-out") is None
    assert "quantization_config" not in json.loads((tmp_path / "float8-out" / "config.json").read_text())
    written = load_file(tmp_path / "float8-out" / "model.safetensors")
    assert written.keys() == numbers.keys()
    assert all(torch.equal(written[name], numbers[name].bfloat16()) for name in numbers)


def sampled_case(place: Place, model: str, scores: list[np.ndarray] | None, **learn: Any) -> Any:
    """Without ``scores`` the log-probabilities of some trees; else a step on these as if an engine that
    gives such scores had sampled them from the weights that are trained.
    """
    trainer = open_trainer(place, learner_config(**learn), model)
    try:
        if scores is None:
            return trainer.logprobs(make_trees(0))
        trees = [
            replace(tree, logprob=own, version=np.full_like(tree.version, 6))
            for tree, own in zip(make_trees(0), scores, strict=True)
        ]
        return train(trainer, trees)
    finally:
        trainer.close()


def test_float8_in_the_engine_shows_and_is_bounded(
    ranks: Ranks, tiny_model: Callable[..., str], tmp_path: Path
) -> None:
    """The same weights in float8, as an engine rounds them: far above what arithmetic alone makes."""
    save_float8(tiny_model(), tmp_path / "float8", "channel", method="compressed-tensors")

    def run(model: str, scores: list[np.ndarray] | None = None, **learn: Any) -> Any:
        return ranks.run(sampled_case, world=1, model=model, scores=scores, **learn)[0]

    exact, rounded = run(tiny_model()), run(str(tmp_path / "float8"))
    strict = {"correction": PartConfig("geo-reject", {"low": 0.999, "high": 1.001})}
    alone, shown, capped, rejecting = (
        run(tiny_model(), scores, objective="decoupled", **more)
        for scores, more in ((exact, {}), (rounded, {}), (rounded, {"tis_cap": 1.02}), (rounded, strict))
    )
    assert alone["engine_kl"] < 1e-6
    assert 1e-3 < shown["engine_kl"] < 1e-2  # measured: 4e-3, a factor of 1.2 for the worst token
    assert shown["engine_logprob_diff_max"] < 0.4
    assert shown["tis_capped"] == 0 < capped["tis_capped"]
    assert capped["tis_mean"] < shown["tis_mean"] < 1.02
    assert rejecting["learn/rejected_leaves"] == 1, "bounds that are meant for bfloat16 leave nothing"
