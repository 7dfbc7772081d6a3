# pyright: reportMissingImports=false, reportUnknownVariableType=false, reportUnknownMemberType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUntypedFunctionDecorator=false
"""Tree attention with FlashAttention 4; its package ``flash-attn-4`` compiles kernels at the first call.

Import it only where :func:`system.learn.attention.flash_refusal` finds nothing against it: it needs the
package and an NVIDIA GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import cutlass
import torch
from cutlass import cute
from flash_attn.cute import utils
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
from flash_attn.cute.interface import flash_attn_func


@cute.jit
def open_to(batch, head, i, j, lengths, tensors):
    # The kernels' test of one element, compiled into them: may query i attend to key j?
    end = utils.scalar_to_ssa(tensors[0][j[0]], cutlass.Int32)
    return (j <= i) & (i < end)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    exit: torch.Tensor,
    block_lists: Sequence[torch.Tensor],
    block: int,
    scale: float,
) -> torch.Tensor:
    """:func:`system.learn.attention.attend` for 16-bit tensors on GPU.

    ``exit`` ``[N]`` int32; ``block_lists``: the eight of ``BLOCK_LISTS``, for blocks of ``block`` tokens.
    """
    keys_of_queries, queries_of_keys = (
        BlockSparseTensorsTorch(*lists, block_size=(block, block))
        for lists in (block_lists[:4], block_lists[4:])
    )
    out = flash_attn_func(
        *(t.transpose(1, 2) for t in (q, k, v)),
        softmax_scale=scale,
        mask_mod=open_to,
        aux_tensors=[exit],
        block_sparse_tensors=keys_of_queries,
        block_sparse_tensors_bwd=queries_of_keys,
        # Queries of one key head in one block: slower on paths and on short trees, measured on an H100.
        pack_gqa=False,
    )
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)
