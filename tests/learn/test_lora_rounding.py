"""What bfloat16 takes of small changes: of adapters that are merged, and of moving averages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from learner_ranks import Place, Ranks
from learner_reference import learner_config, make_trees, train
from safetensors.torch import load_file
from test_learner_equality import open_trainer
from test_learner_state import STEP

from system.config import LoraConfig
from system.learn.average import MovingAverage
from system.learn.extract import extract, merge
from system.models.adapter import Adapter, Rounding, factors
from system.models.shape import ModelShape

KIND = Adapter(4, 8.0, ("q", "k", "v", "out", "gate", "up", "down"))
NAME = "model.layers.0.mlp.up_proj.weight"


def young(dtype: torch.dtype, step: float = 2e-4) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A weight of usual size, and an adapter after ten agreeing steps of 2e-5 on B."""
    generator = torch.Generator().manual_seed(0)
    a = torch.empty(4, 64).uniform_(-1 / 8, 1 / 8, generator=generator)
    b = step * torch.randn(48, 4, generator=generator).sign()
    weight = {NAME: (0.02 * torch.randn(48, 64, generator=generator)).to(dtype)}
    return weight, dict(zip(factors(NAME), (a, b), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_is_measured_as_it_is_defined(dtype: torch.dtype) -> None:
    weight, adapter = young(dtype)
    a, b = adapter.values()
    rounding = Rounding()
    merged = KIND.merged(weight, adapter, rounding)[NAME]
    assert merged.dtype == dtype
    wanted = 2.0 * b.double() @ a.double()
    error = ((merged.double() - weight[NAME].double() - wanted).norm() / wanted.norm()).item()
    assert rounding.kept == pytest.approx(1 - error**2, abs=1e-5)
    if dtype == torch.float32:
        assert rounding.kept > 0.9999
    else:
        assert error > 0.5, "most of it is gone"
        assert 0 <= rounding.kept < 0.75


def test_merging_in_slices_is_merging_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it takes in memory does not grow with the weight; five rows at a time do not divide 48."""
    weight, adapter = young(torch.bfloat16)
    found: list[tuple[torch.Tensor, float | None]] = []
    for numbers in (1 << 22, 5 * 64 + 63):
        monkeypatch.setattr("system.models.adapter.MERGED", numbers)
        rounding = Rounding()
        found.append((KIND.merged(weight, adapter, rounding)[NAME], rounding.kept))
    (whole, kept), (sliced, again) = found
    assert torch.equal(whole, sliced)
    assert again == pytest.approx(kept, rel=1e-6)


def test_of_no_change_and_of_one_that_is_lost_whole() -> None:
    rounding = Rounding()
    assert rounding.kept is None
    weight, adapter = young(torch.bfloat16, 0.0)
    KIND.merged(weight, adapter, rounding)
    assert rounding.kept is None, "nothing was to change"
    weight, adapter = young(torch.bfloat16, 1e-9)
    weight[NAME] += weight[NAME].sign() * 0.01  # none is near zero, where bfloat16 is fine
    KIND.merged(weight, adapter, rounding)
    assert rounding.kept == 0.0


def merged_case(place: Place, model: str, path: str) -> dict[str, Any]:
    """Three small steps in bfloat16: a checkpoint, the merged model, the adapters, and what was measured."""
    config = learner_config(**(STEP | {"lr": 2e-5}), tp=place.world, lora=LoraConfig(rank=4, alpha=8.0))
    config.model.dtype = "bfloat16"
    trainer, root = open_trainer(place, config, model), Path(path)
    try:
        before = [*trainer.export()] and trainer.rounding.kept
        for seed in range(3):
            train(trainer, make_trees(seed))
        for _ in trainer.export():
            pass
        pushed = trainer.rounding.kept
        trainer.save(root / "v3", {})
        trainer.saved()
        kept = trainer.save_hf(root / "model")
        trainer.save_adapters(root / "adapter", model)
        return {"before": before, "pushed": pushed, "kept": kept}
    finally:
        trainer.close()


@pytest.mark.parametrize("world", [1, 2])
def test_a_learner_tells_how_much_its_merged_weights_keep_and_float32_keeps_it(
    ranks: Ranks, tiny_model: Callable[..., str], tmp_path: Path, world: int
) -> None:
    base = tiny_model("qwen3")
    report = ranks.run(merged_case, world=world, model=base, path=str(tmp_path))[0]
    assert report["before"] is None
    assert report["kept"] == report["pushed"]
    assert report["kept"] < 0.5
    shape, start = ModelShape.from_directory(base), load_file(Path(base) / "model.safetensors")
    adapters = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    half = {name: one.bfloat16().double() for name, one in start.items()}
    assert adapters.keys() == KIND.tensors(shape).keys()

    def share(directory: str) -> float:
        """By the files alone: of the change that the adapters are."""
        found, wanted, lost = load_file(tmp_path / directory / "model.safetensors"), 0.0, 0.0
        for part in KIND.parts:
            for layer in range(shape.layers):
                name = shape.tensor(part, layer)
                a, b = (adapters[one].double() for one in factors(name))
                change = KIND.scale * b @ a
                origin = half[name] if directory == "model" else start[name].double()
                wanted += float(change.norm() ** 2)
                lost += float((found[name].double() - origin - change).norm() ** 2)
        return 1 - lost / wanted

    assert share("model") == pytest.approx(report["kept"], abs=1e-4)
    assert merge(tmp_path / "adapter", base, tmp_path / "whole", torch.float32, KIND) > 0.999  # pyright: ignore
    assert share("whole") > 0.999
    assert extract(tmp_path / "v3", base, tmp_path / "exact", torch.float32, adapter=KIND) > 0.999  # pyright: ignore
    assert share("exact") > 0.99  # of its adapters in float32, not of those that were rounded
    assert extract(tmp_path / "v3", base, tmp_path / "again", torch.bfloat16, adapter=KIND) == pytest.approx(
        report["kept"], abs=1e-6
    )
    again, trained = (load_file(tmp_path / one / "model.safetensors") for one in ("again", "model"))
    assert all(torch.equal(again[name], one) for name, one in trained.items())


@pytest.mark.parametrize("decay", [0.9, 0.99])
def test_an_average_follows_small_changes_of_a_bfloat16_model(decay: float) -> None:
    """As float64 does, though none of its own moves would be seen in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    model, shown = (torch.nn.Linear(64, 64, dtype=torch.bfloat16) for _ in range(2))
    average = MovingAverage(shown, decay)
    average.reset(model)
    start = model.weight.detach().double()
    mean, weight = start.clone(), 1.0
    for step in range(300):
        # A master's sum of moves of 1e-6, as the model shows it.
        moved = start + 1e-6 * step * torch.randn(64, 64, generator=generator, dtype=torch.float64).sign()
        with torch.no_grad():
            model.weight.copy_(moved)
        average.update(model)
        weight = decay * weight + 1.0
        mean += (model.weight.detach().double() - mean) / weight
    kept = average.mean["weight"]
    assert kept.dtype == torch.float32
    assert (mean - start).norm() > 0
    assert float((kept.double() - mean).norm() / (mean - start).norm()) < 1e-2
    assert torch.equal(shown.weight, kept.bfloat16()), "it computes with what is nearest"


def average_case(place: Place, model: str, path: str) -> dict[str, Any]:
    """A teacher in bfloat16: saved, changed, restored."""
    config = learner_config(**STEP, tp=place.world, teacher="average", teacher_decay=0.99)
    config.model.dtype = "bfloat16"
    trainer = open_trainer(place, config, model)
    try:
        for seed in range(2):
            train(trainer, make_trees(seed))
        kept = {name: one.clone() for name, one in trainer.beside.teacher.mean.items()}
        shown = [one.detach().clone() for one in trainer.beside.teacher.model.parameters()]
        trainer.save(path, {})
        trainer.saved()
        train(trainer, make_trees(3))
        trainer.load(path)
        teacher = trainer.beside.teacher
        return {
            "fine": any(not torch.equal(one, one.bfloat16().float()) for one in kept.values()),
            "mean": all(torch.equal(one, kept[name]) for name, one in teacher.mean.items()),
            "shown": all(map(torch.equal, teacher.model.parameters(), shown)),
            "weight": teacher.weight,
        }
    finally:
        trainer.close()


def test_an_average_comes_back_from_a_checkpoint_in_float32(
    ranks: Ranks, tiny_model: Callable[..., str], tmp_path: Path
) -> None:
    for report in ranks.run(average_case, world=2, model=tiny_model(), path=str(tmp_path / "v2")):
        assert report == {"fine": True, "mean": True, "shown": True, "weight": 1 + 0.99 * (1 + 0.99)}
