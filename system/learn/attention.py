"""Attention on packed trees: the interval mask and the core-attention module that Megatron's layers call.

In depth-first pre-order token i may attend to token j iff ``j <= i < exit[j]``, so one integer per token is
the whole mask.  On GPU it becomes a block mask, for FlexAttention or, where that serves, FlashAttention 4
(:func:`flash_refusal`).  On CPU, where FlexAttention has no backward pass, short runs of queries each attend
to the keys they can reach, gathered: about one root path per query.  Neither needs N² memory, and neither
pays for pairs in different trees or branches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from system.config import ConfigError
from system.learn.rotary import Rotary
from system.learn.sizes import BLOCK

QUERY_BLOCK = 128  # queries per run on CPU: shorter reaches fewer useless keys, longer calls fewer kernels


Gather = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class TreeMask:
    """The attention mask of one packed row of N tokens.

    ``exit`` ``[N]`` int64: one past the last token that may attend to this one.  Padding tokens are made to
    attend to themselves only, so that no softmax is empty.  Device tensors are built once and shared by all
    layers.

    Under context parallelism this rank's tokens alone ask: the mask then has n = N / cp queries and N keys.
    ``query`` ``[n]`` int64: which tokens of the row they are, ascending, on GPU in whole blocks.  ``gather``
    makes the whole row's keys and values from this rank's (:class:`system.learn.context.RowShare`).
    """

    def __init__(
        self, exit: torch.Tensor, query: torch.Tensor | None = None, gather: Gather | None = None
    ) -> None:
        own = torch.arange(exit.numel(), device=exit.device) + 1
        self.exit = torch.maximum(exit.long(), own)
        self.query, self.gather = query, gather

    @cached_property
    def exit32(self) -> torch.Tensor:
        """``exit`` in int32, as FlashAttention's kernels read it."""
        return self.exit.to(torch.int32)

    @cached_property
    def query_runs(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The mask for the CPU path: short runs of queries, each with the only keys it can reach.

        Returns the keys, run after run, as one int64 index, and of each run its ``[queries, keys]`` float32
        additive mask.
        """
        exit = self.exit
        queries = torch.arange(exit.numel(), device=exit.device) if self.query is None else self.query
        keys, biases = [], []
        for query in queries.split(QUERY_BLOCK):
            reach = torch.nonzero(exit[: int(query[-1]) + 1] > query[0])[:, 0]
            allowed = (reach[None, :] <= query[:, None]) & (query[:, None] < exit[reach][None, :])
            if self.query is not None:  # some were open between the blocks of this run only
                wanted = allowed.any(0)
                reach, allowed = reach[wanted], allowed[:, wanted]
            keys.append(reach)
            biases.append(torch.zeros(allowed.shape).masked_fill_(~allowed, float("-inf")))
        return torch.cat(keys), biases

    @cached_property
    def block_mask(self) -> BlockMask:
        """The mask for FlexAttention, derived per block from ``exit`` without an N² tensor.

        Key block k matters to query block q iff k <= q and some key of k is still open at q's first token;
        every pair of the two is allowed (no per-element test) iff k < q and all keys of k stay open to q's
        last token.
        """
        exit = self.exit
        n = exit.numel()
        blocks = -(-n // BLOCK)
        # Beyond the row: keys that are open to nobody, which makes a ragged last block partial.
        padded = torch.cat([exit, exit.new_zeros(blocks * BLOCK - n)]).view(blocks, BLOCK)
        k = torch.arange(blocks, device=exit.device)
        q = k if self.query is None else self.query[::BLOCK] // BLOCK
        touched = (k[None, :] <= q[:, None]) & (padded.amax(1)[None, :] > q[:, None] * BLOCK)
        full = (k[None, :] < q[:, None]) & (padded.amin(1)[None, :] >= (q[:, None] + 1) * BLOCK)
        partial = touched & ~full

        def ordered(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            count = mask.sum(1, dtype=torch.int32)
            index = torch.argsort(mask.to(torch.int32), dim=1, descending=True, stable=True).to(torch.int32)
            return count[None, None], index[None, None].contiguous()

        return BlockMask.from_kv_blocks(
            *ordered(partial),
            *ordered(full),
            BLOCK_SIZE=BLOCK,
            mask_mod=_open(exit, self.query),
            seq_lengths=(n if self.query is None else self.query.numel(), n),
        )

    @cached_property
    def block_lists(self) -> dict[str, torch.Tensor]:
        """The tensors of :attr:`block_mask` by the names of its constructor: a compiled function that builds
        it from them serves any number of blocks, one that is given it whole a single one.
        """
        lists = {name: getattr(self.block_mask, name) for name in BLOCK_LISTS}
        for tensor in lists.values():
            for dim in range(2, tensor.dim()):
                _varies(tensor, dim)
        return lists


# Of every query block the key blocks that are partly and wholly open to it, then the other way round.
BLOCK_LISTS = tuple(
    f"{whole}{side}_{what}"
    for side in ("kv", "q")
    for whole in ("", "full_")
    for what in ("num_blocks", "indices")
)


def _open(exit: torch.Tensor, query: torch.Tensor | None) -> Callable[..., torch.Tensor]:
    """FlexAttention's per-element test: may query i attend to key j?  ``query``: which token each i is."""

    def mask_mod(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        token = i if query is None else query[i]
        return (j <= token) & (token < exit[j])

    return mask_mod


@cache
def flash_refusal(capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> str | None:
    """Why FlashAttention 4 does not serve; None where it does.

    ``capability``: the GPU's.  The bounds are what was run, on an H100, not all that the package promises.
    """
    if capability[0] != 9:
        return f"it was proved on compute capability 9.0 (H100, H200), not {capability[0]}.{capability[1]}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in 16 bits, and the model is {dtype}".replace("torch.", "")
    if head_dim > 128 or head_dim % 8:
        return f"its blocks fit heads of up to 128 dimensions in steps of 8, not {head_dim}"
    if find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None:
        return "it is not installed: pip install 'espalier[gpu]'"
    return None


def choose_kernels(wish: str, dtype: torch.dtype, head_dim: int, cp: int = 1) -> str:
    """What ``learn.attention`` stands for in this process: "flash", or "flex" (and, without a GPU, our own).

    Raises ``ConfigError`` for a wish that cannot be met.  ``cp``: ranks that share a row; flash takes whole
    rows only.
    """
    if wish == "flash" and cp > 1:
        raise ConfigError(
            f"learn.attention=flash does not serve learn.cp={cp}; learn.attention=auto takes flex"
        )
    if wish == "flex" or (wish == "auto" and (cp > 1 or not torch.cuda.is_available())):
        return "flex"
    if not torch.cuda.is_available():
        raise ConfigError("learn.attention=flash needs an NVIDIA GPU; learn.attention=auto takes what serves")
    refusal = flash_refusal(torch.cuda.get_device_capability(), dtype, head_dim)
    if wish == "flash" and refusal:
        raise ConfigError(f"learn.attention=flash: {refusal}; learn.attention=auto takes what serves")
    return "flex" if refusal else "flash"


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: TreeMask, scale: float, kernels: str = "flex"
) -> torch.Tensor:
    """Softmax attention ``[1, heads, N, d]`` under a tree mask; k and v may have fewer heads (grouped
    queries), and q fewer tokens (``mask.query``).  On GPU, BLOCK divides both numbers of tokens, and
    ``kernels`` ("flex", or for whole rows "flash") compute it.
    """
    if q.is_cuda:
        if kernels == "flash":
            from system.learn import flash

            lists = [mask.block_lists[name] for name in BLOCK_LISTS]
            return flash.attend(q, k, v, mask.exit32, lists, BLOCK, scale)
        for tokens in (mask.exit, mask.query):
            if tokens is not None:
                _varies(tokens, 0)
        blocks = (in_blocks(t) for t in (q, k, v))
        return _compiled_flex()(*blocks, mask.exit, mask.block_lists, scale, mask.query)
    keys, biases = mask.query_runs
    queries_of, keys_of = ([bias.size(dim) for bias in biases] for dim in (0, 1))
    # One gather for all runs, so that its backward pass is one scatter.
    k, v = (t.index_select(2, keys) for t in (k, v))
    if k.size(1) != q.size(1):
        # The fused CPU kernel wants equal head counts.
        k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))
    runs = zip(q.split(queries_of, 2), k.split(keys_of, 2), v.split(keys_of, 2), biases, strict=True)
    return torch.cat(
        [
            F.scaled_dot_product_attention(qb, kb, vb, attn_mask=bias.to(qb.dtype), scale=scale)
            for qb, kb, vb, bias in runs
        ],
        dim=2,
    )


def in_blocks(x: torch.Tensor) -> torch.Tensor:
    """``[1, heads, N, d]`` to ``[1, heads, N / BLOCK, BLOCK, d]``, whose number of blocks alone varies."""
    x = x.unflatten(2, (-1, BLOCK))
    _varies(x, 2)
    return x


def _varies(x: torch.Tensor, dim: int) -> None:
    """Tell the compiler that dimension ``dim`` differs from call to call."""
    import torch._dynamo as dynamo  # two seconds' import, needed on a GPU only

    dynamo.maybe_mark_dynamic(x, dim)


def flex_attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    exit: torch.Tensor,
    block_lists: dict[str, torch.Tensor],
    scale: float,
    query: torch.Tensor | None = None,
) -> torch.Tensor:
    """The GPU branch of :func:`attend`, before compilation.  q, k and v come in blocks."""
    q, k, v = (t.flatten(2, 3) for t in (q, k, v))
    given: dict[str, Any] = {**block_lists, "BLOCK_SIZE": (BLOCK, BLOCK), "mask_mod": _open(exit, query)}
    mask = BlockMask((q.size(2), k.size(2)), **given)
    out = flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=k.size(1) != q.size(1))
    assert isinstance(out, torch.Tensor)
    return out


@cache
def _compiled_flex() -> Any:
    """``flex_attend`` compiled once per process for rows of any length.

    The length is a number of blocks times BLOCK, which the compiler sees, so that the kernel tests no bounds.
    """
    return torch.compile(flex_attend, dynamic=False, fullgraph=True)


class RowContext(NamedTuple):
    """What attention knows of a packed row besides queries, keys and values."""

    mask: TreeMask
    rotary: Rotary


class TreeAttention(torch.nn.Module):
    """Megatron core-attention module (the constructor protocol of ``DotProductAttention``, megatron-core
    0.16); it also rotates queries and keys.

    The row's context travels as ``attention_bias``: Megatron hands it down by closure, unchanged, so it
    survives full activation recomputation without being a tensor.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        kernels: str = "flex",
        **_: Any,
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: RowContext | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """``[N, 1, heads, d]`` (Megatron's sequence-first layout) to ``[N, 1, heads·d]``; the tokens are the
        row's, or this rank's share of them.
        """
        assert attention_bias is not None, "a packed row always comes with its context"
        mask, rotary = attention_bias
        query, key = rotary(query), rotary(key)
        if mask.gather is not None:
            key, value = mask.gather(key, value)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = attend(q, k, v, mask, self.scale, self.kernels)
        return out.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)
