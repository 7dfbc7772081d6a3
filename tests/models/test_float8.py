"""Float8 checkpoints: their numbers are transformers', whole or in boxes; other quantisations are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import as_in_files, family_config
from float8_models import Scaling, matrices, said, save_float8
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from actors.cli.main import main
from system.engine.embedded.weights import load, unfuse
from system.models import directory
from system.models.files import DTYPES, read_tensors
from system.models.float8 import Float8
from system.models.reading import UnsupportedModel
from system.models.shape import ModelShape
from system.models.weights import WeightReader

SIZES = {
    "vocab_size": 151,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


def tiny(path: Path, family: str = "qwen3", **sizes: Any) -> Path:
    torch.manual_seed(0)
    config = family_config(family, False, "default", **(SIZES | sizes))
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return path


def everything(path: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    reader = WeightReader(path)
    return {name: reader.read(name, dtype) for name in reader.names()}


@pytest.mark.parametrize(("family", "more"), [("qwen3", {}), ("qwen2", {}), ("qwen3_moe", EXPERTS)])
def test_the_numbers_are_transformers(family: str, more: dict[str, int], tmp_path: Path) -> None:
    """Whose own reader wants sizes that blocks divide, and dequantises on a machine without a GPU."""
    model = tiny(tmp_path / "plain", family, **more)
    save_float8(model, tmp_path / "float8", "block", (16, 16))
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "float8", dtype=torch.bfloat16)
    theirs = as_in_files(hf.state_dict())
    mine = everything(tmp_path / "float8", torch.bfloat16)
    assert mine.keys() == theirs.keys() == ModelShape.from_directory(tmp_path / "float8").tensors().keys()
    for name, expected in theirs.items():  # what is not quantised stays float32 there, whatever was asked for
        torch.testing.assert_close(mine[name], expected.bfloat16(), rtol=0, atol=0)
    assert len(matrices(mine)) == (4 + 3 * more.get("num_experts", 1)) * SIZES["num_hidden_layers"]


@pytest.mark.parametrize(
    ("scaling", "method", "block"),
    [
        ("block", "fp8", (128, 128)),
        ("block", "fp8", (40, 56)),
        ("tensor", "fp8", (1, 1)),
        ("block", "compressed-tensors", (40, 56)),
        ("channel", "compressed-tensors", (1, 1)),
        ("tensor", "compressed-tensors", (1, 1)),
    ],
)
def test_sizes_that_no_block_divides_rows_and_whole_matrices(
    scaling: Scaling, method: str, block: tuple[int, int], tmp_path: Path
) -> None:
    """Hidden size 200 has a block of 128 and one of 72; a box may begin and end within any."""
    model = tiny(tmp_path / "plain", hidden_size=200, intermediate_size=136)
    numbers = save_float8(model, tmp_path / "float8", scaling, block, method=method)
    mine, reader = everything(tmp_path / "float8", torch.float32), WeightReader(tmp_path / "float8")
    assert mine.keys() == numbers.keys()
    for name, expected in numbers.items():
        torch.testing.assert_close(mine[name], expected, rtol=0, atol=0)
    name = "model.layers.1.mlp.down_proj.weight"
    for box in ((slice(0, 200), slice(31, 131)), (slice(127, 129), slice(0, 136)), (slice(33, 190),)):
        torch.testing.assert_close(reader.read(name, torch.float32, box), numbers[name][box], rtol=0, atol=0)
    plain = load_file(model / "model.safetensors")
    assert not torch.equal(mine[name], plain[name])  # float8 it was
    torch.testing.assert_close(mine[name], plain[name], rtol=1 / 16, atol=1e-4)


def test_the_embedded_engine_and_exports_read_them(tmp_path: Path) -> None:
    numbers = save_float8(tiny(tmp_path / "plain", "qwen3_moe", **EXPERTS), tmp_path / "float8")
    shape = ModelShape.from_directory(tmp_path / "float8")
    held = load(tmp_path / "float8", shape, torch.bfloat16, torch.device("cpu"))
    for name, tensor in unfuse(shape, held):
        assert torch.equal(tensor, numbers[name].bfloat16()), name
    name = matrices(numbers)[0]
    assert torch.equal(read_tensors(tmp_path / "float8", [name], torch.float32)[name], numbers[name])


def test_a_model_is_written_without_its_float8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = save_float8(tiny(tmp_path / "plain"), tmp_path / "float8")
    assert main(["dequantise", str(tmp_path / "float8"), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == numbers.keys()
    assert all(torch.equal(written[name], numbers[name].bfloat16()) for name in numbers)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert Float8.of_directory(tmp_path / "out") is None
    assert main(["dequantise", str(tmp_path / "out"), str(tmp_path / "again")]) == 2
    assert "is not quantised" in capsys.readouterr().err
    before = sorted((tmp_path / "float8").iterdir())
    assert main(["dequantise", str(tmp_path / "float8"), str(tmp_path / "float8")]) == 2
    assert "name a new directory" in capsys.readouterr().err
    assert sorted((tmp_path / "float8").iterdir()) == before  # nothing that is there is replaced


def lose_scale(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.0.mlp.up_proj.weight_scale_inv"]


def wrong_scale(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight_scale_inv"] = torch.ones(3, 1)


def odd_scale(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    tensors[name] = tensors[name].to(torch.float8_e8m0fnu)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lose_scale, r"up_proj\.weight is float8 and has no scale"),
        (wrong_scale, r"has shape \[96, 64\] and a scale of shape \[3, 1\], which is none for blocks of"),
        (odd_scale, r"up_proj\.weight has a scale of F8_E8M0; supported: F64, F32"),
    ],
)
def test_a_damaged_scale_is_told_before_anything_starts(harm: Any, told: str, tmp_path: Path) -> None:
    save_float8(tiny(tmp_path / "plain"), tmp_path / "float8")
    file = tmp_path / "float8" / "model.safetensors"
    faults = [one for one in directory.faults(tmp_path / "float8") if "tokenizer" not in one]
    assert faults == []
    tensors = load_file(file)
    harm(tensors)
    save_file(tensors, file)
    faults = [one for one in directory.faults(tmp_path / "float8") if "tokenizer" not in one]
    with pytest.raises(UnsupportedModel, match=told):
        raise UnsupportedModel("\n".join(faults))
    if harm is not odd_scale:
        with pytest.raises(UnsupportedModel, match=told):
            everything(tmp_path / "float8", torch.float32)


def test_float8_without_a_word_in_the_configuration_is_refused(tmp_path: Path) -> None:
    save_float8(tiny(tmp_path / "plain"), tmp_path / "float8")
    file = tmp_path / "float8" / "config.json"
    config = json.loads(file.read_text())
    del config["quantization_config"]
    file.write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=r"holds torch\.float8_e4m3fn, which config\.json's"):
        everything(tmp_path / "float8", torch.float32)
    assert any(
        "holds F8_E4M3, which config.json does not" in one for one in directory.faults(tmp_path / "float8")
    )


GROUPS = said("channel", (1, 1), "compressed-tensors")


def group(**weights: Any) -> dict[str, Any]:
    own = {**GROUPS["config_groups"]["group_0"]["weights"], **weights}
    return {**GROUPS, "config_groups": {"group_0": {"weights": own}}}


REFUSED: list[tuple[Any, str]] = [
    *(
        (
            {"quant_method": method, "bits": 4},
            rf"quantization_config\.quant_method '{method}': .*take the model",
        )
        for method in ("gptq", "awq", "bitsandbytes", "mxfp4", "fbgemm_fp8", "modelopt", "torchao")
    ),
    ({"bits": 4}, r"quantization_config\.quant_method None"),
    ("fp8", r"quantization_config 'fp8'; it is a table"),
    ({"quant_method": "fp8", "fmt": "e5m2"}, r"quantization_config\.fmt 'e5m2'; supported: e4m3"),
    ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size \[128\]; it is two whole"),
    ({**GROUPS, "format": "pack-quantized"}, r"quantization_config\.format 'pack-quantized'"),
    ({**GROUPS, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config: sparse weights"),
    ({**GROUPS, "transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}}, "rotated weights"),
    (group(num_bits=4), r"config_groups\.group_0\.weights .*floats of 8 bits"),
    (group(type="int"), r"config_groups\.group_0\.weights .*floats of 8 bits"),
    (group(strategy="group"), r"config_groups\.group_0\.weights .*tensor, channel or block"),
    ({**GROUPS, "config_groups": {}}, "config_groups: no groups"),
]


@pytest.mark.parametrize(("given", "told"), REFUSED)
def test_another_quantisation_is_refused_by_name(given: Any, told: str, tmp_path: Path) -> None:
    """Where plan, doctor, learner and engine read config.json, and where weights are read."""
    config = {"model_type": "qwen3", **SIZES, "quantization_config": given}
    with pytest.raises(UnsupportedModel, match=told):
        ModelShape.from_config(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=rf"config\.json: .*{told}"):
        WeightReader(tmp_path)
    assert any(re.search(told, one) for one in directory.faults(tmp_path))


def test_all_dtypes_of_a_run_can_be_asked_for(tmp_path: Path) -> None:
    numbers = save_float8(tiny(tmp_path / "plain"), tmp_path / "float8")
    name = matrices(numbers)[0]
    for dtype in DTYPES.values():
        assert torch.equal(WeightReader(tmp_path / "float8").read(name, dtype), numbers[name].to(dtype))
