"""The map between Megatron parameters and Hugging Face tensors, at the sizes it is made for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from system.config import LearnConfig
from system.learn.model import transformer_config
from system.learn.shards import WeightMap
from system.models.shape import ModelShape

QWEN3_32B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
QWEN2_ODD: dict[str, Any] = {
    "vocab_size": 151,  # no multiple of tp: the last ranks pad it
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}


QWEN3_30B_A3B: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "mlp_only_layers": [7],
}


def weight_map(shape: dict[str, Any], tp: int, pp: int, ep: int = 1) -> WeightMap:
    model = ModelShape.from_config({"model_type": "qwen3" if "head_dim" in shape else "qwen2", **shape})
    learn = LearnConfig(tp=tp, pp=pp, ep=ep, sequence_parallel=True)
    transformer_config(model, learn, torch.bfloat16)  # the layout divides the model
    return WeightMap(model, tp, pp, ep)


@pytest.mark.parametrize(
    ("shape", "tp", "pp", "ep"),
    [
        *((QWEN3_32B, 8, 4, 1), (QWEN3_32B, 1, 1, 1)),
        *((QWEN2_ODD, 4, 2, 1), (QWEN2_ODD, 2, 4, 1), (QWEN2_ODD, 1, 1, 1)),
        *((QWEN3_30B_A3B, 4, 2, 1), (QWEN3_30B_A3B, 2, 1, 8), (QWEN3_30B_A3B, 1, 4, 16)),
    ],
)
def test_the_ranks_together_hold_every_element_once(shape: dict[str, Any], tp: int, pp: int, ep: int) -> None:
    where = weight_map(shape, tp, pp, ep)
    seen: dict[str, list[tuple[int, int, int, int]]] = {}  # name -> boxes (row, rows, column, columns)
    shapes: dict[str, tuple[int, ...]] = {}
    for mapped in where.parameters():
        assert mapped.shapes.keys().isdisjoint(shapes)
        shapes |= mapped.shapes
        for rank in where.holders(mapped):
            width = (*where.shard_shape(mapped), 1)[1]
            end = 0
            for block in where.blocks(mapped, rank):
                assert block.start == end  # the parameter's rows, one after the other
                end += block.rows
                seen.setdefault(block.name, []).append((block.row, block.rows, block.column, width))
            assert end == where.shard_shape(mapped)[0] or mapped.split == "vocabulary"  # the rest pads it
    for name, full in shapes.items():
        rows, columns = (*full, 1)[:2]
        boxes = seen[name]
        assert sum(r * c for _, r, _, c in boxes) == math.prod(full), name
        assert all(a + r <= rows and c + w <= columns for a, r, c, w in boxes), name
        assert len({(a, c) for a, _, c, _ in boxes}) == len(boxes), name


@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (2, 8)])
def test_the_pieces_of_an_export_are_the_parameters_cut_expert_by_expert(tp: int, ep: int) -> None:
    where = weight_map(QWEN3_30B_A3B, tp, 2, ep)
    pieces = list(where.pieces())
    whole = {name: size for mapped in where.parameters() for name, size in mapped.shapes.items()}
    assert {name: size for piece in pieces for name, size in piece.shapes.items()} == whole
    assert max(piece.numel for piece in pieces) == 151936 * 2048  # the embedding, no layer's experts together
    blocks = {
        (mapped.stage, mapped.key, part, block)
        for mapped in where.parameters()
        for part in where.holders(mapped)
        for block in where.blocks(mapped, part)
    }
    cut = [
        (piece.stage, piece.key, part, block)
        for piece in pieces
        for part in where.holders(piece)
        for block in where.blocks(piece, part)
    ]
    assert len(cut) == len(set(cut))
    assert set(cut) == blocks


def test_a_rank_of_a_32b_model_reads_its_share() -> None:
    where = weight_map(QWEN3_32B, tp=8, pp=4)
    total = sum(mapped.numel for mapped in where.parameters())
    assert total == 32_762_123_264  # as published
    held = [0] * 4
    for mapped in where.parameters():
        held[mapped.stage] += math.prod(where.shard_shape(mapped))
    assert max(held) < total / 32 * 1.05  # the ends of the pipeline hold the embedding and the head
