"""The interval mask in its three forms, and attention under it, against the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from learner_reference import CHAIN, SHAPE, STAR, make_tree, pack_whole
from torch.nn.attention.flex_attention import BlockMask

from system.config import ConfigError
from system.learn import attention
from system.learn.attention import TreeMask, attend, choose_kernels, flash_refusal, flex_attend, in_blocks
from system.tree.pack import PackedBatch


def packed(seed: int, repeats: int = 6, pad_to: int = 1) -> PackedBatch:
    rng = np.random.default_rng(seed)
    trees = [make_tree(shape, rng) for shape in (SHAPE, CHAIN, STAR) for _ in range(repeats)]
    return pack_whole(trees, pad_to)


def ancestors(batch: PackedBatch) -> np.ndarray:
    """[N, N] bool by walking predictors up: the paths' own definition of what a token may see."""
    n = batch.tokens.size
    seen = np.eye(n, dtype=bool)
    for i in range(n):
        if batch.predictor[i] >= 0:
            seen[i] |= seen[batch.predictor[i]]
    return seen


def dense(exit: torch.Tensor) -> torch.Tensor:
    """[N, N] bool: may query (row) attend to key (column)?  The definition of the interval mask."""
    index = torch.arange(exit.numel())
    return (index[None, :] <= index[:, None]) & (index[:, None] < exit[None, :])


def qkv(n: int, heads: int = 4, kv_heads: int = 2, d: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, h, n, d, generator=generator, requires_grad=True) for h in (heads, kv_heads, kv_heads)
    ]


def by_definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: np.ndarray) -> torch.Tensor:
    k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.from_numpy(seen), scale=0.25)


def test_the_mask_is_ancestry() -> None:
    batch = packed(0, pad_to=50)
    assert batch.tokens.size > (batch.tree >= 0).sum()  # there is padding
    mask = TreeMask(torch.from_numpy(batch.exit))
    np.testing.assert_array_equal(dense(mask.exit).numpy(), ancestors(batch))


@pytest.mark.parametrize("run", [1, 16, 128, 4096])
def test_cpu_attention_and_its_gradient(monkeypatch: pytest.MonkeyPatch, run: int) -> None:
    monkeypatch.setattr(attention, "QUERY_BLOCK", run)
    batch = packed(1, pad_to=50)
    mask = TreeMask(torch.from_numpy(batch.exit))
    mine, reference = qkv(batch.tokens.size), qkv(batch.tokens.size)
    weight = torch.randn(1, 4, batch.tokens.size, 16, generator=torch.Generator().manual_seed(1))
    out = attend(*mine, mask, 0.25)
    expected = by_definition(*reference, ancestors(batch))
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(mine, reference, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=2e-5)


def test_queries_reach_few_keys() -> None:
    """The point of the runs: cost follows root paths, not the row."""
    batch = packed(2, repeats=12)
    reached = TreeMask(torch.from_numpy(batch.exit)).query_runs[0].numel()
    runs = -(-batch.tokens.size // attention.QUERY_BLOCK)
    longest_path = int(batch.position.max()) + 1
    assert reached <= runs * (attention.QUERY_BLOCK + 3 * longest_path)
    assert reached < runs * batch.tokens.size / 4


def test_flex_attention_equals_the_definition() -> None:
    """FlexAttention's forward pass (all it has on CPU) with the mask that GPUs use."""
    batch = packed(3, pad_to=attention.BLOCK)
    q, k, v = (t.detach() for t in qkv(batch.tokens.size))
    mask = TreeMask(torch.from_numpy(batch.exit))
    blocks = (in_blocks(t) for t in (q, k, v))
    out = flex_attend(*blocks, mask.exit, mask.block_lists, 0.25)
    torch.testing.assert_close(out, by_definition(q, k, v, ancestors(batch)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pad_to", [1, 128])
def test_block_mask_names_exactly_the_needed_blocks(pad_to: int) -> None:
    """Compiled FlexAttention skips blocks that are not listed and tests no element of a full block."""
    batch = packed(4, repeats=14, pad_to=pad_to)
    n, size = batch.tokens.size, attention.BLOCK
    block_mask = TreeMask(torch.from_numpy(batch.exit)).block_mask
    count = -(-n // size)
    seen = np.zeros((count * size, count * size), bool)
    seen[:n, :n] = ancestors(batch)
    tiles = seen.reshape(count, size, count, size).transpose(0, 2, 1, 3)
    assert isinstance(block_mask, BlockMask)
    full_counts, full_indices = block_mask.full_kv_num_blocks, block_mask.full_kv_indices
    assert full_counts is not None
    assert full_indices is not None
    n_full = 0
    for i in range(count):
        partial = set(block_mask.kv_indices[0, 0, i, : block_mask.kv_num_blocks[0, 0, i]].tolist())
        full = set(full_indices[0, 0, i, : full_counts[0, 0, i]].tolist())
        assert not partial & full
        assert {j for j in range(count) if tiles[i, j].all()} == full
        assert {j for j in range(count) if tiles[i, j].any()} <= partial | full
        assert all(j <= i for j in partial)
        n_full += len(full)
    assert block_mask.shape[-2:] == (n, n)


def test_a_long_shared_prefix_gives_full_blocks() -> None:
    from system.tree.record import Kind

    prompt = (Kind.PROMPT, 300, False, [(Kind.MODEL, 100, True, []) for _ in range(4)])
    tree = make_tree(prompt, np.random.default_rng(0))
    batch = pack_whole([tree], 128)
    block_mask = TreeMask(torch.from_numpy(batch.exit)).block_mask
    assert block_mask.full_kv_num_blocks is not None
    # 768 tokens in 6 blocks; blocks 0 and 1 of the prompt are open to all later queries but the padded ones.
    assert block_mask.full_kv_num_blocks[0, 0].tolist() == [0, 1, 2, 2, 2, 0]


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "reason"),
    [
        ((8, 0), torch.bfloat16, 128, "compute capability"),
        ((9, 0), torch.float32, 128, "16 bits"),
        ((9, 0), torch.bfloat16, 256, "128 dimensions"),
        ((9, 0), torch.bfloat16, 36, "steps of 8"),
    ],
)
def test_where_flash_attention_does_not_serve(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, reason: str
) -> None:
    refusal = flash_refusal(capability, dtype, head_dim)
    assert refusal is not None
    assert reason in refusal


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_kernels_without_a_gpu() -> None:
    assert choose_kernels("auto", torch.bfloat16, 128) == choose_kernels("flex", torch.float32, 16) == "flex"
    with pytest.raises(ConfigError, match="flash needs an NVIDIA GPU"):
        choose_kernels("flash", torch.bfloat16, 128)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("kernels", ["flex", "flash"])
def test_kernels_on_cuda_equal_the_definition(kernels: str, head_dim: int) -> None:
    """In bfloat16, against the definition in float32 of the same rounded numbers."""
    refusal = flash_refusal(torch.cuda.get_device_capability(), torch.bfloat16, head_dim)
    if kernels == "flash" and refusal:
        pytest.skip(refusal)
    batch = packed(5, repeats=8, pad_to=attention.BLOCK)
    mask = TreeMask(torch.from_numpy(batch.exit).cuda())
    rounded = [t.detach().bfloat16() for t in qkv(batch.tokens.size, d=head_dim)]
    mine = [t.cuda().requires_grad_() for t in rounded]
    reference = [t.float().requires_grad_() for t in rounded]
    weight = torch.randn(1, 4, batch.tokens.size, head_dim, generator=torch.Generator().manual_seed(1))
    out = attend(*mine, mask, 0.25, kernels)
    expected = by_definition(*reference, ancestors(batch))
    (out * weight.bfloat16().cuda()).sum().backward()
    (expected * weight.bfloat16().float()).sum().backward()
    torch.testing.assert_close(out.float().cpu(), expected, rtol=2e-2, atol=2e-2)
    for a, b in zip(mine, reference, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        distance = (a.grad.float().cpu() - b.grad).norm() / b.grad.norm()
        assert distance < 1e-2
