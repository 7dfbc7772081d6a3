"""Context parallelism without processes: how a row is dealt, and attention for one rank's tokens of it.

That it changes no step is tested with ranks, in test_learner_layouts.py and test_learner_equality.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_reference import CHAIN, SHAPE, STAR, make_tree, pack_whole
from test_tree_attention import ancestors, by_definition, qkv
from torch._dynamo import maybe_mark_dynamic
from torch._dynamo.testing import CompileCounterWithBackend

from system.config import ConfigError, LearnConfig, load
from system.learn import attention
from system.learn.attention import TreeMask, attend, choose_kernels, flex_attend, in_blocks
from system.learn.context import Context, RowShare, attended_blocks, deal
from system.tree.pack import PackedBatch


@st.composite
def rows(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    """The mask of a row of random trees and padding, the ranks, and the tokens of a block."""
    ranks, block = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 4, 16]))
    exit: list[int] = []

    def grow(depth: int) -> None:
        """A node and what is below it, in pre-order."""
        first = len(exit)
        length = draw(st.integers(1, 20))
        exit.extend([0] * length)
        for _ in range(draw(st.integers(0, 3 if depth < 3 else 0))):
            grow(depth + 1)
        exit[first : first + length] = [len(exit)] * length

    for _ in range(draw(st.integers(1, 3))):
        grow(0)
    size = -(-len(exit) // (ranks * block)) * ranks * block
    return np.array([*exit, *range(len(exit) + 1, size + 1)]), ranks, block


def attended_by_definition(exit: np.ndarray, block: int) -> np.ndarray:
    """[N / block] key blocks with a key that some query of the block attends to, pair by pair."""
    index = np.arange(len(exit))
    seen = (index[None, :] <= index[:, None]) & (index[:, None] < exit[None, :])
    return seen.reshape(len(exit) // block, block, -1, block).any((1, 3)).sum(1)


@settings(deadline=None, max_examples=200)
@given(rows())
def test_every_block_is_dealt_once_and_attention_is_balanced(row: tuple[np.ndarray, int, int]) -> None:
    exit, ranks, block = row
    owner, cost = deal(exit, ranks, block), attended_blocks(exit, block)
    np.testing.assert_array_equal(cost, attended_by_definition(exit, block))
    assert owner.shape == cost.shape
    assert np.bincount(owner, minlength=ranks).tolist() == [len(owner) // ranks] * ranks
    load = np.bincount(owner, weights=cost, minlength=ranks)
    assert load.max() - load.min() <= cost.max() - cost.min()


def share_of(rank: int, batch: PackedBatch, predictor: np.ndarray, ranks: int, block: int) -> RowShare:
    context = Context(ranks, rank, cast(dist.ProcessGroup, None), block)
    return RowShare(context, batch.exit, predictor, torch.device("cpu"))


def test_the_shares_are_the_row() -> None:
    """Each token is one rank's, and each scored token is scored where its predictor is."""
    rng = np.random.default_rng(0)
    batch = pack_whole([make_tree(SHAPE, rng) for _ in range(4)], pad_to=48)
    predictor = batch.predictor[batch.predictor >= 0]
    shares = [share_of(rank, batch, predictor, 3, 16) for rank in range(3)]
    assert sorted(np.concatenate([share.index for share in shares])) == list(range(batch.tokens.size))
    assert sorted(np.concatenate([share.scored for share in shares])) == list(range(len(predictor)))
    for share in shares:
        assert (np.diff(share.index) > 0).all()
        np.testing.assert_array_equal(share.index[share.predictor], predictor[share.scored])


@pytest.mark.parametrize(("kernels", "block"), [("cpu", 16), ("flex", attention.BLOCK)])
def test_a_shares_queries_attend_as_in_the_whole_row(kernels: str, block: int) -> None:
    """On CPU, and in FlexAttention's forward pass with the mask that GPUs use (all it has here)."""
    rng = np.random.default_rng(1)
    shapes = (SHAPE, CHAIN, STAR) * 8
    batch = pack_whole([make_tree(shape, rng) for shape in shapes], pad_to=2 * block)
    q, k, v = qkv(batch.tokens.size)
    expected = by_definition(q, k, v, ancestors(batch))
    for rank in range(2):
        share = share_of(rank, batch, np.zeros(0, np.int64), 2, block)
        index = torch.from_numpy(share.index)
        mask = TreeMask(torch.from_numpy(batch.exit), index)
        if kernels == "cpu":
            out = attend(q[:, :, index], k, v, mask, 0.25)
            weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
            for mine, theirs in zip(
                torch.autograd.grad((out * weight).sum(), (q, k, v)),
                torch.autograd.grad((expected[:, :, index] * weight).sum(), (q, k, v), retain_graph=True),
                strict=True,
            ):
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-5)
        else:
            queries, keys, values = (in_blocks(t.detach()) for t in (q[:, :, index], k, v))
            out = flex_attend(queries, keys, values, mask.exit, mask.block_lists, 0.25, mask.query)
        torch.testing.assert_close(out, expected[:, :, index], rtol=1e-5, atol=1e-5)


def test_one_compilation_serves_every_share() -> None:
    """Of rows of any length, traced without a break; the kernels themselves need a GPU."""
    count = CompileCounterWithBackend("eager")
    compiled = torch.compile(flex_attend, dynamic=False, fullgraph=True, backend=count)
    for repeats in (4, 8, 11):
        rng = np.random.default_rng(3)
        shapes = (SHAPE, CHAIN, STAR) * repeats
        batch = pack_whole([make_tree(shape, rng) for shape in shapes], pad_to=2 * attention.BLOCK)
        q, k, v = (t.detach() for t in qkv(batch.tokens.size))
        index = torch.from_numpy(share_of(1, batch, np.zeros(0, np.int64), 2, attention.BLOCK).index)
        mask = TreeMask(torch.from_numpy(batch.exit), index)
        for tokens in (mask.exit, index):
            maybe_mark_dynamic(tokens, 0)
        queries, keys, values = (in_blocks(t) for t in (q[:, :, index], k, v))
        out = compiled(queries, keys, values, mask.exit, mask.block_lists, 0.25, mask.query)
        expected = by_definition(q, k, v, ancestors(batch))[:, :, index]
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert count.frame_count == 1


def test_a_shares_runs_have_no_key_that_none_of_its_queries_reaches() -> None:
    """A run of queries on CPU spans blocks of others, whose keys are not gathered for it."""
    rng = np.random.default_rng(2)
    batch = pack_whole([make_tree(CHAIN, rng) for _ in range(32)], pad_to=64)
    for rank in range(4):
        index = torch.from_numpy(share_of(rank, batch, np.zeros(0, np.int64), 4, 16).index)
        keys, biases = TreeMask(torch.from_numpy(batch.exit), index).query_runs
        assert sum(bias.size(1) for bias in biases) == keys.numel()
        assert all(bool((bias == 0).any(0).all()) for bias in biases)


def test_where_it_does_not_serve() -> None:
    layout = cast(Any, SimpleNamespace(device=torch.device("cpu"), cp_rank=1, cp_group=None))
    assert Context.of(layout, LearnConfig(cp=1, micro_tokens=1)) is None
    with pytest.raises(ConfigError, match=r"learn.micro_tokens=63 .* of learn.cp=4 .* raise it to 64"):
        Context.of(layout, LearnConfig(cp=4, micro_tokens=63))
    found = Context.of(layout, LearnConfig(cp=4, tp=3, sequence_parallel=True, micro_tokens=4096))
    assert found is not None
    assert (found.block, found.padding) == (48, 192)
    with pytest.raises(ConfigError, match=r"learn.attention=flash attends to whole rows, and learn.cp=2 "):
        load(None, ["learn.cp=2", "learn.attention=flash"])
    with pytest.raises(ConfigError, match=r"learn.attention=flash does not serve learn.cp=2"):
        choose_kernels("flash", torch.bfloat16, 128, cp=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("repeats", [4, 8])
def test_a_shares_queries_on_cuda(repeats: int) -> None:
    """FlexAttention compiled, forward and backward, in bfloat16 against the definition in float32."""
    rng = np.random.default_rng(3)
    shapes = (SHAPE, CHAIN, STAR) * repeats
    batch = pack_whole([make_tree(shape, rng) for shape in shapes], pad_to=2 * attention.BLOCK)
    rounded = [t.detach().bfloat16() for t in qkv(batch.tokens.size, d=64)]
    weight = torch.randn(1, 4, batch.tokens.size, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    for rank in range(2):
        share = share_of(rank, batch, np.zeros(0, np.int64), 2, attention.BLOCK)
        index = torch.from_numpy(share.index)
        mask = TreeMask(torch.from_numpy(batch.exit).cuda(), index.cuda())
        mine = [t.cuda().requires_grad_() for t in rounded]
        reference = [t.float().requires_grad_() for t in rounded]
        out = attend(mine[0][:, :, index.cuda()], mine[1], mine[2], mask, 0.25)
        expected = by_definition(reference[0], reference[1], reference[2], ancestors(batch))[:, :, index]
        (out * weight[:, :, index].cuda()).sum().backward()
        (expected * weight[:, :, index].float()).sum().backward()
        torch.testing.assert_close(out.float().cpu(), expected, rtol=2e-2, atol=2e-2)
        for a, b in zip(mine, reference, strict=True):
            assert a.grad is not None
            assert b.grad is not None
            assert (a.grad.float().cpu() - b.grad).norm() / b.grad.norm() < 1e-2
