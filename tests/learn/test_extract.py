"""The model of a checkpoint is written without a learner, and is the one that a learner would write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from learner_ranks import Place, Ranks
from learner_reference import learner_config, load_hf, make_trees, train
from safetensors.torch import load_file
from test_learner_equality import open_trainer
from test_learner_state import STEP

from system.errors import CheckpointError
from system.learn.checkpoint import MANIFEST
from system.learn.extract import extract


def saved_case(place: Place, model: str, path: str) -> None:
    trainer = open_trainer(place, learner_config(tp=2, **STEP), model)
    try:
        train(trainer, make_trees(4))
        trainer.save(path, {})
        trainer.saved()
        trainer.save_hf(Path(path).with_name("model"))
    finally:
        trainer.close()


@pytest.fixture
def saved(ranks: Ranks, tiny_model: Callable[..., str], tmp_path: Path) -> Path:
    ranks.run(saved_case, world=2, model=tiny_model(), path=str(tmp_path / "v1"))
    return tmp_path


def whole(directory: Path) -> dict[str, torch.Tensor]:
    files = [load_file(file) for file in directory.glob("*.safetensors")]
    return {name: tensor for one in files for name, tensor in one.items()}


def test_the_model_of_a_checkpoint_is_what_the_learner_writes(
    saved: Path, tiny_model: Callable[..., str]
) -> None:
    for file_bytes, files in ((1 << 30, 1), (1 << 14, None)):
        target = saved / f"extracted-{file_bytes}"
        extract(saved / "v1", tiny_model(), target, torch.float32, file_bytes=file_bytes)
        found, expected = whole(target), whole(saved / "model")
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
        assert files is None or len([*target.glob("*.safetensors")]) == files
        load_hf(str(target))
    assert len([*target.glob("*.safetensors")]) > 3
    assert len([*saved.iterdir()]) == 4, "nothing half-written"


def test_of_weights_in_bfloat16(saved: Path, tiny_model: Callable[..., str]) -> None:
    extract(saved / "v1", tiny_model(), saved / "half", torch.bfloat16)
    expected = whole(saved / "model")
    for name, tensor in whole(saved / "half").items():
        assert torch.equal(tensor, expected[name].bfloat16()), name


def test_what_is_no_whole_checkpoint_is_told(saved: Path, tiny_model: Callable[..., str]) -> None:
    def refused(says: str, source: str = tiny_model()) -> None:
        with pytest.raises(CheckpointError, match=says):
            extract(saved / "v1", source, saved / "target", torch.float32)
        assert not (saved / "target").exists()

    refused("it does not hold parameter/lm_head|has shape|does not hold", tiny_model("qwen2"))
    part = next(file for file in sorted((saved / "v1").iterdir()) if file.suffix == ".distcp")
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    refused(f"{part.name} is damaged")
    part.unlink()
    refused(f"{part.name} is missing")
    (saved / "v1" / MANIFEST).unlink()
    refused("not a learner checkpoint")
