"""What the plan says that experts keep for the backward pass is what autograd keeps."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from learner_ranks import Place, Ranks
from learner_reference import learner_config

from system.config import LoraConfig
from system.models.adapter import adapter_of
from system.models.known import KNOWN
from system.models.shape import ModelShape
from system.plan import memory

TOKENS = 1024


def small() -> ModelShape:
    """A layer of Qwen3-30B-A3B, an eighth as wide."""
    big = KNOWN["qwen3-30b-a3b"]
    assert big.experts is not None
    experts = replace(big.experts, layers=1, ffn=big.experts.ffn // 8)
    return replace(big, layers=1, vocab=512, hidden=big.hidden // 8, ffn=big.ffn // 8, experts=experts)


def kept_case(place: Place, lora: LoraConfig) -> float:
    """Bytes per token that the experts' layer keeps, but for its input, which its norm's output is."""
    from system.learn import parallel
    from system.learn.model import build, transformer_config

    config, shape = learner_config(lora=lora), small()
    layout = parallel.start(config, rank=place.rank, world=place.world, init_method=place.init_method)
    try:
        model = build(
            shape, transformer_config(shape, config.learn, torch.bfloat16), "auto", adapter_of(lora, shape)
        )
        (layer,) = (module for name, module in model.named_modules() if name == "decoder.layers.0.mlp")
        given = torch.randn(TOKENS, 1, shape.hidden, dtype=torch.bfloat16, device=layout.device)
        given.requires_grad_()
        known = {tensor.untyped_storage().data_ptr() for tensor in (given, *model.parameters())}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(given)
        return sum(kept.values()) / TOKENS
    finally:
        parallel.stop()


@pytest.mark.parametrize("rank", [0, 8], ids=["trained", "frozen beside adapters"])
def test_the_plan_of_experts_is_what_autograd_keeps(ranks: Ranks, rank: int) -> None:
    lora = LoraConfig(rank=rank)
    (kept,) = ranks.run(kept_case, world=1, lora=lora)
    with patch.object(memory, "UNEVEN", 1.0):  # one rank has them all
        planned = memory.mlp_bytes_per_token(small(), learner_config(lora=lora).learn)
    assert planned == pytest.approx(kept, rel=0.03)
