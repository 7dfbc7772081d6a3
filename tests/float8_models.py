"""Float8 checkpoints made of tiny models, and what their numbers are by the plainest reckoning."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Scaling = Literal["block", "channel", "tensor"]
LARGEST = torch.finfo(torch.float8_e4m3fn).max


def matrices(tensors: dict[str, Tensor]) -> list[str]:
    """What published float8 models quantise: the projections, the experts' too."""
    return [name for name in tensors if name.endswith("proj.weight")]


def quantised(weight: Tensor, scaling: Scaling, block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """(float8 numbers, scales, float32 numbers that they stand for), block by block in a loop."""
    rows, columns = {"block": block, "channel": (1, weight.shape[1]), "tensor": tuple(weight.shape)}[scaling]
    codes, numbers = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    scales = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scales[i, j] = weight[place].abs().max() / LARGEST
            codes[place] = (weight[place] / scales[i, j]).to(torch.float8_e4m3fn)
            numbers[place] = codes[place].float() * scales[i, j]
    return codes, scales.reshape(1) if scaling == "tensor" else scales, numbers


def save_float8(
    model: str | Path,
    path: Path,
    scaling: Scaling = "block",
    block: tuple[int, int] = (128, 128),
    *,
    method: str = "fp8",
) -> dict[str, Tensor]:
    """Write the float32 model in ``model`` to ``path`` as float8; returns its numbers, float32."""
    shutil.copytree(model, path)
    tensors = {k: v for file in sorted(path.glob("*.safetensors")) for k, v in load_file(file).items()}
    for file in [*path.glob("*.safetensors"), *path.glob("*.index.json")]:
        file.unlink()
    suffix = "weight_scale_inv" if method == "fp8" and scaling == "block" else "weight_scale"
    numbers = dict(tensors)
    for name in matrices(tensors):
        codes, scales, numbers[name] = quantised(tensors[name], scaling, block)
        tensors |= {name: codes, name.removesuffix("weight") + suffix: scales}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    config["quantization_config"] = said(scaling, block, method)
    (path / "config.json").write_text(json.dumps(config))
    return numbers


def said(scaling: Scaling, block: tuple[int, int], method: str) -> dict[str, Any]:
    """The ``quantization_config`` that goes with it."""
    if method == "fp8":
        size = {"weight_block_size": list(block)} if scaling == "block" else {}
        return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", **size}
    weights = {"type": "float", "num_bits": 8, "symmetric": True, "strategy": scaling, "dynamic": False}
    if scaling == "block":
        weights["block_structure"] = list(block)
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
