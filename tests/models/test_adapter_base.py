"""Adapters are taken for the model that they were trained on, and for no other of the same shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_wrong_weights import SHAPE, Tensors, drawn, written

from system.config import Config, load
from system.doctor.adapters import misfit, other_base
from system.models.adapter import CONFIG, WEIGHTS, Adapter, AdapterError, read_adapter
from system.models.shape import ModelShape
from system.models.weights import SAMPLED, fingerprint

KIND = Adapter(2, 4.0, ("q", "down"))
MODEL = ModelShape.from_config(SHAPE)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return written(tmp_path / "mine", drawn())


@pytest.fixture
def adapters(model: Path, tmp_path: Path) -> Path:
    """Trained on that model."""
    tensors = {name: torch.ones(size) for name, size in KIND.tensors(MODEL).items()}
    KIND.write(tmp_path / "adapters", tensors, "mine", model)
    return tmp_path / "adapters"


def changed(tensors: Tensors) -> Tensors:
    """By less than a person would see, as after some supervised steps."""
    return {name: tensor * 1.01 for name, tensor in tensors.items()}


def without_fingerprint(adapters: Path, base: str | None) -> None:
    """As another program writes them, which knows the name of the model at most."""
    save_file(load_file(adapters / WEIGHTS), adapters / WEIGHTS)
    config = json.loads((adapters / CONFIG).read_text())
    (adapters / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": base}))


def recipe(model: Path, adapters: Path) -> Config:
    words = ["learn.lora.rank=2", "learn.lora.alpha=4", "learn.lora.targets=[q, down]"]
    return load(None, [f"model.path={model}", f"learn.lora.init={adapters}", *words])


def test_a_model_is_the_same_in_any_dtype_and_anywhere(model: Path, tmp_path: Path) -> None:
    there = written(tmp_path / "there", drawn())
    assert fingerprint(there) == fingerprint(model)
    half = {name: torch.from_numpy(tensor).bfloat16() for name, tensor in drawn().items()}
    save_file(half, there / "model.safetensors")
    assert fingerprint(there) == fingerprint(model)
    assert fingerprint(written(tmp_path / "there", changed(drawn()))) != fingerprint(model)
    many = written(tmp_path / "there", drawn(num_hidden_layers=30), num_hidden_layers=30)
    assert len(ModelShape.from_directory(many).tensors()) > SAMPLED
    assert fingerprint(many) != fingerprint(model)


def test_adapters_of_another_model_are_refused(model: Path, adapters: Path, tmp_path: Path) -> None:
    other = written(tmp_path / "other", changed(drawn()))
    assert read_adapter(adapters, MODEL, KIND, model).keys() == KIND.tensors(MODEL).keys()
    with pytest.raises(
        AdapterError, match=r"were trained on another model than .*other \(mine, other weights"
    ):
        read_adapter(adapters, MODEL, KIND, other)
    assert [*misfit(recipe(model, adapters), MODEL)] == []
    (line,) = misfit(recipe(other, adapters), MODEL)
    assert line.startswith(f"learn.lora.init={adapters}: {adapters}: these adapters were trained on another")
    with safe_open(adapters / WEIGHTS, framework="pt") as file:
        assert file.metadata()["format"] == "pt"  # without which transformers takes no file


def test_of_adapters_that_others_made_the_name_of_their_model_is_told(model: Path, adapters: Path) -> None:
    """And a name that agrees, in whatever place it stands, or that none was given, is not."""
    for base, told in (
        ("Qwen/Qwen3-8B", True),
        ("/there/Mine", False),
        ("someone/mine", False),
        (None, False),
    ):
        without_fingerprint(adapters, base)
        lines = [*other_base(recipe(model, adapters))]
        assert bool(lines) == told, base
        assert all(
            "belong to Qwen/Qwen3-8B (base_model_name_or_path), and model.path is mine" in x for x in lines
        )
        assert [*misfit(recipe(model, adapters), MODEL)] == []


def test_a_model_that_was_moved_has_its_adapters(model: Path, adapters: Path, tmp_path: Path) -> None:
    model.rename(moved := tmp_path / "moved")
    assert [*misfit(recipe(moved, adapters), MODEL)] == []
    assert [*other_base(recipe(moved, adapters))] == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_adapters_that_are_not_finite_are_refused(adapters: Path, value: float) -> None:
    tensors = load_file(adapters / WEIGHTS)
    name = sorted(tensors)[3]
    tensors[name][-1, -1] = value
    save_file(tensors, adapters / WEIGHTS)
    with pytest.raises(AdapterError, match=f"{name} holds numbers that are not finite"):
        read_adapter(adapters, MODEL, KIND)
