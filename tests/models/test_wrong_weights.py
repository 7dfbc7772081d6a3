"""Files of weights that would make another model than they hold, or none: refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tiny_shape import tiny_shape

from system.engine.embedded.weights import load
from system.models.directory import INDEX, SINGLE, faults, header, weight_files
from system.models.reading import UnsupportedModel
from system.models.shape import ModelShape
from system.models.weights import WeightReader

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SHAPE = tiny_shape(12)
Tensors = dict[str, np.ndarray]


def drawn(**changes: Any) -> Tensors:
    """Of every tensor that such a model has."""
    numbers = np.random.default_rng(0)
    shapes = ModelShape.from_config(SHAPE | changes).tensors()
    return {name: numbers.normal(size=size).astype(np.float32) for name, size in shapes.items()}


def written(path: Path, tensors: Tensors, **changes: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(SHAPE | changes))
    save_file(tensors, path / SINGLE)
    return path


def found(path: Path) -> list[str]:
    """But for the tokenizer, which has none of these to do with."""
    return [one for one in faults(path) if "tokenizer" not in one]


def no_head(tensors: Tensors) -> Tensors:
    return tensors


def same_head(tensors: Tensors) -> Tensors:
    return tensors | {HEAD: tensors[EMBEDDING]}


def frequencies(tensors: Tensors) -> Tensors:
    return tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}


@pytest.mark.parametrize("more", [no_head, same_head, frequencies])
def test_what_is_there_twice_or_follows_from_the_rest_is_no_fault(
    more: Callable[[Tensors], Tensors], tmp_path: Path
) -> None:
    path = written(tmp_path, more(drawn()))
    assert found(path) == []
    load(path, ModelShape.from_directory(path), torch.float32, torch.device("cpu"))


def other_head(tensors: Tensors) -> Tensors:
    head = tensors[EMBEDDING].copy()
    head[-1, -1] += 1.0
    return tensors | {HEAD: head}


def short_head(tensors: Tensors) -> Tensors:
    return tensors | {HEAD: tensors[EMBEDDING][:-1]}


def bias(tensors: Tensors) -> Tensors:
    return tensors | {"model.layers.1.self_attn.q_proj.bias": np.ones(8, np.float32)}


WRONG: list[tuple[Callable[[Tensors], Tensors], str]] = [
    (other_head, rf"tie_word_embeddings true, and {HEAD} is not {EMBEDDING}; .* to false, or take"),
    (short_head, rf"tie_word_embeddings true, and {HEAD} is not {EMBEDDING}"),
    (
        lambda _: drawn(num_hidden_layers=3),
        r"the weights have 3 layers, config.json says 2: correct num_hidden_layers, or take",
    ),
    (
        bias,
        r"1 tensors have no place in the qwen3 of config\.json, first model\.layers\.1\.self_attn\.q_proj\.b",
    ),
]


@pytest.mark.parametrize(("harm", "says"), WRONG)
def test_tensors_that_would_be_left_out_are_refused(
    harm: Callable[[Tensors], Tensors], says: str, tmp_path: Path
) -> None:
    (line,) = found(written(tmp_path, harm(drawn())))
    assert re.search(says, line), line


def test_scales_of_another_layer_are_not_taken_for_scales_of_this_model(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight_scale"
    (line,) = found(written(tmp_path, drawn() | {name: np.ones(1, np.float32)}))
    assert f"first {name}" in line


def test_a_large_head_is_compared_by_pieces_and_as_a_whole_when_it_is_read(tmp_path: Path) -> None:
    """One row of 512 that differs: between two pieces, where only the reader finds it."""
    sizes = {"vocab_size": 4096, "hidden_size": 512}
    tensors = drawn(**sizes)
    head = tensors[EMBEDDING].copy()
    head[100] += 1.0
    path = written(tmp_path, tensors | {HEAD: head}, **sizes)
    shape, reader = ModelShape.from_directory(path), WeightReader(path)
    assert found(path) == []
    reader.check_tied(shape, torch.float32, (slice(0, 100), slice(0, 512)))
    for box in (None, (slice(0, 101), slice(0, 512))):
        with pytest.raises(UnsupportedModel, match="tie_word_embeddings true, and lm_head"):
            reader.check_tied(shape, torch.float32, box)
    with pytest.raises(UnsupportedModel, match="tie_word_embeddings true, and lm_head"):
        load(path, shape, torch.float32, torch.device("cpu"))
    written(tmp_path, tensors | {HEAD: tensors[EMBEDDING] + 1.0}, **sizes)
    assert "tie_word_embeddings" in found(path)[0]


def test_an_index_that_does_not_agree_with_the_files_is_refused(tmp_path: Path) -> None:
    tensors = drawn()
    names = sorted(tensors)
    where = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    written(tmp_path, tensors)
    (tmp_path / SINGLE).unlink()

    def spread(moved: str = "", double: str = "", indexed: str = "") -> str:
        """``moved`` is in the other file, ``double`` in both, and the index names ``indexed``, too."""
        for file in set(where.values()):
            here = [n for n in names if (where[n] == file) != (n == moved) or n == double]
            save_file({name: tensors[name] for name in here}, tmp_path / file)
        index = where | ({indexed: "model-0.safetensors"} if indexed else {})
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
        return "\n".join(found(tmp_path))

    assert spread() == ""
    assert weight_files(tmp_path) == where
    first = names[0]
    told = spread(moved=first)
    assert f"names model-0.safetensors for {first}, and it is in model-1.safetensors: download" in told
    assert f"{first} is in model-0.safetensors and in model-1.safetensors" in spread(double=first)
    assert f"names model-0.safetensors for {HEAD}, and no file has it" in spread(indexed=HEAD)
    with pytest.raises(UnsupportedModel, match="no file has it"):
        WeightReader(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_not_finite_are_refused_where_they_are_read(
    value: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors, name = drawn(), "model.layers.1.mlp.down_proj.weight"
    tensors[name][3, 5] = value
    reader = WeightReader(written(tmp_path, tensors))
    assert name in header(tmp_path / SINGLE)
    reader.read(name, dtype, (slice(0, 3), slice(0, 8)))
    for box in (None, (slice(3, 4), slice(0, 8))):
        with pytest.raises(UnsupportedModel, match=f"{name} holds numbers that are not finite"):
            reader.read(name, dtype, box)


def test_large_numbers_are_finite(tmp_path: Path) -> None:
    """Though their sum is not."""
    tensors = drawn()
    tensors[EMBEDDING][:] = 3e38
    assert torch.isfinite(WeightReader(written(tmp_path, tensors)).read(EMBEDDING, torch.float32)).all()
