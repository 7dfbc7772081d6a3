"""Run by SGLang's interpreter: an update through its float8 loader under our plug-in, on a model of one
matrix and one norm.  Prints what the weight checker then reports, and how far the codes are from what came.
"""

import json

import espalier_sglang
import torch
from sglang.srt.layers.quantization.fp8_utils import input_to_float8
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.utils.weight_checker import WeightChecker
from torch import nn

NAME, NORM = "model.layers.0.self_attn.o_proj.weight", "model.norm.weight"


def frozen(tensor):
    return nn.Parameter(tensor, requires_grad=False)


class Quantised(nn.Module):
    """As SGLang leaves a layer behind after its start: codes, transposed, and one scale."""

    def __init__(self, weight):
        super().__init__()
        codes, scale = input_to_float8(weight)
        self.weight, self.weight_scale = frozen(codes.t()), frozen(scale.reshape(1))

    def weight_loader(self, parameter, loaded):
        parameter.data.copy_(loaded)


def made(weight):
    model = nn.Module()
    at = model
    for name in NAME.split(".")[:-2]:
        at.add_module(name, nn.Module())
        at = getattr(at, name)
    at.add_module("o_proj", Quantised(weight))
    model.model.add_module("norm", nn.Module())
    model.model.norm.register_parameter("weight", frozen(torch.ones(6)))
    kept = {"shape": weight.shape, "stride": weight.stride(), "dtype": weight.dtype}
    model.original_weights_rebuild_keys = {NAME: kept}
    model.recorded_loader = {"weight_loader": {NAME: at.o_proj.weight_loader}}
    return model, at.o_proj


def main():
    espalier_sglang.register()
    HookRegistry.apply_hooks()
    from sglang.srt.model_loader.loader import QuantizedRLModelLoader

    old, new = torch.randn(2, 8, 6).bfloat16()
    model, layer = made(old)

    def load(weights):
        parameters = dict(model.named_parameters())
        for name, tensor in weights:
            loader = getattr(parameters[name], "weight_loader", None)
            loader(parameters[name], tensor) if loader else parameters[name].data.copy_(tensor)

    came = iter([(NAME, new), (NORM, torch.full((6,), 2.0))])
    QuantizedRLModelLoader.rebinding_and_load_weights(model, load, came)
    checker = WeightChecker.__new__(WeightChecker)
    checker._get_model = lambda: model
    ranks = ("tp", "dp", "pp")
    checker._placement = {f"{one}_rank": 0 for one in ranks} | {f"{one}_size": 1 for one in ranks}
    error = (layer.weight.t().float() * layer.weight_scale - new.float()).abs().max()
    told = checker._compute_checksum(role="target")["checksums"]
    sent = {NAME: new.float().tolist(), NORM: [2.0] * 6}
    print(json.dumps({"told": told, "sent": sent, "error": float(error)}))


if __name__ == "__main__":
    main()
