"""What ``espalier bench gpu`` measures with: one rank's share of a large model, and rows of trees for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import Qwen3Config

from system.tree.record import path_sum
from system.tree.stats import TreeStats


@dataclass(frozen=True, slots=True)
class Scale:
    """What a probe measures with: one rank's share of a model, and a packed row of ``tokens``."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tokens: int
    leaves: int  # of a tree that fills the row
    matmul: int  # edge of the square matrix product
    copy_mb: int
    repeats: int


LARGE = Scale(5120, 20, 10, 2, 128, 4352, 37_984, 18_432, 16, 8192, 1024, 10)
TOY = Scale(64, 2, 4, 2, 16, 128, 256, 256, 4, 128, 1, 2)


def qwen3(scale: Scale) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=scale.vocab,
        hidden_size=scale.hidden,
        intermediate_size=scale.ffn,
        num_hidden_layers=scale.layers,
        num_attention_heads=scale.heads,
        num_key_value_heads=scale.kv_heads,
        head_dim=scale.head_dim,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def attended_pairs(stats: TreeStats) -> int:
    """Pairs of tokens that may attend: each token to itself and to all before it on its root path."""
    n = stats.length
    before = path_sum(stats.parent, n) - n
    return int((n * before + n * (n + 1) // 2).sum())


def even_mask(n: int, trees: int, leaves: int) -> torch.Tensor:
    """``exit`` ``[n]`` of ``trees`` equal trees, half of each shared by its ``leaves``."""
    size = n // trees
    shared = size // 2
    exit = torch.empty(n, dtype=torch.int64)
    for tree in range(trees):
        first, end = tree * size, n if tree == trees - 1 else (tree + 1) * size
        exit[first : first + shared] = end
        each = (end - first - shared) // leaves
        for leaf in range(leaves):
            a = first + shared + leaf * each
            b = end if leaf == leaves - 1 else a + each
            exit[a:b] = b
    return exit


def random_heads(scale: Scale, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    def one(heads: int) -> torch.Tensor:
        shape = (1, heads, scale.tokens, scale.head_dim)
        return torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)

    return one(scale.heads), one(scale.kv_heads), one(scale.kv_heads)
